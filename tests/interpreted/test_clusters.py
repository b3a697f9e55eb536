"""The cluster kernel, interpreted, against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import operands, summary_of

from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary
from prescore_compile.kernels.triton import clusters as kernel

CASES = {
    "two levels": (60, Plan(chunk=64, sinks=3), 20),
    "no level": (40, Plan(chunk=16, sinks=0), 8),
    "wide": (150, Plan(chunk=64, sinks=16, cluster=32), 33),
}


@pytest.fixture(params=[4096, 512], ids=["few tiles", "many tiles"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 512 numbers, parts of 64 keys are read in blocks, and those of 32 one or two at a time."""
    monkeypatch.setattr(kernel, "AT_ONCE", request.param)


def run(site: Operands, plan: Plan) -> Summary:
    found = kernel.clusters(site.key, site.value, site.valid, plan)
    return summary_of(site, plan)._replace(order=found[0], mean=found[1], spread=found[2], bias=found[3])


def describes(summary: Summary, site: Operands, plan: Plan) -> None:
    """Each member stands once, in its chunk; means and spreads are those of the keys that stand there."""
    order = summary.order.long()
    for b, h in ((0, 0), (-1, -1)):
        members = torch.arange(site.key.shape[2])
        members = members[site.valid[b]] if site.valid is not None else members
        assert torch.equal(order[b, h][order[b, h] >= 0].sort().values, members[plan.sinks :])
        for c, keys in enumerate(order[b, h].view(-1, plan.cluster)):
            inside = site.key[b, h, keys[keys >= 0]].float()
            assert (keys[keys >= 0] // plan.chunk == c * plan.cluster // plan.chunk).all()
            if not len(inside):
                assert summary.bias[b, h, c] == -math.inf
                continue
            spread = inside.var(0, unbiased=False) * 2 * math.log(len(inside)) * plan.spread**2
            torch.testing.assert_close(summary.mean[b, h, c], inside.mean(0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(summary.spread[b, h, c], spread, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_clusters_are_the_references(name: str, padded: bool) -> None:
    length, plan, dim = CASES[name]
    site = operands(length, padded=padded, dim=dim)
    got, want = run(site, plan), summary_of(site, plan)
    assert (got.order == want.order).float().mean() > 0.95
    describes(got, site, plan)
    assert torch.equal(got.bias, want.bias)
    assert all(g.dtype == w.dtype and g.shape == w.shape for g, w in zip(got[:4], want[:4], strict=True))


@pytest.mark.usefixtures("at_once")
def test_separated_clusters_are_found_exactly() -> None:
    """Far apart, so that no median cut is decided by rounding."""
    plan = Plan(chunk=64, sinks=0)
    site = operands(128, batch=1, heads=1, kv_heads=1)
    label = torch.randperm(128) % 4
    key = torch.eye(16)[label] * torch.tensor([1, 10, 100, 1000.0])[label, None] + 0.01 * site.key
    site = site._replace(key=key)
    assert torch.equal(run(site, plan).order, summary_of(site, plan).order)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_strides(dtype: torch.dtype) -> None:
    plan = Plan(chunk=32, sinks=2, spread=1.5)
    site = operands(70, dtype=dtype)
    turned = site._replace(key=site.key.transpose(1, 2).contiguous().transpose(1, 2))
    got, want = run(turned, plan), summary_of(site, plan)
    assert (got.order == want.order).float().mean() > 0.95
    describes(got, site, plan)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_taints_its_cluster(what: str, bad: float, dtype: torch.dtype) -> None:
    plan = Plan(chunk=32, sinks=2)
    site = operands(70, dtype=dtype)
    getattr(site, what)[0, 1, 40, 3] = bad
    got = run(site, plan)
    tainted = got.bias.isnan().nonzero()
    assert len(tainted) == 1 and 40 in got.order.view(2, 2, -1, 16)[tuple(tainted[0])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_chunk_of_256_keys(dtype: torch.dtype) -> None:
    """In blocks of 64 keys at two levels, four and eight parts at once after that; or four on tensor cores."""
    plan = Plan(chunk=256, sinks=3)
    site = operands(300, batch=1, heads=1, kv_heads=1, dim=48, value_dim=20, dtype=dtype)
    got, want = run(site, plan), summary_of(site, plan)
    assert (got.order == want.order).float().mean() > 0.95
    describes(got, site, plan)


@pytest.mark.usefixtures("at_once")
def test_equal_keys_and_no_keys() -> None:
    plan = Plan(chunk=32, sinks=2)
    site = operands(70)
    site = site._replace(key=torch.ones_like(site.key), valid=torch.zeros(2, 70, dtype=torch.bool))
    got = run(site, plan)
    assert (got.order == -1).all() and (got.bias == -math.inf).all() and (got.mean == 0).all()
    got = run(site._replace(valid=None), plan)
    assert torch.equal(got.order, summary_of(site._replace(valid=None), plan).order) and (got.spread == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("offset", "features"), [(30, 16), (1024, 1)])
def test_a_centre_far_from_zero(offset: float, features: int, dtype: torch.dtype) -> None:
    """Keys are not centred on tensor cores: what their centre adds is taken off products that it is most of."""
    plan = Plan(chunk=128, sinks=0)
    site = operands(128, batch=1, heads=1, kv_heads=1, dtype=dtype)
    site.key[..., :features] += offset
    got, want = run(site, plan), summary_of(site._replace(key=site.key.double()), plan)
    assert (got.order == want.order).float().mean() > 0.95
    describes(got, site, plan)
