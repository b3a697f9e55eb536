"""The kernels of segments' centroids and of the backward of rows, interpreted, against the reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import operands

from prescore_compile.kernels import ops
from prescore_compile.kernels import summary as summaries
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary
from prescore_compile.kernels.triton import clusters, rows, rows_backward, segments
from prescore_compile.kernels.triton.scores import select

pytestmark = pytest.mark.usefixtures("poisoned")

PLAN = Plan(chunk=16, window=0, sinks=2, keep=3, centroids=3, routes=0)
LENGTH = 171
"""Eleven chunks, the last one partial: segments of 8, 4, 2 and 1."""


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of two chunks and of two steps, so that segments are of four parts, of two, of one and of a half."""
    monkeypatch.setattr(segments, "PART", 32)
    monkeypatch.setattr(segments, "STEP", 16)


def site_of(dtype: torch.dtype = torch.float32, length: int = LENGTH) -> Operands:
    return operands(length, heads=2, kv_heads=1, dim=16, value_dim=20, dtype=dtype)


def padding(name: str, length: int = LENGTH) -> torch.Tensor | None:
    valid = torch.rand(2, length) < 0.6
    if name == "left":
        valid[:] = True
        valid[0, :50], valid[1, 160:] = False, False
    return None if name == "none" else valid


def both(site: Operands, valid: torch.Tensor | None, plan: Plan) -> tuple[Summary, list[torch.Tensor]]:
    """A summary by the reference, and its fields of rows by the kernels."""
    scores = torch.rand(site.key.shape[:3])
    want = summaries.summarize(site.key, site.value, valid, scores, plan)
    chosen = select.select_segments(*select.select(scores, valid, plan), plan) if plan.keep else None
    return want, list(rows.rows(site.key, site.value, valid, chosen, plan))


def check(want: Summary, got: list[torch.Tensor]) -> None:
    index, owner, *of_rows = got
    assert torch.equal(index, want.row_index) and torch.equal(owner, want.row_owner)
    for g, w in zip(of_rows, want[6:], strict=True):
        eps = torch.finfo(g.dtype).eps
        assert g.dtype == w.dtype and g.is_contiguous()
        torch.testing.assert_close(g, w, atol=4 * eps, rtol=4 * eps)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("none", torch.float32), ("left", torch.float32), ("holes", torch.bfloat16), ("none", torch.float16)],
)
def test_centroids_are_those_stated(name: str, dtype: torch.dtype) -> None:
    want, got = both(site_of(dtype), padding(name), PLAN)
    check(want, got)
    assert all((level >= 0).any() for level in got[1][:4]) and (got[1][4:] == -1).all()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (dict(sinks=0, keep=0, centroids=1), "none"),
        (dict(sinks=21), "none"),  # a chunk of sinks alone
        (dict(sinks=21), "holes"),
        (dict(keep=9, centroids=16), "holes"),  # more centroids than keys
        (dict(threshold=0.7), "holes"),  # fewer selected keys than could be
    ],
    ids=str,
)
def test_other_plans(settings: dict[str, float], name: str) -> None:
    check(*both(site_of(), padding(name), replace(PLAN, **settings)))  # type: ignore[arg-type]


def test_a_part_that_is_longer_than_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "PART", 2048)
    check(*both(site_of(length=90), padding("holes", 90), PLAN))


def test_keys_that_lie_apart_in_memory() -> None:
    site = site_of(length=60)
    key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (site.key, site.value))
    check(*both(site._replace(key=key, value=value.mT.contiguous().mT), None, PLAN))


def test_a_mask_that_lies_otherwise_in_memory() -> None:
    """Keys, clusters and centroids are those of the same mask in rows."""
    valid = (torch.rand(60, 2) < 0.6).T
    check(*both(site_of(length=60), valid, PLAN))
    site, plan = site_of(length=60), Plan(chunk=32, window=0, sinks=2, routes=2)
    got, want = (clusters.clusters(site.key, site.value, mask, plan)[0] for mask in (valid, valid.contiguous()))
    assert torch.equal(got, want)


def test_no_valid_key() -> None:
    valid = torch.zeros(2, LENGTH, dtype=torch.bool)
    valid[0, 40:44] = True
    want, got = both(site_of(), valid, replace(PLAN, keep=0))
    check(want, got)
    assert (got[4][1] == -math.inf).all() and not got[2][1].any(), "rows of nothing are empty"


@pytest.mark.parametrize(("name", "number"), [("key", math.nan), ("value", math.nan), ("key", -math.inf)])
def test_what_is_not_finite_stays_so(name: str, number: float) -> None:
    """A key that no segment keeps: its centroids are not finite, and no other is touched."""
    site = site_of()
    getattr(site, name)[1, 0, 70, 5] = number
    want, got = both(site, None, replace(PLAN, keep=0))
    assert torch.equal(got[1], want.row_owner)
    for g, w in zip(got[2:4], want[6:8], strict=True):
        assert torch.equal(g.isfinite(), w.isfinite())
        torch.testing.assert_close(g[w.isfinite()], w[w.isfinite()], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "name", "dtype"),
    [
        ({}, "none", torch.float32),
        ({}, "holes", torch.bfloat16),
        (dict(keep=0), "holes", torch.float32),
        (dict(centroids=0, keep=0, sinks=17), "none", torch.float32),
        (dict(sinks=0, keep=16), "none", torch.bfloat16),
    ],
    ids=str,
)
def test_backward(settings: dict[str, int], name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key has the gradients of its copies, and its part of those of its centroids."""
    monkeypatch.setattr(rows_backward, "SLOTS", 8)
    site, valid, plan = site_of(dtype), padding(name), replace(PLAN, **settings)  # type: ignore[arg-type]
    summary = summaries.summarize(site.key, site.value, valid, torch.rand(site.key.shape[:3]), plan)
    for row in (summary.row_key, summary.row_value):
        grad = torch.randn_like(row)
        got = rows_backward.rows_backward(grad, *summary[4:6], summary.row_bias, LENGTH, plan)
        want = summaries.scatter_rows(grad.double(), *summary[4:6], LENGTH)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_the_operator_and_its_gradient_launch_them(monkeypatch: pytest.MonkeyPatch) -> None:
    site, valid, scores = site_of(), padding("left"), torch.rand(2, 1, LENGTH)
    grads = []
    for generated in (False, True):
        monkeypatch.setattr(ops.dispatch, "generated", lambda *given, generated=generated: generated)
        leaves = [site.key.clone().requires_grad_(), site.value.clone().requires_grad_()]
        found = ops.summarize(*leaves, valid, scores, PLAN.text)
        torch.manual_seed(1)
        (found[6] * torch.randn_like(found[6])).sum().add((found[7] * torch.randn_like(found[7])).sum()).backward()
        grads.append([leaf.grad for leaf in leaves])
    for eager, generated in zip(*grads, strict=True):
        torch.testing.assert_close(generated, eager, atol=1e-6, rtol=1e-5)


def test_what_does_not_fit() -> None:
    for dim, most in ((16, 256), (64, 64), (128, 32), (256, 16)):
        assert segments.fits(Plan(chunk=512, centroids=most, routes=0), dim, dim)
        assert not segments.fits(Plan(chunk=512, centroids=most + 1, routes=0), dim, dim)
    assert not segments.fits(PLAN, 257, 16)
    assert not rows.fits(Plan(centroids=33, routes=0), 128, 128) and rows.fits(PLAN, 128, 128)
