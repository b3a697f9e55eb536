"""What a compiler sees of summarize and route on a GPU, without one."""

from __future__ import annotations

import pytest
import torch
from conftest import PLANS, operands, summary_of
from test_triton_graph import _driver, fakes, graph_of, kernels, launched  # noqa: F401  (a fixture)
from torch._subclasses.fake_tensor import FakeTensorMode

from prescore_compile.kernels import ops, summary
from prescore_compile.kernels.plan import Plan

ROUTED = [name for name, plan in PLANS.items() if plan.routes]


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
    assert kernels(graph) == {"cluster": {"order_out", "mean", "spread", "bias"}}
    for g, w in zip(got, summary_of(site, plan), strict=True):
        assert (g.shape, g.dtype, g.device.type) == (w.shape, w.dtype, "cuda")


@pytest.mark.parametrize("name", ROUTED)
def test_route(name: str) -> None:
    plan = PLANS[name]
    site = operands(200, dtype=torch.bfloat16)
    mass = torch.empty(site.query.shape[:3]) if plan.share else None
    real = (site.query, *summary_of(site, plan)[:4], mass)
    with FakeTensorMode():
        tensors = fakes(real, "cuda")
        graph = graph_of(lambda *t: ops.route(*t[:5], plan.text, True, 200, 0.25, "", [], t[5]), *tensors)
    assert launched(graph) == (["route", "mark", "union", "route"] if plan.coarse else ["route"])


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
