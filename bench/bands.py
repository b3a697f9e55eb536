"""Sliding windows and chunks: exact attention of their bands against SDPA with their masks, and FlexAttention.

    python -m bench.bands                    # some minutes; a table and bench/results/bands-cpu.json
    python -m bench.bands --lengths 8192 --dtypes bfloat16
    python -m bench.bands --backward         # forward and backward

Each result is checked before it is timed: its error against float64, on the last queries, may be twice that of SDPA.
All ways run in turn and the medians are told. ``mask`` is what transformers passes to SDPA: as large as length times
length. FlexAttention is compiled, with the mask's block mask; it has no backward on a CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.operands import smooth
from prescore_compile.kernels import banded, ops
from prescore_compile.kernels.band import K, Q
from prescore_compile.kernels.logits import Logits
from prescore_compile.kernels.plan import WHOLE
from prescore_compile.kernels.reference import Operands
from prescore_compile.passes import cost
from prescore_compile.timing import interleaved

RESULTS = Path(__file__).parent / "results" / "bands-cpu.json"
DIM, HEADS, GROUP = 64, 8, 4
CHECKED = 64
Rule = Callable[[Any, Any], Any]
# As in Gemma 3, Mistral, Llama 4 and ModernBERT: the mask beyond causality, whether it is causal, and all of it.
BANDS: dict[str, tuple[Any, bool, Rule]] = {
    "window 512": (K > Q - 512, True, lambda q, k: (k <= q) & (k > q - 512)),
    "window 4096": (K > Q - 4096, True, lambda q, k: (k <= q) & (k > q - 4096)),
    "chunks 2048": (
        sympy.Eq(sympy.floor(K / 2048), sympy.floor(Q / 2048)),
        True,
        lambda q, k: (k <= q) & (k // 2048 == q // 2048),
    ),
    "both sides 64": (sympy.Abs(Q - K) <= 64, False, lambda q, k: (q - k).abs() <= 64),
}


def ways(name: str, site: Operands, flex: bool, backward: bool) -> dict[str, Callable[[], Any]]:
    """What is measured, by its name; the first is exact attention."""
    expr, _, rule = BANDS[name]
    n, group = site.query.shape[2], site.query.shape[1] // site.key.shape[1]
    at = torch.arange(n)
    mask, logits = rule(at[:, None], at), Logits(expr)
    leaves = [tensor.requires_grad_(backward) for tensor in site[:3]]

    def whole(run: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return with_gradients(run, leaves) if backward else run

    found: dict[str, Callable[[], Any]] = {
        "mask": whole(lambda: F.scaled_dot_product_attention(*leaves, mask, scale=site.scale, enable_gqa=group > 1)),
        "band": whole(lambda: ops.prescored(site, WHOLE, logits)),
    }
    if flex:
        found["flex"] = by_flex(site, rule)
    return found


def by_flex(site: Operands, rule: Rule) -> Callable[[], Any]:
    """Compiled FlexAttention, with the block mask of ``rule``, which is made now."""
    torch._dynamo.reset()
    n, grouped = site.query.shape[2], site.query.shape[1] != site.key.shape[1]
    blocks = create_block_mask(lambda _b, _h, q, k: rule(q, k), None, None, n, n, device="cpu")
    run = torch.compile(flex_attention, dynamic=False)
    return lambda: run(*site[:3], block_mask=blocks, scale=site.scale, enable_gqa=grouped)


def check(name: str, site: Operands, runs: dict[str, Callable[[], Any]], backward: bool) -> dict[str, float]:
    """The largest error of each way; raises where it is not rounding."""
    rule, n = BANDS[name][2], site.query.shape[2]
    at = torch.arange(n)
    q, k, v = (tensor.detach().double() for tensor in site[:3])
    few = q[:, :, -CHECKED:]
    want = F.scaled_dot_product_attention(
        few, k, v, rule(at[-CHECKED:, None], at), scale=site.scale, enable_gqa=q.shape[1] > k.shape[1]
    )
    errors = errors_of(runs, want, backward)
    if backward:
        same_gradients(runs["band"], runs["mask"], {torch.float32: 1e-5, torch.bfloat16: 3e-2})
    return errors


def with_gradients(run: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """What ``run`` gives, and the gradients of its sum."""
    return lambda: (out := run(), *torch.autograd.grad(out.sum(), leaves))


def errors_of(runs: Mapping[str, Callable[[], Any]], want: torch.Tensor, backward: bool) -> dict[str, float]:
    """The largest error of each way, on the last queries; raises where it is more than twice that of the first way."""
    errors: dict[str, float] = {}
    usual = next(iter(runs))
    for way, run in runs.items():
        out = run()[0] if backward else run()
        errors[way] = (out.detach()[:, :, -CHECKED:].double() - want).abs().max().item()
        if not errors[way] <= 2 * errors[usual] + 1e-5:
            raise AssertionError(f"wrong result: {way} is off by {errors[way]:.2g}, {usual} by {errors[usual]:.2g}")
    return errors


def same_gradients(run: Callable[[], Any], usual: Callable[[], Any], most: Mapping[torch.dtype, float]) -> None:
    """Raises where gradients differ by more than ``most`` of their dtype, of the largest one."""
    for got, want in zip(run()[1:], usual()[1:], strict=True):
        torch.testing.assert_close(got, want, atol=most[got.dtype] * want.abs().max().item(), rtol=0)


def row(name: str, length: int, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table; ``options``: of the command line."""
    expr, causal, _ = BANDS[name]
    site = smooth(length, HEADS, GROUP, DIM, causal, dtype)
    runs = ways(name, site, options.flex and not options.backward, options.backward)
    errors = check(name, site, runs, options.backward)
    seconds = interleaved(runs, options.rounds)
    keys = banded.keys_a_query(Logits(expr).band(causal))[0]
    kind, narrow = cost.kind("cpu", dtype), dtype.itemsize == 2
    shape = cost.Shape(1, HEADS, HEADS // GROUP, DIM, DIM, causal, kind, band=keys, narrow=narrow)
    expected = cost.at(cost.exact_cost(shape) / cost.prescored_time(shape, WHOLE), length)
    return {
        "band": name, "n": length, "heads": f"{HEADS} / {HEADS // GROUP}", "dtype": str(dtype)[6:],
        **{f"{way}, ms": 1e3 * taken for way, taken in seconds.items()},
        "faster": seconds["mask"] / seconds["band"], "expected": expected, "errors": errors,
    }  # fmt: skip


def told(rows: list[dict[str, Any]]) -> str:
    def cell(name: str, value: Any) -> Any:
        if name in ("faster", "expected"):
            return f"{value:.1f}x"
        return f"{value:.1f}" if isinstance(value, float) else value

    shown = [{name: cell(name, value) for name, value in row.items() if name != "errors"} for row in rows]
    return str(tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True))


def finish(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the table, and keep the rows and what they were measured on."""
    print(told(rows))
    about = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.processor(),
        "cpu": torch.backends.cpu.get_cpu_capability(), "backward": options.backward,
    }  # fmt: skip
    options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--bands", nargs="+", choices=BANDS, default=list(BANDS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-flex", action="store_false", dest="flex")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for dtype, name, length in product(options.dtypes, options.bands, options.lengths):
        width = int(name.split()[-1])
        if width < length:
            rows.append(row(name, length, getattr(torch, dtype), options))
            print(rows[-1], flush=True)
    finish(rows, options)


if __name__ == "__main__":
    main()
