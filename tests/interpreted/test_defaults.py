"""Default plans on a GPU, each kernel in its own tiles, compiled: too many programs for the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import COMPILED, operands, routes_of, summary_of
from test_attend import check, check_gradients

from prescore_compile.kernels import reference
from prescore_compile.kernels.summary import Summary
from prescore_compile.kernels.triton import clusters, mass, route, rows
from prescore_compile.passes.defaults import CAUSAL_ON_A_GPU, LONG_ON_A_GPU, TWO_SIDED_ON_A_GPU

DEFAULTS = {
    "causal": (CAUSAL_ON_A_GPU, True),
    "long": (replace(LONG_ON_A_GPU, coarse=4), True),  # of few chunks
    "two-sided": (TWO_SIDED_ON_A_GPU, False),
}


@pytest.mark.skipif(not COMPILED, reason="with PRESCORE_COMPILED=sm_80 or sm_90")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", DEFAULTS)
def test_default_plans(name: str, dim: int) -> None:
    """All stages, one after the other, forward and backward: a group of 4 in bfloat16, the last chunk a short one."""
    plan, causal = DEFAULTS[name]
    length = 1300
    site = operands(length, heads=4, kv_heads=1, dim=dim, value_dim=dim, batch=1, causal=causal, dtype=torch.bfloat16)
    site = site._replace(query=site.query * 2)
    summary = Summary(
        *clusters.clusters(site.key, site.value, None, plan), *rows.rows(site.key, site.value, None, None, plan)
    )
    want = summary_of(site, plan)
    assert (summary.order == want.order).float().mean() > 0.98
    near = None
    if plan.needs_mass:
        near = mass.mass(site, summary, plan)
        torch.testing.assert_close(near, reference.mass(site, summary, plan), atol=1e-5, rtol=1e-5)
    routes = route.route(site.query, summary, plan, causal, length, site.scale, mass=near)
    assert (routes == routes_of(site, summary, plan)).float().mean() > 0.98
    check(site, plan, (summary, routes))
    check_gradients(site, plan, (summary, routes))
