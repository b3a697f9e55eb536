"""Which attentions of which model families run, are found, are rewritten, and are right.

    python -m bench.census --jobs 2             # every family; restartable; bench/results/census.json
    python -m bench.census_page                 # docs/census.md from that
    python -m bench.census --sample             # the families of sample.py, with gradients, some minutes
    python -m bench.census --only "t5*" --fresh # some families, again; "*/sdpa" is one implementation of all

Each family is built tiny, with each implementation of attention that it has, in a process of its own.
The oracle counts the attentions that run; the backend rewrites every site it finds with the plan that
keeps everything; outputs must equal the eager model's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from . import families
from .measure import Row, measure
from .sample import SAMPLE

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parent.parent / "build" / "census"
"""Rows as they are made: a run that was stopped goes on from them."""
TIMEOUT = 600
WARM = ("llama", "eager")
"""What is compiled before the first fork."""
_UNSUPPORTED = "does not support an attention implementation"
Task = tuple[str, str]


def tasks(only: str = "*", sample: bool = False) -> list[Task]:
    every = [(n, i) for n in (SAMPLE if sample else families.names()) for i in families.implementations(n)]
    return [(n, i) for n, i in every if fnmatchcase(n, only) or fnmatchcase(f"{n}/{i}", only)]


def _work(task: Task, gradients: bool, pipe: Any) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)  # warnings of hundreds of models
    pipe.send(measure(*task, gradients))
    pipe.close()
    os._exit(0)  # no exit handlers of the parent


def run(todo: list[Task], jobs: int, gradients: bool) -> Iterator[Row]:
    """A row per task, as they finish. Processes are forked: imports, and what Dynamo sets up, are paid once."""
    torch.set_num_threads(1)  # what has used threads should not fork
    measure(*WARM, gradients)
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(todo)), []
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(task, gradients, theirs), daemon=True)
            process.start()
            theirs.close()
            running.append((task, process, ours, time.monotonic()))
        time.sleep(0.02)
        for job in list(running):
            row = _finished(*job)
            if row is not None:
                running.remove(job)
                yield row


def _finished(task: Task, process: Any, pipe: Any, start: float) -> Row | None:
    row: Row = {"family": task[0], "implementation": task[1]}
    seconds = time.monotonic() - start
    if pipe.poll():
        try:
            row = pipe.recv()
        except EOFError:
            row |= {"failed": "the process died", "seconds": round(seconds, 1)}
    elif not process.is_alive():
        row |= {"failed": "the process died", "seconds": round(seconds, 1)}
    elif seconds > TIMEOUT:
        process.kill()
        row |= {"failed": f"took more than {TIMEOUT} s", "seconds": round(seconds, 1)}
    else:
        return None
    process.join(5)
    return row


def table(rows: list[Row]) -> str:
    """Built rows and totals."""
    built = [row for row in rows if "unbuilt" not in row]
    body = [_line(row) for row in built]
    text = str(tabulate(body, headers="keys", disable_numparse=True))
    return text + "\n\n" + "\n".join(f"{name}: {value}" for name, value in totals(rows).items())


def _line(row: Row) -> dict[str, Any]:
    return {
        "family": row["family"],
        "impl": row["implementation"],
        "ran": _counts(row.get("ran", {})),
        "found": row.get("found", "-"),
        "rewritten": row.get("rewritten", "-"),
        "kept": _counts(row.get("kept", {})),
        "missed": _counts(row.get("missed", {})),
        "extra": row.get("extra") or "",
        "outside": row.get("outside") or "",
        "result": _result(row),
    }


def _result(row: Row) -> str:
    for word in ("failed", "uncompiled"):
        if word in row:
            return f"{word}: {row[word].splitlines()[0][:60]}"
    if row.get("wrong") or row.get("unsteady"):
        return "WRONG" if row.get("wrong") else "unsteady"
    return f"{row['error']:.0e}" + (" (rounding)" if "sensitivity" in row else "")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in counts.items()) or "-"


def totals(rows: list[Row]) -> dict[str, Any]:
    built = [row for row in rows if "unbuilt" not in row]
    compiled = [row for row in built if "found" in row]

    def add(key: str) -> dict[str, int]:
        total: Counter[str] = Counter()
        for row in compiled:
            total.update(row.get(key) or {})
        return dict(total.most_common())

    return {
        "families built": {
            i: len({r["family"] for r in built if r["implementation"] == i}) for i in families.IMPLEMENTATIONS
        },
        "without that implementation": sum(_UNSUPPORTED in row.get("unbuilt", "") for row in rows),
        "not built": sum("unbuilt" in row and _UNSUPPORTED not in row["unbuilt"] for row in rows),
        "not compiled by Dynamo": sum("uncompiled" in row for row in built),
        "failed": sum("failed" in row for row in built),
        "wrong": sum(bool(row.get("wrong")) for row in built),
        "rounding alone is above the tolerance": sum("sensitivity" in row and not row.get("wrong") for row in built),
        "unsteady": sum(bool(row.get("unsteady")) for row in built),
        "ran": add("ran"),
        "found": sum(row["found"] for row in compiled),
        "rewritten": sum(row["rewritten"] for row in compiled),
        "kept": add("kept"),
        "missed": add("missed"),
        "of these outside graphs": sum(row.get("outside", 0) for row in compiled),
        "sites where none ran": sum(row["extra"] for row in compiled),
        "lookalikes": sum(sum(row["lookalikes"].values()) for row in compiled),
    }


def _cached(path: Path) -> dict[Task, Row]:
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["family"], row["implementation"]): row for row in rows}


def census(todo: list[Task], jobs: int, gradients: bool = False, cache: Path | None = None) -> list[Row]:
    """A row for every task, in order; from the cache where it has them."""
    rows = _cached(cache) if cache else {}
    missing = [task for task in todo if task not in rows]
    for done, row in enumerate(run(missing, jobs, gradients), 1):
        rows[row["family"], row["implementation"]] = row
        if cache:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with cache.open("a") as file:
                file.write(json.dumps(row) + "\n")
        told = f"not built: {row['unbuilt'][:80]}" if "unbuilt" in row else " | ".join(map(str, _line(row).values()))
        print(f"[{done}/{len(missing)}] {row['family']} {row['implementation']} | {told}", flush=True)
    return [rows[task] for task in todo]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="*", help="glob over families, or over family/implementation")
    parser.add_argument("--sample", action="store_true", help="the fixed sample, with gradients")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/census.json for a whole census)")
    arguments = parser.parse_args()
    cache = CACHE / ("sample.jsonl" if arguments.sample else "rows.jsonl")
    todo = tasks(arguments.only, arguments.sample)
    if arguments.fresh and cache.exists():
        left = {task: row for task, row in _cached(cache).items() if task not in todo}
        cache.write_text("".join(json.dumps(row) + "\n" for row in left.values()))
    rows = census(todo, arguments.jobs, arguments.sample, cache)
    print()
    print(table(rows))
    if arguments.out or (arguments.only == "*" and not arguments.sample):
        out = arguments.out or RESULTS / "census.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        about = {"torch": torch.__version__, "transformers": families.transformers.__version__}
        body = ",\n".join(json.dumps(row) for row in rows)
        out.write_text(
            f'{{"about": {json.dumps(about)}, "totals": {json.dumps(totals(rows))}, "rows": [\n{body}\n]}}\n'
        )


if __name__ == "__main__":
    main()
