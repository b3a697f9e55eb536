"""The compiled kernels against the reference in double precision."""

from __future__ import annotations

import ctypes
import math
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import EVERYTHING, PLANS, ROUTED, check_budget, in_double, operands, routes_of, rows_in_double, summary_of

from prescore_compile.kernels import cpu, library, ops, reference, routing
from prescore_compile.kernels import summary as summaries
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 17, 64, 333])
@pytest.mark.parametrize("name", PLANS)
def test_attend_meets_the_reference(name: str, length: int, causal: bool, padded: bool) -> None:
    plan = PLANS[name]
    site = operands(length, causal=causal, padded=padded, dim=24, value_dim=40)
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    true = reference.attend(in_double(site), rows_in_double(summary), routes, plan)
    check_budget(cpu.attend(site, summary, routes, plan), reference.attend(site, summary, routes, plan), true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PLANS)
def test_low_precision(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "tiles", lambda: False)  # test_tiles.py
    plan = PLANS[name]
    site = operands(300, dtype=dtype)
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    true = reference.attend(in_double(site), rows_in_double(summary), routes, plan)
    got = cpu.attend(site, summary, routes, plan)
    assert got.dtype == dtype
    check_budget(got, reference.attend(site, summary, routes, plan), true)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("dim", "value_dim"), [(5, 3), (64, 64)])
def test_bfloat16_is_what_float32_gives_rounded(
    dim: int, value_dim: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs are widened as they are read and only the result is rounded: the same bits (without tiles)."""
    monkeypatch.setattr(library, "tiles", lambda: False)
    plan = PLANS["keep and routes"]
    site = operands(200, heads=3, kv_heads=3 // group, dim=dim, value_dim=value_dim, dtype=torch.bfloat16, padded=True)
    site = site._replace(query=site.query.transpose(1, 2).contiguous().transpose(1, 2))
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    whole = site._replace(query=site.query.float(), key=site.key.float(), value=site.value.float())
    rows = summary._replace(row_key=summary.row_key.float(), row_value=summary.row_value.float())
    assert torch.equal(
        cpu.route(site.query, summary, plan, True, 200, site.scale),
        cpu.route(whole.query, summary, plan, True, 200, site.scale),
    )
    assert torch.equal(cpu.attend(site, summary, routes, plan), cpu.attend(whole, rows, routes, plan).bfloat16())
    member = summaries._chunk_mask(site.key, site.valid, plan.chunk).flatten(2)
    for got, want in zip(
        cpu.clusters(site.key, site.value, member, plan),
        cpu.clusters(whole.key, whole.value, member, plan),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_heads_are_packed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """More packed bytes than fit at once: every KV head meets its own clusters."""
    plan = Plan(chunk=16, window=16, sinks=2, routes=3)
    site = operands(2048, heads=24, kv_heads=24, dim=64, value_dim=64)
    summary = summary_of(site, plan)
    routes = cpu.route(site.query, summary, plan, True, 2048, site.scale)
    whole = cpu.attend(site, summary, routes, plan)
    for b, h in ((0, 0), (0, 23), (1, 11), (1, 23)):
        one = Operands(*(t[b : b + 1, h : h + 1] for t in site[:3]), None, True, site.scale)
        alone = summary._replace(
            **{name: getattr(summary, name)[b : b + 1, h : h + 1] for name in summary._fields if name != "row_owner"}
        )
        assert torch.equal(cpu.attend(one, alone, routes[b : b + 1, h : h + 1], plan), whole[b : b + 1, h : h + 1])
    assert torch.equal(cpu.route_attend(site, summary, plan), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 17, 333])
@pytest.mark.parametrize("name", ROUTED)
def test_routing_tile_by_tile_gives_the_same_bits(
    name: str, length: int, causal: bool, padded: bool, dtype: torch.dtype
) -> None:
    site = operands(length, causal=causal, padded=padded, dim=24, value_dim=40, dtype=dtype)
    for plan in (PLANS[name], replace(PLANS[name], share=0.02)):
        summary = summary_of(site, plan)
        mass = cpu.mass(site, summary, plan) if plan.needs_mass else None
        routes = cpu.route(site.query, summary, plan, causal, length, site.scale, mass)
        assert torch.equal(cpu.route_attend(site, summary, plan), cpu.attend(site, summary, routes, plan))
        assert torch.equal(cpu.route_attend(site, summary, plan, tile=7), cpu.attend(site, summary, routes, plan, 7))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 3, 27])
def test_route_chooses_among_many(count: int, ties: bool) -> None:
    """Long enough that only what passes a first bar is looked at closely; ties go to the earlier, NaN first."""
    plan = Plan(chunk=16, window=0, sinks=0, routes=count)
    clusters = 4000
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(1, 1, clusters, 1, generator=generator)
    if ties:
        mean = mean.round()
    bias = torch.zeros(1, 1, clusters)
    bias[0, 0, 77], bias[0, 0, 1234] = math.nan, -math.inf
    none = mean.new_empty(0)
    summary = summaries.Summary(none, mean, torch.zeros_like(mean), bias, none, none, none, none, none)
    query = torch.tensor([1.0, -2.0, 0.0]).view(1, 1, 3, 1)
    got = cpu.route(query, summary, plan, False, clusters * 16, 1.0)
    assert torch.equal(got, routing.route(query, summary, plan, False, clusters * 16, 1.0))
    assert (got == 77).any(3).all()


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (8, 8), (33, 65), (64, 64), (80, 80), (128, 128), (256, 256)])
def test_any_head_dim(dim: int, value_dim: int) -> None:
    plan = PLANS["keep and routes"]
    site = operands(150, dim=dim, value_dim=value_dim)
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    true = reference.attend(in_double(site), rows_in_double(summary), routes, plan)
    check_budget(cpu.attend(site, summary, routes, plan), reference.attend(site, summary, routes, plan), true)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (8, 1)])
def test_mha_gqa_mqa(heads: int, kv_heads: int) -> None:
    plan = PLANS["routes"]
    site = operands(200, heads=heads, kv_heads=kv_heads)
    summary = summary_of(site, plan)
    routes = cpu.route(site.query, summary, plan, True, 200, site.scale)
    torch.testing.assert_close(
        cpu.attend(site, summary, routes, plan), reference.attend(site, summary, routes, plan), atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("tile", [1, 3, 64, 1000])
def test_the_tile_does_not_matter(tile: int) -> None:
    plan = PLANS["keep and routes"]
    site = operands(333)
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    torch.testing.assert_close(cpu.attend(site, summary, routes, plan, tile), cpu.attend(site, summary, routes, plan))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 64, 333, 1000])
@pytest.mark.parametrize("name", ["routes", "wide clusters", "keep and routes", "two levels"])
def test_route_chooses_the_best_clusters(name: str, length: int, causal: bool, padded: bool) -> None:
    """The same number of routes, ascending, eligible, and as good as the reference's to rounding."""
    plan = PLANS[name]
    site = operands(length, causal=causal, padded=padded)
    summary = summary_of(site, plan)
    got = cpu.route(site.query, summary, plan, causal, length, site.scale)
    want = routes_of(site, summary, plan)
    assert torch.equal(got >= 0, want >= 0)
    clusters = summary.mean.shape[2]
    ascending = got.where(got >= 0, clusters + torch.arange(got.shape[3], dtype=torch.int32))
    assert (ascending.diff(dim=3) > 0).all()
    scores = routing.routing_scores(site.query.double(), summary, site.scale)
    taken = [scores.gather(3, r.long().clamp(min=0)).masked_fill(r < 0, 0).sort(3).values for r in (got, want)]
    torch.testing.assert_close(*taken, atol=1e-5, rtol=1e-5)
    if causal:
        first = got // (plan.chunk // plan.cluster) * plan.chunk
        finished = (torch.arange(length) - plan.window).clamp(min=0) // plan.chunk * plan.chunk
        assert (first < finished[:, None]).logical_or(got < 0).all()


@pytest.mark.parametrize("share", [0.0, 0.02])
@pytest.mark.parametrize("cluster", [16, 32, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_two_levels_are_the_references(causal: bool, cluster: int, share: float) -> None:
    """Chunks of one and of four clusters, many of them, of which neighbouring rows choose others."""
    length = 600 + 30 * cluster
    for parts in (1, 4):
        plan = Plan(chunk=parts * cluster, window=50, sinks=2, cluster=cluster, routes=5, coarse=5, share=share)
        site = operands(length, causal=causal, padded=True, heads=3, kv_heads=1, dim=24)
        summary = summary_of(site, plan)
        mass = reference.mass(site, summary, plan) if share else None
        got = cpu.route(site.query, summary, plan, causal, length, site.scale, mass)
        want = routes_of(site, summary, plan)
        assert (got == want).all(3).float().mean() > 0.998, "but where rounding decides"
        if not share:  # which is of the clusters that were looked at
            assert torch.equal(want, routes_of(site, summary, replace(plan, coarse=0))) == (parts == 1)


def clustered(length: int = 333, padded: bool = True):  # type: ignore[no-untyped-def]
    plan = Plan(chunk=128, sinks=3, routes=2)
    site = operands(length, padded=padded, dim=20)
    member = summaries._chunk_mask(site.key, site.valid, plan.chunk).flatten(2)
    return site, member, plan


def test_clusters_are_the_references() -> None:
    """The same median cuts but where rounding decides; and what stands for a cluster is its own."""
    site, member, plan = clustered()
    got, want = (make(site.key, site.value, member, plan) for make in (cpu.clusters, summaries.clusters))
    assert (got[0] == want[0]).float().mean() > 0.95
    same = (got[0] == want[0]).unflatten(2, (-1, plan.cluster)).all(3)
    for g, w in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(g[same], w[same], atol=1e-5, rtol=1e-4)


def test_clusters_hold_each_member_once() -> None:
    site, member, plan = clustered()
    order = cpu.clusters(site.key, site.value, member, plan)[0].long()
    held = torch.zeros(*member.shape[:2], member.shape[2] + 1).scatter_add_(
        2, order.where(order >= 0, member.shape[2]), torch.ones_like(order, dtype=torch.float32)
    )
    assert torch.equal(held[..., :-1], member.float())
    first = order.unflatten(2, (-1, plan.chunk)) // plan.chunk
    assert ((first == torch.arange(first.shape[2])[:, None]) | (first < 0)).all(), "a key left its chunk"


def test_clusters_mark_what_is_empty_or_not_finite() -> None:
    site, member, plan = clustered(256, padded=False)
    site.value[0, 0, 200] = math.inf
    member = member.clone()
    member[1] = False
    order, _, _, bias = cpu.clusters(site.key, site.value, member, plan)
    marked = (order == 200).unflatten(2, (-1, plan.cluster)).any(3)
    assert bias[0, 0][marked[0, 0]].isnan().all() and (bias[0, 0][~marked[0, 0]] == 0).all()
    assert (bias[1] == -math.inf).all() and (bias[0, 1] == 0).all()


def test_route_breaks_ties_by_position() -> None:
    plan = Plan(chunk=16, window=0, sinks=0, routes=2)
    site = operands(160, causal=True)._replace(key=torch.ones(2, 2, 160, 16))
    summary = summary_of(site, plan)
    routes = cpu.route(site.query, summary, plan, True, 160, site.scale)
    assert (routes[:, :, 48:] == torch.tensor([0, 1], dtype=torch.int32)).all()


def test_strided_inputs() -> None:
    """The [B, N, H, D] layout that every model's transpose makes, and one with strided features."""
    plan = PLANS["routes"]
    site = operands(200)
    want = ops.prescored(site, plan)
    turned = site._replace(
        query=site.query.transpose(1, 2).contiguous().transpose(1, 2),
        key=site.key.transpose(2, 3).contiguous().transpose(2, 3),
        value=torch.cat([site.value, site.value], 3)[..., :16],
    )
    torch.testing.assert_close(ops.prescored(turned, plan), want)


def test_the_same_input_gives_the_same_bits_for_any_number_of_threads() -> None:
    plan = PLANS["keep and routes"]
    site = operands(500)
    threads = torch.get_num_threads()
    base = ops.prescored(site, plan)
    state = torch.random.get_rng_state()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(ops.prescored(site, plan), base)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was touched"


@pytest.mark.parametrize("name", EVERYTHING)
def test_large_logits(name: str) -> None:
    site = operands(200)
    site = site._replace(query=site.query * 300)
    want = reference.exact(in_double(site))
    check_budget(ops.prescored(site, EVERYTHING[name]), reference.exact(site), want)


@pytest.mark.parametrize("what", ["key", "value", "query"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["routes", "keep and routes", "wide clusters"])
def test_what_is_not_finite_is_never_hidden(name: str, bad: float, what: str) -> None:
    """Wherever exact attention gives NaN the prescored one does, and nowhere does it for an earlier query."""
    if what == "query" and bad == math.inf:
        pytest.skip("an infinite query gives finite output where every key has the sign to underflow")
    plan = PLANS[name]
    site = operands(200)
    at = 70
    getattr(site, what)[0, 1, at, 5] = bad
    out, exact = ops.prescored(site, plan), reference.exact(site)
    assert torch.isfinite(out[:, :, :at]).all()
    lost = ~torch.isfinite(exact).all(3)
    assert not torch.isfinite(out).all(3)[lost].any()


def test_padding_may_hold_anything() -> None:
    plan = PLANS["keep and routes"]
    site = operands(200, padded=True)
    want = ops.prescored(site, plan)
    hidden = ~site.valid[:, None, :, None]
    dirty = site._replace(key=site.key.masked_fill(hidden, math.nan), value=site.value.masked_fill(hidden, math.inf))
    seen = site.valid[:, None, :, None].expand_as(want)
    torch.testing.assert_close(ops.prescored(dirty, plan)[seen], want[seen])


def test_continuing_a_cache() -> None:
    """Causal with fewer queries than keys: the last query sees the last key."""
    full = operands(300)
    tail = full._replace(query=full.query[:, :, 250:])
    for plan in (PLANS["routes"], EVERYTHING["window"], EVERYTHING["routes"]):
        summary = summary_of(full, plan)
        routes = [cpu.route(s.query, summary, plan, True, 300, s.scale) for s in (full, tail)]
        whole, part = (cpu.attend(s, summary, r, plan) for s, r in zip((full, tail), routes, strict=True))
        torch.testing.assert_close(part, whole[:, :, 250:])


def test_empty() -> None:
    for batch, heads, length in ((0, 4, 8), (2, 4, 0)):
        q = torch.randn(batch, heads, length, 16)
        for plan in (*PLANS.values(), *EVERYTHING.values()):
            assert ops.prescored(Operands(q, q, q, None, True, 0.25), plan).shape == q.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "chunk", "window"), [(1, 32, 0), (333, 32, 0), (333, 64, 40), (700, 128, 0)])
def test_mass_and_share(length: int, chunk: int, window: int, causal: bool, dtype: torch.dtype) -> None:
    plan = Plan(chunk=chunk, window=window, sinks=3, routes=9, share=0.02)
    site = operands(length, causal=causal, padded=True, dim=24, value_dim=40, dtype=dtype)
    summary = summary_of(site, plan)
    mass = cpu.mass(site, summary, plan)
    torch.testing.assert_close(mass, reference.mass(site, summary, plan), atol=2e-5, rtol=1e-5)
    got = cpu.route(site.query, summary, plan, causal, length, site.scale, mass)
    differ = (got != routes_of(site, summary, plan)).any(3)
    assert differ.float().mean() <= 0.01  # rounding decides there


@pytest.mark.parametrize("keys", [40, 100, 300])
def test_a_padding_mask_of_any_layout(keys: int) -> None:
    """A copy that is made of it lives until the kernel has read it."""
    plan = Plan(chunk=32, window=0, sinks=2, routes=4, share=0.01)
    valid = torch.ones(1, keys, dtype=torch.bool)
    valid[:, :32] = False
    for laid_out in (valid.expand(4, keys), torch.stack([valid.expand(4, keys)] * 2, 2)[..., 0]):
        site = operands(keys, batch=4)._replace(valid=laid_out)
        whole = site._replace(valid=laid_out.contiguous())
        summary = summary_of(whole, plan)
        assert not laid_out.is_contiguous()
        assert torch.equal(cpu.mass(site, summary, plan), cpu.mass(whole, summary, plan))
        mass = cpu.mass(whole, summary, plan)
        want = cpu.route(site.query, summary, plan, True, keys, site.scale, mass)
        turned = mass.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(cpu.route(site.query, summary, plan, True, keys, site.scale, turned), want)
        assert torch.equal(cpu.attend(site, summary, want, plan), cpu.attend(whole, summary, want, plan))


@pytest.mark.parametrize("near", [math.nan, math.inf, -math.inf, 0.0])
def test_a_share_hides_nothing_that_is_not_finite(near: float) -> None:
    plan = Plan(chunk=32, window=0, sinks=3, routes=4, share=0.3)
    site = operands(300)
    summary = summary_of(site, plan)
    bias = summary.bias.clone()
    bias[:, :, 3] = math.nan
    summary = summary._replace(bias=bias)
    mass = torch.full(site.query.shape[:3], near)
    got = cpu.route(site.query, summary, plan, True, 300, site.scale, mass)
    want = routing.route(site.query, summary, plan, True, 300, site.scale, mass=mass)
    assert torch.equal(got, want)
    assert (got[:, :, 64:] == 3).any(3).all()


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no Clang")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_clang_makes_of_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It once left vectors on its stack where they may not lie."""
    built = ctypes.CDLL(str(library.build("clang++")))
    monkeypatch.setattr(library, "needed", lambda: built)
    monkeypatch.setattr(library, "tiles", lambda: True)
    for plan in EVERYTHING.values():
        site = operands(200, dim=24, value_dim=40, padded=True, dtype=dtype)
        check_budget(ops.prescored(site, plan), reference.exact(site), reference.exact(in_double(site)))
    for name in ROUTED:
        site = operands(333, dtype=dtype)
        summary = summary_of(site, PLANS[name])
        mass = cpu.mass(site, summary, PLANS[name])
        differ = (
            cpu.route(site.query, summary, PLANS[name], True, 333, site.scale, mass)
            != routes_of(site, summary, PLANS[name])
        ).any(3)
        assert differ.float().mean() <= 0.01
