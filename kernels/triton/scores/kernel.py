"""What a score kernel depends on, its frame and its launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...layout import chunk_count
from ...plan import Plan
from ..cache import features_last, launch, load, strides
from ..clusters import CHUNK, tile_of
from ..device import target
from ..loops import wide_precision
from ..render import arguments, fill, source, widened
from ..spec import DTYPES, MOST_FEATURES
from . import attention, centres, leverage, products

METHODS = ("kmeans", "kmeans_relative", "kmedian", "leverage", "peak", "query", "norm", "inverse_norm")
"""The scorers that kernels are written for. The others are torch operations on a GPU too."""
READ_QUERIES = ("peak", "query")
CENTRES = ("kmeans", "kmeans_relative", "kmedian")

KERNEL = """
def score(
    $arguments
):
    DIM: tl.constexpr = $dim
    CHUNK: tl.constexpr = $chunk
    program = tl.program_id(0)
    pair = (program // chunks).to(tl.int64)  # of batch and KV head
    chunk = program % chunks
    key_head = key + pair // kv_heads * key_b + pair % kv_heads * key_h
    feature = tl.arange(0, $dim_tile)
    place = tl.arange(0, CHUNK)
    at = chunk * CHUNK + place
    keys = tl.load(
        key_head + at.to(tl.int64)[:, None] * key_n + feature[None, :],
        mask=(at < k_len)[:, None] & (feature < DIM)[None, :],
        other=0.0,
    )
    finite = tl.sum(keys.to(tl.float32) * 0.0, 1) == 0.0  # 0 * x is NaN for what is not finite
    here = (at < k_len) & finite  #? not valid
    here = finite & (tl.load(member + pair // kv_heads * k_len + at, mask=at < k_len, other=0) != 0)  #? valid
    keys = tl.where(here[:, None], keys, 0.0).to(key.dtype.element_ty)

    $body

    $store
"""

STORE = """
# A key that is not finite must be met, not hidden; what is no number is taken for the same.
result = tl.where(here & (result == result), result, tl.where(here, float("inf"), 0.0))
tl.store(scores + pair * k_len + at, tl.where(finite, result, float("inf")), mask=at < k_len)
"""

NORM = """
lengths = keys.to(tl.float32)
result = $root(tl.sum(lengths * lengths, 1))
"""


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """What the source depends on.

    Attributes:
        plan: its text. dtype: of query and key, a value of ``spec.DTYPES``. target: of ``spec.TARGETS``.
        dim: features. group: query heads that share a KV head, 0 where queries are not read.
        causal: read where queries are. valid: some keys are padding.
    """

    plan: str
    dtype: str
    target: str
    dim: int
    group: int = 0
    causal: bool = True
    valid: bool = False

    @property
    def settings(self) -> Plan:
        return Plan.parse(self.plan)

    @property
    def warps(self) -> int:
        """Of the launch: 64 registers a lane for one copy of the keys, or of a part's Gram matrix, in float32."""
        plan, width = self.settings, tile_of(self.dim)
        numbers = min(width, leverage.FEATURES) ** 2 if plan.method == "leverage" else plan.chunk * width
        # The two loops of k-median in bfloat16 keep a little more than 255 registers hold.
        crowded = (plan.method, self.target, self.dtype) == ("kmedian", "cuda", "bfloat16") and width <= 128
        return 4 if numbers <= 8192 else 8 if numbers <= (8192 if crowded else 16384) else 16


def fits(plan: Plan, dim: int, dtype: str, small: bool = False) -> bool:
    """Whether a chunk is scored on chip: a method that has a kernel, and a chunk that fits.

    ``small``: on a device with less shared memory than others (``device.is_small``).
    """
    if plan.method not in METHODS or plan.chunk > CHUNK or dim > MOST_FEATURES:
        return False
    return plan.chunk * tile_of(dim) <= most_numbers(plan.method, dtype, dim, small)


def most_numbers(method: str, dtype: str, dim: int, small: bool) -> int:
    """The most keys times features of a chunk: what the shared memory takes, as compiled."""
    wide = dim > 128
    if method == "leverage":  # a chunk comes in steps
        return CHUNK * MOST_FEATURES
    if method in CENTRES:
        return (32768 if dtype == "bfloat16" else 16384) >> (wide + (small and dtype == "float16"))
    if method in READ_QUERIES:
        return (16384 if dtype == "float32" else 32768) >> (small and (wide or dtype == "float32"))
    return 32768


def score_source(spec: ScoreSpec) -> str:
    """Source of ``score``."""
    plan, method = spec.settings, spec.settings.method
    names = ["query"] * bool(spec.group) + ["key", *["member"] * spec.valid, "scores"]
    names += ["query_b", "query_h", "query_n"] * bool(spec.group)
    names += ["whites", "lefts", "part"] * (method == "leverage")
    names += ["key_b", "key_h", "key_n", "kv_heads", "k_len", "chunks", *["scale"] * bool(spec.group)]
    exact = spec.dtype == "float32"
    parts: dict[str, Any] = dict(
        arguments=arguments(names),
        dim=spec.dim,
        dim_tile=tile_of(spec.dim),
        chunk=plan.chunk,  # a power of two: a cluster is 16, 32 or 64 keys
        group=spec.group,
        causal=spec.causal,
        valid=spec.valid,
        wide=exact,
        wide_type=widened(spec.dtype),
        wide_precision=wide_precision(spec.target),
        store=STORE,
    )
    functions: tuple[str, ...] = ()
    template = KERNEL
    if method == "leverage":
        template, functions = leverage.body(parts), (products.added(spec.target),)
    elif method in CENTRES:
        parts["body"] = centres.body(method, parts)
        functions = (products.product(spec.dtype, spec.target), *[products.picked(spec.target)] * exact)
    elif method in READ_QUERIES:
        parts["body"] = attention.body(method, parts)
        functions = (products.product(spec.dtype, spec.target),) * exact
    else:
        parts["body"] = fill(NORM, {"root": "-tl.sqrt" if method == "inverse_norm" else "tl.sqrt"})
    about = {"plan": spec.plan, "stage": f"score, {method} of a chunk's keys"}
    return source("score", about, products.before(*functions) + fill(template, parts))


def spec_of(plan: Plan, *, dim: int, group: int, dtype: str, causal: bool, valid: bool, target: str) -> ScoreSpec:
    """What the kernel depends on: on queries, and causality, where the method reads them."""
    reads = plan.method in READ_QUERIES
    return ScoreSpec(
        plan=plan.text,
        dtype=dtype,
        target=target,
        dim=dim,
        group=group if reads else 0,
        causal=causal if reads else True,
        valid=valid,
    )


def scores(
    query: torch.Tensor, key: torch.Tensor, valid: torch.Tensor | None, plan: Plan, causal: bool, scale: float
) -> torch.Tensor:
    """``summary.score``: ``[B, Hkv, Nk]`` float32. Padding scores 0; what is NaN there is +inf here."""
    batch, heads, k_len, _ = key.shape
    chunks = chunk_count(k_len, plan.chunk)
    found = key.new_empty((batch, heads, k_len), dtype=torch.float32)
    query, key = (features_last(t) for t in (query, key))
    spec = spec_of(
        plan, dim=int(key.shape[3]), group=int(query.shape[1]) // int(heads), dtype=DTYPES[key.dtype],
        causal=causal, valid=valid is not None, target=target(),
    )  # fmt: skip
    values = strides("query", query) | strides("key", key) | dict(
        query=query, key=key, member=None if valid is None else valid.contiguous(), scores=found,
        kv_heads=heads, k_len=k_len, chunks=chunks, scale=scale,
    )  # fmt: skip
    parts = 1
    if plan.method == "leverage":
        parts = leverage.parts(tile_of(spec.dim))
        values |= leverage.scratch(found, tile_of(spec.dim), plan.chunk, batch * heads * chunks)
    kernel = load(score_source(spec), "score")
    for part in range(parts):
        launch(kernel, (batch * heads * chunks,), values | {"part": part}, warps=spec.warps, stages=1)
    return found
