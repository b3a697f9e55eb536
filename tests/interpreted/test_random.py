"""Random plans and sites: route, attend and its backward, interpreted, against the reference.

By hand, all of them in five minutes: ``TRITON_INTERPRET=1 pytest -m "" tests/interpreted/test_random.py``.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import operands, routes_of, summary_of
from test_attend import check, check_gradients
from test_route import check as check_routes

from prescore_compile.kernels.plan import METHODS, OptionError, Plan

FAST, SITES = 6, 100

pytestmark = pytest.mark.usefixtures("poisoned")


def plan(draw: random.Random) -> Plan:
    """Few chunks, and all that may lie in them."""
    while True:
        cluster = draw.choice([16, 16, 32])
        settings: dict[str, Any] = dict(
            method=draw.choice([method for method in METHODS if method != "kernel_kmeans"]),
            cluster=cluster,
            chunk=cluster * draw.choice([1, 2, 4]),
            window=draw.choice([0, 0, 1, 17, 40, 100, None]),
            sinks=draw.choice([0, 1, 3, 20, 70]),
            routes=draw.choice([0, 1, 2, 5, 9]),
            spread=draw.choice([0.0, 1.0, 1.5]),
            share=draw.choice([0.0, 0.0, 0.05]),
            keep=draw.choice([0, 0, 1, 5, 20]),
            centroids=draw.choice([0, 0, 1, 4]),
            coarse=draw.choice([0, 0, 2, 5]),
            threshold=draw.choice([0.0, 0.0, 0.5]),
            group_routes=draw.random() < 0.3,
            residual=draw.random() < 0.4,
        )
        try:
            return Plan(**settings)
        except OptionError:
            continue


@pytest.mark.parametrize("seed", [pytest.param(at, marks=[pytest.mark.slow] * (at >= FAST)) for at in range(SITES)])
def test_random_sites(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    settings, causal = plan(draw), draw.random() < 0.6
    kv_heads, group = draw.choice([(1, 1), (1, 2), (2, 2), (1, 3)])
    site = operands(
        draw.choice([1, 15, 33, 64, 97, 130]),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=draw.choice([8, 16, 20]),
        value_dim=draw.choice([16, 24]),
        batch=2,
        causal=causal,
        padded=draw.random() < 0.5,
    )
    summary = summary_of(site, settings)
    if causal and draw.random() < 0.3:
        site = site._replace(query=site.query[:, :, -draw.choice([1, 2, 9]) :])
    routes = torch.empty(*site.query.shape[:3], 0, dtype=torch.int32)
    if settings.routes:
        routes = routes_of(site, summary, settings)
        if settings.window is not None:
            check_routes(site, summary, settings)
    check(site, settings, (summary, routes))
    check_gradients(site, settings, (summary, routes), least=4.0)
