"""The census over its sample of model families, against what is expected of the matcher."""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bench.census_page import missed_inside

pytest.importorskip("transformers")

WRONG = 0
FAILED = 0
MISSED_CALLS = 0
"""Calls of F.scaled_dot_product_attention and fused modules without a site."""
MISSED_HAND_WRITTEN = 0.02
"""Share of the hand-written attentions that may lack a site."""
EXTRA = 2
"""Sites where the oracle sees no attention: groupvit assigns patches to groups by a softmax over the groups (kept)."""
BUILT = 75
"""Families of the sample that must build; a new transformers may break some."""
SECONDS = 1800
Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    faulthandler.cancel_dump_traceback_later()  # pytest's, after 300 s: this takes longer, and has its own limit
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all processes of this run: one makes the census, the others wait for it
    out, part = folder / "census.json", folder / "census.part"
    with FileLock(folder / "census.lock"):
        if not out.exists():
            # A process of its own: the census forks, which a process that has used torch's threads should not.
            command = [sys.executable, "-m", "bench.census", "--sample", "--fresh", "--jobs", "2", "--out", str(part)]
            root = Path(__file__).parent.parent
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=SECONDS)
            assert done.returncode == 0, done.stderr[-2000:]
            part.rename(out)
    found: list[Row] = json.loads(out.read_text())["rows"]
    return [row for row in found if "unbuilt" not in row]


def test_enough_families(rows: list[Row]) -> None:
    assert len({row["family"] for row in rows}) >= BUILT


def test_nothing_is_wrong(rows: list[Row]) -> None:
    wrong = [(row["family"], row["implementation"], row["error"]) for row in rows if row.get("wrong")]
    assert len(wrong) <= WRONG, wrong


def test_everything_compiles(rows: list[Row]) -> None:
    failed = [(row["family"], row["implementation"], row["failed"][:300]) for row in rows if "failed" in row]
    assert len(failed) <= FAILED, failed


def test_every_call_is_found(rows: list[Row]) -> None:
    missed = [(row["family"], row["missed"]) for row in rows if _missed(row, "sdpa", "fused")]
    assert sum(_missed(row, "sdpa", "fused") for row in rows) <= MISSED_CALLS, missed


def test_nothing_else_is_found(rows: list[Row]) -> None:
    extra = [(row["family"], row["implementation"], row["extra"]) for row in rows if row.get("extra")]
    assert sum(n for _, _, n in extra) <= EXTRA, extra


def test_every_site_has_a_line_of_the_source(rows: list[Row]) -> None:
    without = [(row["family"], row["implementation"], row["without_line"]) for row in rows if row.get("without_line")]
    assert not without and any(row.get("found") for row in rows)


def test_hand_written_attention_is_found(rows: list[Row]) -> None:
    ran = sum(row.get("ran", {}).get("hand", 0) for row in rows)
    places = Counter({place: n for row in rows if _missed(row, "hand") for place, n in row["missed_at"].items()})
    missed = sum(_missed(row, "hand") for row in rows)
    assert missed <= MISSED_HAND_WRITTEN * ran, f"{missed} of {ran}: {places.most_common(20)}"


def _missed(row: Row, *kinds: str) -> int:
    found = missed_inside(row)
    return sum(found.get(kind, 0) for kind in kinds)
