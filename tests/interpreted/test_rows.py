"""The kernel that copies rows, interpreted, against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import operands

from prescore_compile.kernels import summary as summaries
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.triton import rows as kernel

pytestmark = pytest.mark.usefixtures("poisoned")

LENGTH = 75


def padding(name: str) -> torch.Tensor | None:
    """Which keys are valid: two sequences."""
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    if name == "none":
        return None
    if name == "left":
        valid[0, :40], valid[1, :7] = False, False
    elif name == "holes":
        valid = torch.rand(2, LENGTH) < 0.4
    elif name == "few":
        valid[:] = False
        valid[0, [3, 70]] = True
    return valid


@pytest.mark.parametrize("sinks", [0, 5, 16, 21, 100])
@pytest.mark.parametrize("name", ["none", "left", "holes", "few"])
def test_sinks_are_the_first_valid_keys(name: str, sinks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those and nothing else; a walk over the keys in steps of 16."""
    monkeypatch.setattr(kernel, "STEP", 16)
    plan = Plan(chunk=16, sinks=sinks, routes=0)
    site = operands(LENGTH, dim=20, value_dim=33)
    valid = padding(name)
    got = kernel.rows(site.key, site.value, valid, None, plan)
    want = summaries.summarize(site.key, site.value, valid, None, plan)[4:]
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w) and g.dtype == w.dtype and g.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["none", "left"])
def test_selected_keys_follow_them(name: str, dtype: torch.dtype) -> None:
    """Of five segments; keys that lie apart in memory; what is not finite is copied as it is."""
    plan = Plan(chunk=16, sinks=3, keep=7, routes=0, method="norm")
    site, valid = operands(LENGTH, dtype=dtype, dim=16), padding(name)
    site.key[0, 0, 60], site.value[1, 1, 61] = math.nan, math.inf
    scores = summaries.score(site.query, site.key, valid, plan, True, 1.0)
    want = summaries.summarize(site.key, site.value, valid, scores, plan)[4:]
    chosen = want[0][:, :, 3:].unflatten(2, (-1, 7))
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (site.key, site.value)]
    got = kernel.rows(turned[0], turned[1].mT.contiguous().mT, valid, chosen.contiguous(), plan)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=0, rtol=0, equal_nan=True)


def test_no_rows() -> None:
    site = operands(LENGTH)
    index, owner, key, value, bias = kernel.rows(site.key, site.value, None, None, Plan(sinks=0, routes=0))
    assert index.shape == bias.shape == (2, 2, 0) and key.shape[2] == value.shape[2] == owner.shape[0] == 0
