"""The generated attend kernel, forward and backward, against the reference in double precision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import EVERYTHING, PLANS, check_budget, in_double, operands, routes_of, rows_in_double, summary_of

from prescore_compile.kernels import ops, reference
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary
from prescore_compile.kernels.triton import attend_backward as backward
from prescore_compile.kernels.triton import options, union
from prescore_compile.kernels.triton.attend import attend

SOME = PLANS["keep and routes"]
# How routes were chosen is no concern of attend.
ATTENDED = [name for name, plan in PLANS.items() if not (plan.coarse or plan.share)]  # of which attend knows nothing


pytestmark = pytest.mark.usefixtures("poisoned")


def parts(site: Operands, plan: Plan) -> tuple[Summary, torch.Tensor]:
    summary = summary_of(site, plan)
    return summary, routes_of(site, summary, plan)


def check(site: Operands, plan: Plan, found: tuple[Summary, torch.Tensor] | None = None) -> None:
    summary, routes = found or parts(site, plan)
    out, _ = attend(site, summary, routes, plan)
    assert out.dtype == site.query.dtype and out.transpose(1, 2).is_contiguous()
    true = reference.attend(in_double(site), rows_in_double(summary), routes, plan)
    check_budget(out, reference.attend(site, summary, routes, plan), true)


def check_gradients(
    site: Operands, plan: Plan, found: tuple[Summary, torch.Tensor] | None = None, least: float = 1.0
) -> None:
    """Twice the forward's budget: what is multiplied was rounded before, and sums of signs cancel.

    ``least``: of what terms are rounded, where all of them cancel.
    """
    summary, routes = found or parts(site, plan)
    out, sums = attend(site, summary, routes, plan)
    grad = torch.randn_like(out)
    got = backward.attend_backward(grad, out, sums, site, summary, routes, plan)
    low = reference.attend_backward(grad, site, summary, routes, plan)
    true = reference.attend_backward(grad.double(), in_double(site), rows_in_double(summary), routes, plan)
    for name, g, lo, t in zip(("query", "key", "value", "row_key", "row_value"), got, low, true, strict=True):
        if g.numel():
            band = torch.finfo(site.query.dtype).eps * t.abs().max().clamp(min=least)
            error, budget = (g.double() - t).abs().max(), 4 * ((lo.double() - t).abs().max() + band)
            assert error <= budget, f"{name}: error {error:.3g}, budget {budget:.3g}"


@pytest.mark.parametrize(("causal", "padded"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("name", ATTENDED)
def test_forward(name: str, causal: bool, padded: bool) -> None:
    check(operands(110, causal=causal, padded=padded, dim=24, value_dim=40, batch=1 + padded), PLANS[name])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ATTENDED)
def test_backward(name: str, causal: bool) -> None:
    check_gradients(operands(90, causal=causal, padded=causal, dim=16, value_dim=24, batch=1), PLANS[name])


def test_the_same_input_gives_the_same_bits() -> None:
    site = operands(70, batch=1)
    summary, routes = parts(site, SOME)
    out, sums = attend(site, summary, routes, SOME)
    first, second = (backward.attend_backward(out, out, sums, site, summary, routes, SOME) for _ in range(2))
    assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True))


@pytest.mark.parametrize("length", [1, 17, 64])
def test_any_length(length: int) -> None:
    check(operands(length, batch=1), SOME)
    check_gradients(operands(length, batch=1, causal=False), SOME)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [name for name, plan in EVERYTHING.items() if not plan.coarse])
def test_a_plan_that_covers_every_key_is_exact(name: str, causal: bool) -> None:
    plan = EVERYTHING[name]
    if name == "rows" and not causal:
        plan = Plan(chunk=256, window=0, sinks=4, routes=0, keep=256)
    site = operands(110, causal=causal, padded=True)
    out, sums = attend(site, *parts(site, plan), plan)
    check_budget(out, reference.exact(site), reference.exact(in_double(site)))
    logits = site.query.double() @ site.key.double().repeat_interleave(2, 1).mT * site.scale
    seen = site.valid[:, None, None].expand_as(logits)
    if causal:
        seen = seen & torch.ones(110, 110, dtype=torch.bool).tril()
    want = logits.masked_fill(~seen, -math.inf).logsumexp(3)
    torch.testing.assert_close(sums.double(), want.masked_fill(want == -math.inf, math.inf), atol=1e-5, rtol=1e-5)


@pytest.fixture
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as 16-bit integers and multiplies those: give it the numbers."""
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    product = interpreter.InterpreterBuilder.create_dot

    def number(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, number(a), number(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("_bfloat16_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    for plan in (SOME, PLANS["centroids"]):
        check(operands(130, dtype=dtype, batch=1), plan)
    check_gradients(operands(100, dtype=dtype, batch=1), SOME)


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (33, 65), (80, 80), (128, 16), (256, 256)])
def test_any_head_dim(dim: int, value_dim: int) -> None:
    site = operands(50, dim=dim, value_dim=value_dim, batch=1)
    check(site, SOME)
    check_gradients(site, SOME)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (8, 2)])
def test_mha_gqa_mqa(heads: int, kv_heads: int) -> None:
    site = operands(70, heads=heads, kv_heads=kv_heads, batch=1)
    check(site, SOME)
    check_gradients(site, SOME)
    check(site._replace(causal=False), PLANS["streaming"])


@pytest.mark.parametrize(("name", "causal"), [("keep and routes", True), ("residual", False)])
def test_more_heads_than_a_tile_has_rows(name: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nineteen share a KV head: ten are in one tile, nine in another."""
    for table in (options.FORWARD, options.BACKWARD):
        monkeypatch.setitem(table, ("cuda", True, 64), (16, 32, 4, 1))
    plan = replace(PLANS[name], method="norm", chunk=16, window=0, routes=2)
    site = operands(36, causal=causal, heads=19, kv_heads=1, batch=1, padded=True)
    check_gradients(site, plan)
    site = operands(36, causal=causal, heads=38, kv_heads=2, batch=1)
    check(site._replace(query=site.query[:, :, -2:]), plan)  # programs share the keys of a tile


def test_routes_sorted_on_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    site = operands(40, batch=1, heads=1, kv_heads=1)
    summary, routes = parts(site, SOME)
    by_torch = attend(site, summary, routes, SOME)[0]
    monkeypatch.setattr(union, "SORTED_ON_CHIP", 4096)
    assert torch.equal(attend(site, summary, routes, SOME)[0], by_torch)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cluster", [32, 64])
def test_a_step_may_have_a_part_of_a_cluster(cluster: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (options.FORWARD, options.BACKWARD):
        monkeypatch.setitem(table, ("cuda", True, 64), (64, 16, 4, 1))
    plan = Plan(chunk=64, window=16, sinks=3, keep=5 * (cluster == 32), routes=2, cluster=cluster)
    site = operands(200, causal=causal, padded=True, batch=2, heads=2, kv_heads=1)
    check(site, plan)
    check_gradients(site, plan)
    if not plan.keep:
        check(site._replace(query=site.query[:, :, -2:]), plan)  # programs share the keys of a tile


@pytest.mark.parametrize("name", ["keep and routes", "residual", "streaming"])
def test_perturbing_the_future_leaves_the_past_bit_equal(name: str) -> None:
    plan, site = PLANS[name], operands(120, batch=1)
    base = attend(site, *parts(site, plan), plan)[0]
    for cut in (47, 64):
        for change in (torch.randn, lambda size: torch.full(size, math.nan)):
            moved = site._replace(query=site.query.clone(), key=site.key.clone(), value=site.value.clone())
            for tensor in moved[:3]:
                tensor[:, :, cut:] = change(tensor[:, :, cut:].shape)
            assert torch.equal(attend(moved, *parts(moved, plan), plan)[0][:, :, :cut], base[:, :, :cut]), cut


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01])
def test_later_queries_do_not_move_a_cluster_to_another_step(share: float, together: bool) -> None:
    """Sums are of steps, which have clusters that other queries of the tile chose: those before, and no later ones."""
    plan = Plan(chunk=32, window=0, sinks=1, routes=5, share=share, group_routes=together)
    site = operands(400, batch=1, heads=2, kv_heads=1, dim=8, value_dim=8)
    base = attend(site, *parts(site, plan), plan)[0]
    for cut in (389, 395):
        moved = site._replace(query=site.query.clone())
        moved.query[:, :, cut:] = torch.randn_like(moved.query[:, :, cut:])
        assert torch.equal(attend(moved, *parts(moved, plan), plan)[0][:, :, :cut], base[:, :, :cut]), cut


@pytest.mark.parametrize("what", ["key", "value", "query"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_hidden(bad: float, what: str) -> None:
    if what == "query" and bad == math.inf:
        pytest.skip("an infinite query gives finite output where every key has the sign to underflow")
    site, at = operands(130, batch=1), 70
    getattr(site, what)[0, 1, at, 5] = bad
    out = attend(site, *parts(site, SOME), SOME)[0]
    assert torch.isfinite(out[:, :, :at]).all()
    lost = ~torch.isfinite(reference.exact(site)).all(3)
    assert not torch.isfinite(out).all(3)[lost].any()


def test_padding_may_hold_anything() -> None:
    site = operands(120, padded=True)
    want = attend(site, *parts(site, SOME), SOME)
    hidden = ~site.valid[:, None, :, None]
    dirty = site._replace(key=site.key.masked_fill(hidden, math.nan), value=site.value.masked_fill(hidden, math.inf))
    got = attend(dirty, *parts(dirty, SOME), SOME)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert (got[0][0, :, : 120 // 3] == 0).all() and (got[1][0, :, : 120 // 3] == math.inf).all()


def test_strided_inputs() -> None:
    """The [B, N, H, D] layout that every model's transpose makes, and one with strided features."""
    site = operands(100, batch=1)
    summary, routes = parts(site, SOME)
    want = attend(site, summary, routes, SOME)
    turned = site._replace(
        query=site.query.transpose(1, 2).contiguous().transpose(1, 2),
        key=site.key.transpose(2, 3).contiguous().transpose(2, 3),
        value=torch.cat([site.value, site.value], 3)[..., :16],
    )
    grad = torch.ones(()).expand_as(want[0])  # as `out.sum().backward()` gives it
    for found, expected in (
        (attend(turned, summary, routes, SOME), want),
        (backward.attend_backward(grad, *want, turned, summary, routes, SOME),
         backward.attend_backward(grad.contiguous(), *want, site, summary, routes, SOME)),
    ):  # fmt: skip
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["routes", "keep and routes", "residual", "centroids", "streaming"])
def test_few_queries_continue_a_cache(name: str) -> None:
    """Causal with fewer queries than keys: programs share the keys, and the last query sees the last key."""
    plan, full = PLANS[name], operands(150, batch=1)
    tail = full._replace(query=full.query[:, :, 147:])
    summary = summary_of(full, plan)
    routes = routes_of(tail, summary, plan)
    out, sums = attend(tail, summary, routes, plan)
    whole = attend(full, summary, routes_of(full, summary, plan), plan)
    torch.testing.assert_close(out, whole[0][:, :, 147:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums, whole[1][:, :, 147:], atol=1e-5, rtol=1e-5)
    check_gradients_of_a_tail(tail, summary, routes, plan)


def check_gradients_of_a_tail(site: Operands, summary: Summary, routes: torch.Tensor, plan: Plan) -> None:
    out, sums = attend(site, summary, routes, plan)
    got = backward.attend_backward(out, out, sums, site, summary, routes, plan)
    want = reference.attend_backward(out, site, summary, routes, plan)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)


def test_empty() -> None:
    for batch, heads, length in ((0, 4, 8), (2, 4, 0)):
        q = torch.randn(batch, heads, length, 16)
        site = Operands(q, q, q, None, True, 0.25)
        summary, routes = parts(site, SOME)
        out, sums = attend(site, summary, routes, SOME)
        assert (
            out.shape == q.shape
            and backward.attend_backward(out, out, sums, site, summary, routes, SOME)[0].shape == q.shape
        )


def test_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake tensors and autograd, with the kernels that a GPU would run."""
    monkeypatch.setattr(ops.dispatch, "generated", lambda *given: True)
    site = operands(80, batch=1)
    summary, routes = parts(site, SOME)
    for tensor in (*site[:3], summary.row_key, summary.row_value):
        tensor.requires_grad_()
    args = (*site[:4], summary.order, routes, *summary[4:], SOME.text, True, site.scale, "", [], None)
    tests: Any = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.attend_forward, args, test_utils=tests)
    out = ops.attend(*args)
    leaves = (*site[:3], summary.row_key, summary.row_value)
    got = torch.autograd.grad(out.square().sum(), leaves)
    monkeypatch.setattr(ops.dispatch, "generated", lambda *given: False)
    want = torch.autograd.grad(ops.attend(*args).square().sum(), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)
