"""Attention alone: exact against prescored, stage by stage, each result checked before it is timed.

    python -m bench.attention                   # half an hour; a table and bench/results/attention-cpu.json
    python -m bench.attention --lengths 8192 --dtypes bfloat16 --causal yes
    python -m bench.attention --tiles           # query-major (1) to cluster-major (large) tiles
    python -m bench.attention --device cuda     # under ten minutes; see bench/gpu

Exact is SDPA's flash kernel with ``is_causal``, its fastest CPU form; flex is compiled FlexAttention, exact too. All
ways run in turn and the median is told: of wall time, or with ``--clock cpu`` of the processor's, which other work
on the machine moves less. Memory is what a call adds to the process at its peak. Inputs are smooth along the
sequence, as real queries and keys are; on noise every query of a tile would want other clusters. They are as
peaked as text, where SmolLM2's queries take 25 of 64 routes at a share of 0.001 and 8192 tokens; the table says how
many they take here.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.operands import counted, smooth
from prescore_compile import Config
from prescore_compile.kernels import coarse, cpu, ops, reference, routing
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary
from prescore_compile.passes import cost
from prescore_compile.timing import interleaved

RESULTS = Path(__file__).parent / "results"
DIM = 64
CHECKED = 128
"""Queries compared with the reference in double precision: the last ones, the first ones without causality."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Case:
    """One measured shape: ``heads`` query heads on ``heads / group`` KV heads, D = 64."""

    length: int
    heads: int
    group: int
    causal: bool
    dtype: torch.dtype


def inputs(case: Case) -> Operands:
    return smooth(case.length, case.heads, case.group, DIM, case.causal, case.dtype)


def peak(work: Callable[[], Any]) -> float:
    """MB that ``work`` adds to the process at its peak, its result included; NaN where Linux does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def most() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be used again unseen
        reset.write_text("5")
        before = most()
        work()
        return (most() - before) / 1024
    except (OSError, AttributeError):
        return float("nan")


def flex_of(case: Case, site: Operands, exact: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Compiled FlexAttention of the case, checked: its error may be twice that of ``exact``, SDPA."""

    def causal(_batch: Any, _head: Any, q: Any, k: Any) -> Any:
        return q >= k

    n = case.length
    mask = create_block_mask(causal, None, None, n, n, device="cpu") if case.causal else None
    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> torch.Tensor:
        found = compiled(site.query, site.key, site.value, block_mask=mask, scale=site.scale, enable_gqa=case.group > 1)
        assert isinstance(found, torch.Tensor)
        return found

    torch._dynamo.reset()  # a shape is compiled for itself; what it was compiled for before is not needed again
    part = slice(-CHECKED, None) if case.causal else slice(CHECKED)
    few = site._replace(query=site.query[:, :, part])
    want = reference.exact(few._replace(query=few.query.double(), key=site.key.double(), value=site.value.double()))
    error, usual = ((found - want).abs().max().item() for found in (run()[:, :, part], exact()[:, :, part]))
    if not error <= 2 * usual + 1e-5:
        raise AssertionError(f"wrong result: FlexAttention is off by {error:.2g}, SDPA by {usual:.2g}")
    return run


def check(site: Operands, summary: Summary, routes: torch.Tensor, plan: Plan) -> float:
    """Largest error of the compiled kernels on some queries; raises if it is not rounding."""
    part = slice(-CHECKED, None) if site.causal else slice(CHECKED)
    query = site.query[:, :, part]
    few = site._replace(query=query)
    wide = few._replace(query=query.double(), key=site.key.double(), value=site.value.double())
    rows = summary._replace(row_key=summary.row_key.double(), row_value=summary.row_value.double())
    some = routes[:, :, part]
    want = reference.attend(wide, rows, some, plan)
    error = (cpu.attend(few, summary, some, plan).double() - want).abs().max().item()
    whole = (cpu.attend(site, summary, routes, plan)[:, :, part].double() - want).abs().max().item()
    as_one = (ops.prescored(site, plan)[:, :, part].double() - want).abs().max().item()
    scores = routing.routing_scores(query.double(), summary, site.scale)
    mass = reference.mass(few, summary, plan) if plan.needs_mass else None
    best = coarse.route(query, summary, plan, site.causal, site.key.shape[2], site.scale, mass=mass)
    got, want_best = (scores.gather(3, r.long().clamp(min=0)).masked_fill(r < 0, 0).sum(3) for r in (some, best))
    same = (some >= 0).sum(3) == (best >= 0).sum(3)  # rounding may decide whether a cluster has its share
    gap, odd = (got - want_best)[same].abs().max().item(), (~same).float().mean().item()
    limit = 1e-4 if site.query.dtype == torch.float32 else 3e-2
    error = max(error, whole, as_one)
    if error > limit or gap > 1e-2 or odd > 0.02:
        told = f"attend is off by {error:.2g}, routes by {gap:.2g}, {odd:.1%} have another number of them"
        raise AssertionError(f"wrong result: {told}")
    return error


def prepared(site: Operands, plan: Plan) -> tuple[Summary, torch.Tensor | None, torch.Tensor]:
    """What ``attend`` needs beside the operands: the summary, with a share its ``mass``, and the routes."""
    summary = Summary(*ops.summarize(site.key, site.value, None, None, plan.text))
    mass = cpu.mass(site, summary, plan) if plan.needs_mass else None
    return summary, mass, cpu.route(site.query, summary, plan, site.causal, site.key.shape[2], site.scale, mass)


def measure(case: Case, plan: Plan, rounds: int, clock: str, flex: bool) -> dict[str, Any]:
    site = inputs(case)
    query, key, value = site[:3]
    summary, mass, routes = prepared(site, plan)
    error = check(site, summary, routes, plan)
    k, v = key.repeat_interleave(case.group, 1), value.repeat_interleave(case.group, 1)
    ways: dict[str, Callable[[], Any]] = {
        "exact": lambda: F.scaled_dot_product_attention(query, k, v, is_causal=case.causal, scale=site.scale),
        "summarize": lambda: ops.summarize(key, value, None, None, plan.text),
        "route": lambda: cpu.route(query, summary, plan, case.causal, case.length, site.scale, mass),
        "attend": lambda: cpu.attend(site, summary, routes, plan),
        "total": lambda: ops.prescored(site, plan),
    }
    if plan.needs_mass:
        ways["mass"] = lambda: cpu.mass(site, summary, plan)
    if flex:
        ways["flex"] = flex_of(case, site, ways["exact"])
    memory = {name: peak(ways[name]) for name in ("exact", "total")}
    times = interleaved(ways, rounds, clock=CLOCKS[clock])
    kind = cost.kind("cpu", case.dtype)
    shape = cost.Shape(1, case.heads, case.heads // case.group, DIM, DIM, case.causal, kind)
    taken = (routes >= 0).sum().item() / max(routes[..., :1].numel(), 1)
    pairs = {
        "exact": cost.at(cost.exact_pairs(case.causal), case.length),
        "attend": cost.at(cost.attended_pairs(counted(plan, taken), case.causal), case.length),
        "route": cost.at(cost.routing_pairs(plan, case.causal), case.length),
    }
    unit = times["exact"] / pairs["exact"]
    return {
        "n": case.length,
        "heads": f"{case.heads}/{case.heads // case.group}",
        "causal": case.causal,
        "dtype": str(case.dtype).removeprefix("torch."),
        **{f"{name}_ms": 1e3 * seconds for name, seconds in times.items()},
        "routes": taken,
        "speedup": times["exact"] / times["total"],
        "predicted": cost.at(cost.exact_cost(shape) / cost.prescored_time(shape, plan), case.length),
        "attend_price": times["attend"] / pairs["attend"] / unit,
        "route_price": times["route"] / pairs["route"] / unit if pairs["route"] else None,
        "summary_per_key": times["summarize"] / unit * 2 * DIM * case.heads / (case.heads // case.group * case.length),
        **{f"{name}_mb": size for name, size in memory.items()},
        "error": error,
    }


def tiles(case: Case, plan: Plan, rounds: int, clock: str) -> dict[str, Any]:
    """Milliseconds of ``attend`` by queries a tile."""
    site = inputs(case)
    summary, _, routes = prepared(site, plan)
    check(site, summary, routes, plan)

    def way(tile: int) -> Callable[[], Any]:
        return lambda: cpu.attend(site, summary, routes, plan, tile)

    times = interleaved({str(tile): way(tile) for tile in (1, 4, 16, 32, 64, 128, 256)}, rounds, clock=CLOCKS[clock])
    return {"n": case.length, "heads": f"{case.heads}/{case.heads // case.group}"} | {
        f"tile {tile}, ms": 1e3 * seconds for tile, seconds in times.items()
    }


def on_gpu(arguments: argparse.Namespace) -> int:
    """Measure on a GPU; the exit status: 0, 1 where a result was wrong, 2 without a GPU."""
    from bench.gpu import apart, machine, run

    if arguments.dry_run:
        return run.dry_run(arguments.out)
    if not torch.cuda.is_available():
        print("No GPU: torch.cuda.is_available() is false. --dry-run shows what would be run.")
        return 2
    try:  # in another process: this one must not open the device
        (name,) = apart.apart(lambda _: 60.0, machine.device_name)
    except apart.EndedError as problem:
        print(f"No GPU that answers: {problem}")
        return 2
    cases = machine.cases(tuple(arguments.lengths or machine.LENGTHS))
    out = arguments.out or RESULTS / "attention-cuda.json"
    seconds = 60 * arguments.minutes
    return run.run(cases, None, machine.Machine("cuda", name=name), out, seconds, resume=arguments.resume)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dry-run", action="store_true", help="the cuda path, tiny, in Triton's interpreter")
    parser.add_argument("--minutes", type=float, default=8, help="of --device cuda: what begins later is left out")
    parser.add_argument("--resume", action="store_true", help="of --device cuda: keep the cases that --out has")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--heads", nargs="+", default=["8/8", "9/3"], help="query heads / KV heads")
    parser.add_argument("--dtypes", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--causal", choices=["yes", "no"], nargs="+", default=["yes", "no"])
    parser.add_argument("--rounds", type=int, default=5, help="fewer beyond 16384 tokens")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-flex", action="store_true", help="without FlexAttention, which compiles for each shape")
    parser.add_argument("--tiles", action="store_true", help="compare tile sizes of attend instead")
    parser.add_argument("--out", type=Path, help="JSON file (default: in bench/results)")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        sys.exit(on_gpu(arguments))
    torch.set_num_threads(arguments.threads)
    rows = []
    lengths = arguments.lengths or [1024, 2048, 4096, 8192, 16384, 32768]
    for causal, dtype, heads, length in product(arguments.causal, arguments.dtypes, arguments.heads, lengths):
        count, kv_heads = map(int, heads.split("/"))
        case = Case(length, count, count // kv_heads, causal == "yes", getattr(torch, dtype))
        rounds = arguments.rounds if length <= 16384 else (arguments.rounds + 1) // 2
        plan = Config().plan_for(case.causal, "cpu", length)
        if arguments.tiles:
            rows.append(tiles(case, plan, rounds, arguments.clock))
        else:
            rows.append(measure(case, plan, rounds, arguments.clock, not arguments.no_flex))
        print(json.dumps(rows[-1]), flush=True)
    print()
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    out = arguments.out or RESULTS / f"attention-cpu{'-tiles' if arguments.tiles else ''}.json"
    about = {
        "plans": {kind: Config().plan_for(kind == "causal", "cpu", 0).settings() for kind in ("causal", "two-sided")},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
