"""What Triton compiled for a GPU, run: the tests of ``interpreted/``, each kernel by the machine of ``bench/ptx``.

A few each time; all of them, in half an hour a target, with ``-m slow``. To run one file by hand:
``PRESCORE_COMPILED=sm_90 pytest tests/interpreted/test_attend.py``.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 5400
ALL = ("attend", "clusters", "defaults", "logits", "random", "residual", "route", "rows", "scores", "segments", "union")
"""Files of ``interpreted/``; the others are of the interpreter, or of no kernel."""
FEW = {
    "sm_80": (
        "attend.py::test_forward[keep and routes-True-False]",
        "attend.py::test_backward[residual-False]",
        "route.py::test_words_of_many_clusters[0.003]",
        "scores.py::test_leverage_of_features_in_parts[80]",
        "rows.py",
    ),
    "sm_90": (
        "attend.py::test_forward[routes-True-False]",
        "attend.py::test_backward[keep and routes-True]",
        "clusters.py::test_low_precision_and_strides[dtype0]",
        "route.py::test_words_of_many_clusters[0.0]",
        "scores.py::test_scores_are_the_references[kmeans-True]",
        "segments.py::test_centroids_are_those_stated[holes-dtype2]",
        "union.py::test_numbers_sorted_on_chip",
    ),
}


def run(target: str, *what: str) -> None:
    pytest.importorskip("triton")
    faulthandler.cancel_dump_traceback_later()  # pytest's, after 300 s: this may take longer, and has its own limit
    command = [sys.executable, "-m", "pytest", "-q", "-x", *(f"tests/interpreted/test_{each}" for each in what)]
    env = os.environ | {"PRESCORE_COMPILED": target}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("target", FEW)
def test_a_few_kernels(target: str) -> None:
    run(target, *FEW[target])


@pytest.mark.slow
@pytest.mark.parametrize("target", FEW)
@pytest.mark.parametrize("name", ALL)
def test_all_kernels(name: str, target: str) -> None:
    run(target, f"{name}.py")
