"""One matrix over all clusterings, and over methods and clusterings together."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import operands

from prescore_compile.kernels import ops, reference
from prescore_compile.kernels import summary as summaries
from prescore_compile.kernels.clusterings import CLUSTERINGS
from prescore_compile.kernels.plan import CLUSTERINGS as NAMES
from prescore_compile.kernels.plan import METHODS, Plan
from prescore_compile.kernels.scorers import SCORERS

CONTENT = [name for name in CLUSTERINGS if name != "contiguous"]


def chunks() -> tuple[torch.Tensor, torch.Tensor]:
    keys, member = torch.randn(5, 128, 16), torch.ones(5, 128, dtype=torch.bool)
    member[0, :16] = False
    member[2, 100:] = False
    return keys, member


def spread(keys: torch.Tensor, order: torch.Tensor, cluster: int = 16) -> torch.Tensor:
    groups = keys.gather(1, order.unsqueeze(2).expand_as(keys)).unflatten(1, (-1, cluster))
    return (groups - groups.mean(2, keepdim=True)).square().sum((1, 2, 3))


def groups(order: torch.Tensor) -> list[set[frozenset[int]]]:
    return [{frozenset(g.tolist()) for g in row.view(-1, 16)} for row in order]


def test_the_names_are_those_of_the_tables() -> None:
    assert set(NAMES) == set(CLUSTERINGS) and set(METHODS) == {*SCORERS, "window_peak"}


@pytest.mark.parametrize("cluster", [16, 32])
@pytest.mark.parametrize("name", CLUSTERINGS)
def test_each_chunk_is_ordered_members_first(name: str, cluster: int) -> None:
    keys, member = chunks()
    state = torch.random.get_rng_state()
    order = CLUSTERINGS[name](keys, member, cluster)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort(1).values, torch.arange(128).expand(5, 128))
    assert torch.equal(member.gather(1, order), member.sort(dim=1, descending=True).values)
    assert torch.equal(order, CLUSTERINGS[name](keys, member, cluster))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was touched"
    alone = torch.cat([CLUSTERINGS[name](k[None], m[None], cluster) for k, m in zip(keys, member, strict=True)])
    assert torch.equal(order, alone), "a chunk is clustered alone"


@pytest.mark.parametrize("name", CONTENT)
def test_permuting_keys_and_scaling_them_leaves_the_clusters(name: str) -> None:
    keys, member = chunks()[0], torch.ones(5, 128, dtype=torch.bool)
    order = CLUSTERINGS[name](keys, member, 16)
    assert groups(CLUSTERINGS[name](4 * keys, member, 16)) == groups(order)
    shuffle = torch.randperm(128)
    assert groups(shuffle[CLUSTERINGS[name](keys[:, shuffle], member, 16)]) == groups(order)


@pytest.mark.parametrize("name", CLUSTERINGS)
@pytest.mark.parametrize("case", ["all equal", "one key", "no key", "NaN", "inf", "huge"])
def test_degenerate_chunks_are_ordered_too(name: str, case: str) -> None:
    keys, member = chunks()
    if case == "all equal":
        keys[:] = 1
    if case == "one key":
        member[:, 1:] = False
    if case == "no key":
        member[:] = False
    if case in ("NaN", "inf"):
        keys[:, 7] = math.nan if case == "NaN" else math.inf
    if case == "huge":
        keys *= 1e30
    order = CLUSTERINGS[name](keys, member, 16)
    assert torch.equal(order.sort(1).values, torch.arange(128).expand(5, 128))


@pytest.mark.parametrize("name", ["pca_tree", "kmeans", "kmedian"])
def test_planted_clusters_are_found(name: str) -> None:
    centres = 20 * torch.randn(4, 8, 16)
    label = torch.stack([torch.randperm(128) % 8 for _ in range(4)])
    keys = centres.gather(1, label.unsqueeze(2).expand(-1, -1, 16)) + 0.1 * torch.randn(4, 128, 16)
    found = label.gather(1, CLUSTERINGS[name](keys, torch.ones(4, 128, dtype=torch.bool), 16)).view(4, 8, 16)
    assert (found == found[:, :, :1]).float().mean() > 0.8


def test_exchanges_make_clusters_tighter() -> None:
    keys, member = chunks()[0], torch.ones(5, 128, dtype=torch.bool)
    tree, means, runs = (spread(keys, CLUSTERINGS[n](keys, member, 16)) for n in ("pca_tree", "kmeans", "contiguous"))
    assert (means < tree).all() and (tree < runs).all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CLUSTERINGS)
def test_routing_to_every_cluster_is_exact(name: str, causal: bool, padded: bool) -> None:
    plan = Plan(chunk=32, window=8, sinks=4, routes=100, clustering=name)
    site = operands(150, causal=causal, padded=padded)
    torch.testing.assert_close(ops.prescored(site, plan), reference.exact(site), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("clustering", CLUSTERINGS)
@pytest.mark.parametrize("method", METHODS)
def test_the_future_does_not_reach_the_past(method: str, clustering: str) -> None:
    site = operands(130, batch=1)
    for window, cut, fill in ((8, 47, 30.0), (8, 109, math.nan), (32, 75, 30.0)):
        plan = Plan(method=method, chunk=32, window=window, sinks=3, keep=4, routes=2, clustering=clustering)
        moved = [tensor.clone() for tensor in site[:3]]
        for tensor in moved:
            tensor[:, :, cut:] = fill * torch.randn_like(tensor[:, :, cut:])
        later = ops.prescored(type(site)(*moved, *site[3:]), plan)
        assert torch.equal(later[:, :, :cut], ops.prescored(site, plan)[:, :, :cut]), (window, cut, fill)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 8, 32])
def test_window_peak_is_what_it_says(window: int, causal: bool) -> None:
    plan = Plan(method="window_peak", chunk=32, window=window, sinks=3, keep=4)
    site = operands(150, batch=1, causal=causal)
    got = summaries.score(site.query, site.key, None, plan, causal, site.scale)
    i, j = torch.arange(150)[:, None], torch.arange(150)
    begin = (i // 32 - (i % 32 < window).long()) * 32
    seen = (j >= begin) & ((j <= i) if causal else (j // 32 <= i // 32))
    logits = site.scale * site.query @ site.key.repeat_interleave(2, 1).transpose(2, 3)
    weights = logits.masked_fill(~(seen | (j < 3) & (j < begin)), -math.inf).softmax(3)
    weights = weights.masked_fill(~(seen & ((i - j).abs() >= 8)), 0)
    torch.testing.assert_close(got[0], weights[0].amax(1).view(2, 2, 150).amax(1))


def test_a_threshold_selects_what_reaches_it() -> None:
    site = operands(200)
    plan = Plan(method="window_peak", chunk=32, window=8, sinks=3, keep=8, routes=0, threshold=0.2)
    scores = summaries.score(site.query, site.key, None, plan, True, site.scale)
    rows = summaries.summarize(site.key, site.value, None, scores, plan).row_index[:, :, 3:11].long()
    reach = (scores[:, :, 3:32] >= 0.2).sum(2).clamp(max=8)
    assert torch.equal((rows >= 0).sum(2), reach) and 0 < reach.sum() < 32
    assert (scores.gather(2, rows.clamp(min=0))[rows >= 0] >= 0.2).all()
