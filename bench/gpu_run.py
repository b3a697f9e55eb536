"""Runs the cases of ``bench.gpu`` until time is up, prints and keeps what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate

from bench import gpu, svg
from prescore_compile.kernels import ops
from prescore_compile.kernels.plan import Plan

FLEX = ((True, 128, 4), (False, 128, 4))
"""(causal, dim, group) of the cases that FlexAttention is compiled for; a compile takes half a minute."""
TINY = Plan(chunk=16, window=16, sinks=2, routes=1)


def run(cases: list[gpu.Case], plan: Plan, machine: gpu.Machine, out: Path, seconds: float) -> int:
    """Measure, print a table, write JSON and an SVG beside it; 1 where a result was wrong or a kernel did not run."""
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for case in cases:
        name = f"n={case.n} {'causal' if case.causal else 'two-sided'} D={case.dim} group={case.group}"
        if time.monotonic() - begin > seconds:
            left_out.append(name)
            continue
        flex = machine.device == "cuda" and (case.causal, case.dim, case.group) in FLEX
        failed: dict[str, str] = {}
        with gpu.told(failed, "case"):
            rows.append(gpu.measure(case, plan, machine, flex))
        if failed:  # not even its inputs or its summary could be made
            rows.append(gpu.row(case, plan, machine, {}, failed))
        print(f"{time.monotonic() - begin:6.0f} s  {name}: {say(rows[-1])}", flush=True)
    print()
    print(tabulate([flat(row) for row in rows], headers="keys", floatfmt=".3g"))
    print(where_apart(rows))
    if left_out:
        print(f"left out, as {seconds / 60:g} minutes were over: " + "; ".join(left_out))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"about": about(machine, plan), "cases": rows, "left_out": left_out}, indent=1) + "\n")
    out.with_suffix(".svg").write_text(plot(rows))
    print(f"wrote {out} and {out.with_suffix('.svg').name}")
    ours = ["case", "stages", "summarize", "route", "attend", "total", "total, backward"]
    ours += [f"score {method}" for method in gpu.SCORED]
    return int(any(name in ours or "wrong result" in why for row in rows for name, why in row["failed"].items()))


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
            for name, seconds in row["stages"].items():
                if name != "exact" and not name.endswith("backward") and not name.startswith("score "):
                    series.setdefault(name, []).append((row["n"], 1e3 * seconds))
    title = f"Attention, {'causal' if shape[0] else 'two-sided'}, D = {shape[1]}, groups of {shape[2]}"
    return svg.lines(title, "keys", "milliseconds", series)


def about(machine: gpu.Machine, plan: Plan) -> dict[str, Any]:
    import triton

    device = torch.cuda.get_device_name() if machine.device == "cuda" else "interpreter: times mean nothing"
    return {
        "plan": plan.settings(),
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
    machine = gpu.Machine("cpu", torch.float32, rounds=1)
    tiny = [gpu.Case(48, True, 16, 2, 2), gpu.Case(48, False, 16, 1, 1)]
    with mock.patch.object(ops, "_generated", lambda query: True):
        return run(tiny, TINY, machine, target, 600)
