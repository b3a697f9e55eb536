"""Route and attend with masks of pairs, biases and softcaps, interpreted, against torch in double precision."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
import torch.nn.functional as F
from conftest import EVERYTHING, PLANS, check_budget, in_double, operands, rows_in_double, summary_of

from prescore_compile.kernels import coarse, reference
from prescore_compile.kernels.band import B, H, K, Q
from prescore_compile.kernels.logits import NOTHING, Logits, by_chunk
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary
from prescore_compile.kernels.triton import attend_backward as backward
from prescore_compile.kernels.triton.attend import attend
from prescore_compile.kernels.triton.route import route

N = 97
DOCUMENT = torch.arange(N).div(40, rounding_mode="floor").expand(2, N)
T0 = sympy.Function("t0")
WINDOW = Logits(K >= Q - 50)
CAPPED = Logits(K >= Q - 50, softcap=1.5)
NARROW = Logits(K >= Q - 5)  # narrower than the plans' windows
DOCUMENTS = Logits(sympy.Eq(T0(B, Q), T0(B, K)))
ALIBI = Logits(bias=-sympy.Rational(1, 4) * 2 ** (-H / 2) * (Q - K), softcap=2.0)
KERPLE = Logits(bias=-sympy.log(1 + sympy.Abs(Q - K)) / 2)
NEAR = Logits(bias=sympy.exp(-sympy.Abs(Q - K)))
HIDDEN = Logits(sympy.And(T0(B, Q) > 0, K >= Q - 50))  # the queries of the first document have no key


pytestmark = pytest.mark.usefixtures("poisoned")


def small(dtype: torch.dtype = torch.float32, causal: bool = True, heads: int = 2, kv_heads: int = 1) -> Operands:
    return operands(N, batch=1, heads=heads, kv_heads=kv_heads, dim=20, causal=causal, dtype=dtype)


def tensors(logits: Logits) -> dict[str, torch.Tensor]:
    return dict.fromkeys(logits.tensors, DOCUMENT)


def routed(site: Operands, summary: Summary, plan: Plan, logits: Logits) -> torch.Tensor:
    known = by_chunk(logits, tensors(logits), plan.chunk)
    return route(site.query, summary, plan, site.causal, site.key.shape[2], site.scale, logits.reach, known)


def attended(
    site: Operands, summary: Summary, routes: torch.Tensor, plan: Plan, logits: Logits
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result and the gradients of query, key, value, row_key, row_value for a gradient of ones."""
    more = tensors(logits)
    out, sums = attend(site, summary, routes, plan, logits.lifted, **more, softcap=logits.softcap)
    grad = torch.ones_like(out)
    given = (grad, out, sums, site, summary, routes, plan, logits.lifted)
    return out, list(backward.attend_backward(*given, **more, softcap=logits.softcap))


@pytest.mark.parametrize(
    ("logits", "plan", "dtype"),
    [
        (CAPPED, PLANS["keep and routes"], torch.float32),
        (CAPPED, PLANS["routes"], torch.float16),
        (NARROW, PLANS["routes"], torch.float32),
        (DOCUMENTS, PLANS["two levels"], torch.float32),
        (ALIBI, PLANS["keep and routes"], torch.float32),
        (KERPLE, PLANS["routes"], torch.float32),
        (NEAR, PLANS["routes"], torch.float32),
        (HIDDEN, PLANS["keep"], torch.float32),
    ],
)
def test_route_and_attend(logits: Logits, plan: Plan, dtype: torch.dtype) -> None:
    site = small(dtype)
    summary = summary_of(site, plan)
    routes = torch.empty(1, 2, N, 0, dtype=torch.int32)
    if plan.routes:
        routes = routed(site, summary, plan, logits)
        want = coarse.route(site.query, summary, plan, True, N, site.scale, logits, tensors(logits))
        assert torch.equal(routes >= 0, want >= 0)
        # Where rounding decides between nearly equal scores; queries of 16 bits meet rounded representatives.
        assert (routes != want).any(3).float().mean() < (0.02 if dtype == torch.float32 else 0.2)
    out, got = attended(site, summary, routes, plan, logits)
    more = (routes, plan, logits, tensors(logits))
    true = reference.attend(in_double(site), rows_in_double(summary), *more)
    check_budget(out, reference.attend(site, summary, *more), true)
    ones = torch.ones_like(out)
    low = reference.attend_backward(ones, site, summary, *more)
    gradients = reference.attend_backward(ones.double(), in_double(site), rows_in_double(summary), *more)
    for g, lo, t in zip(got, low, gradients, strict=True):
        if g.numel():  # twice the forward's budget: what is multiplied was rounded before
            band = torch.finfo(dtype).eps * t.abs().max().clamp(min=1)
            assert (g.double() - t).abs().max() <= 4 * ((lo.double() - t).abs().max() + band)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("logits", [CAPPED, DOCUMENTS])
def test_a_plan_that_keeps_everything_is_exact(logits: Logits, causal: bool) -> None:
    plan, site = EVERYTHING["routes"], small(causal=causal)
    summary = summary_of(site, plan)
    out, _ = attended(site, summary, routed(site, summary, plan, logits), plan, logits)
    q, k = torch.arange(N)[:, None], torch.arange(N)
    mask = (k >= q - 50) if logits is CAPPED else (DOCUMENT[0][q] == DOCUMENT[0][k])
    mask = mask & (k <= q) if causal else mask
    exact = in_double(site)
    if not logits.softcap:
        want = F.scaled_dot_product_attention(*exact[:3], attn_mask=mask, scale=site.scale, enable_gqa=True)
    else:
        found = exact.query @ exact.key.mT * site.scale
        found = (logits.softcap * torch.tanh(found / logits.softcap)).masked_fill(~mask, -math.inf)
        want = found.softmax(3) @ exact.value
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)


def test_a_mask_that_is_always_true_is_none() -> None:
    plan, site = PLANS["keep and routes"], small()
    summary = summary_of(site, plan)
    results = []
    for logits in (NOTHING, Logits(K <= Q + N), Logits(K <= Q)):  # the last says again that the site is causal
        routes = routed(site, summary, plan, logits)
        out, gradients = attended(site, summary, routes, plan, logits)
        results.append((routes, out, *gradients))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_mask_that_is_the_causal_form_is_the_built_in() -> None:
    plan = EVERYTHING["window"]
    causal, masked = small(causal=True), small(causal=False)
    masked = causal._replace(causal=False)
    routes = torch.empty(1, 2, N, 0, dtype=torch.int32)
    want, wanted = attended(causal, summary_of(causal, plan), routes, plan, NOTHING)
    got, gradients = attended(masked, summary_of(masked, plan), routes, plan, Logits(K <= Q))
    for a, b in zip((got, *gradients[:3]), (want, *wanted[:3]), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_a_query_without_keys_gives_0() -> None:
    """As F.scaled_dot_product_attention does; and no gradient that is not a number."""
    plan, site = PLANS["keep and routes"], small()
    summary = summary_of(site, plan)
    out, gradients = attended(site, summary, routed(site, summary, plan, HIDDEN), plan, HIDDEN)
    assert (out[:, :, :40] == 0).all() and out[:, :, 40:].abs().amin(3).gt(0).all()
    assert (gradients[0][:, :, :40] == 0).all() and all(g.isfinite().all() for g in gradients)
