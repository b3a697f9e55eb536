"""One matrix over all scorers, the clustering, and what is selected with them."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import PLANS, operands, summary_of

from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.scorers import READS_QUERIES, SCORERS
from prescore_compile.kernels.scorers.kmeans import strided
from prescore_compile.kernels.summary import score

CONTENT = [name for name in SCORERS if name != "random"]


def chunks(count: int = 3, length: int = 64, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys = torch.randn(count, length, dim)
    return keys, torch.ones(count, length, dtype=torch.bool), torch.randn(count, 2, length, dim)


def run(name: str, keys: torch.Tensor, mask: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    return SCORERS[name](keys, mask, queries, 0.25, True, 7)


@pytest.mark.parametrize("name", SCORERS)
def test_shape_and_determinism(name: str) -> None:
    keys, mask, queries = chunks()
    state = torch.random.get_rng_state()
    scores = run(name, keys, mask, queries)
    assert scores.shape == mask.shape and scores.dtype == torch.float32 and torch.isfinite(scores).all()
    assert torch.equal(scores, run(name, keys, mask, queries))
    if name not in READS_QUERIES:
        assert torch.equal(scores, run(name, keys, mask, queries[:, :0]))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was touched"


@pytest.mark.parametrize("name", CONTENT)
def test_a_chunk_is_scored_alone(name: str) -> None:
    keys, mask, queries = chunks()
    scores = run(name, keys, mask, queries)
    keys[1] *= 5
    queries[1] += 3
    again = run(name, keys, mask, queries)
    assert torch.equal(scores[0], again[0]) and torch.equal(scores[2], again[2])
    assert not torch.equal(scores[1], again[1])


@pytest.mark.parametrize("name", CONTENT)
def test_masked_keys_do_not_matter(name: str) -> None:
    keys, mask, queries = chunks()
    mask[:, 50:] = False
    scores = run(name, keys, mask, queries)
    keys[:, 50:] = 1e4
    queries[:, :, 50:] = -3
    torch.testing.assert_close(run(name, keys, mask, queries)[:, :50], scores[:, :50])


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("case", ["all equal", "one key", "no key", "zero"])
def test_degenerate_chunks(name: str, case: str) -> None:
    keys, mask, queries = chunks()
    if case == "all equal":
        keys[:] = keys[:, :1]
    if case == "one key":
        mask[:, 1:] = False
    if case == "no key":
        mask[:] = False
    if case == "zero":
        keys[:] = 0
    assert torch.isfinite(run(name, keys, mask, queries)[mask]).all()


@pytest.mark.parametrize("name", ["leverage", "norm", "inverse_norm", "random"])
def test_permuting_keys_permutes_scores(name: str) -> None:
    keys, mask, queries = chunks()
    order = torch.randperm(64)
    torch.testing.assert_close(run(name, keys[:, order], mask, queries), run(name, keys, mask, queries)[:, order])


def test_leverage_is_the_diagonal_of_the_hat_matrix() -> None:
    keys, mask, queries = chunks(1, 64, 8)
    centred = (keys[0] - keys[0].mean(0)).double()
    gram = centred.T @ centred
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(8)
    want = (centred @ torch.linalg.inv(gram + ridge) * centred).sum(1)
    torch.testing.assert_close(run("leverage", keys, mask, queries)[0].double(), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run("leverage", keys * 50, mask, queries), run("leverage", keys, mask, queries))


@pytest.mark.parametrize("name", ["kmeans", "kmeans_relative", "kmedian"])
def test_kmeans_scores_an_outlier_highest(name: str) -> None:
    keys, mask, queries = chunks()
    keys = 0.1 * keys + torch.randn(3, 4, 16).repeat_interleave(16, 1)
    keys[:, 21] += 2
    assert (run(name, keys, mask, queries).argmax(1) == 21).all()


def test_kmeans_distances_are_scikit_learns() -> None:
    cluster = pytest.importorskip("sklearn.cluster", reason="needs scikit-learn")
    keys, mask, queries = chunks(1, 128, 8)
    fit = cluster.KMeans(8, init=strided(keys, mask, 8)[0].numpy(), n_init=1, max_iter=3, tol=0, algorithm="lloyd")
    distance = torch.from_numpy(fit.fit(keys[0].numpy()).transform(keys[0].numpy()))
    # Both are local optima from the same start, three updates in: the mean distance tells.
    ours = run("kmeans", keys, mask, queries)[0].mean()
    torch.testing.assert_close(ours, distance.min(1).values.mean(), atol=0, rtol=0.05)


def test_a_geometric_median_is_not_dragged_along_by_an_outlier() -> None:
    keys, mask, queries = chunks(1, 16, 4)
    keys[0, 3] = 1000
    others = torch.arange(16) != 3
    median, mean = (run(name, keys, mask, queries)[0, others].mean() for name in ("kmedian", "kmeans"))
    assert median < 5 < mean


def test_query_is_the_mean_attention_of_the_last_queries() -> None:
    keys, mask, queries = chunks(1)
    logits = (0.25 * queries[0] @ keys[0].T).masked_fill(~torch.ones(64, 64, dtype=torch.bool).tril(), -math.inf)
    torch.testing.assert_close(run("query", keys, mask, queries)[0], logits.softmax(2)[:, -32:].mean((0, 1)))


@pytest.mark.parametrize("name", ["kmeans", "kmedian", "leverage"])  # dividing by the cluster's sum loses some
def test_the_papers_planted_subspace(name: str) -> None:
    """Keys of a few directions of their own among many that share a small subspace score highest."""
    keys = 0.05 * torch.randn(4, 128, 16)
    keys[..., :3] += torch.randn(4, 128, 3)
    heavy = torch.tensor([5, 40, 77, 120])
    keys[:, heavy, 10:14] += 4 * torch.eye(4)
    found = run(name, keys, torch.ones(4, 128, dtype=torch.bool), torch.empty(4, 0, 128, 16)).topk(8).indices
    hits = torch.stack([torch.isin(heavy, row).float().mean() for row in found]).mean()
    assert hits > 0.9


def test_peak_finds_the_key_that_every_query_wants() -> None:
    keys, mask, queries = chunks()
    keys[:, 13] = 4
    queries[:] = queries.abs()
    assert (run("peak", keys, mask, queries).argmax(1) == 13).all()
    assert (run("peak", keys, mask, queries)[:, -8:] == 0).all()


@pytest.mark.parametrize("method", SCORERS)
def test_selected_keys_are_the_best_of_their_segment(method: str) -> None:
    plan = Plan(method=method, chunk=32, window=8, sinks=3, keep=4, routes=0)
    site = operands(200)
    scores = score(site.query, site.key, None, plan, True, site.scale)
    summary = summary_of(site, plan)
    for segment, (begin, end) in {0: (0, 32), 1: (0, 64), 2: (64, 96), 3: (0, 128), 5: (128, 192)}.items():
        rows = summary.row_index[:, :, 3 + 4 * segment : 7 + 4 * segment].long()
        best = scores[:, :, max(begin, 3) : end].topk(4).indices + max(begin, 3)
        assert torch.equal(rows.sort(2).values, best.sort(2).values), segment


def test_a_key_that_is_not_finite_is_selected() -> None:
    for method in SCORERS:
        plan = Plan(method=method, chunk=32, window=8, sinks=0, keep=2, routes=0)
        site = operands(200, batch=1)
        site.key[0, 0, 40] = math.nan
        rows = summary_of(site, plan).row_index[0, 0, 2:4]
        assert 40 in rows.tolist()


def test_fewer_valid_keys_than_keep() -> None:
    plan = PLANS["keep"]
    site = operands(64, padded=True)
    site.valid[:] = False
    site.valid[:, 3] = True
    summary = summary_of(site, plan)
    assert (summary.row_index >= 0).sum() == site.key.shape[0] * site.key.shape[1], "only the sink"
    assert (summary.row_bias[summary.row_index < 0] == -math.inf).all()
