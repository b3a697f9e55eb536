"""Results on disk, cell by cell, so that a run goes on where it stopped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


class Store:
    """A JSON list of cells; a cell is found again by its ``key`` (a dict of plain values)."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        old = json.loads(path.read_text()) if path.is_file() else {}
        self.cells: list[dict[str, Any]] = old.get("cells", [])
        self.about = about
        self.begin = time.perf_counter()

    def find(self, **key: Any) -> dict[str, Any] | None:
        for cell in self.cells:
            if all(cell.get(name) == value for name, value in ({"draw": None} | key).items()):
                return cell
        return None

    def measure(self, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell of ``key``: the stored one, or what ``run`` gives, stored at once."""
        found = self.find(**key)
        if found is not None:
            return found
        begin = time.perf_counter()
        values = run()
        cell = key | {n: round(v, 6) if isinstance(v, float) else v for n, v in values.items()}
        self.cells.append(cell)
        scratch = self.path.with_suffix(".tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join("  " + json.dumps(c) for c in self.cells)
        scratch.write_text('{"about": ' + json.dumps(self.about) + ', "cells": [\n' + rows + "\n]}\n")
        scratch.replace(self.path)
        now = time.perf_counter()
        told = "  ".join(f"{n}={v:.4g}" if isinstance(v, float) else f"{n}={v}" for n, v in cell.items())
        print(f"[{now - self.begin:6.0f} s] {now - begin:5.1f} s  {told}", file=sys.stderr, flush=True)
        return cell
