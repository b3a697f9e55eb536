"""What the tests share: random attention inputs, plans, and the error budget."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Inductor keeps what it made of an operator's gradient, even when the operator has changed since.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="prescore_tests_")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from prescore_compile.kernels import coarse, reference
from prescore_compile.kernels import summary as summaries
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary

# The target that kernels are compiled for and run: see test_compiled.py.
COMPILED = os.environ.get("PRESCORE_COMPILED", "")
# Run by test_triton.py and test_compiled.py, in processes of their own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or COMPILED else ["interpreted"]
collect_ignore += [] if os.environ.get("PRESCORE_NAMED") == "1" else ["named"]

# Minutes each: begun with, so that no process is left alone with one of them at the end.
LONG = ("test_triton.py", "test_triton_codegen.py", "test_census.py", "test_generated.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


# Small, and between them every source: window, sinks, selected keys, centroids, routes.
PLANS = {
    "routes": Plan(chunk=32, window=16, sinks=3, routes=3),
    "two levels": Plan(chunk=32, window=16, sinks=3, routes=3, spread=1.5, coarse=2),
    "residual": Plan(chunk=32, window=16, sinks=3, routes=2, residual=True),
    "share": Plan(chunk=32, window=16, sinks=3, routes=6, spread=1.3, share=0.05),
    "together": Plan(chunk=32, window=16, sinks=3, routes=6, share=0.08, group_routes=True),
    "wide clusters": Plan(chunk=64, window=0, sinks=5, routes=2, cluster=32),
    "keep": Plan(chunk=32, window=8, sinks=2, keep=4, routes=0),
    "keep and routes": Plan(chunk=32, window=16, sinks=2, keep=5, routes=3),
    "centroids": Plan(chunk=32, window=8, sinks=2, keep=4, centroids=3, routes=0),
    "streaming": Plan(chunk=16, window=40, sinks=4, routes=0),
}
ROUTED = [name for name, plan in PLANS.items() if plan.routes]
EVERYTHING = {
    "window": Plan(window=None, sinks=0, routes=0),
    "routes": Plan(chunk=32, window=8, sinks=4, routes=10**6),
    "two levels": Plan(chunk=32, window=8, sinks=4, routes=10**6, coarse=10**6),
    "residual": Plan(chunk=32, window=8, sinks=4, routes=10**6, residual=True),
    "rows": Plan(chunk=128, window=8, sinks=4, routes=0, keep=128),  # up to 256 keys
}


@pytest.fixture(autouse=True, scope="session")
def _watched() -> Iterator[None]:
    """Interpreted kernels do nothing that a GPU would not stand."""
    if COMPILED:
        from bench.ptx.launch import compiled_launches

        with compiled_launches(COMPILED):
            yield
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from described import once
    from sanitizer import watching

    with once(), watching():
        yield


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def operands(
    length: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    value_dim: int = 16,
    batch: int = 2,
    causal: bool = True,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Operands:
    """Random operands; ``padded`` pads row 0 on the left and row 1 on the right."""
    valid = None
    if padded:
        valid = torch.ones(batch, length, dtype=torch.bool)
        valid[0, : length // 3] = False
        valid[-1, length - length // 4 :] = False
    return Operands(
        torch.randn(batch, heads, length, dim, dtype=dtype),
        torch.randn(batch, kv_heads, length, dim, dtype=dtype),
        torch.randn(batch, kv_heads, length, value_dim, dtype=dtype),
        valid,
        causal,
        dim**-0.5,
    )


def summary_of(site: Operands, plan: Plan) -> Summary:
    scores = None
    if plan.keep:
        scores = summaries.score(site.query, site.key, site.valid, plan, site.causal, site.scale)
    return summaries.summarize(site.key, site.value, site.valid, scores, plan)


def routes_of(site: Operands, summary: Summary, plan: Plan) -> torch.Tensor:
    mass = reference.mass(site, summary, plan) if plan.needs_mass else None
    return coarse.route(site.query, summary, plan, site.causal, site.key.shape[2], site.scale, mass=mass)


def in_double(site: Operands) -> Operands:
    return site._replace(query=site.query.double(), key=site.key.double(), value=site.value.double())


def rows_in_double(summary: Summary) -> Summary:
    return summary._replace(row_key=summary.row_key.double(), row_value=summary.row_value.double())


def check_budget(got: torch.Tensor, low: torch.Tensor, true: torch.Tensor, times: int = 2) -> None:
    """Within ``times`` x (the low-precision reference's own error + one rounding of the result)."""
    band = torch.finfo(got.dtype).eps * true.abs().max()
    budget = times * ((low.double() - true).abs().max() + band)
    error = (got.double() - true).abs().max()
    assert error <= budget, f"error {error:.3g}, budget {budget:.3g}"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote is NaN, or a place that is nowhere; and sorting is left to torch (it is fast)."""
    from prescore_compile.kernels.triton import key_major, options, union

    def poison(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(math.nan if tensor.is_floating_point() else 2**30)

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(union, "SORTED_ON_CHIP", 0)
    monkeypatch.setattr(key_major, "SINK_SPLITS", 2)
    for table in (options.FORWARD, options.BACKWARD):  # large tiles: few programs
        monkeypatch.setitem(table, ("cuda", True, 64), (64, 64, 4, 1))
