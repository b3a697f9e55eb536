"""The route kernel, interpreted, against the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import COMPILED, EVERYTHING, PLANS, operands, routes_of, summary_of

from prescore_compile.kernels import coarse, reference, routing
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary
from prescore_compile.kernels.triton import route as of_route
from prescore_compile.kernels.triton.mass import mass
from prescore_compile.kernels.triton.route import route, route_source, spec_of

ROUTED = {name: plan for name, plan in PLANS.items() if plan.routes and not plan.coarse}


def check(site: Operands, summary: Summary, plan: Plan) -> torch.Tensor:
    """The same routes, but where rounding decides between scores that are nearly equal."""
    length = site.key.shape[2]
    mass = reference.mass(site, summary, plan) if plan.needs_mass else None
    got = route(site.query, summary, plan, site.causal, length, site.scale, mass=mass)
    want = routes_of(site, summary, plan)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.equal(got >= 0, want >= 0)
    differ = (got != want).any(3)
    assert differ.float().mean() < 0.02
    scores = routing.routing_scores(site.query.double(), summary, site.scale)
    totals = [scores.gather(3, r.long().clamp(min=0)).masked_fill(r < 0, 0).sum(3)[differ] for r in (got, want)]
    torch.testing.assert_close(*totals, atol=1e-5, rtol=1e-5)
    return got


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """As bfloat16, towards 0: Triton's interpreter cuts what a GPU rounds."""
    if COMPILED:
        return tensor.bfloat16().double()
    return (tensor.contiguous().view(torch.int32) & -65536).view(torch.float32).double()


def cut_scores(query: torch.Tensor, summary: Summary, scale: float) -> torch.Tensor:
    """What the kernel gives queries of bfloat16, but for the rounding of its sums."""
    group = query.shape[1] // summary.mean.shape[1]
    mean, spread, bias = (t.repeat_interleave(group, 1) for t in (cut(summary.mean), cut(summary.spread), summary.bias))
    within = cut(query * query) @ spread.transpose(2, 3)
    return query.double() @ mean.transpose(2, 3) * scale + within.sqrt() * abs(scale) + bias.unsqueeze(2)


def resolution(score: torch.Tensor, walked: int) -> torch.Tensor:
    """Least distance of scores that words of 32 bits tell apart: ``walked`` clusters leave that much of 23 bits."""
    return 2.0 ** (score.abs().clamp(min=1e-30).log2().floor() - 23 + (walked - 1).bit_length())


def check_words(got: torch.Tensor, want: torch.Tensor, scores: torch.Tensor, walked: int) -> None:
    """The same routes, but for clusters that words, or else the rounding of sums, do not tell apart."""
    assert torch.equal(got >= 0, want >= 0)
    one, other = (
        torch.zeros(*scores.shape[:3], scores.shape[3] + 1, dtype=torch.bool).scatter_(
            3, routes.long().where(routes >= 0, scores.shape[3]), True
        )[..., :-1]
        for routes in (got, want)
    )
    missed = scores.masked_fill(~other | one, -math.inf).amax(3)
    taken = scores.masked_fill(~one | other, math.inf).amin(3)
    differ = (one != other).any(3)
    assert (missed - taken <= resolution(missed, walked) + 1e-5)[differ].all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(1, 2, 1), (97, 3, 1), (170, 4, 2)])
@pytest.mark.parametrize("name", ROUTED)
def test_routes_are_the_references(name: str, length: int, heads: int, kv_heads: int, causal: bool) -> None:
    site = operands(length, heads=heads, kv_heads=kv_heads, causal=causal, padded=length > 100, dim=20)
    check(site, summary_of(site, ROUTED[name]), ROUTED[name])


@pytest.mark.parametrize("name", ["routes", "together"])
def test_a_negative_scale(name: str) -> None:
    site = operands(97, heads=4, kv_heads=2, dim=20, causal=True)._replace(scale=-0.3)
    check(site, summary_of(site, PLANS[name]), PLANS[name])


@pytest.mark.parametrize(("name", "causal"), [("two levels", True), ("share", False)])
def test_more_heads_than_a_tile_has_rows(name: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nineteen share a KV head: ten are in one tile, nine in another."""
    monkeypatch.setattr(of_route, "ROWS", 32)  # in float32, half of them
    site = operands(70, dim=16, heads=19, kv_heads=1, causal=causal, batch=1)
    check(site, summary_of(site, PLANS[name]), PLANS[name])


@pytest.mark.parametrize("name", ["share", "together", "two levels"])
def test_features_in_parts(name: str) -> None:
    """In float32, some at a time; the last part is not full."""
    site = operands(97, dim=72, value_dim=16, heads=4, kv_heads=2, batch=1)
    check(site, summary_of(site, PLANS[name]), PLANS[name])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "window"), [(1, 0), (97, 0), (150, 16)])
def test_mass(length: int, window: int, causal: bool) -> None:
    plan = Plan(chunk=32, window=window, sinks=3, routes=4, share=0.05)
    site = operands(length, causal=causal, padded=length > 100, dim=20)
    summary = summary_of(site, plan)
    torch.testing.assert_close(mass(site, summary, plan), reference.mass(site, summary, plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"coarse": 3}, {"routes": 70}])
def test_share(settings: dict[str, int]) -> None:
    """Also on two levels and by bisection; with a NaN that every query must meet, and one of infinite mass."""
    plan = Plan(**Plan(chunk=32, window=0, sinks=3, routes=6, share=0.1).settings() | settings)
    site = operands(300, batch=1, heads=2, kv_heads=1)
    summary = summary_of(site, plan)
    found = check(site, summary, plan)
    every = routes_of(site, summary, Plan(**plan.settings() | {"share": 0.0}))
    assert 0.1 < (found >= 0).sum() / (every >= 0).sum() < 0.9
    near = torch.zeros(site.query.shape[:3])
    near[:, :, 200], near[:, :, 201] = math.inf, -math.inf
    bias = summary.bias.clone()
    bias[:, :, 3] = math.nan
    tainted = summary._replace(bias=bias)
    got = route(site.query, tainted, plan, True, 300, site.scale, mass=near)
    assert torch.equal(got, coarse.route(site.query, tainted, plan, True, 300, site.scale, mass=near))
    assert (got[:, :, 64:] == 3).any(3).all()


@pytest.mark.parametrize(
    ("causal", "settings"),
    [(False, {"share": 0.0}), (True, {"coarse": 3}), (False, {"coarse": 3, "share": 0.0}), (True, {"routes": 70})],
)
def test_heads_that_route_together(causal: bool, settings: dict[str, Any]) -> None:
    """Also where a key is NaN, and where a head's mass says nothing."""
    plan = replace(PLANS["together"], **{"share": 0.08, "window": 0} | settings)
    site = operands(260, batch=1, heads=6, kv_heads=2, causal=causal)
    site.key[0, 1, 70] = math.nan
    summary = summary_of(site, plan)
    near = reference.mass(site._replace(key=site.key.nan_to_num(0)), summary, plan)
    near[:, 1, 100], near[:, 2, 110], near[:, 3, 120], near[:, :, 130] = math.inf, -math.inf, math.nan, math.nan
    got = route(site.query, summary, plan, causal, 260, site.scale, mass=near)
    assert torch.equal(got, coarse.route(site.query, summary, plan, causal, 260, site.scale, mass=near))
    assert torch.equal(got[:, 0], got[:, 2]) and (got[:, 0] != got[:, 3]).any()
    tainted = summary.bias[0, 1].isnan().nonzero()[0, 0]
    assert (got[:, 3, 128:130] == tainted).any(2).all() and (got[:, :, 130] == -1).all()
    alone = coarse.route(site.query, summary, replace(plan, group_routes=False), causal, 260, site.scale, mass=near)
    assert (alone != got).any()


@pytest.mark.parametrize("causal", [False, True])
def test_two_levels(causal: bool) -> None:
    plan = Plan(chunk=32, window=8, sinks=3, routes=3, coarse=2)
    site = operands(150, causal=causal, batch=1, heads=2, kv_heads=1)
    summary = summary_of(site, plan)
    one_level = routing.route(site.query, summary, plan, causal, 150, site.scale)
    assert (routes_of(site, summary, plan) != one_level).any()
    check(site, summary, plan)


@pytest.mark.parametrize("routes", [70, 10**6])
def test_more_routes_than_are_sorted(routes: int) -> None:
    plan = Plan(chunk=16, window=0, sinks=1, routes=routes)
    site = operands(1300 if routes == 70 else 100, batch=1, heads=1, kv_heads=1, causal=False)
    site = site._replace(query=site.query[:, :, :20])
    check(site, summary_of(site, plan), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_earlier_and_what_is_not_finite_comes_first(dtype: torch.dtype) -> None:
    plan = Plan(chunk=16, window=0, sinks=0, routes=2)
    # Small integers: their products are exact, in whatever order they are summed.
    whole = torch.randint(-3, 4, (2, 4, 160, 16)).to(dtype)
    site = operands(160, dtype=dtype)._replace(query=whole, key=torch.ones(2, 2, 160, 16, dtype=dtype))
    routes = check(site, summary_of(site, plan), plan)
    assert (routes[:, :, 48:] == torch.tensor([0, 1], dtype=torch.int32)).all()
    site.key[0, 1, 70] = math.nan
    site.value[1, 0, 90] = math.inf
    summary = summary_of(site, plan)
    routes = check(site, summary, plan)
    assert (routes[0, 2:, 80:] == torch.tensor([0, 4], dtype=torch.int32)).all()
    assert (routes[1, :2, 96:] == torch.tensor([0, 5], dtype=torch.int32)).all()
    none = summary._replace(bias=torch.full_like(summary.bias, -math.inf))
    assert (route(site.query, none, plan, True, 160, site.scale) == -1).all()


def of_scores(scores: torch.Tensor) -> Summary:
    """A summary of clusters that have these scores for a query of ones, in two parts that bfloat16 holds."""
    mean = torch.zeros(1, 1, len(scores), 16)
    mean[0, 0, :, 0] = scores.bfloat16().float()
    mean[0, 0, :, 1] = scores - mean[0, 0, :, 0]
    empty = torch.empty(0)
    return Summary(empty, mean, torch.zeros_like(mean), torch.zeros(1, 1, len(scores)), *[empty] * 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_words_tell_apart(dtype: torch.dtype) -> None:
    """Exact ones in float32; in 16 bits, nearer ones are ties. Negative and infinite ones come in their order."""
    plan = Plan(chunk=16, window=0, sinks=0, routes=2)
    clusters = 600
    step = float(resolution(torch.tensor(4.0), clusters if dtype == torch.bfloat16 else 1))
    query = torch.ones(1, 1, 1, 16, dtype=dtype)

    def found(**scores: float) -> list[int]:
        values = torch.full((clusters,), -100.0)
        for name, score in scores.items():
            values[int(name[1:])] = score
        return route(query, of_scores(values), plan, False, 16 * clusters, 1.0)[0, 0, 0].tolist()

    assert found(c5=4.0, c70=4.0 + step, c599=4.0 + 2 * step) == [70, 599]
    assert found(c5=4.0, c70=4.0, c599=4.0) == [5, 70]
    assert found(c5=-4.0 - step, c70=-4.0, c599=-4.0) == [70, 599]
    assert found(c5=-1e30, c599=3e38) == [0, 599]
    if dtype == torch.bfloat16:
        assert found(c5=4.0, c70=4.0 + step / 2, c599=4.0 + step / 2) == [5, 70]


@pytest.mark.parametrize("share", [0.0, 0.003])
def test_words_of_many_clusters(share: float) -> None:
    """And a share keeps what is at its bar, and of what is below nothing that words tell apart from it."""
    plan = Plan(chunk=16, window=0, sinks=0, routes=20, share=share)
    clusters = 2000
    query = torch.randn(1, 2, 24, 16).bfloat16()
    summary = of_scores(torch.zeros(clusters))
    summary = summary._replace(mean=torch.randn(1, 1, clusters, 16), spread=torch.rand(1, 1, clusters, 16))
    near = torch.zeros(1, 2, 24)
    got = route(query, summary, plan, False, 16 * clusters, 0.25, mass=near)
    scores = cut_scores(query.float(), summary, 0.25)
    every = torch.ones(clusters, dtype=torch.bool)
    best = routing.best_of(scores, summary, every, 20)
    if not share:
        check_words(got, best, scores, clusters)
        return
    kept = scores.gather(3, got.long().clamp(min=0)).masked_fill(got < 0, math.inf)
    bar = torch.logaddexp(scores.logsumexp(3), near.double()) + math.log(share)
    assert (kept >= (bar - resolution(bar, clusters) - 1e-5).unsqueeze(3)).all()
    at_least = (scores.gather(3, best) >= bar.unsqueeze(3) + 1e-5).sum(3)
    counts = (got >= 0).sum(3)
    assert (counts >= at_least).all() and 0.1 < counts.float().mean() / 20 < 0.9


@pytest.mark.parametrize("group", [False, True])
def test_later_queries_do_not_change_earlier_routes(group: bool) -> None:
    """On two levels a tile walks over the chunks that all its queries chose."""
    plan = Plan(chunk=32, window=0, sinks=1, routes=6, share=0.02, coarse=3, group_routes=group)
    site = operands(250, batch=1, heads=2, kv_heads=1, dim=8)
    summary = summary_of(site, plan)
    near = torch.randn(1, 2, 250)
    base = route(site.query, summary, plan, True, 250, site.scale, mass=near)
    query = site.query.clone()
    query[:, :, 237:] = torch.randn_like(query[:, :, 237:])
    assert torch.equal(route(query, summary, plan, True, 250, site.scale, mass=near)[:, :, :237], base[:, :, :237])


def test_routes_of_two_levels_ascend_whatever_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bisection finds them in the order of the tile's list; who lists them in turn merges rows that ascend."""
    monkeypatch.setattr(of_route, "SORTED", 4)
    plan = Plan(chunk=32, window=0, sinks=2, routes=5, coarse=3)
    site = operands(230, batch=1, heads=2, kv_heads=1, dim=8)
    got = route(site.query, summary_of(site, plan), plan, True, 230, site.scale)
    last = got.masked_fill(got < 0, 2**30)
    assert (got[:, :, -1] >= 0).all() and torch.equal(last, last.sort(3).values)


def test_continuing_a_cache_strides_and_no_window() -> None:
    plan = ROUTED["routes"]
    site = operands(150)
    summary = summary_of(site, plan)
    whole = check(site, summary, plan)
    tail = site.query.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 110:]
    assert torch.equal(route(tail, summary, plan, True, 150, site.scale), whole[:, :, 110:])
    every = Plan(window=None, routes=3)
    assert (route(site.query, summary_of(site, every), every, True, 150, site.scale) == -1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_loses_no_more_than_rounding(dtype: torch.dtype) -> None:
    """Queries of 16 bits meet representatives that are rounded to 16 bits, as keys are."""
    plan = ROUTED["routes"]
    site = operands(150, dtype=dtype, dim=32)
    summary = summary_of(site, plan)
    got, want = route(site.query, summary, plan, True, 150, site.scale), routes_of(site, summary, plan)
    scores = routing.routing_scores(site.query.double(), summary, site.scale)
    totals = [scores.gather(3, r.long().clamp(min=0)).masked_fill(r < 0, 0).sum(3) for r in (got, want)]
    lost = totals[1] - totals[0]
    assert torch.equal(got >= 0, want >= 0) and lost.max() < 3 * 2**-7 and lost.mean() < 1e-3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["routes", "two levels"])
def test_low_precision_is_the_references_of_representatives_in_bfloat16(
    name: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLANS[name]
    site = operands(170, causal=causal, padded=True, dtype=torch.bfloat16)
    summary = summary_of(site, plan)
    got = route(site.query, summary, plan, causal, 170, site.scale)
    monkeypatch.setattr(routing, "routing_scores", cut_scores)
    scores = cut_scores(site.query.float(), summary, site.scale)
    check_words(got, routes_of(site, summary, plan), scores, summary.mean.shape[2])


def test_what_is_not_used_is_not_in_the_source() -> None:
    shape: dict[str, Any] = dict(dim=16, group=2, dtype="float32", target="cuda")
    text = {c: route_source(spec_of(Plan(window=0), causal=c, **shape), 8, False) for c in (False, True)}
    assert not any("listed" in t or "tried" in t or "bar" in t for t in text.values())
    assert "outside" not in text[True] and "position" not in text[False]
    assert EVERYTHING["routes"].routes > 64
