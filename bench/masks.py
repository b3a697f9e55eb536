"""Masks that are read as they come: exact attention that skips what they hide, against SDPA, and FlexAttention.

    python -m bench.masks                    # some minutes; a table and bench/results/masks-cpu.json
    python -m bench.masks --heads 8 8        # as many KV heads as query heads
    python -m bench.masks --by-hand          # numbers that are added, by what writes attention out

Each result is checked before it is timed: its error against float64, on the last queries, may be twice that of SDPA.
All ways run in turn and the medians are told. ``read`` has the mask alone, as SDPA has, and finds out each time what it
hides; ``by its mask``, where that is no more than causality and valid keys, attends by the default plan of such a site,
to the bit as where that was known before; FlexAttention is compiled, with a block mask of the same mask that was made
before. By hand is transformers' ``eager_attention_forward``, compiled by Inductor, in which all numbers are added.
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

from bench.bands import CHECKED, by_flex, errors_of, finish
from bench.operands import smooth
from prescore_compile.kernels import cpu, masked, ops
from prescore_compile.kernels.logits import parse
from prescore_compile.kernels.plan import WHOLE
from prescore_compile.kernels.reads import reads_of
from prescore_compile.kernels.reference import Operands
from prescore_compile.passes.defaults import CAUSAL, TWO_SIDED
from prescore_compile.timing import interleaved

RESULTS = Path(__file__).parent / "results"
DIM = 64
READ = parse("softcap 0.0; add 0; where Ne(t00(0, 0, q, k), 0)")
ADDED = parse("softcap 0.0; add t00(0, 0, q, k); where True")
TWICE = parse("softcap 0.0; add t00(0, 0, q, k) + t01(0, 0, 0, k); where True")
BIAS, PADDED_BIAS = "a bias, causal", "a bias, and padded keys"


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
    PADDED_BIAS: lambda q, k: (q >= 0) & (k >= 100),
}


def numbers(name: str, mask: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """What is added to logits instead of the mask, ``[1, 1, n or 1, n]`` each."""

    def lowest(allowed: torch.Tensor) -> torch.Tensor:
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[None, None]

    if name == PADDED_BIAS:
        return [torch.randn(1, 1, *mask.shape, dtype=dtype), lowest(mask[:1])]
    return [lowest(mask) + torch.randn(mask.shape, dtype=dtype) if name == BIAS else lowest(mask)]


def by_hand(site: Operands, *given: torch.Tensor) -> torch.Tensor:
    """``eager_attention_forward`` of transformers; ``given``: what is added to the logits."""
    query, key, value = site[:3]
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    logits = query @ key.mT * site.scale
    for mask in given:
        logits = logits + mask
    return logits.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def ways(site: Operands, given: list[torch.Tensor], flex: bool) -> dict[str, Callable[[], Any]]:
    """What is measured, by its name; the first is exact attention. ``given``: a mask of bools, or numbers."""
    grouped = site.query.shape[1] != site.key.shape[1]
    if given[0].dtype != torch.bool:
        torch._dynamo.reset()
        compiled, logits = torch.compile(by_hand, dynamic=False), TWICE if len(given) == 2 else ADDED
        return {
            "by hand": partial(compiled, site, *given),
            "read": partial(ops.prescored, site, WHOLE, logits, dict(zip(logits.tensors, given, strict=True))),
        }
    (mask,) = given
    found: dict[str, Callable[[], Any]] = {
        "SDPA": partial(
            F.scaled_dot_product_attention, *site[:3], mask, scale=site.scale, enable_gqa=grouped
        ),
        "read": partial(ops.prescored, site, WHOLE, READ, {"t00": mask}),
    }  # fmt: skip
    if flex:
        found["flex"] = by_flex(site, lambda q, k: mask[0, 0, q, k])
    return found


def by_its_mask(site: Operands, mask: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """One way more where the mask turns out to be one that a plan goes with; raises where the result is another."""
    found = masked.recognized(site, masked.see(reads_of(READ) or [], {"t00": mask}, site.query.dtype))
    if found is None:
        return {}
    run = partial(ops.attend_recognized, *site[:3], site.scale, READ.text, [mask], None, CAUSAL.text, TWO_SIDED.text)
    if not torch.equal(run(), ops.prescored(found, CAUSAL if found.causal else TWO_SIDED)):
        raise AssertionError("wrong result: by its mask is not what its plan gives")
    return {"by its mask": run}


@torch.no_grad()
def row(name: str, length: int, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table; ``options``: of the command line."""
    heads, kv_heads = options.heads
    site = smooth(length, heads, heads // kv_heads, DIM, False, dtype)
    at = torch.arange(length)
    mask = MASKS[name](at[:, None], at[None])
    given = numbers(name, mask, dtype) if options.by_hand else [mask[None, None]]
    runs = ways(site, given, options.flex)
    q, k, v = (tensor.double() for tensor in site[:3])
    few, grouped = q[:, :, -CHECKED:], heads != kv_heads
    rows = [one[:, :, -CHECKED:] for one in given]
    seen = sum(one.double() for one in rows) if options.by_hand else rows[0]
    want = F.scaled_dot_product_attention(few, k, v, seen, scale=site.scale, enable_gqa=grouped)
    errors = errors_of(runs, want, backward=False)
    runs |= {} if options.by_hand else by_its_mask(site, *given)
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
        if name in (BIAS, PADDED_BIAS) and not options.by_hand:
            continue
        rows.append(row(name, length, getattr(torch, dtype), options))
        print(rows[-1], flush=True)
    finish(rows, options)


if __name__ == "__main__":
    main()
