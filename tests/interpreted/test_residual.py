"""The residual in the generated kernels: centroids of what a query does not route to, against the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from conftest import in_double, operands, rows_in_double
from test_attend import _bfloat16_products, check, check_gradients, check_gradients_of_a_tail, parts  # noqa: F401

from prescore_compile.kernels import centroids as stated
from prescore_compile.kernels import ops, reference, routing
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.triton import attend_backward as backward
from prescore_compile.kernels.triton import options, residual
from prescore_compile.kernels.triton.attend import attend, spec_of
from prescore_compile.kernels.triton.maths import lifted

BOTH = Plan(chunk=32, window=0, sinks=1, routes=2, residual=True)
TWO_SIDED = replace(BOTH, window=20)
WIDE = Plan(chunk=64, window=0, sinks=3, cluster=32, routes=1, residual=True)
K = sympy.Symbol("k", integer=True, nonnegative=True)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("plan", [BOTH, WIDE])
def test_centroids_are_those_stated(plan: Plan, dtype: torch.dtype) -> None:
    site = operands(135, padded=True, dim=20, value_dim=33, dtype=dtype)
    site = site._replace(key=site.key.transpose(1, 2).contiguous().transpose(1, 2))
    summary, routes = parts(site, plan)
    got = residual.centroids(spec_of(site, plan), site, summary)
    want = stated.centroids(site.key, site.value, summary.order, plan.cluster)
    eps = torch.finfo(dtype).eps
    for name, w in (("rest_key", want.key), ("rest_value", want.value), ("rest_bias", want.bias)):
        torch.testing.assert_close(got[name], w, atol=4 * eps, rtol=4 * eps)
    assert (got["rest_bias"] == -math.inf).any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("plan", [BOTH, TWO_SIDED, WIDE])
def test_bidirectional(plan: Plan, padded: bool) -> None:
    site = operands(101, causal=False, padded=padded, dim=24, value_dim=40, batch=1 + padded)
    check(site, plan)
    check_gradients(site, plan)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [16, 64])
def test_many_blocks_of_clusters(keys: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More clusters than a step has, and than a word has bits."""
    for table in (options.FORWARD, options.BACKWARD):
        monkeypatch.setitem(table, ("cuda", True, 64), (64, keys, 4, 1))
    site = operands(620 if keys == 64 else 300, causal=causal, batch=1, heads=1, kv_heads=1, dim=8, value_dim=8)
    check(site, replace(BOTH, routes=5))
    check_gradients(site, replace(BOTH, routes=5))


@pytest.mark.parametrize("causal", [False, True])
def test_a_step_may_have_a_part_of_a_cluster(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (options.FORWARD, options.BACKWARD):
        monkeypatch.setitem(table, ("cuda", True, 64), (64, 16, 4, 1))
    site = operands(150, causal=causal, padded=True, batch=1, heads=2, kv_heads=1)
    for plan in (WIDE, replace(WIDE, cluster=WIDE.chunk)):
        check(site, plan)
        check_gradients(site, plan)


def test_more_routes_than_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, site = replace(BOTH, routes=5), operands(150, batch=1, causal=False)
    summary, routes = parts(site, plan)
    out, sums = attend(site, summary, routes, plan)
    held = (out, sums, *backward.attend_backward(out, out, sums, site, summary, routes, plan))
    monkeypatch.setattr(residual, "HELD", 2)
    out, sums = attend(site, summary, routes, plan)
    read = (out, sums, *backward.attend_backward(out, out, sums, site, summary, routes, plan))
    assert all(torch.equal(h, r) for h, r in zip(held, read, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_where_every_cluster_is_routed_to_there_is_no_residual(causal: bool) -> None:
    every = replace(BOTH, routes=10**6)
    site = operands(110, causal=causal, padded=True)
    summary, routes = parts(site, every)
    found = []
    for plan in (every, replace(every, residual=False)):
        out, sums = attend(site, summary, routes, plan)
        found.append((out, sums, *backward.attend_backward(out, out, sums, site, summary, routes, plan)))
    for with_residual, without in zip(*found, strict=True):
        assert torch.equal(with_residual, without)


@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_hidden(bad: float, what: str) -> None:
    """Also where more clusters than routes are not finite: then it stands in a centroid."""
    site = operands(150, batch=1)
    for at in (40, 70, 100, 101, 102, 103):
        getattr(site, what)[0, 1, at, 5] = bad
    out = attend(site, *parts(site, BOTH), BOTH)[0]
    assert torch.isfinite(out[:, :, :40]).all() and torch.isfinite(out[:, :2]).all()
    lost = ~torch.isfinite(reference.attend(site, *parts(site, BOTH), BOTH)).all(3)
    assert lost.any() and not torch.isfinite(out).all(3)[lost].any()


def test_a_mean_that_overflows_reaches_those_that_attend_it() -> None:
    """Keys and values are finite, so that what routes there is too."""
    site = operands(96, batch=1, heads=1, kv_heads=1, causal=False)
    summary, _ = parts(site, BOTH)
    site.value[0, 0, summary.order[0, 0, 32:48].long(), 3] = 2.2e37
    routes = torch.tensor([2, 3], dtype=torch.int32).repeat(1, 1, 96, 1)
    routes[:, :, 50:] = torch.tensor([3, 4], dtype=torch.int32)
    out = attend(site, summary, routes, BOTH)[0]
    assert torch.isfinite(out[:, :, :50]).all() and out[:, :, 50:].isnan().all()


def test_two_levels() -> None:
    plan = replace(BOTH, coarse=2)
    check(operands(150, batch=1, causal=False), plan)


@pytest.mark.usefixtures("_bfloat16_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    for causal in (False, True):
        check(operands(130, dtype=dtype, batch=1, causal=causal), BOTH)
    check_gradients(operands(100, dtype=dtype, batch=1, causal=False), BOTH)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 1), (8, 2)])
def test_mha_gqa_mqa(heads: int, kv_heads: int) -> None:
    for causal in (False, True):
        site = operands(70, heads=heads, kv_heads=kv_heads, batch=1, causal=causal)
        check(site, BOTH)
        check_gradients(site, BOTH)


@pytest.mark.parametrize("padded", [False, True])
def test_few_queries_continue_a_cache(padded: bool) -> None:
    full = operands(150, batch=1 + padded, padded=padded)
    tail = full._replace(query=full.query[:, :, 146:])
    summary, _ = parts(full, BOTH)
    routes = routing.route(tail.query, summary, BOTH, True, 150, tail.scale)
    assert spec_of(tail, BOTH).splits > 1
    out, _ = attend(tail, summary, routes, BOTH)
    want = reference.attend(in_double(tail), rows_in_double(summary), routes, BOTH)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    check_gradients_of_a_tail(tail, summary, routes, BOTH)


def test_padding_may_hold_anything() -> None:
    site = operands(120, padded=True, causal=False)
    want = attend(site, *parts(site, BOTH), BOTH)
    hidden = ~site.valid[:, None, :, None]
    dirty = site._replace(key=site.key.masked_fill(hidden, math.nan), value=site.value.masked_fill(hidden, math.inf))
    assert all(torch.equal(g, w) for g, w in zip(attend(dirty, *parts(dirty, BOTH), BOTH), want, strict=True))


def test_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake tensors and autograd, with the kernels that a GPU would run."""
    monkeypatch.setattr(ops.dispatch, "generated", lambda *given: True)
    site = operands(80, batch=1, causal=False)
    summary, routes = parts(site, BOTH)
    leaves = (*site[:3], summary.row_key, summary.row_value)
    for tensor in leaves:
        tensor.requires_grad_()
    args = (*site[:4], summary.order, routes, *summary[4:], BOTH.text, False, site.scale, "", [], None)
    tests: Any = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.attend_forward, args, test_utils=tests)
    got = torch.autograd.grad(ops.attend(*args).square().sum(), leaves)
    monkeypatch.setattr(ops.dispatch, "generated", lambda *given: False)
    want = torch.autograd.grad(ops.attend(*args).square().sum(), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)


def test_a_mask_of_pairs_is_a_clear_error() -> None:
    site = operands(40)
    summary, routes = parts(site, BOTH)
    for more in (dict(lifted=lifted(K > 3)), dict(softcap=5.0)):
        with pytest.raises(ValueError, match="residual: got True; allowed: False"):
            attend(site, summary, routes, BOTH, **more)
