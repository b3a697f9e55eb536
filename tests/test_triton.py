"""Runs each file of ``interpreted/`` in a process of its own, where Triton interprets its kernels on CPU tensors.

Triton reads ``TRITON_INTERPRET`` when it is imported, and what it then does to ``triton.jit`` would
change the other tests. To run one file by hand: ``TRITON_INTERPRET=1 pytest tests/interpreted/test_attend.py``.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 1800
FILES = sorted(path.name for path in (ROOT / "tests" / "interpreted").glob("test_*.py"))


def interpret(*what: str) -> None:
    pytest.importorskip("triton")
    faulthandler.cancel_dump_traceback_later()  # pytest's, after 300 s: this may take longer, and has its own limit
    command = [sys.executable, "-m", "pytest", "-q", "-x", *what]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str) -> None:
    interpret(f"tests/interpreted/{file}")


@pytest.mark.slow
def test_interpreted_slow_ones() -> None:
    interpret("-m", "slow", "tests/interpreted/test_random.py")
