"""Learned attention sinks in the generated kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import PLANS, check_budget, in_double, operands, routes_of, rows_in_double, summary_of

from prescore_compile.kernels import ops, reference
from prescore_compile.kernels.band import K, Q
from prescore_compile.kernels.logits import Logits
from prescore_compile.kernels.plan import WHOLE
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.triton import attend as generated
from prescore_compile.kernels.triton import attend_backward as backward
from prescore_compile.kernels.triton import mass

N = 150
WINDOW = Logits(K >= Q - 20)

pytestmark = pytest.mark.usefixtures("poisoned")


def sunk(per_query: bool, **how: Any) -> Operands:
    """A sink of each head, seen as one of each query, or one that each query has of its own."""
    site = operands(N, **how)
    batch, heads = site.query.shape[:2]
    size = (batch, heads, N) if per_query else (1, heads, 1)
    return site._replace(sink_logit=(2 * torch.randn(size, dtype=site.query.dtype)).expand(batch, heads, N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["residual", "keep and routes", "centroids", "band"])
def test_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    plan, logits = (WHOLE, WINDOW) if name == "band" else (PLANS[name], Logits())
    site = sunk(name != "band", padded=True, heads=6, kv_heads=2, dim=20, value_dim=24, dtype=dtype)
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan) if plan.routes else torch.empty(2, 6, N, 0, dtype=torch.int32)
    grad = torch.randn(2, 6, N, 24, dtype=dtype)
    out, sums = generated.attend(site, summary, routes, plan, logits.lifted)
    grads = backward.attend_backward(grad, out, sums, site, summary, routes, plan, logits.lifted)
    assert len(grads) == 6 and grads[5].shape == (2, 6, N)
    found = []
    for where, rows, of_out in ((site, summary, grad), (in_double(site), rows_in_double(summary), grad.double())):
        given = (where, rows, routes, plan, logits)
        found.append([reference.attend(*given), *reference.attend_backward(of_out, *given)])
    for got, low, true in zip([out, *grads], *found, strict=True):
        if got.numel():  # gradients: what is multiplied was rounded before
            check_budget(got.to(dtype), low.to(dtype), true, times=4)


def test_few_queries() -> None:
    """Programs that share the keys of a tile: the sink is counted once."""
    plan, full = PLANS["keep and routes"], sunk(True, batch=1)
    tail = full._replace(query=full.query[:, :, 147:], sink_logit=full.sink_logit[:, :, 147:])
    summary = summary_of(full, plan)
    routes = routes_of(tail, summary, plan)
    out, sums = generated.attend(tail, summary, routes, plan)
    assert generated.spec_of(tail, plan).splits > 1
    whole = generated.attend(full, summary, routes_of(full, summary, plan), plan)
    torch.testing.assert_close(out, whole[0][:, :, 147:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums, whole[1][:, :, 147:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["share", "together"])
def test_mass(name: str) -> None:
    plan, site = PLANS[name], sunk(False, padded=True)
    summary = summary_of(site, plan)
    torch.testing.assert_close(
        mass.mass(site, summary, plan), reference.mass(site, summary, plan), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("logit", [float("-inf"), float("inf"), float("nan"), torch.finfo(torch.float32).max])
def test_one_that_is_not_finite_or_hardly(logit: float) -> None:
    """-inf is none; inf and NaN make their query, and no other, NaN; the largest number makes it 0."""
    plan, site = PLANS["residual"], sunk(True)
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    base = generated.attend(site, summary, routes, plan)[0]
    site.sink_logit[1, 2, 70] = logit
    out = generated.attend(site, summary, routes, plan)[0]
    if logit == float("-inf"):
        none = generated.attend(site._replace(sink_logit=None), summary, routes, plan)[0]
        torch.testing.assert_close(out[1, 2, 70], none[1, 2, 70])
    else:
        largest = logit == torch.finfo(torch.float32).max
        assert (out[1, 2, 70] == 0).all() if largest else out[1, 2, 70].isnan().all()
    out[1, 2, 70] = base[1, 2, 70]
    assert torch.equal(out, base)


def test_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake tensors and gradients, with the kernels that a GPU would run."""
    monkeypatch.setattr(ops.dispatch, "generated", lambda *given: True)
    plan, site = PLANS["together"], sunk(False, batch=1)
    summary = [part.detach() for part in summary_of(site, plan)]
    sink = site.sink_logit.contiguous()
    leaves = [tensor.requires_grad_() for tensor in (*site[:3], summary[6], summary[7], sink)]
    more = (plan.text, True, site.scale, "", [])
    near = ops.mass(*site[:2], None, *summary[4:], *more, sink)
    routes = ops.route(site.query, *summary[:4], plan.text, True, N, site.scale, "", [], near)
    args = (*site[:3], None, summary[0], routes, *summary[4:], *more, sink)
    tests: Any = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.attend_forward, args, test_utils=tests)
    got = torch.autograd.grad(ops.attend(*args).square().sum(), leaves)
    monkeypatch.setattr(ops.dispatch, "generated", lambda *given: False)
    want = torch.autograd.grad(ops.attend(*args).square().sum(), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)
