"""The score kernels, interpreted, against the scorers in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import in_double, operands

from prescore_compile.kernels import summary as summaries
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.scorers import SCORERS, custom
from prescore_compile.kernels.triton.scores import kernel

pytestmark = pytest.mark.usefixtures("poisoned")

TOLERANCE = {"leverage": dict(atol=2e-5, rtol=2e-4)}
"""Of float32 scores; elsewhere 10^-5 of each and 10^-6."""


def plan_of(method: str, **settings: int) -> Plan:
    return Plan(**dict(method=method, chunk=32, sinks=2, keep=4, routes=0, window=8) | settings)  # type: ignore[arg-type]


def run(site: Operands, plan: Plan) -> torch.Tensor:
    return kernel.scores(site.query, site.key, site.valid, plan, site.causal, site.scale)


def want(site: Operands, plan: Plan) -> torch.Tensor:
    """``summary.score`` without its rounding to float32."""
    batch, heads, length, dim = site.key.shape
    wide = in_double(site)
    finite = site.key.isfinite().all(3)
    keys = summaries._chunks(wide.key, plan.chunk)
    mask = summaries._chunk_mask(site.key, site.valid, plan.chunk)
    mask = mask & summaries._pad_places(finite, plan.chunk).view(mask.shape)
    queries = summaries._chunks(wide.query, plan.chunk).unflatten(1, (heads, -1)).transpose(2, 3)
    flat = (tensor.flatten(0, 2) for tensor in (keys, mask, queries))
    scores = SCORERS[plan.method](*flat, site.scale, site.causal, 0)
    return scores.view(batch, heads, -1)[..., :length].masked_fill(~finite, math.inf)


def check(site: Operands, plan: Plan) -> None:
    """Equal where a score is read; padding scores 0."""
    got, true = run(site, plan), want(site, plan)
    assert got.dtype == torch.float32 and got.shape == true.shape
    read = torch.ones_like(got, dtype=torch.bool)
    if site.valid is not None:
        read = site.valid[:, None].expand_as(got)
        assert (got[~read & site.key.isfinite().all(3)] == 0).all()
    tolerance = TOLERANCE.get(plan.method, dict(atol=1e-6, rtol=1e-5))
    torch.testing.assert_close(got[read].double(), true[read], **tolerance)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", kernel.METHODS)
def test_scores_are_the_references(method: str, padded: bool) -> None:
    check(operands(75, dim=20, padded=padded), plan_of(method))


@pytest.mark.parametrize("method", kernel.METHODS)
def test_sizes_of_chunks_and_heads(method: str) -> None:
    """Chunks of 16 and 128 keys, the last one short; a group of three; neither causal nor a power of two wide."""
    check(operands(40, dim=16, heads=3, kv_heads=1, batch=1, causal=False), plan_of(method, chunk=16))
    check(operands(150, dim=40, heads=3, kv_heads=1, batch=1, causal=False), plan_of(method, chunk=128))
