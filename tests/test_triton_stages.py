"""What a compiler sees of score, summarize and route on a GPU, without one."""

from __future__ import annotations

import pytest
import torch
from conftest import PLANS, ROUTED, operands, summary_of
from test_triton_graph import _driver, fakes, graph_of, kernels, launched  # noqa: F401  (a fixture)
from torch._subclasses.fake_tensor import FakeTensorMode

from prescore_compile.kernels import ops, summary
from prescore_compile.kernels.plan import METHODS, Plan
from prescore_compile.kernels.triton.scores import kernel as scores

SELECTED = {"select": {"best", "best_score"}, "select_segments": {"chosen"}}
SUMS = {"number_out", "key_sum_out", "value_sum_out"}
SEGMENTS = {
    "segment_moments": {"moments"},
    "segment_assign_0": SUMS,
    "segment_assign_1": SUMS | {"row_owner"},
    "segment_rows": {"row_index", "row_key", "row_value", "row_bias"},
}
ROWS = {"rows": {"row_index", "row_key", "row_value", "row_bias"}}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ROUTED)
def test_summarize(name: str, padded: bool) -> None:
    plan = PLANS[name]
    site = operands(200, dtype=torch.bfloat16, padded=padded)
    scores = torch.empty(2, 2, 200) if plan.keep else None
    with FakeTensorMode():
        tensors = fakes((*site[1:4], scores), "cuda")
        graph = graph_of(lambda *t: ops.summarize(*t, plan.text), *tensors)
        got = ops.summarize(*tensors, plan.text)
    expected = {"cluster": {"order_out", "mean", "spread", "bias"}}
    expected |= (SELECTED if plan.keep else {}) | ROWS
    assert kernels(graph) == expected
    for g, w in zip(got, summary_of(site, plan), strict=True):
        assert (g.shape, g.dtype, g.device.type) == (w.shape, w.dtype, "cuda")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["keep", "centroids"])
def test_rows_without_clusters(name: str, padded: bool) -> None:
    plan = PLANS[name]
    site = operands(200, dtype=torch.bfloat16, padded=padded)
    with FakeTensorMode():
        tensors = fakes((*site[1:4], torch.empty(2, 2, 200)), "cuda")
        graph = graph_of(lambda *t: ops.summarize(*t, plan.text), *tensors)
        got = ops.summarize(*tensors, plan.text)
    assert kernels(graph) == SELECTED | ROWS | (SEGMENTS if plan.centroids else {})
    for g, w in zip(got, summary_of(site, plan), strict=True):
        assert (g.shape, g.dtype, g.device.type) == (w.shape, w.dtype, "cuda")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_score(method: str, padded: bool) -> None:
    """One launch, or what is not written for a GPU as one operator."""
    plan = Plan(method=method, keep=4, chunk=32, routes=0)
    site = operands(200, dtype=torch.bfloat16, padded=padded)
    with FakeTensorMode():
        tensors = fakes((*site[:3], site.valid), "cuda")
        graph = graph_of(lambda q, k, v, there: ops.score(q, k, there, plan.text, True, 0.25), *tensors)
        got = ops.score(tensors[0], tensors[1], tensors[3], plan.text, True, 0.25)
    eager = [node for node in graph.nodes if node.target is torch.ops.prescore.score_eager.default]
    assert kernels(graph) == ({"score": {"scores"}} if method in scores.METHODS else {})
    assert len(eager) == (method not in scores.METHODS)
    assert (got.shape, got.dtype, got.device.type) == ((2, 2, 200), torch.float32, "cuda")


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_of_scores_and_rows_for_all_lengths(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.dispatch, "generated", lambda *given: True)
    plan = Plan(method="peak", keep=4, chunk=32, routes=0)

    def rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.summarize(k, v, None, ops.score(q, k, None, plan.text, True, 0.25), plan.text)[6]

    site = operands(200, dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in site[:3]]
    graph = graph_of(rows, *leaves, dynamic=dynamic)
    assert list(kernels(graph)) == ["score", "select", "select_segments", "rows"]
    sizes = [node for node in graph.nodes if isinstance(node.meta.get("val"), torch.SymInt)]
    assert bool(sizes) == dynamic


@pytest.mark.parametrize("name", ROUTED)
def test_route(name: str) -> None:
    plan = PLANS[name]
    site = operands(200, dtype=torch.bfloat16)
    mass = torch.empty(site.query.shape[:3]) if plan.needs_mass else None
    real = (site.query, *summary_of(site, plan)[:4], mass)
    with FakeTensorMode():
        tensors = fakes(real, "cuda")
        graph = graph_of(lambda *t: ops.route(*t[:5], plan.text, True, 200, 0.25, "", [], t[5]), *tensors)
    assert launched(graph) == (["route", "mark", "union", "arrange", "route"] if plan.coarse else ["route"])


def test_mass() -> None:
    plan = PLANS["share"]
    site = operands(200, dtype=torch.bfloat16, padded=True)
    real = (site.query, site.key, site.valid, *summary_of(site, plan)[4:])
    with FakeTensorMode():
        tensors = fakes(real, "cuda")
        graph = graph_of(lambda *t: ops.mass(*t, plan.text, True, 0.25, "", []), *tensors)
        got = ops.mass(*tensors, plan.text, True, 0.25, "", [])
    assert launched(graph) == ["attend"]
    assert (got.shape, got.dtype, got.device.type) == (site.query.shape[:3], torch.float32, "cuda")


def test_a_chunk_that_does_not_fit_takes_the_reference() -> None:
    plan = Plan(chunk=1024)
    with FakeTensorMode():
        key = torch.empty(1, 2, 4096, 64, device="cuda")
        assert kernels(graph_of(lambda k: ops.summarize(k, k, None, None, plan.text), key)) == {}


def test_segments_are_views() -> None:
    """Reading a segment's begin back would stop the host until the device is done."""
    plan = PLANS["centroids"]
    site = operands(200)
    scores = summary.score(site.query, site.key, None, plan, True, site.scale)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        key, value, ranks = (mode.from_tensor(t) for t in (site.key, site.value, scores))
        summary.summarize(key, value, None, ranks, plan)  # a fake tensor has no numbers to read
