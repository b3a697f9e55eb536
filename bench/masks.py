"""Masks that are read as they come: exact attention that skips what they hide, against SDPA, and FlexAttention.

    python -m bench.masks                    # some minutes; a table and bench/results/masks-cpu.json
    python -m bench.masks --heads 8 8        # as many KV heads as query heads
    python -m bench.masks --by-hand          # numbers that are added, by what writes attention out

Each result is checked before it is timed: its error against float64, on the last queries, may be twice that of SDPA.
All ways run in turn and the medians are told. ``read`` has the mask alone, as SDPA has, and finds out each time what it
hides; FlexAttention is compiled, with a block mask of the same mask that was made before. By hand is transformers'
``eager_attention_forward``, compiled by Inductor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.alone import by_hand
from bench.bands import CHECKED, by_flex, errors_of, finish
from bench.operands import smooth
from prescore_compile.demo import interleaved
from prescore_compile.kernels import cpu, ops
from prescore_compile.kernels.logits import parse
from prescore_compile.kernels.plan import WHOLE
from prescore_compile.kernels.reference import Operands

RESULTS = Path(__file__).parent / "results"
DIM = 64
READ = parse("softcap 0.0; add 0; where Ne(t00(0, 0, q, k), 0)")
ADDED = parse("softcap 0.0; add t00(0, 0, q, k); where True")
BIAS = "a bias, causal"


def documents(q: Any, k: Any) -> Any:
    """Of 100 to 1,500 tokens, causal, as packed sequences are."""
    ends = torch.randint(100, 1500, (200,), generator=torch.Generator().manual_seed(0)).cumsum(0)
    return (k <= q) & (torch.bucketize(q, ends) == torch.bucketize(k, ends))


# Which keys a query may attend, with padding on the left and in any order.
MASKS: dict[str, Callable[[Any, Any], Any]] = {
    "causal, padded": lambda q, k: (k <= q) & (k >= 100),
    "window 512, padded": lambda q, k: (k <= q) & (k > q - 512) & (k >= 100),
    "documents": documents,
    "prefix 1000": lambda q, k: (k <= q) | (k < 1000),
    "first 64 and window 256": lambda q, k: (k <= q) & ((k < 64) | (k > q - 256)),
    "half, anywhere": lambda q, k: torch.rand(q.shape[0], k.shape[1], generator=torch.Generator().manual_seed(0)) < 0.5,
    "every key": lambda q, k: (q >= 0) & (k >= 0),
    BIAS: lambda q, k: k <= q,
}


def numbers(name: str, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to logits instead of the mask."""
    usual = torch.randn(mask.shape, dtype=dtype) if name == BIAS else torch.zeros(mask.shape, dtype=dtype)
    return usual.masked_fill(~mask, torch.finfo(dtype).min)


def ways(site: Operands, mask: torch.Tensor, flex: bool) -> dict[str, Callable[[], Any]]:
    """What is measured, by its name; the first is exact attention. ``mask``: bools, or numbers."""
    four, grouped = mask[None, None], site.query.shape[1] != site.key.shape[1]
    if mask.dtype != torch.bool:
        torch._dynamo.reset()
        compiled = torch.compile(by_hand, dynamic=False)
        return {
            "by hand": partial(compiled, *site[:3], four, None, 0.0, site.scale),
            "read": partial(ops.prescored, site, WHOLE, ADDED, {"t00": four}),
        }
    found: dict[str, Callable[[], Any]] = {
        "SDPA": partial(
            F.scaled_dot_product_attention, *site[:3], four, scale=site.scale, enable_gqa=grouped
        ),
        "read": partial(ops.prescored, site, WHOLE, READ, {"t00": four}),
    }  # fmt: skip
    if flex:
        found["flex"] = by_flex(site, lambda q, k: mask[q, k])
    return found


@torch.no_grad()
def row(name: str, length: int, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table; ``options``: of the command line."""
    heads, kv_heads = options.heads
    site = smooth(length, heads, heads // kv_heads, DIM, False, dtype)
    at = torch.arange(length)
    mask = MASKS[name](at[:, None], at[None])
    given = numbers(name, mask, dtype) if options.by_hand else mask
    runs = ways(site, given, options.flex)
    q, k, v = (tensor.double() for tensor in site[:3])
    few, grouped = q[:, :, -CHECKED:], heads != kv_heads
    seen = given[-CHECKED:] if given.dtype == torch.bool else given[-CHECKED:].double()
    want = F.scaled_dot_product_attention(few, k, v, seen, scale=site.scale, enable_gqa=grouped)
    errors = errors_of(runs, want, backward=False)
    seconds = interleaved(runs, options.rounds)
    return {
        "mask": name, "n": length, "heads": f"{heads} / {kv_heads}", "dtype": str(dtype)[6:],
        "share": f"{cpu.share(mask[None, None], site.query.shape, site.key.shape):.2f}",
        **{f"{way}, ms": 1e3 * taken for way, taken in seconds.items()},
        "faster": next(iter(seconds.values())) / seconds["read"], "errors": errors,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--heads", type=int, nargs=2, default=[8, 2], metavar=("QUERY", "KV"))
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-flex", action="store_false", dest="flex")
    parser.add_argument("--by-hand", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.set_defaults(backward=False)
    options = parser.parse_args()
    options.out = options.out or RESULTS / ("masks-by-hand-cpu.json" if options.by_hand else "masks-cpu.json")
    rows = []
    for dtype, name, length in product(options.dtypes, options.masks, options.lengths):
        if name == BIAS and not options.by_hand:
            continue
        rows.append(row(name, length, getattr(torch, dtype), options))
        print(rows[-1], flush=True)
    finish(rows, options)


if __name__ == "__main__":
    main()
