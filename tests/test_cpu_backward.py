"""The compiled gradients of attend against the reference in double precision."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import PLANS, in_double, operands, routes_of, rows_in_double, summary_of
from sympy import Abs, And

from prescore_compile.kernels import banded, cpu, library, ops, reference
from prescore_compile.kernels.band import K, Q
from prescore_compile.kernels.logits import NOTHING, Logits
from prescore_compile.kernels.plan import WHOLE, Plan
from prescore_compile.kernels.reference import Operands

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler")


def check(site: Operands, plan: Plan, logits: Logits = NOTHING, room: float = 3e-6) -> tuple[torch.Tensor, ...]:
    """The error, of the largest number of each gradient; ``logits``: a band and a softcap."""
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    grad = torch.randn(*site.query.shape[:3], site.value.shape[3]).to(site.query.dtype)
    lengths = site.query.shape[2], site.key.shape[2]
    band = banded.ends(logits.band(), *lengths, site.causal) if logits.uncapped.only_band else None
    got = cpu.attend_backward(grad, site, summary, routes, plan, logits.softcap, band)
    want = reference.attend_backward(grad.double(), in_double(site), rows_in_double(summary), routes, plan, logits)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32 and g.shape == w.shape
        if w.numel():
            assert (g - w).abs().max() <= room * w.abs().max().clamp(min=1e-3)
    return got


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str, causal: bool, padded: bool) -> None:
    check(operands(300, causal=causal, padded=padded), PLANS[name])


SIZES: list[dict[str, Any]] = [
    dict(length=1), dict(length=31), dict(length=129, batch=1, heads=3, kv_heads=3, dim=20),
    dict(length=200, heads=8, kv_heads=1, dim=7), dict(length=200, batch=1, heads=1, kv_heads=1, dim=128),
]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: dict[str, Any], causal: bool) -> None:
    check(operands(**size, causal=causal), PLANS["keep and routes"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["share", "residual", "keep"])
def test_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    """What is read is widened: nothing is rounded in between."""
    check(operands(300, dtype=dtype), PLANS[name])


def test_values_of_other_features_and_few_queries() -> None:
    site = operands(300)
    check(site._replace(value=torch.randn(*site.value.shape[:3], 36)), PLANS["routes"])
    check(site._replace(query=site.query[:, :, -50:]), PLANS["routes"])
    check(site._replace(query=site.query.mT.contiguous().mT, key=site.key.mT.contiguous().mT), PLANS["routes"])


@pytest.mark.parametrize("name", ["keep and routes", "centroids"])
@pytest.mark.parametrize("causal", [False, True])
def test_softcaps_and_sinks(causal: bool, name: str) -> None:
    site, plan = operands(300, causal=causal), PLANS[name]
    check(site, plan, Logits(softcap=1.5))
    sink = torch.randn(site.query.shape[:3])
    sink[:, 0], sink[:, 1] = -torch.inf, 40.0
    *_, d_sink = check(site._replace(sink_logit=sink), plan, Logits(softcap=1.5))
    assert (d_sink[:, 0] == 0).all() and (d_sink[:, 2] != 0).any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("mask", "causal"), [(K > Q - 20, True), (Abs(K - Q) <= 9, False), (And(K >= Q - 30, K <= Q - 10), False)]
)
def test_bands(mask: Any, causal: bool, padded: bool) -> None:
    """The first queries of the last one have no key."""
    site, logits = operands(300, causal=causal, padded=padded), Logits(mask, softcap=1.5)
    check(site, WHOLE, logits)
    check(site._replace(query=site.query[:, :, -50:], sink_logit=torch.randn(2, 4, 50)), WHOLE, logits)


def test_long_sequences_have_smaller_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PAIRS", 300 * 40)
    check(operands(300, heads=6, kv_heads=1), WHOLE)


def test_threads_never_change_a_bit() -> None:
    """Nor do parts that are added: one KV head has as many as there are."""
    plan, threads = PLANS["residual"], torch.get_num_threads()
    site = operands(2100, batch=1, heads=2, kv_heads=1)
    summary = summary_of(site, plan)
    given = (torch.randn_like(site.query), site, summary, routes_of(site, summary, plan), plan)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(cpu.attend_backward(*given))
    finally:
        torch.set_num_threads(threads)
    for one, other in itertools.product(found, found):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_no_room_for_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PARTS", 0)
    check(operands(300), PLANS["routes"])


def test_nothing_to_do() -> None:
    for site in (operands(8)._replace(query=torch.randn(2, 4, 0, 16)), operands(8, batch=1)):
        if site.query.shape[0] == 1:
            site = site._replace(query=site.query[:0], key=site.key[:0], value=site.value[:0])
        assert all(not g.any() for g in check(site, PLANS["routes"]))


@pytest.mark.parametrize("place", ["value", "key", "query", "grad"])
def test_what_is_no_number_is_left_to_the_reference(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, (q, k, v, _, causal, scale) = Plan(chunk=32, window=8, sinks=2, routes=2), operands(150)[:6]
    grad, asked = torch.randn_like(q), []
    run = cpu.attend_backward
    monkeypatch.setattr(cpu, "attend_backward", lambda *given: asked.append(1) or run(*given))

    def gradients() -> list[torch.Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out = ops.prescored(Operands(leaves[0], leaves[1], leaves[2], None, causal, scale), plan)
        return list(torch.autograd.grad(out, leaves, grad))

    gradients()
    assert asked
    asked.clear()
    dict(value=v, key=k, query=q, grad=grad)[place][0, 0, 140, 0] = torch.nan
    found = gradients()
    assert not asked and found[0].isnan().any()
    assert all(g[1].isfinite().all() for g in found)
