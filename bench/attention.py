"""Attention alone: exact against prescored, stage by stage, each result checked before it is timed.

    python -m bench.attention                   # a few minutes; a table and bench/results/attention-cpu.json
    python -m bench.attention --tiles           # query-major (1) to cluster-major (large) tiles
    python -m bench.attention --device cuda     # under ten minutes; see bench/gpu.py

Exact is SDPA's flash kernel with ``is_causal``, its fastest CPU form. All ways run in turn and the
median is told. Inputs are smooth along the sequence, as real queries and keys are; on noise every
query of a tile would want other clusters.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

from prescore_compile import Config
from prescore_compile.demo import interleaved
from prescore_compile.kernels import cpu, ops, reference
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary
from prescore_compile.passes import cost

RESULTS = Path(__file__).parent / "results"
DIM = 64
CHECKED = 128
"""The last queries, compared with the reference in double precision."""


@dataclass(frozen=True)
class Case:
    """One measured shape: ``heads`` query heads on ``heads / group`` KV heads, D = 64."""

    length: int
    heads: int
    group: int
    causal: bool
    dtype: torch.dtype


def inputs(case: Case) -> Operands:
    generator = torch.Generator().manual_seed(0)

    def smooth(heads: int) -> torch.Tensor:
        noise = torch.randn(1, heads, case.length, DIM, generator=generator)
        steps = torch.randn(1, heads, case.length // 64 + 1, DIM, generator=generator)
        return (noise / 2 + steps.repeat_interleave(64, 2)[:, :, : case.length]).to(case.dtype)

    kv_heads = case.heads // case.group
    return Operands(smooth(case.heads), smooth(kv_heads), smooth(kv_heads), None, case.causal, DIM**-0.5)


def check(site: Operands, summary: Summary, routes: torch.Tensor, plan: Plan) -> float:
    """Largest error of the compiled kernels on the last queries; raises if it is not rounding."""
    at = site.query.shape[2] - CHECKED if site.causal else 0
    if not site.causal and plan.window:
        raise ValueError("only causal plans, or plans without a window, can be checked on some queries")
    query = site.query[:, :, at:]
    few = site._replace(query=query)
    wide = few._replace(query=query.double(), key=site.key.double(), value=site.value.double())
    rows = summary._replace(row_key=summary.row_key.double(), row_value=summary.row_value.double())
    part = routes[:, :, at:]
    want = reference.attend(wide, rows, part, plan)
    error = (cpu.attend(few, summary, part, plan).double() - want).abs().max().item()
    whole = (cpu.attend(site, summary, routes, plan)[:, :, at:].double() - want).abs().max().item()
    scores = reference.routing_scores(query.double(), summary, site.scale)
    best = reference.route(query, summary, plan, site.causal, site.key.shape[2], site.scale)
    got, want_best = (scores.gather(3, r.long().clamp(min=0)).masked_fill(r < 0, 0).sum(3) for r in (part, best))
    gap = (got - want_best).abs().max().item()
    limit = 1e-4 if site.query.dtype == torch.float32 else 3e-2
    if max(error, whole) > limit or gap > 1e-2:
        raise AssertionError(f"wrong result: attend is off by {max(error, whole):.2g}, routes by {gap:.2g}")
    return max(error, whole)


def measure(case: Case, plan: Plan, rounds: int) -> dict[str, Any]:
    site = inputs(case)
    query, key, value = site[:3]
    summary = Summary(*ops.summarize(key, value, None, None, plan.text))
    routes = cpu.route(query, summary, plan, case.causal, case.length, site.scale)
    error = check(site, summary, routes, plan)
    k, v = key.repeat_interleave(case.group, 1), value.repeat_interleave(case.group, 1)
    ways: dict[str, Callable[[], Any]] = {
        "exact": lambda: F.scaled_dot_product_attention(query, k, v, is_causal=case.causal, scale=site.scale),
        "summarize": lambda: ops.summarize(key, value, None, None, plan.text),
        "route": lambda: cpu.route(query, summary, plan, case.causal, case.length, site.scale),
        "attend": lambda: cpu.attend(site, summary, routes, plan),
        "total": lambda: ops.prescored(site, plan),
    }
    times = interleaved(ways, rounds)
    shape = cost.Shape(1, case.heads, case.heads // case.group, DIM, DIM, case.causal)
    pairs = {
        "exact": cost.at(cost.exact_pairs(case.causal), case.length),
        "attend": cost.at(cost.attended_pairs(plan, case.causal), case.length),
        "route": cost.at(cost.routing_pairs(plan, case.causal), case.length),
    }
    unit = times["exact"] / pairs["exact"]
    return {
        "n": case.length,
        "heads": f"{case.heads}/{case.heads // case.group}",
        "causal": case.causal,
        "dtype": str(case.dtype).removeprefix("torch."),
        **{f"{name}_ms": 1e3 * seconds for name, seconds in times.items()},
        "speedup": times["exact"] / times["total"],
        "predicted": cost.at(cost.exact_cost(shape) / cost.prescored_time(shape, plan), case.length),
        "attend_price": times["attend"] / pairs["attend"] / unit,
        "route_price": times["route"] / pairs["route"] / unit if pairs["route"] else None,
        "summary_per_key": times["summarize"] / unit * 2 * DIM * case.heads / (case.heads // case.group * case.length),
        "error": error,
    }


def tiles(case: Case, plan: Plan, rounds: int) -> dict[str, Any]:
    """Milliseconds of ``attend`` by queries a tile."""
    site = inputs(case)
    summary = Summary(*ops.summarize(site.key, site.value, None, None, plan.text))
    routes = cpu.route(site.query, summary, plan, case.causal, case.length, site.scale)
    check(site, summary, routes, plan)

    def way(tile: int) -> Callable[[], Any]:
        return lambda: cpu.attend(site, summary, routes, plan, tile)

    times = interleaved({str(tile): way(tile) for tile in (1, 4, 16, 32, 64, 128, 256)}, rounds)
    return {"n": case.length, "heads": f"{case.heads}/{case.heads // case.group}"} | {
        f"tile {tile}, ms": 1e3 * seconds for tile, seconds in times.items()
    }


def on_gpu(arguments: argparse.Namespace) -> int:
    """Measure on a GPU; the exit status: 0, 1 where a result was wrong, 2 without a GPU."""
    from bench import gpu, gpu_run

    if arguments.dry_run:
        return gpu_run.dry_run(arguments.out)
    if not torch.cuda.is_available():
        print("No GPU: torch.cuda.is_available() is false. --dry-run shows what would be run.")
        return 2
    lengths = tuple(arguments.lengths or gpu.LENGTHS)
    out = arguments.out or RESULTS / "attention-cuda.json"
    return gpu_run.run(gpu.cases(lengths), Config().default_plan, gpu.Machine("cuda"), out, 60 * arguments.minutes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dry-run", action="store_true", help="the cuda path, tiny, in Triton's interpreter")
    parser.add_argument("--minutes", type=float, default=9, help="of --device cuda: what begins later is left out")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--groups", type=int, nargs="+", default=[3, 1])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiles", action="store_true", help="compare tile sizes of attend instead")
    parser.add_argument("--out", type=Path, help="JSON file (default: in bench/results)")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        sys.exit(on_gpu(arguments))
    plan, rows = Config().default_plan, []
    for group in arguments.groups:
        for length in arguments.lengths or [1024, 2048, 4096, 8192, 16384]:
            case = Case(length, arguments.heads, group, True, getattr(torch, arguments.dtype))
            rows.append((tiles if arguments.tiles else measure)(case, plan, arguments.rounds))
            print(f"n={length} heads={rows[-1]['heads']} done", flush=True)
    print()
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    out = arguments.out or RESULTS / f"attention-cpu{'-tiles' if arguments.tiles else ''}-{arguments.dtype}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "plan": plan.settings(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
    out.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
