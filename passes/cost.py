"""The cost model: multiply-adds of exact and of prescored attention, as sympy expressions of n."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy
import torch

from ..kernels import library
from ..kernels.plan import Plan

N = sympy.Symbol("n", integer=True, positive=True)

# Time of one multiply-add of a stage, in those of exact attention (SDPA's CPU kernel, float32,
# D = 64). Measured by `python -m bench.attention`; see docs/cpu.md.
ATTEND_PRICE = 0.8
ROUTE_PRICE = 1.2
# Fixed work a key and KV head, in the same unit: clustering it and copying it, and scoring it.
SUMMARY_PER_KEY = 40_000
SCORE_PER_KEY = {
    "kmeans": 35_000, "kmeans_relative": 38_000, "kernel_kmeans": 55_000, "kmedian": 100_000,
    "leverage": 45_000, "peak": 220_000, "window_peak": 290_000, "random": 10_000, "norm": 11_000,
    "inverse_norm": 10_000, "query": 73_000,
}  # fmt: skip
# The same for the centroids of a segment, of each that a key lies in: torch operations.
CENTROIDS_PER_KEY = 120_000
# How much faster exact attention is in bfloat16 where there is AMX: by so much the same work weighs more.
FASTER_ON_AMX = 2.5
# Keys that a query of a band costs beyond its own: of the tile that it lies in. Measured at 1,024 to 8,192 keys.
BAND_EDGE = 256
# Attention by hand, compiled by Inductor, whose logits are in memory: what a pair costs beside its products, where
# logits fit into a cache and where they do not; and a multiply-add of its products, in 16 bits where there is AMX. The
# same of a kernel that attends every key. Measured by `python -m bench.alone`, docs/cpu.md.
BY_HAND_PAIR, BY_HAND_LARGE = 50, 120
BY_HAND_PRODUCT, BY_HAND_NARROW = 0.8, 0.3
# In 16 bits without a unit for their products: 20 and more were measured on AVX2.
BY_HAND_SLOW = 12
ALONE_PRICE, ALONE_ON_TILES = 1.05, 0.45
LARGE_LOGITS = 2**25
"""Bytes."""
ALONE_GAIN, ALONE_TRAINED = 1.4, 1.6
"""The least that is expected of it: what is measured differs from machine to machine, and from mask to mask; and of its
forward where gradients are asked for, of which it makes less: 0.7 times as much was measured."""
ALONE_FROM, ALONE_FROM_SLOW = 1024, 128
"""Keys; below, what a call of an operator costs weighs as much as what it computes. Where products are slow, one
kernel is 7 times as fast with 128, and more with more."""
# Numbers in keys and values (of all KV heads) from which few queries that share them read them faster than SDPA does,
# with one query and for each more, and for each more where they are repeated in memory; and of one query in 16 bits,
# which SDPA widens. A call costs 0.1 ms. Keys from which a mask is worth it, where SDPA, too, reads each once. Measured
# by `python -m bench.few`.
FEW_NUMBERS, FEW_NUMBERS_MORE, FEW_REPEATED_MORE, FEW_NARROW, FEW_MASKED = 3 << 18, 1 << 18, 1 << 14, 3 << 16, 8192
LONGEST = 2**24
# Of the routes that a plan with a share may take, those that it takes on average: of 64 at a share of 0.0012 and 8192
# tokens of text, by `python -m bench.quality`. Content decides, so this is an expectation.
FILLED = 0.38
# How much more the last queries of a long sequence attend than all do on average: measured, 128 to 1024 of 8192.
FILLED_LATE = 1.7
# The same where the heads of a group route together, at a share of 0.0014.
FILLED_TOGETHER = 0.42


@dataclass(frozen=True)
class Prices:
    """What stages cost on a kind of device, in multiply-adds of its exact attention.

    Attributes:
        attend: of one multiply-add of an attended pair; band: of a pair of a band. route: of a routing pair, its
            features counted in ``attend``'s way. route_pair: of a routing pair whatever its features. mass: of a pair
            of the sum that a share is of, in attended pairs: none where attending has that sum.
        union: routed pairs that are computed, for each that is attended. union_together: where the heads of a group
            route together. chunk_union: chunks of the first of two levels that are walked over, for each chosen.
        lists: a route that a query may take, or the heads together, to list it for its tile.
        route_head: part of a routing pair's price that each of the heads pays that route together.
        per_key, per_feature: a key and KV head, to cluster and copy it; and each of its features.
        centroids: a key and KV head, for the centroids of one segment that it lies in.
        score: a key and KV head, to score it, by method; other: by a user's own scorer. select: of scored keys, to
            find the best and copy them. band_edge: keys that a query of a band costs beyond its own.
        fixed: the launches. attend_fixed: that of a plan that only attends. select_fixed: those of scores and selected
            keys.
    """

    attend: float
    band: float
    route: float
    score: Mapping[str, int]
    other: int
    route_pair: float = 0.0
    lists: float = 0.0
    mass: float = 1.0
    union: float = 1.0
    union_together: float = 1.0
    route_head: float = 1.0
    chunk_union: float = 1.0
    per_key: float = 0.0
    per_feature: float = 0.0
    centroids: float = 0.0
    select: float = 0.0
    band_edge: float = 0.0
    fixed: float = 0.0
    attend_fixed: float = 0.0
    select_fixed: float = 0.0


PRICES = {
    # What a user's scorer costs nobody knows: as kmedian, the dearest that reads keys alone.
    "cpu": Prices(
        attend=ATTEND_PRICE, band=ATTEND_PRICE, route=ROUTE_PRICE, mass=0.0,
        per_key=SUMMARY_PER_KEY, centroids=CENTROIDS_PER_KEY, score=SCORE_PER_KEY, other=SCORE_PER_KEY["kmedian"],
        band_edge=BAND_EDGE, fixed=2e7, attend_fixed=5e6,
    ),
    # bfloat16 where there is AMX, of which SDPA makes more than clusters of 16 keys can: `python -m bench.attention
    # --dtypes bfloat16`. Scores and centroids take as long as in float32, which SDPA does not.
    "amx": Prices(
        attend=3.0, band=1.0, route=3.0, mass=0.0, per_key=90_000, centroids=FASTER_ON_AMX * CENTROIDS_PER_KEY,
        score={method: int(FASTER_ON_AMX * price) for method, price in SCORE_PER_KEY.items()},
        other=int(FASTER_ON_AMX * SCORE_PER_KEY["kmedian"]), band_edge=400, fixed=6e7, attend_fixed=1.2e7,
    ),
    # Modelled, not measured: an H100 in bfloat16 as `bench/model.py` has it, for AMD's GPUs too. Scores: 128 features,
    # 4 query heads a KV head. kernel_kmeans, window_peak, random and a user's scorer are torch operations there:
    # what they read and write, or their launches where that is more.
    "cuda": Prices(
        attend=1.5, band=1.5, route=0.28, route_pair=646.0, route_head=0.17, lists=3_000.0, union=4.3,
        union_together=2.8, chunk_union=1.5, per_key=79_900.0, per_feature=1_785.0, centroids=210_000, fixed=1.04e10,
        score={
            "kmeans": 114_000, "kmeans_relative": 120_000, "kmedian": 416_000, "leverage": 956_000,
            "peak": 300_000, "query": 103_000, "norm": 26_000, "inverse_norm": 26_000,
            "kernel_kmeans": 9_000_000, "window_peak": 20_000_000, "random": 1_000_000,
        },
        other=9_000_000, select=87_000, select_fixed=4.5e9, band_edge=128, attend_fixed=1.3e9,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One site's fixed sizes, and the kind of device, a key of ``PRICES``."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool
    device: str = "cpu"
    band: float = 0.0
    """Keys that a query may attend on average, where the mask is a band that is attended whole; 0.0: as many as there
    are."""
    queries: int = 0
    """Where they are fewer than keys, the last ones, as behind a cache; 0: as many."""
    narrow: bool = False
    """Numbers of 16 bits."""
    unit: bool = True
    """The device has instructions for their products: a CPU without takes many times as long as in float32."""


def kind(device: str, dtype: torch.dtype) -> str:
    """The key of ``PRICES`` for tensors of ``dtype`` on a device of that type."""
    return "amx" if device == "cpu" and dtype == torch.bfloat16 and library.tiles() else device


def has_unit(device: str, dtype: torch.dtype) -> bool:
    """``Shape.unit`` of tensors of ``dtype`` on a device of that type."""
    return device != "cpu" or dtype.itemsize != 2 or library.multiplies(str(dtype).removeprefix("torch."))


def exact_pairs(causal: bool, band: float = 0.0) -> sympy.Expr:
    """(query, key) pairs of exact attention, a head: of a band, all that a mask is looked up for."""
    return N * (N + 1) / 2 if causal and not band else N**2


def attended_pairs(plan: Plan, causal: bool, band: float = 0.0) -> sympy.Expr:
    """(query, key or row) pairs that the plan attends, a head; at most the exact ones."""
    if plan.window is None and not band:
        return exact_pairs(causal)
    if plan.window is None:
        most = _least(band, N)
        return most * N - most**2 / 2 if causal else _least(band * N, N**2)
    window, routed = _window(plan, causal), routed_keys(plan)
    rows: sympy.Expr = plan.sinks + (segments(plan) if causal else 1) * plan.rows_per_segment
    residual = exact_pairs(causal) / plan.cluster if plan.residual else 0
    total = N * (window + routed)
    if causal:  # the first queries have fewer keys before them
        full = _least(window + routed, N)
        total = full * N - full**2 / 2
    return _least(total + N * rows + residual, exact_pairs(causal))


def routed_keys(plan: Plan) -> float:
    """Keys that a query is expected to attend through its routes."""
    filled = FILLED_TOGETHER if plan.group_routes else FILLED
    return plan.routes * plan.cluster * (filled if plan.share else 1.0)


def mass_pairs(plan: Plan, causal: bool) -> sympy.Expr:
    """What the sum that a share is of costs, in attended pairs, a head: logits of window and sinks, without values."""
    if not plan.needs_mass:
        return sympy.Integer(0)
    return attended_pairs(plan.near, causal) / 2


def segments(plan: Plan) -> sympy.Expr:
    """Segments that a query attends, and that a key lies in: about half the bits of the number of chunks."""
    return sympy.log(_most(N / plan.chunk, 1), 2) / 2


def _window(plan: Plan, causal: bool) -> float:
    """Keys of a query's window, on average."""
    assert plan.window is not None
    if causal:
        return plan.window + plan.chunk / 2
    return 2 * (plan.window + plan.chunk / 2) if plan.window else 0


def routing_pairs(plan: Plan, causal: bool, union: float = 1) -> sympy.Expr:
    """(query, representative vector) pairs: a mean and a spread for each cluster, a head.

    On the second of two levels ``union`` times as many are computed (``Prices.chunk_union``). Two vectors of D a
    cluster cost as much as one attended key (its key and its value).
    """
    if not plan.routes:
        return sympy.Integer(0)
    seen = exact_pairs(causal)
    if causal and plan.window is not None:
        seen = _most(N - _window(plan, causal), 0) ** 2 / 2
    every = seen / plan.cluster
    if not plan.coarse:
        return every
    return seen / plan.chunk + _least(N * union * plan.coarse * plan.chunk / plan.cluster, every)


def exact_cost(shape: Shape) -> sympy.Expr:
    """Multiply-adds of exact attention."""
    return _part(shape) * _late(shape) * _per_pair(shape) * exact_pairs(shape.causal, shape.band)


def prescored_cost(shape: Shape, plan: Plan) -> sympy.Expr:
    """Multiply-adds of attending and routing; not the summary, which is linear in n."""
    attended = attended_pairs(plan, shape.causal, shape.band) + mass_pairs(plan, shape.causal)
    return _part(shape) * _per_pair(shape) * (attended + _late(shape) * routing_pairs(plan, shape.causal))


def density(plan: Plan, causal: bool) -> sympy.Expr:
    """Attended pairs, routing counted in, over exact pairs."""
    attended = attended_pairs(plan, causal) + mass_pairs(plan, causal) + routing_pairs(plan, causal)
    return attended / exact_pairs(causal)


def prescored_time(shape: Shape, plan: Plan) -> sympy.Expr:
    """Expected time in units of one exact multiply-add, everything included."""
    prices = PRICES[shape.device]
    keys, rows = shape.batch * shape.kv_heads * N, shape.batch * shape.heads
    summary = (prices.per_key + prices.per_feature * shape.head_dim) * keys if plan.routes else 0
    if plan.centroids:
        summary += prices.centroids * keys * segments(plan)
    scoring = 0
    if plan.keep:
        scoring = (prices.score.get(plan.method, prices.other) + prices.select) * keys + prices.select_fixed
    attended = attended_pairs(plan, shape.causal, shape.band)
    routing = routing_pairs(plan, shape.causal, prices.chunk_union)
    group = plan.together(shape.heads // shape.kv_heads)
    union = prices.union_together if group > 1 else prices.union
    if union != 1:
        attended += (union - 1) * _least(N * routed_keys(plan), attended)
    if shape.queries and plan.share:
        attended *= FILLED_LATE
    attended += prices.mass * mass_pairs(plan, shape.causal) + (N * prices.band_edge if shape.band else 0)
    routing *= _late(shape) * (prices.route_head + (1 - prices.route_head) / group)
    price = prices.band if shape.band else prices.attend
    pairs = _per_pair(shape) * (price * attended + prices.route * routing)
    pairs += rows * (prices.route_pair * routing + prices.lists / group * N * (plan.routes + plan.coarse))
    return _part(shape) * pairs + summary + scoring + (prices.attend_fixed if plan.only_window else prices.fixed)


@functools.cache
def queries_needed(shape: Shape, plan: Plan, length: int) -> int | None:
    """The fewest queries for which the plan is expected to be faster than exact, of ``length`` keys; None: for none.

    It is about the same for all lengths: what keys cost and what queries save both grow with them.
    """
    low, high = 1, max(length - 1, 1)

    def gains(queries: int) -> bool:
        asked = replace(shape, queries=queries)
        return at(prescored_time(asked, plan), length) < at(exact_cost(asked), length)

    if length <= shape.band or not gains(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if gains(middle) else (middle + 1, high)
    return low


@functools.cache
def break_even(shape: Shape, plan: Plan) -> int | None:
    """The shortest length at which the plan is expected to be faster than exact; None: never.

    A sequence within its band is attended whole: no gain is looked for there.
    """
    if plan.window is None and not shape.band:  # every key is attended: whatever a kernel gains, the plan does not
        return None
    faster = sympy.lambdify(N, prescored_time(shape, plan) - exact_cost(shape), "math")
    if faster(LONGEST) >= 0:
        return None
    low, high = 1 + math.ceil(shape.band), LONGEST  # the gain grows with n: bisect
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) < 0 else (middle + 1, high)
    return low


@functools.cache
def alone_from(shape: Shape, trained: bool) -> int | None:
    """The fewest keys from which one kernel that attends all of them is faster than attention by hand; None: never.

    ``trained``: gradients are asked for. On AMX, whose tiles the kernel's backward does not use, what is measured of
    the forward then holds where logits do not fit into a cache, or a band is short.
    """
    if shape.device == "cuda":
        return ALONE_FROM
    features = shape.head_dim + shape.value_dim
    slow = shape.narrow and not shape.unit
    products = features * (BY_HAND_SLOW if slow else BY_HAND_NARROW if shape.narrow else BY_HAND_PRODUCT)
    on_tiles = shape.device == "amx"
    kernel = (ALONE_TRAINED if trained else ALONE_GAIN) * (ALONE_ON_TILES if on_tiles else ALONE_PRICE) * features
    unknown = trained and on_tiles
    # The most of the pairs that the kernel may attend, and those that it does.
    in_cache, beyond = ((pair + products) / kernel for pair in (BY_HAND_PAIR, BY_HAND_LARGE))
    attended = 0.5 if shape.causal and not shape.queries else 1.0
    found = []
    if attended <= in_cache and not unknown:
        found.append(0)
    if attended <= beyond:
        pairs = LARGE_LOGITS // (shape.batch * shape.heads * (2 if shape.narrow else 4))
        found.append(pairs // shape.queries if shape.queries else math.isqrt(pairs))
    if shape.band:
        found.append(math.ceil(shape.band / min(in_cache, attended) * (2 if unknown else 1)))
    return max(ALONE_FROM_SLOW if slow else ALONE_FROM, min(found)) if found else None


def few_from(shape: Shape, queries: int, masked: bool, by_hand: bool, repeated: bool) -> int | None:
    """The fewest keys from which ``kernels.few`` is faster for so many queries than what is there; None: never.

    ``masked``: a mask may hide some. ``by_hand``: it is written out, which Inductor widens nothing for. ``repeated``:
    keys and values are in memory for each query head.
    """
    more = queries - 1
    if shape.narrow and not more and not by_hand:
        numbers = FEW_NARROW
    elif shape.narrow and more and by_hand and not shape.unit:
        numbers = FEW_NUMBERS
    elif shape.heads > shape.kv_heads:
        wide = FEW_REPEATED_MORE * (4 if shape.narrow and not by_hand else 1)  # 16 bits are copied in less time
        numbers = FEW_NUMBERS + more * (wide if repeated else FEW_NUMBERS_MORE)
        numbers *= 2 if shape.narrow and by_hand else 1
    else:
        return FEW_MASKED if masked and not shape.narrow and queries <= 4 else None
    return math.ceil(numbers / (shape.batch * shape.kv_heads * (shape.head_dim + shape.value_dim)))


def at(expr: sympy.Expr, length: int) -> float:
    """The expression's value at a length."""
    return float(sympy.sympify(expr).subs(N, length))


def _least(*of: sympy.Expr) -> sympy.Expr:
    """The minimum, without sympy's search for which it is for every n: that took a fifth of all passes' time."""
    return sympy.Min(*of, evaluate=False)


def _most(*of: sympy.Expr | int) -> sympy.Expr:
    return sympy.Max(*of, evaluate=False)


def _part(shape: Shape) -> sympy.Expr:
    """How many queries there are for each key."""
    return shape.queries / N if shape.queries else sympy.Integer(1)


def _late(shape: Shape) -> sympy.Expr:
    """How many more keys the last queries meet than all do on average."""
    return 2 - _part(shape) if shape.causal and not shape.band else sympy.Integer(1)


def _per_pair(shape: Shape) -> int:
    return shape.batch * shape.heads * (shape.head_dim + shape.value_dim)
