"""Random sites, as compilers for GPUs see them: their kernels compile, and shared memory holds what they take.

The front end alone takes a second a site; ``make test-slow`` compiles one kernel of each as well.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from bench import aot  # noqa: E402
from bench.aot import Launch, Variant  # noqa: E402
from prescore_compile.kernels.plan import METHODS, OptionError, Plan  # noqa: E402

FAST, SITES = 5, 60
LOGITS = (aot.NOTHING, aot.NOTHING, aot.IN_DOCUMENTS, aot.SLOPED, aot.CURVED)


def plan(draw: random.Random) -> Plan:
    while True:
        cluster = draw.choice([16, 16, 32, 64])
        settings: dict[str, Any] = dict(
            method=draw.choice(METHODS),
            cluster=cluster,
            chunk=cluster * draw.choice([1, 2, 4, 8, 16]),
            window=draw.choice([0, 1, 64, 100, 1000, None]),
            sinks=draw.choice([0, 1, 4, 16, 100, 1000]),
            routes=draw.choice([0, 1, 3, 12, 27, 33, 64, 65, 100, 200]),
            spread=draw.choice([0.0, 1.0, 1.4]),
            share=draw.choice([0.0, 0.0, 0.01]),
            keep=draw.choice([0, 0, 1, 5, 32, 64, 100]),
            centroids=draw.choice([0, 0, 1, 8, 32, 100]),
            coarse=draw.choice([0, 0, 4, 32, 200]),
            group_routes=draw.random() < 0.3,
            residual=draw.random() < 0.3,
        )
        try:
            found = Plan(**settings)
        except OptionError:
            continue
        if found.chunk <= 256:  # more are torch operations, which run on no device that is not there
            return found


def site(seed: int) -> tuple[Variant, str]:
    """A site and a target."""
    draw = random.Random(seed)
    settings, causal, logits = plan(draw), draw.random() < 0.7, draw.choice(LOGITS)
    pairs = causal and not settings.centroids and not settings.residual  # a mask may speak of pairs
    few = causal and not (settings.keep and settings.reads_queries)
    dim = draw.choice([16, 24, 40, 64, 80, 96, 128, 160, 192, 256])
    variant = Variant(
        plan=settings,
        dim=dim,
        value_dim=draw.choice([dim, dim, 16, 64, 128, 256]),
        group=draw.choice([1, 2, 3, 4, 7, 8, 16, 32, 71, 128]),
        dtype=draw.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
        causal=causal,
        padded=draw.random() < 0.4,
        queries=draw.choice([4096, 4096, 5000, 100, 2, 1]) if few else 4096,
        backward=draw.random() < 0.6,
        logits=logits if pairs else aot.NOTHING,
    )
    return variant, draw.choice(["sm_80", "sm_89", "sm_90", "gfx942"])


def launches(seed: int) -> tuple[list[Launch], str]:
    """What a site launches, each source once."""
    variant, target = site(seed)
    return list({launch.kernel.src: launch for launch in aot.launches(variant, target)}.values()), target


@pytest.mark.parametrize("seed", [pytest.param(at, marks=[pytest.mark.slow] * (at >= FAST)) for at in range(SITES)])
def test_tritons_front_end_takes(seed: int) -> None:
    found, target = launches(seed)
    for launch in found:
        aot.parsed(launch, target)
        aot.parsed(launch, target, wide=True)
    assert found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SITES))
def test_shared_memory_holds_what_a_kernel_takes(seed: int) -> None:
    found, target = launches(seed)
    launch = random.Random(seed).choice(found)
    with aot.fresh_cache():
        assert aot.compiled(launch, target).metadata.shared <= aot.SHARED[target], f"{launch.name}: {site(seed)}"


def test_sites_differ() -> None:
    sites = [site(seed)[0] for seed in range(SITES)]
    assert {bool(s.plan.routes) for s in sites} == {bool(s.plan.keep) for s in sites} == {True, False}
    assert {bool(s.plan.centroids) for s in sites} == {s.plan.residual for s in sites} == {True, False}
    assert len({(s.dim, s.value_dim, s.group, s.dtype) for s in sites}) > SITES // 2
