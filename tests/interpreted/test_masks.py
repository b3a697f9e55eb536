"""Lifted masks, biases and softcaps in the generated kernels, against the same written in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from conftest import PLANS, operands, routes_of, summary_of

from prescore_compile.kernels import reference
from prescore_compile.kernels.layout import TILE, spans
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.triton import attend_backward as backward
from prescore_compile.kernels.triton import key_major, options, union
from prescore_compile.kernels.triton.attend import attend
from prescore_compile.kernels.triton.maths import lifted, triton_text

B, H, Q, K = sympy.symbols("b h q k", integer=True, nonnegative=True)
DOCUMENT, KEEP = sympy.Function("document"), sympy.Function("keep")
LENGTH = 90
TENSORS = {
    "document": torch.arange(LENGTH).div(25, rounding_mode="floor").expand(2, LENGTH),
    "keep": torch.arange(LENGTH).remainder(7).ne(3).expand(2, LENGTH),
}

# What is allowed, what is added, and the same in torch; document and keep are TENSORS.
Torch = Callable[..., Any]
MASKS: dict[str, tuple[Any, Any, Torch, Torch]] = {
    "sliding window": (K > Q - 20, 0, lambda b, h, q, k: k > q - 20, lambda b, h, q, k: 0.0),
    "chunked": (
        sympy.Eq(sympy.floor(K / 24), sympy.floor(Q / 24)),
        0,
        lambda b, h, q, k: k // 24 == q // 24,
        lambda b, h, q, k: 0.0,
    ),
    "prefix": (sympy.Or(K <= Q, K < 13), 0, lambda b, h, q, k: (k <= q) | (k < 13), lambda b, h, q, k: 0.0),
    "documents": (
        sympy.And(sympy.Eq(DOCUMENT(B, Q), DOCUMENT(B, K)), sympy.Ne(KEEP(B, K), 0)),
        0,
        lambda b, h, q, k: (TENSORS["document"][b, q] == TENSORS["document"][b, k]) & TENSORS["keep"][b, k],
        lambda b, h, q, k: 0.0,
    ),
    "alibi": (
        sympy.true,
        sympy.Rational(-1, 2) * 2 ** (-H / 2) * sympy.Abs(Q - K),
        lambda b, h, q, k: k >= 0,
        lambda b, h, q, k: -0.5 * 2 ** (-h / 2) * (q - k).abs(),
    ),
    "remainder": (
        sympy.Ne(sympy.Mod(K - Q, 3), 1),
        sympy.Piecewise((sympy.Rational(1, 4), K > Q), (0, True)),
        lambda b, h, q, k: (k - q) % 3 != 1,
        lambda b, h, q, k: (k > q) * 0.25,
    ),
}


def by_definition(
    site: Operands, plan: Plan, choice: tuple[Any, torch.Tensor], allowed: Torch, bias: Torch, softcap: float
) -> torch.Tensor:
    """Attention over the pairs that the reference attends and the mask allows; differentiable."""
    summary, routes = choice
    batch, heads, q_len, _ = site.query.shape
    group = heads // site.key.shape[1]
    tiles = []
    for span in spans(plan, site.causal, q_len, site.key.shape[2], TILE):
        b, h, q = torch.meshgrid(
            torch.arange(batch), torch.arange(heads), torch.arange(span.begin, span.end), indexing="ij"
        )
        b, h, q = b[..., None], h[..., None], q[..., None]
        index = summary.row_index.long().clamp(min=0).repeat_interleave(group, 1)[:, :, None]
        query = site.query[:, :, span.begin : span.end]
        logits, values = [], []
        with torch.no_grad():
            weights = reference.attention_weights(site, summary, routes, plan, span, None)
        places = (torch.arange(site.key.shape[2]).view(1, 1, 1, -1), index)
        for weight, k, key, value in zip(
            weights, places, (site.key, summary.row_key), (site.value, summary.row_value), strict=True
        ):
            found = query @ key.repeat_interleave(group, 1).mT * site.scale
            if softcap:
                found = softcap * torch.tanh(found / softcap)
            found = found + bias(b, h, q, k)
            logits.append(found.masked_fill(~((weight > 0) & allowed(b, h, q, k)), -torch.inf))
            values.append(value.repeat_interleave(group, 1))
        probability = torch.softmax(torch.cat(logits, 3), 3).nan_to_num()
        tiles.append(probability @ torch.cat(values, 2))
    return torch.cat(tiles, 2)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(union, "SORTED_ON_CHIP", 0)
    monkeypatch.setattr(key_major, "SINK_SPLITS", 2)
    for table in (options.FORWARD, options.BACKWARD):  # large tiles: few programs
        monkeypatch.setitem(table, ("cuda", True, 64), (64, 64, 4, 1))


@pytest.mark.parametrize(
    ("name", "plan", "causal", "softcap"),
    [
        ("sliding window", PLANS["keep and routes"], True, 0.0),
        ("chunked", PLANS["routes"], False, 0.0),
        ("prefix", Plan(window=None, sinks=0, routes=0), False, 0.0),
        ("documents", PLANS["keep and routes"], True, 0.0),
        ("alibi", PLANS["keep and routes"], True, 1.5),
        ("remainder", PLANS["streaming"], False, 0.0),
        ("prefix", PLANS["streaming"], False, 1e6),  # the logits stay, to their last bits
    ],
)
def test_masks(name: str, plan: Plan, causal: bool, softcap: float) -> None:
    expr, added, allowed, bias = MASKS[name]
    site = operands(LENGTH, causal=causal, batch=1 + (name == "documents"))
    mask = lifted(expr, added)
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    more = {tensor: TENSORS[tensor] for tensor, _ in mask.loads}
    out, sums = attend(site, summary, routes, plan, mask, **more, softcap=softcap)
    leaves = [tensor.double().requires_grad_() for tensor in (*site[:3], summary.row_key, summary.row_value)]
    wide = site._replace(query=leaves[0], key=leaves[1], value=leaves[2])
    rows = summary._replace(row_key=leaves[3], row_value=leaves[4])
    want = by_definition(wide, plan, (rows, routes), allowed, bias, softcap)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    grad = torch.randn_like(out)
    got = backward.attend_backward(grad, out, sums, site, summary, routes, plan, mask, **more, softcap=softcap)
    for g, w in zip(got, torch.autograd.grad(want, leaves, grad.double(), allow_unused=True), strict=True):
        torch.testing.assert_close(g.double(), torch.zeros_like(g).double() if w is None else w, atol=5e-6, rtol=1e-4)


def test_division_rounds_down() -> None:
    """Triton's rounds towards 0: what may be negative is written out."""
    assert triton_text(sympy.floor(K / 8)) == "(k // 8)"
    below = triton_text(sympy.floor((Q - K) / 8))
    assert below == "(((-k + q) - ((((-k + q) % 8) + 8) % 8)) // 8)"


@pytest.mark.parametrize(
    ("expr", "message"),
    [
        (sympy.sin(K) > 0, r"got sin\(k\)"),
        (sympy.Symbol("n") > K, "got the symbol n; allowed: b, h, q, k"),
        (sympy.And(DOCUMENT(K) > 0, DOCUMENT(B, K) > 0), "document with"),
    ],
)
def test_what_cannot_be_printed_is_a_clear_error(expr: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lifted(expr)


def test_a_tensor_that_is_missing_is_a_clear_error() -> None:
    site, plan = operands(40), PLANS["streaming"]
    summary = summary_of(site, plan)
    with pytest.raises(ValueError, match="keep: got nothing; allowed: a tensor of 2 axes"):
        attend(site, summary, routes_of(site, summary, plan), plan, lifted(sympy.Ne(KEEP(B, K), 0)))
    with pytest.raises(ValueError, match="centroids"):
        attend(site, summary, routes_of(site, summary, plan), PLANS["centroids"], lifted(K > 3))
