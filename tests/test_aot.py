"""The generated kernels compiled for GPUs that are not here; figures in ``bench/results/triton-aot.json``."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from bench import aot  # noqa: E402
from bench.aot import Variant  # noqa: E402
from prescore_compile.kernels.plan import Plan  # noqa: E402
from prescore_compile.kernels.triton import sources  # noqa: E402
from prescore_compile.kernels.triton.spec import DTYPES  # noqa: E402

FAST = [
    ("default 64", "sm_90", "route"),
    ("default 64", "sm_80", "cluster"),
    ("default 64", "gfx942", "attend"),
    ("leverage 64", "sm_90", "score"),
    ("relative kmeans 128", "gfx942", "score"),
]
"""What is compiled each time: about a minute on one core. The rest is slow."""


def kept() -> dict[str, Any]:
    return json.loads(aot.RESULTS.read_text())


def compare(name: str, target: str, only: str | None = None) -> None:
    """Within bounds; and the kept figures, where the same Triton made them."""
    with aot.fresh_cache():
        found = aot.report(aot.VARIANTS[name], target, only)
    assert found and not aot.broken(name, target, found)
    if kept()["about"]["triton"] == triton.__version__ and name in kept()["figures"]:
        figures = {kernel: of[target] for kernel, of in kept()["figures"][name].items() if target in of}
        assert found == {kernel: figures[kernel] for kernel in found}, "python -m bench.aot writes them again"
        assert only or found.keys() == figures.keys()


@pytest.mark.parametrize(("name", "target", "kernel"), FAST)
def test_a_few_kernels(name: str, target: str, kernel: str) -> None:
    compare(name, target, kernel)


COMBINED = {
    "two levels, masked": Variant(plan=Plan(coarse=32), group=2, logits=aot.IN_DOCUMENTS),
    "two levels, many routes": Variant(plan=Plan(coarse=64, routes=200, cluster=32), causal=False, padded=True),
    "many routes, masked": Variant(plan=Plan(routes=70), logits=aot.IN_DOCUMENTS, dtype=torch.float32),
    "kept, padded, masked": Variant(plan=Plan(keep=24, method="leverage"), padded=True, logits=aot.IN_DOCUMENTS),
    "residual on two levels": Variant(plan=Plan(residual=True, coarse=32), causal=False, padded=True),
    "residual, many routes": Variant(plan=Plan(residual=True, routes=100), group=3, padded=True),
    "few queries, kept": Variant(plan=Plan(keep=24), queries=2, backward=False, padded=True),
    "centroids, causal": Variant(plan=Plan(keep=24, centroids=8, routes=0), group=4, padded=True),
    "share on two levels, masked": Variant(plan=Plan(share=0.01, coarse=32), logits=aot.IN_DOCUMENTS, backward=False),
    "share, many routes": Variant(plan=Plan(share=0.01, routes=70), padded=True, backward=False),
    "share, kept": Variant(plan=Plan(share=0.01, keep=24), group=2, backward=False),
    "share and residual": Variant(plan=Plan(share=0.01, residual=True), causal=False, padded=True, backward=False),
    "together on two levels, masked": Variant(
        plan=Plan(share=0.01, coarse=32, group_routes=True), group=3, logits=aot.IN_DOCUMENTS, backward=False
    ),
    "together, many routes": Variant(
        plan=Plan(routes=70, group_routes=True), group=4, causal=False, dtype=torch.float32, backward=False
    ),
    "together by shares, many routes": Variant(plan=Plan(share=0.01, routes=70, group_routes=True), group=3),
    "more heads than rows": Variant(plan=Plan(keep=24, coarse=32), group=71, dtype=torch.float32),
    "slopes in double precision": Variant(plan=Plan(share=0.01), logits=aot.SLOPED, read=torch.float64),
    "logarithms and exponentials": Variant(plan=Plan(coarse=32), logits=aot.CURVED),
    "a head dim that is padded": Variant(dim=80, group=2, padded=True),
}
"""What ``VARIANTS`` has one by one, together."""


@pytest.mark.parametrize("name", COMBINED)
def test_tritons_front_end_takes(name: str) -> None:
    """As the interpreter does not look at types: a variable of a loop may not change its own."""
    seen = set()
    for launch in aot.launches(COMBINED[name], "sm_90"):
        if launch.kernel.src not in seen:
            seen.add(launch.kernel.src)
            aot.parsed(launch, "sm_90")
            aot.parsed(launch, "sm_90", wide=True)
    assert seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"), [pair for pair in itertools.product(aot.VARIANTS, aot.SHARED) if aot.has_figures(*pair)]
)
def test_every_kernel(name: str, target: str) -> None:
    compare(name, target)


def test_the_kept_figures_are_within_bounds() -> None:
    figures = kept()["figures"]
    assert {"default 64"} <= figures.keys() <= aot.VARIANTS.keys()
    for name, kernels in figures.items():
        for target in aot.SHARED:
            here = {kernel: of[target] for kernel, of in kernels.items() if target in of}
            assert bool(here) == aot.has_figures(name, target)
            assert not aot.broken(name, target, here)


@pytest.mark.parametrize("name", ["default 64", "masked and capped 128", "keep 64", "leverage 128", "share 64"])
def test_the_launches_are_those_that_were_kept(name: str) -> None:
    """Without compiling anything: a kernel that is new has no figures yet."""
    for target in [target for target in aot.SHARED if aot.has_figures(name, target)]:
        launched = {launch.name for launch in aot.launches(aot.VARIANTS[name], target)}
        assert launched == {kernel for kernel, of in kept()["figures"][name].items() if target in of}


def test_a_product_that_is_not_on_tensor_cores_is_told() -> None:
    good = {"registers": 64, "stack": 0, "shared": 1024, "products": 8}
    assert not aot.broken("default 64", "sm_90", {"attend": good})
    for name, value, told in (
        ("products", 0, "no tensor-core"),
        ("stack", 8, "spills"),
        ("shared", 2**20, "shared memory"),
    ):
        (problem,) = aot.broken("default 64", "sm_90", {"attend": good | {name: value}})
        assert told in problem
    assert not re.search(aot.PRODUCTS["sm_80"], "fma.rn.f32") and re.search(aot.PRODUCTS["gfx942"], " v_mfma_f32_16x16")


@pytest.mark.parametrize(
    "name", [name for name, variant in aot.VARIANTS.items() if not variant.scores and variant.queries > 1]
)
def test_what_is_launched_is_listed(name: str) -> None:
    """``prescore kernels`` prints what runs; of few queries, programs that share a tile's keys are not listed."""
    variant = aot.VARIANTS[name]
    plan, logits = variant.plan, variant.logits
    listed = sources(
        plan, dim=variant.dim, value_dim=variant.value_dim, group=variant.group, dtype=DTYPES[variant.dtype],
        causal=variant.causal, valid=variant.padded, lifted=logits.lifted, softcap=logits.softcap, reach=logits.reach,
        sink_logit=variant.sunk,
    )  # fmt: skip
    for launch in aot.launches(variant, "sm_90"):
        assert any(launch.kernel.src in text for text in listed.values()), launch.name
