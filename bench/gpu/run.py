"""Runs cases until time is up, prints and keeps what they say."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
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

from .machine import Case, Machine
from .measure import OVER, measure
from .warm import warm_up
from .ways import SCORES, STAGES

SCORING = ((True, 128, 4), (False, 128, 4))
"""(causal, dim, group) of the cases that scorers and centroids are measured for, and FlexAttention at some lengths."""
FLEX_LENGTHS = (4096, 32768, 131072)
"""It is compiled for each, in half a minute."""
WARMING = 150.0
"""Seconds after which what is not compiled yet is compiled as it is measured."""
TINY = Plan(chunk=16, window=16, sinks=2, routes=1)


def run(
    cases: list[Case],
    plan: Plan | None,
    machine: Machine,
    out: Path,
    seconds: float,
    again: Callable[[float], int] | None = None,
) -> int:
    """Measure, print a table, write JSON and an SVG beside it; 1 where a result was wrong or a kernel did not run.

    The JSON is written after each case, so that nothing is lost to a run that is cut off. Where a kernel's fault
    has taken the device from this process, ``again`` is called with the seconds that are left: it should measure
    in a new process the cases that the file has not (``--resume``).

    Args:
        plan: of all cases; None: that which a graph's site would have by default.
    """
    begin = time.monotonic()
    machine = replace(machine, deadline=begin + seconds)
    rows: list[dict[str, Any]] = [] if again is None else kept(out)
    done = [name_of(row) for row in rows]
    left_out: list[str] = []
    tasks = [(case, plan or Config().plan_for(case.causal, "cuda", case.n), is_scored(case, machine)) for case in cases]
    if machine.device == "cuda":
        print(f"compiling: {warm_up(tasks, machine, WARMING)} of the kinds of cases have their kernels", flush=True)
    for case, given, scoring in tasks:
        name = name_of(asdict(case))
        if name in done:
            continue
        if machine.over():
            left_out.append(name)
            continue
        flex = machine.device == "cuda" and scoring and case.n in FLEX_LENGTHS
        rows.append(measure(case, given, machine, flex, scoring))
        print(f"{time.monotonic() - begin:6.0f} s  {name}: {say(rows[-1])}", flush=True)
        keep(out, machine, plan, rows, [])
        if machine.lost() and again is not None:
            print("the device is lost to this process: another one goes on", flush=True)
            return again(seconds - (time.monotonic() - begin))
    print()
    print(tabulate([flat(row) for row in rows], headers="keys", floatfmt=".3g"))
    print(where_apart(rows))
    if left_out:
        print(f"left out, as {seconds / 60:.3g} minutes were over: " + "; ".join(left_out))
    keep(out, machine, plan, rows, left_out)
    out.with_suffix(".svg").write_text(plot(rows))
    print(f"wrote {out} and {out.with_suffix('.svg').name}")
    ours = ["case", *STAGES, "total", "total, backward", *SCORES, "centroids", "centroids, backward"]
    told = [(name, why) for row in rows for name, why in row["failed"].items() if why != OVER]
    return int(any(name in ours or "wrong result" in why for name, why in told))


def is_scored(case: Case, machine: Machine) -> bool:
    return machine.device == "cpu" or (case.causal, case.dim, case.group) in SCORING


def name_of(case: Mapping[str, Any]) -> str:
    return f"n={case['n']} {'causal' if case['causal'] else 'two-sided'} D={case['dim']} group={case['group']}"


def keep(out: Path, machine: Machine, plan: Plan | None, rows: list[dict[str, Any]], left_out: list[str]) -> None:
    """Write what was found, all at once: a run that is killed leaves the last whole file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {"about": about(machine, plan), "cases": rows, "left_out": left_out}
    scratch = out.with_suffix(".part")
    scratch.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(scratch, out)


def kept(out: Path) -> list[dict[str, Any]]:
    """The cases of an earlier process."""
    return list(json.loads(out.read_text())["cases"]) if out.exists() else []


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
                beside = name in ("exact", "centroids") or name.startswith("score ")
                if not beside and not name.endswith("backward"):
                    series.setdefault(name, []).append((row["n"], 1e3 * seconds))
    title = f"Attention, {'causal' if shape[0] else 'two-sided'}, D = {shape[1]}, groups of {shape[2]}"
    return svg.lines(title, "keys", "milliseconds", series)


@functools.cache  # a device that was lost no longer says its name
def about(machine: Machine, plan: Plan | None) -> dict[str, Any]:
    import triton

    device = torch.cuda.get_device_name() if machine.device == "cuda" else "interpreter: times mean nothing"
    defaults = {"causal": default_plan(True, "cuda", 0), "two-sided": default_plan(False, "cuda", 0)}
    defaults[f"causal, from {TWO_LEVELS_FROM}"] = default_plan(True, "cuda", TWO_LEVELS_FROM)
    plans = {kind: plan or of for kind, of in defaults.items()}
    return {
        "plans": {kind: of.settings() for kind, of in plans.items()},
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": device,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "model": machine.model.name,
    }


def dry_run(out: Path | None) -> int:
    """The path that a GPU would take, on a CPU: Triton reads ``TRITON_INTERPRET`` when it is imported."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, "-m", "bench.attention", "--device", "cuda", "--dry-run"]
        command += ["--out", str(out)] if out else []
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode
    target = out or Path(tempfile.mkdtemp(prefix="prescore_")) / "dry-run.json"
    machine = Machine("cpu", torch.float32, rounds=1)
    tiny = [Case(48, True, 16, 2, 2), Case(48, False, 16, 1, 1)]
    with mock.patch.object(ops, "_generated", lambda query: True):
        return run(tiny, TINY, machine, target, 600)
