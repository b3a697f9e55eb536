"""Runs cases until time is up, prints and keeps what they say."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate

from bench import svg
from prescore_compile import Config
from prescore_compile.kernels import ops
from prescore_compile.kernels.plan import Plan
from prescore_compile.passes.defaults import TWO_LEVELS_FROM, default_plan

from .apart import apart
from .machine import CASE, Case, Machine
from .measure import OVER, WRONG, Found, Task, found_of, ours, row_of, ways_of
from .supervise import Messages, supervised, work
from .warm import warm_up
from .ways import MASKED, SELECTING, STAGES, WHOLLY

SCORING = ((True, 128, 4), (False, 128, 4))
"""(causal, dim, group) of the cases that scorers, centroids, windows and learned sinks are measured for, and
FlexAttention at some lengths."""
FLEX_LENGTHS = (32768, 4096, 131072)
"""It is compiled for each, in half a minute; the most telling first."""
WARMING = 150.0
"""Seconds after which what is not compiled yet is compiled as it is measured."""
TINY = Plan(chunk=16, window=16, sinks=2, routes=1)


def run(
    cases: list[Case],
    plan: Plan | None,
    machine: Machine,
    out: Path,
    seconds: float,
    *,
    resume: bool = False,
    worker: Callable[..., Messages] = work,
    process: Callable[..., Messages] = apart,
) -> int:
    """Measure, print a table, write JSON and an SVG beside it; 1 where a result was wrong or a kernel did not run.

    The JSON is written after each case, so that nothing is lost to a run that is cut off. This process never opens the
    device, which a lost context or a hanging kernel of its own would keep from the next one.

    Args:
        plan: of all cases; None: that which a graph's site would have by default.
        resume: keep what the file has.
        worker, process: see ``supervised``.
    """
    begin = time.monotonic()
    machine = replace(machine, deadline=begin + seconds)
    rows = kept(out) if resume else {}
    founds = {case: found_of(known) for case, known in rows.items()}
    tasks = [task for task in tasks_of(cases, plan, machine) if founds.get(task.case, Found()).following(task)]
    head: dict[str, Any] = {"about": about(machine, plan)}
    keep(out, head, rows, [])
    if machine.device == "cuda":
        head["not_compiled"] = compiled(tasks, machine)
    left = list(tasks)
    for task, lost in supervised(tasks, machine, founds, worker, process):
        found = founds[task.case]
        rows[task.case] = row_of(task, machine, found)
        keep(out, head, rows, [])
        if lost is None:
            left.remove(task)
            what = f": {say(rows[task.case])}"
        else:
            what = f", {lost}: {found.failed[lost]}; another process goes on"
        print(f"{time.monotonic() - begin:6.0f} s  {task.case}{what}", flush=True)
    left_out = [str(task.case) + ", flex" * (task.names == ("flex",)) for task in left]
    print()
    print(tabulate([flat(known) for known in rows.values()], headers="keys", floatfmt=".3g"))
    print(where_apart(list(rows.values())))
    if left_out:
        print(f"left out, as {seconds / 60:.3g} minutes were over: " + "; ".join(left_out))
    keep(out, head, rows, left_out)
    out.with_suffix(".svg").write_text(plot(list(rows.values())))
    print(f"wrote {out} and {out.with_suffix('.svg').name}")
    told = [(name, why) for known in rows.values() for name, why in known["failed"].items() if why != OVER]
    of_ours = (CASE, *STAGES, "total", "total, backward", *SELECTING, *WHOLLY)
    return int(any(name in of_ours or why.startswith(WRONG) for name, why in told))


def tasks_of(cases: list[Case], plan: Plan | None, machine: Machine) -> list[Task]:
    """What is measured, in order: FlexAttention's compiles come last, but for one after the most telling shape."""

    def task(case: Case, *names: str) -> Task:
        of = plan or Config().plan_for(case.causal, "cuda", case.n)
        return Task(case, of, names or ways_of(case, of, is_scored(case, machine)))

    def shape(case: Case) -> tuple[bool, int, int]:
        return case.causal, case.dim, case.group

    flexed = [case for n in FLEX_LENGTHS for case in cases if case.n == n and shape(case) in SCORING]
    flex = [task(case, "flex") for case in flexed if machine.device == "cuda"]
    first = [task(case) for case in cases if shape(case) == shape(cases[0])]
    return first + flex[:1] + [task(case) for case in cases if shape(case) != shape(cases[0])] + flex[1:]


def is_scored(case: Case, machine: Machine) -> bool:
    return machine.device == "cpu" or (case.causal, case.dim, case.group) in SCORING


def compiled(tasks: list[Task], machine: Machine) -> dict[str, dict[str, str]]:
    """Compile what the tasks run; what could not be, by case, and why."""
    print("compiling", flush=True)
    begin = time.monotonic()
    whole = [task for task in tasks if task.names != ("flex",)]
    todo = [replace(task, names=ours(task.case, task.plan, is_scored(task.case, machine))) for task in whole]
    found = warm_up(todo, machine, WARMING)
    failed = {str(task.case): failures for task, failures in found.items() if failures}
    for case, failures in failed.items():
        print(f"not compiled, {case}: " + "; ".join(f"{name}: {why}" for name, why in failures.items()))
    took = time.monotonic() - begin
    print(f"{took:6.0f} s  {len(found) - len(failed)} of {len(found)} kinds of cases have their kernels", flush=True)
    return failed


def keep(out: Path, head: dict[str, Any], rows: dict[Case, dict[str, Any]], left_out: list[str]) -> None:
    """Write what was found, all at once: a run that is killed leaves the last whole file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_suffix(".part")
    scratch.write_text(json.dumps(head | {"cases": list(rows.values()), "left_out": left_out}, indent=1) + "\n")
    os.replace(scratch, out)


def kept(out: Path) -> dict[Case, dict[str, Any]]:
    """The cases of an earlier run."""
    rows = json.loads(out.read_text())["cases"] if out.exists() else []
    return {Case(**{field.name: known[field.name] for field in fields(Case)}): known for known in rows}


def say(row: dict[str, Any]) -> str:
    """One line of a case."""
    parts = [f"{row['faster']:.2f}x faster than {row['best']}"] if "faster" in row else []
    parts += [f"attend {100 * row['attend_share_of_best']:.0f}% of its rate"] if "attend_share_of_best" in row else []
    parts += [f"{name}: {reason}" for name, reason in row["failed"].items()]
    return "; ".join(parts) or "nothing to compare with"


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: milliseconds, rates, shares."""
    found = {name: row[name] for name in ("n", "causal", "dim", "group")}
    found |= {f"{name}, ms": 1e3 * seconds for name, seconds in row["stages"].items() if name != "exact"}
    for name in ("exact_tflops", "attend_tflops", "attend_share_of_best", "scoring_and_routing_share"):
        found[name] = row.get(name)
    return found | {"faster": row.get("faster"), "faster_backward": row.get("faster_backward")}


def where_apart(rows: list[dict[str, Any]]) -> str:
    """Stages whose measured and predicted times part by more than a factor of two."""
    said = [
        f"n={row['n']} causal={row['causal']} D={row['dim']} group={row['group']}: "
        + ", ".join(f"{stage} x{ratio:.2g}" for stage, ratio in row["off_the_prediction"].items())
        for row in rows
        if row["off_the_prediction"]
    ]
    return "measured / predicted, where they part by more than 2:\n  " + ("\n  ".join(said) or "nowhere")


def plot(rows: list[dict[str, Any]]) -> str:
    """Times of the causal case with D = 128 and groups of 4, or of whatever there is."""
    shapes = [(row["causal"], row["dim"], row["group"]) for row in rows]
    shape = (True, 128, 4) if (True, 128, 4) in shapes else (shapes or [(True, 128, 4)])[0]
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if (row["causal"], row["dim"], row["group"]) == shape:
            for name, seconds in row["stages"].items():  # a case whose time ran out has some of them
                beside = name in ("exact", "centroids", MASKED, *WHOLLY) or name.startswith("score ")
                if not beside and not name.endswith("backward"):
                    series.setdefault(name, []).append((row["n"], 1e3 * seconds))
    title = f"Attention, {'causal' if shape[0] else 'two-sided'}, D = {shape[1]}, groups of {shape[2]}"
    return svg.lines(title, "keys", "milliseconds", series)


def about(machine: Machine, plan: Plan | None) -> dict[str, Any]:
    import triton

    defaults = {"causal": default_plan(True, "cuda", 0), "two-sided": default_plan(False, "cuda", 0)}
    defaults[f"causal, from {TWO_LEVELS_FROM}"] = default_plan(True, "cuda", TWO_LEVELS_FROM)
    plans = {kind: plan or of for kind, of in defaults.items()}
    return {
        "plans": {kind: of.settings() for kind, of in plans.items()},
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": machine.name,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "model": machine.model.name,
    }


def dry_run(out: Path | None) -> int:
    """The path that a GPU would take, on a CPU: Triton reads ``TRITON_INTERPRET`` when a process imports it."""
    target = out or Path(tempfile.mkdtemp(prefix="prescore_")) / "dry-run.json"
    machine = Machine("cpu", torch.float32, rounds=1, name="interpreter: times mean nothing")
    tiny = [Case(48, True, 16, 2, 2), Case(48, False, 16, 1, 1)]
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        return run(tiny, TINY, machine, target, 600, worker=interpreted)


def interpreted(*given: Any) -> Iterator[Any]:
    with mock.patch.object(ops.dispatch, "generated", lambda *given: True):
        yield from work(*given)
