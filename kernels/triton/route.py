"""Route on a GPU: the best clusters of every query, found without a list of all scores.

A program holds a tile of queries (times the heads of the group) and walks over the representatives once.
It keeps the best ``routes`` of each row, sorted, by a bitonic network whose exchanges are a minimum and a
maximum of integers: words with a score, mapped to an integer of the same order, in the high bits and the cluster's
number in the walk below it, reversed, so that ties go to the earlier cluster. After the walk, the numbers are
sorted once more, ascending.

Queries of 16 bits have words of 32. The numbers of the clusters that a row's walk can come to take as many low bits
as they need, and the score's fraction has what is left of 23: 10 with 8192 clusters, where that of a representative has
7 (bfloat16) or 10 (float16). Scores that a word does not tell apart are ties. float32 has words of 64 bits and loses
nothing.

On sm_90 a lane spends 58 instructions on a pair of row and representative with D = 64 and 61 with D = 128, with a
share 67 and 71 (64 routes; counted in the binary), more than half of them in the network; the products are 4 D flops of
tensor cores a pair. More routes than ``SORTED`` take a threshold by bisection over the bits of a float instead, and
write what is above it: 34 walks in all.

A ``share`` is a bar that what was kept must reach: the walk also sums the exponentials of all scores, as it goes. A
score in the same word as the bar reaches it.

Heads that route together share a row; see ``route_scores``.

With ``listed`` chunks (two levels) a tile walks only over the clusters of the chunks that any of its
rows chose, and each row counts its own; see ``kernels.coarse``. They are listed as in ``union``, so that no later query
changes a sum; ties go to what is listed earlier.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..coarse import coarse
from ..layout import smaller
from ..plan import Plan
from ..summary import Summary
from . import device as devices
from .cache import features_last, launch, load, strides
from .loops import mask_parameters, mask_values, names, precision, tile, words
from .network import exchange, falling, rank, rising
from .render import arguments, fill, source, widened
from .route_scores import LOG2E, blocks, in_parts
from .spec import DTYPES, NOTHING, Lifted, Spec, Tile, power_of_two
from .union import union

ROWS = 64
COLUMNS = 32
WARPS = 4
STAGES = 2
SORTED = 64
"""The most routes that are kept on chip."""

KERNEL = """
def route(
    $arguments
):
    DIM: tl.constexpr = $dim
    DIM_TILE: tl.constexpr = $dim_tile
    GROUP: tl.constexpr = $group
    QUERIES: tl.constexpr = $queries
    ROWS: tl.constexpr = $rows
    COLUMNS: tl.constexpr = $columns
    HEADS: tl.constexpr = $together  #? together
    CHUNK: tl.constexpr = $chunk
    WINDOW: tl.constexpr = $window
    PER_CHUNK: tl.constexpr = $per_chunk
    $tile
    low = tl.maximum(query_at - WINDOW, 0) // CHUNK * CHUNK  #? sides
    high = ((query_at + WINDOW) // CHUNK + 1) * CHUNK  #? sides
    feature = tl.arange(0, DIM_TILE)  #? not in_parts
    $read_queries
    b = batch  #? lifted
    h = head[:, None]  #? lifted and not together
    q = tl.minimum(tl.maximum(query_at, 0), q_len - 1)[:, None]  #? lifted
    own_mean = mean + pair * clusters * DIM
    own_spread = spread + pair * clusters * DIM
    own_bias = bias + pair * clusters
    row = (batch * kv_heads * GROUP + head) * q_len + query_at  #? not together
    row = pair * HEADS * q_len + query_at  # of the first of the heads that route together  #? together
    near = tl.load(mass + row, mask=live, other=float("-inf"))  #? share and not together
    stop = tl.maximum(block, 0) * PER_CHUNK  #? causal and not listed
    stop = clusters  #? not causal and not listed
    list_at = (pair * tiles + tile) * list_size  #? listed
    stop = tl.load(listed_count + pair * tiles + tile) * PER_CHUNK  #? listed

    scale *= $log2e  #? together
    $start
    $choose
"""

SCORE = """
number = begin + tl.arange(0, COLUMNS)
there = number < stop
at = number  #? not listed
slot = number // PER_CHUNK  #? listed
at = tl.load(listed + list_at + slot, mask=there, other=0) * PER_CHUNK + number % PER_CHUNK  #? listed
$read_representatives
own = tl.load(own_bias + at, mask=there, other=float("-inf"))
own *= $log2e  #? together
c = (tl.minimum(at, clusters - 1) // PER_CHUNK)[None, :]  #? lifted
k_low = c * CHUNK  #? lifted
k_high = tl.minimum(k_low + CHUNK, k_len) - 1  #? lifted
$score_of
$chosen
score = tl.where(chosen, score, float("-inf"))  #? listed
first_key = at // PER_CHUNK * CHUNK  #? sides
outside = (first_key[None, :] < low[:, None]) | (first_key[None, :] >= high[:, None])  #? sides
score = tl.where(outside, score, float("-inf"))  #? sides
"""

BY_SORTING = """
# The best of each row so far, the largest first: words of a score, as an integer of the same order, above a cluster's
# number in the walk, of which the first is the largest.
below = stop - 1  #? not exact and not listed
below = tl.minimum(list_size, tl.maximum(block, 0)) * PER_CHUNK - 1  #? not exact and listed and causal
below = list_size * PER_CHUNK - 1  #? not exact and listed and not causal
for by in tl.static_range(5):  #? not exact
    below |= below >> (1 << by)  #? not exact
best = tl.full([ROWS] + [2] * $log, $least, $word)
for begin in range(0, stop, COLUMNS):
    $score
    $sum
    bits = score.to(tl.int32, bitcast=True)
    bits = (bits & 2147483647) ^ (bits >> 31)  #? not together
    word = (bits & ~below) | (~number & below)[None, :]  #? not exact
    word = (bits.to(tl.int64) << 32) | (number ^ 2147483647)[None, :]  #? exact
    rise = tl.reshape(word, [ROWS] + [2] * $log)
    $rising
    best = tl.maximum(best, rise)
    $falling
best = tl.reshape(best, [ROWS, COLUMNS])
place = tl.arange(0, COLUMNS)
rank = ($rank)[None, :]
number = ~best & below  #? not exact
number = best.to(tl.int32) ^ 2147483647  #? exact
best = best >> 32  #? exact
taken = (rank < route_count) & (best > (below | -2139095041))  # that of -inf  #? not exact and not together
taken = (rank < route_count) & (best > -2139095041)  # that of -inf  #? exact and not together
taken = (rank < route_count) & (best > below)  # that of 0  #? not exact and together
taken = (rank < route_count) & (best > 0)  #? exact and together
$bar
bits = bar.to(tl.int32, bitcast=True)  #? share
bits = (bits & 2147483647) ^ (bits >> 31)  #? share and not together
taken &= best >= (bits & ~below)[:, None]  #? share and not exact
taken &= best >= bits[:, None]  #? share and exact
slot = number // PER_CHUNK  #? listed
number = tl.load(listed + list_at + slot, mask=taken, other=0) * PER_CHUNK + number % PER_CHUNK  #? listed
# Ascending; what is not taken comes last.
rise = tl.reshape(tl.where(taken, number, 2147483647), [ROWS] + [2] * $log)
$rising
cluster = tl.reshape(rise, [ROWS, COLUMNS])
cluster = tl.where(cluster == 2147483647, -1, cluster)
$own_routes
$store_sorted
"""

BY_BISECTION = """
for begin in range(0, stop, COLUMNS):  #? share
    $score  #? share
    $sum  #? share
# Floats, mapped to integers of the same order, from that of -inf upwards.
least = tl.full([ROWS], -2139095041, tl.int64)
count = tl.zeros([ROWS], tl.int32)
for step in range(0, 33):
    half = (tl.full([ROWS], 2147483648, tl.int64) >> step)
    tried = least + tl.where(step == 32, 1, half)
    count = count * 0
    for begin in range(0, stop, COLUMNS):
        $score
        score = tl.where(score == 0.0, 0.0, score)
        bits = score.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 2147483647, bits)
        count += tl.sum((bits.to(tl.int64) >= tried[:, None]).to(tl.int32), 1)
    least = tl.where((step < 32) & (count >= route_count), tried, least)
bits = least.to(tl.int32)
threshold = tl.where(bits < 0, bits ^ 2147483647, bits).to(tl.float32, bitcast=True)
equal_count = route_count - count
$bar
equal_count = tl.where(bar > threshold, route_count, equal_count)  #? share
threshold = tl.maximum(threshold, bar)  #? share

# Write what is above the threshold, and the first of its equals.
$own_routes
seen_above = tl.zeros([ROWS], tl.int32)
seen_equal = tl.zeros([ROWS], tl.int32)
for begin in range(0, stop, COLUMNS):
    $score
    above = score > threshold[:, None]
    equal = (score == threshold[:, None]) & (score > float("-inf"))
    both = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    before = tl.cumsum(both, 1) - both
    equals = seen_equal[:, None] + (before >> 16)
    to = seen_above[:, None] + (before & 65535) + tl.minimum(equals, equal_count[:, None])
    taken = above | (equal & (equals < equal_count[:, None]))
    column = tl.broadcast_to(at[None, :], [ROWS, COLUMNS])
    $store_taken
    counts = tl.sum(both, 1)
    seen_above += counts & 65535
    seen_equal += counts >> 16
written = seen_above + tl.minimum(seen_equal, equal_count)
for begin in range(0, route_count, COLUMNS):
    to = begin + tl.arange(0, COLUMNS)
    rest = (to[None, :] >= written[:, None]) & (to < route_count)[None, :] & live[:, None]
    $store_rest
"""


# Where it is used: before the walk, it would take registers from that.
OWN_ROUTES = """
own_routes = routes + row * route_count  #? not compact
own_routes = routes + (pair * q_len + query_at) * route_count  #? compact
"""

STORES = {
    "store_sorted": "tl.store(own_routes[:, None] + rank, cluster, mask=(rank < route_count) & live[:, None])",
    "store_taken": "tl.store(own_routes[:, None] + to, column, mask=taken & (to < route_count) & live[:, None])",
    "store_rest": "tl.store(own_routes[:, None] + to[None, :], tl.full([ROWS, COLUMNS], -1, tl.int32), mask=rest)",
}

EACH_HEAD = """
first_routes = own_routes
for each in tl.static_range(HEADS):
    $text
    own_routes += q_len * route_count
own_routes = first_routes
"""


def spec_of(plan: Plan, *, dim: int, group: int, dtype: str, causal: bool, target: str) -> Spec:
    """What the kernel of one level depends on, but for the mask; see ``Spec``."""
    # What two stages of representatives need of the shared memory: 64 KiB on AMD's GPUs, 163 and 227 on NVIDIA's.
    narrow = dim * columns(plan) > (128 if target == "hip" else 256) * COLUMNS
    # What would spill with 64 rows on NVIDIA's: factors of three TF32 passes, or of more than 128 features.
    crowded = target == "cuda" and (dtype == "float32" or dim > 128)
    return Spec(
        plan=plan.text,
        dtype=dtype,
        target=target,
        dim=dim,
        value_dim=dim,
        group=group,
        causal=causal,
        valid=False,
        routes=True,
        tile=Tile(
            rows=ROWS // 2 if crowded else ROWS,
            keys=columns(plan),
            warps=2 * WARPS if crowded else WARPS,
            stages=1 if narrow else STAGES,
        ),
    )


def columns(plan: Plan) -> int:
    """Representatives of one step; where they are sorted, as many as are kept."""
    return max(COLUMNS, power_of_two(plan.routes)) if plan.routes <= SORTED else COLUMNS


def order_of_bits(wide: int) -> tuple[int, ...]:
    """Bits of a column, those first that a lane holds of a product on NVIDIA's tensor cores: all but 1 and 2."""
    bits = range(wide.bit_length() - 1)
    return tuple(sorted(bits, key=lambda bit: bit in (1, 2)))


@functools.cache
def route_source(spec: Spec, per_chunk: int, listed: bool, compact: bool = False) -> str:
    """Source of ``route``: over ``per_chunk`` representatives a chunk, all or those of listed chunks.

    ``compact``: what heads that route together find is written once, not for each of them.
    """
    plan, rows = spec.settings, tiled(spec)
    wide = columns(plan)
    own = ["query", "mean", "spread", "bias", *["mass"] * plan.needs_mass, "routes"]
    own += ["listed", "listed_rows", "listed_count"] * listed
    own += ["query_b", "query_h", "query_n", "kv_heads", "q_len", "k_len", *["first_block"] * spec.aligned]
    own += ["clusters", "route_count", *["list_size"] * listed, "tiles", "scale"]
    loads, strides = mask_parameters(spec)
    own += loads + strides
    parts = names(rows) | dict(
        arguments=arguments(own),
        tile=tile(rows),
        columns=wide,
        log=wide.bit_length() - 1,
        per_chunk=per_chunk,
        listed=listed,
        together=spec.together,
        compact=compact,
        sides=not spec.causal and plan.window != 0,
        share=plan.share,
        sorts=plan.routes <= SORTED,
        log2e=LOG2E,
        exact=spec.dtype == "float32",
        in_parts=in_parts(spec),
        dtype=spec.dtype,
        square_type="float32" if spec.dtype == "float32" else "bfloat16",
        precision=precision(spec),
        wide_type=widened(spec.dtype),
        chosen=_chosen(rows) if listed else "",
    )
    parts |= blocks(spec, parts)
    parts["score"] = fill(SCORE, parts)
    bits = order_of_bits(wide)
    parts |= dict(rising=rising("rise", bits, len(bits) - 2), falling=falling("best", bits), rank=rank("place", bits))
    parts |= dict(word="tl.int64", least=-(2**63)) if parts["exact"] else dict(word="tl.int32", least=-(2**31))
    each = spec.together and not compact
    parts |= {name: fill(EACH_HEAD, {"text": text}) if each else text for name, text in STORES.items()}
    parts["own_routes"] = fill(OWN_ROUTES, parts)
    parts["choose"] = fill(BY_SORTING if parts["sorts"] else BY_BISECTION, parts)
    about = {"plan": spec.plan, "stage": "route, " + ("of listed chunks" if listed else "all of a level")}
    return source("route", about, (exchange() if parts["sorts"] else "") + fill(KERNEL, parts))


def tiled(spec: Spec) -> Spec:
    """What says which rows are in a tile: where heads route together, a row is a query."""
    return replace(spec, group=1) if spec.together else spec


def route(
    query: torch.Tensor,
    summary: Summary,
    plan: Plan,
    causal: bool,
    k_len: Any,
    scale: float,
    lifted: Lifted = NOTHING,
    tensors: Mapping[str, torch.Tensor] | None = None,
    mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """``routing.route``, or ``coarse.route`` where the plan has two levels.

    ``lifted`` says which chunks a query can reach and what is added there (``logits.Logits.reach``), ``tensors``
    what it reads; ``mass`` where the plan needs it.
    """
    if scale < 0:
        query, scale = -query, -scale
    more = (lifted, tensors or {}, mass)
    if not plan.coarse or plan.window is None:
        return _walk(query, summary, plan, causal, k_len, scale, plan.chunk // plan.cluster, {}, *more)
    heads, per_chunk = summary.mean.shape[1], plan.chunk // plan.cluster
    first = plan.first_level
    spec = _spec_of(query, heads, first, causal)
    found = _walk(query, coarse(summary, plan), first, causal, k_len, scale, 1, {}, *more, compact=bool(spec.together))
    lists = union(tiled(spec), found, query.shape[2], k_len, heads, summary.mean.shape[2] // per_chunk)
    return _walk(query, summary, plan, causal, k_len, scale, per_chunk, lists, *more)


def _spec_of(query: torch.Tensor, kv_heads: int, plan: Plan, causal: bool) -> Spec:
    """``spec_of``, of queries ``[B, H, Nq, D]``."""
    group, dtype = int(query.shape[1]) // int(kv_heads), DTYPES[query.dtype]
    return spec_of(plan, dim=int(query.shape[3]), group=group, dtype=dtype, causal=causal, target=devices.target())


def _walk(
    query: torch.Tensor,
    summary: Summary,
    plan: Plan,
    causal: bool,
    k_len: Any,
    scale: float,
    per_chunk: int,
    lists: dict[str, Any],
    lifted: Lifted,
    tensors: Mapping[str, torch.Tensor],
    mass: torch.Tensor | None,
    compact: bool = False,
) -> torch.Tensor:
    batch, heads, q_len, _ = query.shape
    kv_heads, clusters = summary.mean.shape[1:3]
    count = smaller(plan.routes, clusters)
    routes = query.new_empty((batch, kv_heads if compact else heads, q_len, count), dtype=torch.int32)
    if plan.window is None:  # the window holds every key
        return routes.fill_(-1)
    spec = replace(_spec_of(query, kv_heads, plan, causal), lifted=lifted)
    tiles = tiled(spec).tiles(q_len, k_len)
    query = features_last(query)
    values = strides("query", query) | dict(
        query=query, mean=summary.mean, spread=summary.spread, bias=summary.bias, mass=mass, routes=routes,
        kv_heads=kv_heads, q_len=q_len, k_len=k_len, first_block=spec.first_block(q_len, k_len) if spec.aligned else 0,
        clusters=clusters, route_count=count, tiles=tiles, scale=scale,
    )  # fmt: skip
    text = route_source(spec, per_chunk, bool(lists), compact)
    grid = (batch * kv_heads * tiles,)
    values |= mask_values(spec, tensors)
    # Where shared memory is less, two stages of many features do not fit every plan.
    stages = 1 if spec.dim > 128 and devices.is_small(query.device) else spec.tile.stages
    launch(load(text, "route"), grid, values | lists, warps=spec.tile.warps, stages=stages)
    if lists and plan.routes > SORTED:  # what bisection finds is in the order of the list
        nothing = torch.iinfo(torch.int32).max
        routes = routes.masked_fill(routes < 0, nothing).sort(3).values
        routes = routes.masked_fill(routes == nothing, -1)
    return routes


def _chosen(spec: Spec) -> str:
    """``chosen`` ``[ROWS, COLUMNS]``: the row is one of those that listed the column's chunk; see ``union``."""
    lines, word = words(spec)
    return f"{lines}\nchosen = (({word} >> (member % 32)[:, None]) & 1) != 0"
