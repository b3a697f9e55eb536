"""Exact attention that SDPA does not take, in one kernel against what models write by hand, compiled by Inductor.

    python -m bench.alone                    # some minutes; a table and bench/results/alone-cpu.json
    python -m bench.alone --backward         # forward and backward
    python -m bench.alone --dim 256 --heads 8 --group 2 --dtypes bfloat16 --out build/alone.json

Learned sinks as in gpt-oss and softcaps as in Gemma 2, with a window as in their local layers and without one; causal,
a finite number in the mask. Each result is checked before it is timed: its error against float64, on the last queries,
may be twice that of the attention by hand. Both ways run in turn and the medians are told.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor

from bench.bands import CHECKED, errors_of, finish, same_gradients, with_gradients
from bench.operands import smooth
from prescore_compile.kernels import ops
from prescore_compile.kernels.band import K, Q
from prescore_compile.kernels.logits import Logits
from prescore_compile.kernels.plan import WHOLE
from prescore_compile.kernels.reference import Operands
from prescore_compile.timing import interleaved

RESULTS = Path(__file__).parent / "results" / "alone-cpu.json"
# What there is of each: a window, a learned sink, a softcap.
KINDS: dict[str, tuple[int, bool, float]] = {
    "sink": (0, True, 0.0),
    "sink, window 128": (128, True, 0.0),
    "softcap": (0, False, 50.0),
    "softcap, window 512": (512, False, 50.0),
}


def by_hand(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor | None, softcap: float, scale: float
) -> Tensor:
    """``eager_attention_forward`` of transformers' gpt-oss and Gemma 2."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    logits = query @ key.mT * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits + mask
    if sinks is None:
        return logits.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
    joined = torch.cat([logits, sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], -1)], -1)
    joined = joined - joined.max(-1, keepdim=True).values
    return joined.softmax(-1, dtype=joined.dtype)[..., :-1] @ value


def mask_of(length: int, window: int, dtype: torch.dtype) -> Tensor:
    at = torch.arange(length)
    allowed = at <= at[:, None]
    if window:
        allowed &= at > at[:, None] - window
    return torch.zeros(length, length, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def row(kind: str, length: int, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    window, sunk, softcap = KINDS[kind]
    heads, group, backward = options.heads, options.group, options.backward
    site = smooth(length, heads, group, options.dim, True, dtype)
    sinks = torch.randn(heads, dtype=dtype) if sunk else None
    leaves = [tensor.requires_grad_(backward) for tensor in (*site[:3], *([] if sinks is None else [sinks]))]
    mask, logits = mask_of(length, window, dtype), Logits(Q - window < K if window else sympy.true, softcap=softcap)
    torch._dynamo.reset()
    hand = torch.compile(by_hand, dynamic=False)

    def one_kernel() -> Tensor:
        given: Operands = site
        if sinks is not None:
            given = site._replace(sink_logit=sinks.reshape(1, -1, 1).expand(1, -1, length))
        return ops.prescored(given, WHOLE, logits)

    def whole(run: Callable[[], Tensor]) -> Callable[[], Any]:
        return with_gradients(run, leaves) if backward else run

    runs = {
        "by hand": whole(lambda: hand(*site[:3], mask, sinks, softcap, site.scale)),
        "one kernel": whole(one_kernel),
    }
    wide = [tensor.detach().double() for tensor in (site.query[:, :, -CHECKED:], *site[1:3], mask[-CHECKED:])]
    want = by_hand(*wide, None if sinks is None else sinks.detach().double(), softcap, site.scale)
    errors = errors_of(runs, want, backward)
    if backward:
        bounds = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
        same_gradients(runs["one kernel"], runs["by hand"], bounds)
    seconds = interleaved(runs, options.rounds)
    return {
        "attention": kind, "n": length, "heads": f"{heads} / {heads // group}", "D": options.dim,
        "dtype": str(dtype)[6:],
        **{f"{way}, ms": 1e3 * taken for way, taken in seconds.items()},
        "faster": seconds["by hand"] / seconds["one kernel"], "errors": errors,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for dtype, kind, length in product(options.dtypes, options.kinds, options.lengths):
        rows.append(row(kind, length, getattr(torch, dtype), options))
        print(rows[-1], flush=True)
    finish(rows, options)


if __name__ == "__main__":
    main()
