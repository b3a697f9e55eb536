"""bfloat16 by products of tiles: the machine's own (AMX), and the plain code that stands for them elsewhere."""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import EVERYTHING, PLANS, ROUTED, check_budget, in_double, operands, routes_of, rows_in_double, summary_of

from prescore_compile.kernels import banded, cpu, library, ops, reference
from prescore_compile.kernels.band import K, Q
from prescore_compile.kernels.logits import Logits
from prescore_compile.kernels.plan import WHOLE, Plan
from prescore_compile.kernels.reference import Operands

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler")
WITHOUT = ("-mno-amx-tile", "-mno-amx-bf16", "-mno-avx512f") if platform.machine() == "x86_64" else ()
"""Compiler flags: so the AVX2 form is compiled, too."""
SIZES = [(5, 3), (32, 16), (80, 40), (320, 272)]
N = 150


@pytest.fixture(scope="module")
def plain() -> ctypes.CDLL:
    compiler, flags = library.compiler(), library.FLAGS
    assert compiler is not None
    library.FLAGS = (*flags, *WITHOUT)
    try:
        return ctypes.CDLL(str(library.build(compiler)))
    finally:
        library.FLAGS = flags


@pytest.fixture(params=["own", "plain"], autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "plain":
        built = request.getfixturevalue("plain")
        assert not built.prescore_tiles()
        monkeypatch.setattr(library, "needed", lambda: built)
        monkeypatch.setattr(library, "tiles", lambda: True)
    elif not library.tiles():
        pytest.skip("no AMX")
    yield request.param


def small(length: int = N, **sizes: int) -> Operands:
    return operands(length, padded=True, dtype=torch.bfloat16, **sizes)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_attend_meets_the_reference(name: str, causal: bool) -> None:
    plan = PLANS[name]
    for length, dim, value_dim in ((1, 24, 40), (17, 24, 40), (N, 64, 64)):
        site = small(length, dim=dim, value_dim=value_dim)._replace(causal=causal)
        site = site._replace(query=site.query.transpose(1, 2).contiguous().transpose(1, 2))
        summary = summary_of(site, plan)
        routes = routes_of(site, summary, plan)
        true = reference.attend(in_double(site), rows_in_double(summary), routes, plan)
        check_budget(cpu.attend(site, summary, routes, plan), reference.attend(site, summary, routes, plan), true)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", EVERYTHING)
def test_exact_where_a_plan_keeps_everything(name: str, sizes: tuple[int, int]) -> None:
    site = small(dim=sizes[0], value_dim=sizes[1])
    check_budget(ops.prescored(site, EVERYTHING[name]), reference.exact(site), reference.exact(in_double(site)))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ROUTED)
def test_routes_are_those_of_float32(name: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers of bfloat16 are nearly one of float32: hardly a query chooses another cluster."""
    plan = PLANS[name]
    site = small(333, dim=sizes[0], value_dim=sizes[1])
    summary = summary_of(site, plan)
    mass = cpu.mass(site, summary, plan)
    torch.testing.assert_close(mass, reference.mass(site, summary, plan), atol=2e-5, rtol=1e-5)
    got = cpu.route(site.query, summary, plan, True, 333, site.scale, mass)
    monkeypatch.setattr(library, "tiles", lambda: False)
    want = cpu.route(site.query, summary, plan, True, 333, site.scale, mass)
    assert (got != want).any(3).float().mean() <= 0.01


@pytest.mark.parametrize("name", ROUTED)
def test_routing_and_attending_as_one(name: str) -> None:
    plan, site = PLANS[name], small()
    summary = summary_of(site, plan)
    mass = cpu.mass(site, summary, plan) if plan.needs_mass or plan.group_routes else None
    routes = cpu.route(site.query, summary, plan, True, N, site.scale, mass)
    assert torch.equal(cpu.route_attend(site, summary, plan), cpu.attend(site, summary, routes, plan))


@pytest.mark.parametrize("name", ["streaming", "routes", "keep and routes", "wide clusters", "residual"])
def test_any_split_into_tiles_of_queries_or_threads(name: str) -> None:
    plan, site = PLANS[name], small()
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    base, threads = cpu.attend(site, summary, routes, plan), torch.get_num_threads()
    for tile in (1, 7, 64):
        torch.testing.assert_close(cpu.attend(site, summary, routes, plan, tile), base, atol=2e-2, rtol=2e-2)
    try:
        torch.set_num_threads(3)
        assert torch.equal(cpu.attend(site, summary, routes, plan), base)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["whole", "keep and routes", "residual"])
def test_the_future_does_not_show(name: str, bad: float) -> None:
    """Not even where later values, of the same blocks, are not finite."""
    plan, site = (PLANS | {"whole": WHOLE})[name], operands(N, dtype=torch.bfloat16)
    later = [tensor.clone() for tensor in site[:3]]
    for tensor in later:
        tensor[:, :, 100:] = torch.randn_like(tensor[:, :, 100:])
        tensor[:, :, 103:, ::3] += bad
    a, b = (ops.prescored(s, plan) for s in (site, Operands(*later, None, True, site.scale)))
    assert torch.equal(a[:, :, :100], b[:, :, :100]) and not torch.equal(a, b)


@pytest.mark.parametrize("what", ["key", "value", "query"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["routes", "keep and routes", "wide clusters"])
def test_what_is_not_finite_reaches_only_who_attends_it(name: str, bad: float, what: str) -> None:
    site = operands(200, dtype=torch.bfloat16)
    getattr(site, what)[0, 1, 70, 5] = bad
    out, exact = ops.prescored(site, PLANS[name]), reference.exact(in_double(site))
    assert torch.isfinite(out[:, :, :70]).all()
    if what != "query" or math.isnan(bad):
        assert not torch.isfinite(out).all(3)[~torch.isfinite(exact).all(3)].any()


def test_a_value_that_is_not_finite_costs_no_precision() -> None:
    """Its blocks are attended in float32, the rest as before."""
    plan, site = Plan(window=None, sinks=0, routes=0), operands(N, dtype=torch.bfloat16)
    clean = ops.prescored(site, plan)
    site.value[:, :, 140] = math.inf
    out = ops.prescored(site, plan)
    torch.testing.assert_close(out[:, :, :140], clean[:, :, :140], atol=2e-2, rtol=2e-2)
    assert not torch.isfinite(out[:, :, 140:]).any()


def test_large_logits() -> None:
    site = operands(200, dtype=torch.bfloat16)
    site = site._replace(query=site.query * 300)
    for plan in EVERYTHING.values():
        check_budget(ops.prescored(site, plan), reference.exact(site), reference.exact(in_double(site)))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("sunk", [False, True])
def test_bands_sinks_and_softcaps(sunk: bool, softcap: float) -> None:
    """A window of 40 keys, which a padded query may leave without any."""
    plan = Plan(window=None, sinks=0, routes=0)
    site, logits = small(dim=24, value_dim=40), Logits(K > Q - 40, softcap=softcap)
    if sunk:
        site = site._replace(sink_logit=torch.randn(4).bfloat16()[None, :, None].expand(2, 4, N))
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    ends = banded.ends(replace(logits, softcap=0.0).band(), N, N, True)
    got = cpu.attend(site, summary, routes, plan, band=ends, softcap=softcap)
    true = reference.attend(in_double(site), rows_in_double(summary), routes, plan, logits)
    check_budget(got, reference.attend(site, summary, routes, plan, logits), true)


def test_float32_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of 32 bits among them, and all is as where there are no tiles."""
    plan, site = PLANS["routes"], small()
    site = site._replace(value=site.value.float())
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    got = cpu.attend(site, summary, routes, plan)
    monkeypatch.setattr(library, "tiles", lambda: False)
    assert torch.equal(got, cpu.attend(site, summary, routes, plan))


def test_the_tiles_of_others(products: str) -> None:
    """oneDNN's products, of the same threads, find theirs as they left them."""
    if products == "plain":
        pytest.skip("no tiles")
    a, site = torch.randn(256, 256).bfloat16(), small()
    before = a @ a
    for _ in range(3):
        ops.prescored(site, PLANS["routes"])
        assert torch.equal(a @ a, before)
