"""The score kernels and the selection of keys, interpreted, against the scorers in double precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COMPILED, in_double, operands
from triton.runtime import interpreter

from prescore_compile.kernels import ops
from prescore_compile.kernels import summary as summaries
from prescore_compile.kernels.layout import chunk_count
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.scorers import SCORERS
from prescore_compile.kernels.triton import rows
from prescore_compile.kernels.triton.clusters import members
from prescore_compile.kernels.triton.scores import kernel, select

pytestmark = pytest.mark.usefixtures("poisoned")

TOLERANCE = {"leverage": dict(atol=1e-5, rtol=1e-4)}
"""Of float32 scores; elsewhere 10^-5 of each and 10^-6."""
if COMPILED:  # what weighs a key may have more bits than TF32 passes take: one that is its own median is nearly there
    TOLERANCE["kmedian"] = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(params=["float32", "tensor cores"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How products are made: as the interpreter does, and with factors cut to the bits that TF32 passes take."""
    if request.param == "tensor cores":
        exact = interpreter.InterpreterBuilder.create_dot

        def cut(given: Any, keep: bool = True) -> Any:
            high = (given.data.view(np.int32) & -8192).view(np.float32)
            return interpreter.TensorHandle(high if keep else given.data - high, given.dtype)

        def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, most: Any) -> Any:
            if a.data.dtype != np.float32 or "IEEE" in str(precision):
                return exact(self, a, b, d, precision, most)
            pairs = [(cut(a), cut(b))]
            if "TF32x3" in str(precision):
                pairs = [(cut(cut(a, False)), cut(b)), (cut(a), cut(cut(b, False))), *pairs]
            for left, right in pairs:
                d = exact(self, left, right, d, precision, most)
            return d

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    return request.param


def plan_of(method: str, **settings: float) -> Plan:
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


def check(site: Operands, plan: Plan, **tolerance: float) -> None:
    """Equal where a score is read; padding scores 0."""
    got, true = run(site, plan), want(site, plan)
    assert got.dtype == torch.float32 and got.shape == true.shape
    read = torch.ones_like(got, dtype=torch.bool)
    if site.valid is not None:
        read = site.valid[:, None].expand_as(got)
        assert (got[~read & site.key.isfinite().all(3)] == 0).all()
    tolerance = tolerance or TOLERANCE.get(plan.method, dict(atol=1e-6, rtol=1e-5))
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


@pytest.mark.parametrize("method", ["peak", "query"])
def test_a_chunk_whose_queries_come_in_tiles(method: str) -> None:
    check(operands(300, dim=16, heads=2, kv_heads=1, batch=1), plan_of(method, chunk=256))


@pytest.mark.parametrize("method", kernel.CENTRES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_distances_on_tensor_cores(dtype: torch.dtype, method: str, products: str) -> None:
    """In TF32 passes, and a key that is its own centre is there."""
    check(operands(75, dim=20, dtype=dtype), plan_of(method))
    site = operands(32, dim=20, dtype=dtype)
    site.key[:] = site.key[:, :, :1]
    single = site._replace(valid=torch.arange(32).eq(0).expand(2, 32))
    assert run(single, plan_of(method)).max() <= (2e-6 if method == "kmedian" else 0)  # a weighted mean of one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", kernel.METHODS)
def test_low_precision_and_strides(method: str, dtype: torch.dtype) -> None:
    """Keys of 16 bits are factors as they are, and what they meet is float32: the float32 tolerance holds."""
    site = operands(75, dim=20, batch=1, dtype=dtype)
    turned = {name: getattr(site, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("query", "key")}
    check(site._replace(**turned), plan_of(method))


def test_kmedian_of_clusters_around_a_key() -> None:
    """A key in the midst of pairs on either side is their geometric median: where the mean is one."""
    around = torch.randn(2, 7, 20)
    middle = torch.tensor([[0.0], [30.0]]).expand(2, 20)[:, None]
    keys = torch.cat([middle, middle + around, middle - around, middle], 1)  # 16 a cluster, the first is a start
    site = operands(32, dim=20, batch=1, heads=1, kv_heads=1)._replace(key=keys.view(1, 1, 32, 20))
    got = run(site, plan_of("kmedian")).view(2, 16)
    length = around.norm(dim=2)
    expected = torch.cat([torch.zeros(2, 1), length, length, torch.zeros(2, 1)], 1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_median_is_not_dragged_along_by_an_outlier() -> None:
    site = operands(16, dim=16, batch=1, heads=1, kv_heads=1)
    site.key[0, 0, 3] = 1000
    others = torch.arange(16) != 3
    median, mean = (run(site, plan_of(name, chunk=16))[0, 0, others].mean() for name in ("kmedian", "kmeans"))
    assert median < 10 < mean


@pytest.mark.parametrize("method", ["kmeans", "kmedian", "leverage"])
def test_the_planted_subspace(method: str) -> None:
    """Keys of directions of their own among many that share a small subspace are selected."""
    site = operands(128, dim=16, batch=2, heads=1, kv_heads=1, dtype=torch.bfloat16)
    keys = 0.05 * torch.randn(2, 1, 128, 16)
    keys[..., :3] += torch.randn(2, 1, 128, 3)
    heavy = torch.tensor([5, 40, 77, 120])
    keys[:, :, heavy, 10:14] += 4 * torch.eye(4)
    found = run(site._replace(key=keys.bfloat16()), plan_of(method, chunk=128)).topk(8).indices
    assert torch.stack([torch.isin(heavy, row).float().mean() for row in found.view(-1, 8)]).mean() > 0.8


CHUNKS = {
    "low rank": lambda n, dim: torch.randn(n, 3) @ torch.randn(3, dim),
    "one strong direction": lambda n, dim: 0.01 * torch.randn(n, dim) + 100 * torch.randn(n, 1) @ torch.randn(1, dim),
    "falling spectrum": lambda n, dim: torch.randn(n, dim) / torch.arange(1, dim + 1) ** 3,
    "far from zero": lambda n, dim: torch.randn(n, dim) + 100 * torch.randn(dim),
    "fewer keys than features": lambda n, dim: torch.randn(n, dim) * (torch.arange(n) < 10).unsqueeze(1),
    "large": lambda n, dim: 1e8 * torch.randn(n, dim),
    "small": lambda n, dim: 1e-8 * torch.randn(n, dim),
}


@pytest.mark.parametrize("dim", [24, 80, 200])
@pytest.mark.parametrize("name", CHUNKS)
def test_leverage_of_hard_chunks(name: str, dim: int, products: str) -> None:
    """Condition numbers up to the ridge's 1000 D + 1. No worse than some times torch's Cholesky in float32."""
    site = operands(64, dim=dim, batch=1, heads=1, kv_heads=1)._replace(key=CHUNKS[name](64, dim).view(1, 1, 64, dim))
    plan = plan_of("leverage", chunk=64)
    true = want(site, plan)
    low = summaries.score(site.query, site.key, None, plan, True, site.scale)
    error, torchs = ((t.double() - true).abs().max() for t in (run(site, plan), low))
    assert error <= (5 if products == "float32" else 15) * torchs + 2e-6


@pytest.mark.parametrize("dim", [80, 200])
def test_leverage_of_features_in_parts(dim: int) -> None:
    """Of keys of 16 bits, some of them padding, and some not finite in a feature of another part."""
    site = operands(45, dim=dim, batch=1, heads=2, kv_heads=2, padded=True, dtype=torch.bfloat16)
    check(site, plan_of("leverage"))
    site.key[0, 0, 5, 0] = math.nan
    site.key[0, 1, 40, dim - 1] = math.inf
    check(site, plan_of("leverage"))


@pytest.mark.parametrize("method", ["leverage", "norm", "inverse_norm"])
def test_permuting_keys_permutes_scores(method: str) -> None:
    site, order = operands(32, dim=20, batch=1), torch.randperm(32)
    turned = site._replace(key=site.key[:, :, order])
    torch.testing.assert_close(run(turned, plan_of(method)), run(site, plan_of(method))[:, :, order])


@pytest.mark.parametrize("method", kernel.METHODS)
@pytest.mark.parametrize("case", ["all equal", "one key", "no key", "zero"])
def test_degenerate_chunks(method: str, case: str) -> None:
    site = operands(40, dim=16, batch=1)
    valid = torch.ones(1, 40, dtype=torch.bool)
    if case == "all equal":
        site.key[:] = site.key[:, :, :1].bfloat16()
    if case == "one key":
        valid[:, 1:] = False
    if case == "no key":
        valid[:] = False
    if case == "zero":
        site.key[:] = 0
    site = site._replace(valid=valid)
    got = run(site, plan_of(method))
    assert got.isfinite().all()
    if case == "zero" or (case == "all equal" and method in ("kmeans", "kmeans_relative")):
        torch.testing.assert_close(got.double(), want(site, plan_of(method)), atol=1e-6, rtol=1e-5)
    if case == "one key" and method in ("kmeans", "kmedian", "leverage"):
        assert got.abs().max() < 1e-5, "it is its own centre"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", kernel.METHODS)
def test_a_key_that_is_not_finite_scores_the_most_and_is_in_no_sum(method: str, padded: bool) -> None:
    site, plan = operands(64, dim=16, heads=2, kv_heads=1, padded=padded), plan_of(method)
    hidden = torch.zeros(2, 64, dtype=torch.bool)
    hidden[0, 40] = hidden[1, 33] = True
    valid = site.valid if padded else torch.ones(2, 64, dtype=torch.bool)
    without = run(site._replace(valid=valid & ~hidden), plan)
    site.key[0, :, 40, 3] = math.nan
    site.key[1, :, 33, 0] = -math.inf
    got = run(site, plan)
    assert (got.isinf() == hidden[:, None]).all() and (got[got.isinf()] > 0).all()
    torch.testing.assert_close(got.where(~hidden[:, None], 0), without, atol=1e-6, rtol=1e-5)


def test_a_query_that_is_not_finite_reaches_the_keys_it_answers() -> None:
    """NaN in the scorer, +inf in the kernel: the first that are selected by either."""
    for bad in (math.nan, math.inf):
        site = operands(32, dim=16)
        site.query[0, 1, 20, 3] = bad
        plan = plan_of("peak")
        true = summaries.score(site.query, site.key, None, plan, True, site.scale)
        assert true.isnan().any() and torch.equal(run(site, plan).isinf(), true.isnan())


@pytest.mark.parametrize("method", kernel.METHODS)
def test_scores_are_deterministic_and_of_their_chunk_alone(method: str) -> None:
    site, plan = operands(96, dim=16, batch=1, heads=2, kv_heads=1), plan_of(method)
    before = run(site, plan)
    assert torch.equal(run(site, plan), before)
    site.key[:, :, 64:] += 3
    site.query[:, :, 64:] *= -2
    again = run(site, plan)
    assert torch.equal(again[:, :, :64], before[:, :, :64]) and not torch.equal(again, before)


def best_of(scores: torch.Tensor, valid: torch.Tensor | None, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference of ``select``."""
    batch, heads, length = scores.shape
    if valid is None:
        member = (torch.arange(length) >= plan.sinks).expand(batch, -1)
    else:
        member = members(valid, plan.sinks)
    places = summaries._pad_places(member.unsqueeze(1), plan.chunk).expand(-1, heads, -1)
    assert places.shape[2] == chunk_count(length, plan.chunk) * plan.chunk
    return summaries._best_of_chunks(scores, places, plan)


SCORES = {
    "different": lambda: torch.randn(2, 2, 75),
    "ties": lambda: torch.randint(0, 3, (2, 2, 75)).float(),
    "equal": lambda: torch.ones(2, 2, 75),
    "not finite": lambda: (
        torch.randn(2, 2, 75).masked_fill(torch.rand(2, 2, 75) < 0.2, math.nan)
        + torch.zeros(2, 2, 75).masked_fill(torch.rand(2, 2, 75) < 0.2, -math.inf)
    ),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("keep", [1, 5, 32])
@pytest.mark.parametrize("name", SCORES)
def test_selected_keys_are_the_references(name: str, keep: int, padded: bool) -> None:
    scores, valid = SCORES[name](), operands(75, padded=padded).valid
    for plan in (plan_of("norm", keep=keep), plan_of("norm", keep=keep, threshold=0.5, sinks=0)):
        found, expected = select.select(scores, valid, plan), best_of(scores, valid, plan)
        assert all(torch.equal(f, e) and f.dtype == e.dtype for f, e in zip(found, expected, strict=True))


def test_fewer_valid_keys_than_keep() -> None:
    scores, valid = torch.randn(1, 2, 64), torch.zeros(1, 64, dtype=torch.bool)
    valid[:, [3, 40, 41]] = True
    plan = plan_of("norm", keep=8, sinks=1)
    place, score = select.select(scores, valid, plan)
    chosen = place.where(score > -math.inf, -1)
    assert chosen[0, 0].tolist()[0] == [-1] * 8, "the one valid key is a sink"
    assert chosen[0, 1, 1].unique().tolist() == [-1, 40, 41]


@pytest.mark.parametrize("keep", [3, 32])
@pytest.mark.parametrize("name", ["ties", "not finite"])
def test_selected_keys_of_segments_are_the_references(name: str, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 11 chunks: segments of 8, 4, 2 and 1; a step of fewer keys than a segment has."""
    monkeypatch.setattr(select, "WIDTH", 64)
    site, plan = operands(335, dim=16), plan_of("norm", keep=keep)
    scores = torch.cat([SCORES[name]() for _ in range(5)], 2)[..., :335]
    valid = torch.rand(2, 335) < 0.5
    for there in (None, valid):
        chosen = select.select_segments(*select.select(scores, there, plan), plan)
        found = rows.rows(site.key, site.value, there, chosen, plan)
        expected = summaries.summarize(site.key, site.value, there, scores, plan)[4:]
        assert all(torch.equal(f, e) and f.dtype == e.dtype for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", ["kmeans", "leverage", "peak"])
def test_rows_are_the_references(method: str) -> None:
    """Scored, selected and merged: the rows of a summary."""
    site, plan = operands(150, dim=16, padded=True), plan_of(method, centroids=2)
    scores = summaries.score(site.query, site.key, site.valid, plan, site.causal, site.scale)
    expected = summaries.summarize(site.key, site.value, site.valid, scores, plan)
    best = select.select(run(site, plan), site.valid, plan)
    got = summaries.summarize(site.key, site.value, site.valid, None, plan, best=best)
    assert torch.equal(got.row_index, expected.row_index) and torch.equal(got.row_owner, expected.row_owner)


@pytest.mark.parametrize("settings", [{}, {"centroids": 2}, {"routes": 2}])
def test_the_operators_launch_them(settings: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Score and summarize, as a GPU would run them, and as this machine does."""
    site, plan = operands(150, padded=True), plan_of("leverage", **settings)
    arguments = (site.query, site.key, site.valid, plan.text, site.causal, site.scale)
    expected = ops.score_eager(*arguments)
    copied = ops.summarize_eager(site.key, site.value, site.valid, expected, plan.text)[4:]
    monkeypatch.setattr(ops.dispatch, "generated", lambda *given: True)
    scores = ops.score(*arguments)
    read = site.valid[:, None].expand_as(scores)
    torch.testing.assert_close(scores[read], expected[read], atol=1e-5, rtol=1e-4)
    got = ops.summarize(site.key, site.value, site.valid, scores, plan.text)[4:]
    for name, g, e in zip(("index", "owner", "key", "value", "bias"), got, copied, strict=True):
        torch.testing.assert_close(g, e, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_what_does_not_fit() -> None:
    assert not kernel.fits(Plan(method="kernel_kmeans"), 64, "bfloat16")
    assert not kernel.fits(Plan(method="scorer_of_a_user:widest"), 64, "bfloat16")
    assert not kernel.fits(plan_of("kmeans", chunk=512), 16, "bfloat16")
    assert not kernel.fits(plan_of("leverage", chunk=32), 257, "bfloat16")
    assert not kernel.fits(plan_of("kmedian", chunk=256), 128, "float32")
    assert not kernel.fits(plan_of("norm", chunk=16), 257, "bfloat16")
    assert kernel.fits(plan_of("leverage", chunk=256), 256, "float32")
    assert not select.fits(plan_of("norm", keep=0)) and not select.fits(plan_of("norm", chunk=512))
    assert not select.segments_fit(plan_of("norm", chunk=128, keep=65)) and select.segments_fit(plan_of("norm"))
