"""Lengths that no machine here can run: what each stage would cost, and what bounds it.

    python -m bench.roofline                     # 1M tokens, batch 8, on four devices
    python -m bench.roofline --lengths 131072 --batch 1 --devices H100
    python -m bench.roofline --measured bench/results/attention-cuda.json

A model on paper (``bench.model``): nothing was measured unless ``--measured`` names the file that
`python -m bench.attention --device cuda` writes; each stage is then scaled by what the longest case
of its kind took, measured over predicted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import model
from prescore_compile.passes import cost
from prescore_compile.passes.defaults import CAUSAL_ON_A_GPU, LONG_ON_A_GPU, TWO_LEVELS_FROM


def table(
    lengths: list[int], devices: list[str], batch: int, heads: int, kv_heads: int, dim: int, scales: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for each device, length and way of routing; times in milliseconds."""
    rows = []
    for name in devices:
        device = model.DEVICES[name]
        for length in lengths:
            for plan in (CAUSAL_ON_A_GPU, LONG_ON_A_GPU) if length >= TWO_LEVELS_FROM else (CAUSAL_ON_A_GPU,):
                shape = cost.Shape(batch, heads, kv_heads, dim, dim, True)
                site = model.Site(shape, length, plan)
                works = {stage: work(site) for stage, work in model.STAGES.items()}
                works = {stage: work for stage, work in works.items() if work != model.Work()}
                times = {stage: work.seconds(device) * scales.get(stage, 1.0) for stage, work in works.items()}
                exact = model.exact(site).seconds(device) * scales.get("exact", 1.0)
                total = sum(times.values())
                rows.append(
                    {
                        "device": name,
                        "n": length,
                        "levels": 2 if plan.coarse else 1,
                        "exact, ms": 1e3 * exact,
                        **{f"{stage}, ms": 1e3 * seconds for stage, seconds in times.items()},
                        "total, ms": 1e3 * total,
                        "faster": exact / total,
                        "bounds": " ".join(f"{stage[:2]}:{work.bound(device)}" for stage, work in works.items()),
                        "memory, GB": memory(site) / 1e9,
                        "fits": memory(site) < device.memory,
                    }
                )
    return rows


def memory(site: model.Site) -> float:
    """Bytes of one site: operands and output, clusters, routes and the lists that ``attend`` makes of them."""
    shape, plan = site.shape, site.plan
    operands = model.NUMBER_BYTES * (2 * site.rows + 2 * site.keys) * shape.head_dim
    clusters = site.keys * (4 + 8 * shape.head_dim / plan.cluster)
    return operands + clusters + site.rows * plan.routes * 16.0


def scales_of(measured: dict[str, Any]) -> dict[str, float]:
    """Measured over predicted seconds of each stage, of the longest causal case."""
    cases = [case for case in measured["cases"] if case["causal"] and case.get("stages")]
    if not cases:
        return {}
    case = max(cases, key=lambda found: found["n"])
    return {
        stage: case["stages"][stage] / case["predicted"][stage]
        for stage in case["stages"]
        if stage in case["predicted"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 1048576])
    parser.add_argument("--devices", nargs="+", choices=model.DEVICES, default=list(model.DEVICES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--measured", type=Path, help="what `python -m bench.attention --device cuda` wrote")
    arguments = parser.parse_args()
    scales = scales_of(json.loads(arguments.measured.read_text())) if arguments.measured else {}
    a = arguments
    rows = table(a.lengths, a.devices, a.batch, a.heads, a.kv_heads, a.dim, scales)
    said = (
        "scaled by measured times: " + ", ".join(f"{k} x{v:.2f}" for k, v in scales.items()) if scales else "modelled"
    )
    print(f"causal, batch {a.batch}, {a.heads} / {a.kv_heads} heads, D = {a.dim}, bf16, default plan; {said}")
    print(tabulate(rows, headers="keys", floatfmt=".4g"))


if __name__ == "__main__":
    main()
