"""The reference against torch's own attention and against its own definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERYTHING, PLANS, in_double, operands, routes_of, summary_of

from prescore_compile.kernels import coarse, ops, reference, routing
from prescore_compile.kernels.layout import TILE, spans
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands


def torch_exact(site: Operands) -> torch.Tensor:
    q_len, k_len = site.query.shape[2], site.key.shape[2]
    mask = torch.ones(q_len, k_len, dtype=torch.bool)
    if site.causal:
        mask = mask.tril(k_len - q_len)
    mask = mask[None, None]
    if site.valid is not None:
        mask = mask & site.valid[:, None, None]
    return F.scaled_dot_product_attention(*site[:3], attn_mask=mask, scale=site.scale, enable_gqa=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 31, 150])
def test_exact_is_torchs_attention(length: int, causal: bool, padded: bool) -> None:
    site = operands(length, causal=causal, padded=padded, dtype=torch.float64)
    torch.testing.assert_close(reference.exact(site), torch_exact(site))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 32, 150, 200])
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_plan_that_covers_every_key_is_exact(name: str, length: int, causal: bool, padded: bool) -> None:
    plan = EVERYTHING[name]
    if name == "rows" and not causal:
        plan = Plan(chunk=512, window=0, sinks=4, routes=0, keep=512)
    site = operands(length, causal=causal, padded=padded, dtype=torch.float64)
    torch.testing.assert_close(ops.prescored(site, plan), torch_exact(site))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_the_sources_are_disjoint_and_lawful(name: str, causal: bool, padded: bool) -> None:
    plan = PLANS[name]
    site = operands(170, causal=causal, padded=padded)
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    centred, stood_in = reference._residual(site, summary, plan), False
    for span in spans(plan, causal, 170, 170, TILE):
        keys, rows, *rest = reference.attention_weights(site, summary, routes, plan, span, centred)
        copies = summary.row_index.repeat_interleave(2, 1)[:, :, None].expand_as(rows)
        copied = torch.zeros(*keys.shape[:3], 171).scatter_add_(3, copies.long().where(copies >= 0, 170), rows)
        assert not ((keys > 0) & (copied[..., :170] > 0)).any(), "a key is counted twice"
        total = keys + copied[..., :170]
        if rest:  # each member has its centroid's weight
            clusters = rest[0].repeat_interleave(plan.cluster, 3)
            order = summary.order.long().repeat_interleave(2, 1)[:, :, None].expand_as(clusters)
            members = torch.zeros(*keys.shape[:3], 171).scatter_add_(3, order.where(order >= 0, 170), clusters)
            assert not ((total > 0) & (members[..., :170] > 0)).any(), "a key is counted twice"
            stood_in |= bool((members[..., :170] > 0).any())
            total = total + members[..., :170]
        if site.valid is not None:
            assert not total.masked_fill(site.valid[:, None, None], 0).any(), "a padded key has weight"
        if causal:
            i = torch.arange(span.begin, span.end)[:, None]
            assert not total.masked_fill(torch.arange(170) <= i, 0).any(), "a later key has weight"
        whole = sum(part.sum(3) for part in (keys, rows, *rest))
        assert ((whole - 1).abs() < 1e-5).logical_or(whole == 0).all()
    assert stood_in == plan.residual


def test_centroids_and_selected_keys_carry_every_finished_key_once() -> None:
    plan = PLANS["centroids"]
    site = operands(170)
    summary = summary_of(site, plan)
    span = list(spans(plan, True, 170, 170, 1))[-1]
    read = reference._rows_read(summary, plan, span)
    mass = summary.row_bias.exp().masked_fill(~read, 0).sum(2)
    torch.testing.assert_close(mass, torch.full_like(mass, float(span.low)))


def test_a_query_without_keys_gives_zero_as_sdpa_does() -> None:
    site = operands(64, padded=True)
    out = ops.prescored(site, PLANS["routes"])
    assert (out[0, :, : 64 // 3] == 0).all() and (torch_exact(site)[0, :, : 64 // 3] == 0).all()


def test_dropped_keys_leave_the_softmax() -> None:
    """Keys that are not attended may be anything: even huge ones change nothing."""
    plan = Plan(chunk=16, window=16, sinks=2, routes=0)
    site = operands(160, causal=True)
    low = [span for span in spans(plan, True, 160, 160, 1)][-1].low
    moved = site._replace(key=site.key.clone(), value=site.value.clone())
    moved.key[:, :, 2:low] *= 100
    moved.value[:, :, 2:low] = 7
    assert torch.equal(ops.prescored(site, plan)[:, :, -1], ops.prescored(moved, plan)[:, :, -1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_gradients_are_those_of_the_definition(name: str, causal: bool) -> None:
    """Against autograd through the reference with the same choice of keys."""
    plan = PLANS[name]
    site = in_double(operands(110, causal=causal, dim=8, value_dim=12))
    for tensor in site[:3]:
        tensor.requires_grad_()
    out = ops.prescored(site, plan)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), site[:3])

    from prescore_compile.kernels.summary import gather_rows

    detached = site._replace(query=site.query.detach(), key=site.key.detach(), value=site.value.detach())
    summary = summary_of(detached, plan)
    routes = routes_of(detached, summary, plan)
    rows = gather_rows(site.key, site.value, summary.row_index, summary.row_owner)
    summary = summary._replace(row_key=rows[0], row_value=rows[1], row_bias=rows[2])
    tiles = []
    for span in spans(plan, causal, 110, 110, 64):
        rest = reference._residual(site, summary, plan)
        weights = reference.attention_weights(site, summary, routes, plan, span, rest)
        group = site.query.shape[1] // site.key.shape[1]
        values = (site.value, summary.row_value, *([rest.value] if rest else []))
        tiles.append(sum(part @ v.repeat_interleave(group, 1) for part, v in zip(weights, values, strict=True)))
    want = torch.autograd.grad((torch.cat(tiles, 2) * weight).sum(), site[:3])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", PLANS)
def test_perturbing_the_future_leaves_the_past_bit_equal(name: str) -> None:
    plan = PLANS[name]
    site = operands(300, dtype=torch.float32)
    base = ops.prescored(site, plan)
    for cut in (1, 47, 128, 299):
        moved = site._replace(query=site.query.clone(), key=site.key.clone(), value=site.value.clone())
        for tensor in moved[:3]:
            tensor[:, :, cut:] = torch.randn_like(tensor[:, :, cut:]) * 30
        assert torch.equal(ops.prescored(moved, plan)[:, :, :cut], base[:, :, :cut]), cut
        for tensor in moved[:3]:
            tensor[:, :, cut:] = float("nan")
        assert torch.equal(ops.prescored(moved, plan)[:, :, :cut], base[:, :, :cut]), f"NaN after {cut}"


@pytest.mark.parametrize("name", PLANS)
def test_heads_and_batch_rows_do_not_meet(name: str) -> None:
    plan = PLANS[name]
    site = operands(200)
    base = ops.prescored(site, plan)
    swapped = Operands(site.query.flip(0), site.key.flip(0), site.value.flip(0), None, True, site.scale)
    torch.testing.assert_close(ops.prescored(swapped, plan).flip(0), base)
    one = Operands(site.query[:, 2:], site.key[:, 1:], site.value[:, 1:], None, True, site.scale)
    torch.testing.assert_close(ops.prescored(one, plan), base[:, 2:])


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.5])
def test_spread_counts_deviations_in_routing_scores(factor: float) -> None:
    """The mean's logit and so many times the deviation that normal keys would have."""
    site = operands(150, causal=False)
    plain, settings = PLANS["routes"], PLANS["routes"].settings()
    summaries = [summary_of(site, Plan(**settings | {"spread": s})) for s in (0.0, 1.0, factor)]
    mean, one, some = (routing.routing_scores(site.query, s, site.scale) for s in summaries)
    live = one.isfinite()
    assert torch.equal(summaries[0].order, summaries[2].order) and live.any()
    torch.testing.assert_close((some - mean)[live], factor * (one - mean)[live], atol=1e-4, rtol=1e-4)
    assert plain.spread == 1.0 and Plan.parse(Plan(spread=factor).text).spread == factor


def test_more_spread_finds_a_key_that_stands_out() -> None:
    """One strong key among weak ones against a cluster that is a little better on the mean."""
    plan = Plan(chunk=32, window=0, sinks=0, routes=1, clustering="contiguous")
    key = torch.zeros(1, 1, 64, 4)
    key[0, 0, 5, 0], key[0, 0, 16:32, 0] = 4.0, 2.0
    query = torch.tensor([4.0, 0, 0, 0]).expand(1, 1, 64, 4).contiguous()
    site = Operands(query, key, key, None, True, 1.0)
    for spread, want in ((0.5, 1), (2.0, 0)):
        wide = Plan(**plan.settings() | {"spread": spread})
        assert routes_of(site, summary_of(site, wide), wide)[0, 0, -1, 0] == want


def test_two_levels_with_every_chunk_are_one() -> None:
    plan = replace(PLANS["routes"], coarse=99)
    site = operands(150)
    summary = summary_of(site, plan)
    one_level = routing.route(site.query, summary, plan, True, 150, site.scale)
    assert torch.equal(routes_of(site, summary, plan), one_level)


def test_a_chunks_representative_is_that_of_its_keys() -> None:
    plan = Plan(chunk=32, window=8, sinks=3, routes=5, spread=1.5)
    site = operands(100, padded=True, dim=16)
    level = coarse.coarse(summary_of(site, plan), plan)
    keys = site.key[0, 1, 64:96][site.valid[0, 64:96]]
    torch.testing.assert_close(level.mean[0, 1, 2], keys.mean(0))
    spread = keys.var(0, unbiased=False) * 2 * math.log(len(keys)) * plan.spread**2
    torch.testing.assert_close(level.spread[0, 1, 2], spread, atol=1e-5, rtol=1e-4)
    assert (level.bias[0, :, 0] == -math.inf).all() and (level.bias[0, :, 2] == 0).all()
