"""A training step of attention alone, forward and backward: Inductor's, prescore's, and attending every key, in turn.

    python -m bench.training         # some ten minutes; a table and bench/results/training-cpu.json

Inputs are smooth along the sequence, as in ``bench.attention``. Before anything is timed, gradients are checked against
the reference in double precision at ``CHECKED`` tokens; and where they are timed by their sum: weights add up to 1, so
that the values are given what the output is.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from bench.attention import prepared
from bench.bands import finish
from bench.operands import smooth
from prescore_compile import Config
from prescore_compile.kernels import cpu, ops, reference
from prescore_compile.kernels.plan import WHOLE
from prescore_compile.kernels.reference import Operands

RESULTS = Path(__file__).parent / "results" / "training-cpu.json"
CHECKED = 1024
SHAPES = ((9, 3, 64, True), (32, 8, 128, True), (8, 8, 64, False))
"""Query heads, KV heads, features, causal."""


def error_of(site: Operands, plan: Any) -> float:
    """Of the compiled gradients, relative to the largest number of each."""
    summary, _, routes = prepared(site, plan)
    grad = torch.randn_like(site.query)
    wide = site._replace(query=site.query.double(), key=site.key.double(), value=site.value.double())
    rows = summary._replace(row_key=summary.row_key.double(), row_value=summary.row_value.double())
    want = reference.attend_backward(grad.double(), wide, rows, routes, plan)
    got = cpu.attend_backward(grad, site, summary, routes, plan)
    pairs = [(g, w) for g, w in zip(got, want, strict=True) if w.numel()]
    return max(float((g - w).abs().max() / w.abs().max()) for g, w in pairs)


def row(shape: tuple[int, int, int, bool], length: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    heads, kv_heads, dim, causal = shape
    found: dict[str, Any] = {"n": length, "heads": f"{heads}/{kv_heads}", "dim": dim, "causal": causal}
    found["dtype"] = str(dtype).removeprefix("torch.")
    plan = Config().plan_for(causal, "cpu", length)
    found["error"] = error_of(smooth(CHECKED, heads, heads // kv_heads, dim, causal, dtype), plan)
    if not found["error"] < 1e-5:
        return found | {"failed": "gradients are not the reference's"}
    site = smooth(length, heads, heads // kv_heads, dim, causal, dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in site[:3]]
    grad = torch.randn(1, heads, length, dim).to(dtype)

    def run(q: Any, k: Any, v: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != kv_heads, scale=site.scale)

    def exact(q: Any, k: Any, v: Any) -> Any:
        return ops.prescored(site._replace(query=q, key=k, value=v), WHOLE)

    torch._dynamo.reset()
    ways = {backend: torch.compile(run, backend=backend, dynamic=False) for backend in ("inductor", "prescore")}
    ways["exact"] = exact
    given = grad.float().sum(2).sum(1)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            out = way(*leaves)
            middle = time.perf_counter()
            *_, d_value = torch.autograd.grad(out, leaves, grad)
            times[name].append((middle - begin, time.perf_counter() - middle))
            got = d_value.float().sum(2).sum(1)
            if not (got - given).abs().max() < (1e-3 if dtype == torch.float32 else 0.5) * given.abs().max():
                return found | {"failed": f"gradients of the values do not add up: {name}"}
    for name, kept in times.items():
        forward, backward = zip(*kept[1:], strict=True)  # the first one compiles
        found |= {f"{name}_ms": 1e3 * median(forward), f"{name}_backward_ms": 1e3 * median(backward)}
    total = {name: found[f"{name}_ms"] + found[f"{name}_backward_ms"] for name in ways}
    return found | {"faster": total["inductor"] / total["prescore"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.backward = True
    rows = []
    for dtype in options.dtypes:
        for shape in SHAPES:
            for length in options.lengths:
                if dtype == "bfloat16" and (length > 4096 or shape[0] > 9):
                    continue  # minutes, of SDPA's backward
                rows.append(row(shape, length, getattr(torch, dtype), options.rounds))
                print(rows[-1], flush=True)
    finish(rows, options)


if __name__ == "__main__":
    main()
