"""Centroids of segments on a GPU: k-means of the keys that a segment does not keep, and the means of its clusters.

A segment is one program's, or as many as it has parts of ``PART`` keys; one launch has the parts of all sizes:

  - ``segment_moments`` sums up a part's keys and values, by which values come to weigh as much as keys;
  - ``segment_assign_0`` and its like, a Lloyd iteration each, give a part's keys to centres and sum them up;
  - ``segment_rows`` makes a segment's rows of the last sums.

Sums of parts are added up, in order, by each program that needs those of a whole segment: no atomics. A point is
``[key, ratio * value]``, but the centres in the lanes hold values as they are, so that the last means are the rows;
the ratio is in the distance. The key that starts a centre is found by its rank among the segment's keys, of
which none is read for that: those before a place are counted in ``before``, and the kept ones are few.

Level by level, as ``summary._residual`` and ``summary.gather_rows`` do it, this is some 170 torch operations at
n = 32,768, over all keys and values in float32. Where rounding decides between two centres, as among equal keys, owners
may differ from the reference's; an infinite key makes its centroid NaN in float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..layout import chunk_count
from ..plan import Plan
from ..summary import LEVELS, RESIDUAL_ITERATIONS
from .cache import launch, load, strides
from .clusters import members, tile_of
from .device import target
from .render import arguments, fill, source, widened
from .scores import products
from .spec import DTYPES, MOST_FEATURES, SummarySpec, cdiv, power_of_two

STEP = 32
"""Keys of one step: of 64, centres of 128 features spill registers on AMD's GPUs."""
PART = 2048
"""Keys of a part."""
WARPS = 8
MOST = 8192
"""The most centroids times features, of keys and values together, that lanes hold."""
ASSIGNED = tuple(f"segment_assign_{step}" for step in range(RESIDUAL_ITERATIONS))
"""The kernels of Lloyd iterations."""

PART_OF = """
    # A part of a segment of 2^level chunks, which is named by its last one. The first programs have one of the segments
    # that are shorter than a part each; then come those of blocks as long as a part, one for each longer level.
    program = tl.program_id(0)
    pair = (program % pairs).to(tl.int64)  # of batch and KV head
    part = program // pairs
    is_short = part < chunks
    block = tl.maximum(part - chunks, 0) // $long_levels
    level = $part_level + tl.maximum(part - chunks, 0) % $long_levels
    run = block >> (level - $part_level)  # of the blocks of a segment of this level, or of what is between two
    last = tl.where(is_short, part, (run + 1) * (1 << level) - 1)
    size = tl.where(is_short, (last + 1) & -(last + 1), 1 << level)
    there = tl.where(is_short, size < $part_chunks, (run % 2 == 0) & (last < chunks))
    if not there:
        return
    begin = (last + 1 - size) * CHUNK
    first_part = tl.where(is_short, part, chunks + (begin // $part) * $long_levels + level - $part_level)
    stop = tl.minimum((last + 1) * CHUNK, k_len)
    own_begin = tl.where(is_short, begin, block * $part)
    own_stop = tl.minimum(own_begin + tl.minimum(size * CHUNK, $part), k_len)
    part_at = pair * parts + part
"""

MEMBERS = """
    key_head = key + pair // kv_heads * key_b + pair % kv_heads * key_h
    value_head = value + pair // kv_heads * value_b + pair % kv_heads * value_h
    before += pair // kv_heads * (k_len + 1)  #? valid
    feature = tl.arange(0, $dim_tile)
    value_feature = tl.arange(0, $value_tile)
    slot = tl.arange(0, $slots)  #? keep
    kept = tl.load(chosen + (pair * chunks + last) * $keep + slot, mask=slot < $keep, other=-1)  #? keep
"""

MOMENTS = """
def segment_moments(
    $arguments
):
    DIM: tl.constexpr = $dim
    VALUE_DIM: tl.constexpr = $value_dim
    CHUNK: tl.constexpr = $chunk
    STEP: tl.constexpr = $step
    $part_of
    $members
    # Over steps, lane by lane; over lanes once, at the end.
    key_sum = tl.zeros([STEP, $dim_tile], tl.float32)
    value_sum = tl.zeros([STEP, $value_tile], tl.float32)
    key_squares = tl.zeros([STEP, $dim_tile], tl.float32)
    value_squares = tl.zeros([STEP, $value_tile], tl.float32)
    for first in range(own_begin, own_stop, STEP):
        $points
        wide = keys.to(tl.float32)
        key_sum += wide
        key_squares += wide * wide
        wide = values.to(tl.float32)
        value_sum += wide
        value_squares += wide * wide
    to = moments + part_at * (DIM + VALUE_DIM + 2)
    tl.store(to + feature, tl.sum(key_sum, 0), mask=feature < DIM)
    tl.store(to + DIM + value_feature, tl.sum(value_sum, 0), mask=value_feature < VALUE_DIM)
    tl.store(to + DIM + VALUE_DIM, tl.sum(tl.sum(key_squares, 1), 0))
    tl.store(to + DIM + VALUE_DIM + 1, tl.sum(tl.sum(value_squares, 1), 0))
"""

ASSIGN = """
def segment_assign_$step_number(
    $arguments
):
    DIM: tl.constexpr = $dim
    VALUE_DIM: tl.constexpr = $value_dim
    CHUNK: tl.constexpr = $chunk
    STEP: tl.constexpr = $step
    TILE: tl.constexpr = $tile
    $part_of
    $members
    centre = tl.arange(0, TILE)
    used = centre < $centroids
    part_count = tl.maximum(size // $part_chunks, 1)

    # Evenly spaced keys, by rank among those that are there and not kept, are the first centres.
    from_member = tl.load(before + begin)  #? valid
    count = tl.load(before + stop) - from_member  #? valid
    from_member = tl.maximum(begin - $sinks, 0)  #? not valid
    count = tl.maximum(stop - $sinks, 0) - from_member  #? not valid
    is_kept = kept >= 0  #? keep
    others = tl.load(before + kept, mask=is_kept, other=0)  #? keep and valid
    others = tl.maximum(kept - $sinks, 0)  #? keep and not valid
    others -= from_member + tl.cumsum(is_kept.to(tl.int32), 0) - 1  # before a kept key  #? keep
    count -= tl.sum(is_kept.to(tl.int32), 0)  #? keep
    rank = (centre.to(tl.int64) * tl.maximum(count, 1) // $centroids).to(tl.int32)
    rank += tl.sum((is_kept[None, :] & (others[None, :] <= rank[:, None])).to(tl.int32), 1)  #? keep
    rank += from_member
    start = rank + $sinks  #? not valid
    # The last place with as many before it.  #? valid
    start = tl.full([TILE], 0, tl.int32) + begin  #? valid
    jump = size * CHUNK  #? valid
    while jump > 0:  #? valid
        further = start + jump  #? valid
        fewer = tl.load(before + further, mask=further < stop, other=2147483647) <= rank  #? valid
        start = tl.where(fewer, further, start)  #? valid
        jump //= 2  #? valid
    begins = used & (start < stop) & (count > 0)
    start_at = start.to(tl.int64)[None, :]
    inside = begins[None, :] & (feature < DIM)[:, None]
    key_centres = tl.load(key_head + start_at * key_n + feature[:, None], mask=inside, other=0.0).to(tl.float32)
    inside = begins[None, :] & (value_feature < VALUE_DIM)[:, None]
    value_centres = tl.load(value_head + start_at * value_n + value_feature[:, None], mask=inside, other=0.0)
    value_centres = value_centres.to(tl.float32)
    $sums  #? again
    key_centres = tl.where((number > 0.0)[None, :], key_sum * share[None, :], key_centres)  #? again
    value_centres = tl.where((number > 0.0)[None, :], value_sum * share[None, :], value_centres)  #? again

    # By this the squares of values are multiplied.
    key_mean = tl.zeros([$dim_tile], tl.float32)
    value_mean = tl.zeros([$value_tile], tl.float32)
    key_variance = 0.0
    value_variance = 0.0
    each = 1.0 / tl.maximum(count, 1).to(tl.float32)
    for other in range(0, part_count):
        of = moments + (pair * parts + first_part + other * $long_levels) * (DIM + VALUE_DIM + 2)
        key_mean += tl.load(of + feature, mask=feature < DIM, other=0.0) * each
        value_mean += tl.load(of + DIM + value_feature, mask=value_feature < VALUE_DIM, other=0.0) * each
        key_variance += tl.load(of + DIM + VALUE_DIM) * each
        value_variance += tl.load(of + DIM + VALUE_DIM + 1) * each
    key_variance -= tl.sum(key_mean * key_mean, 0)
    value_variance -= tl.sum(value_mean * value_mean, 0)
    key_variance = tl.where(key_variance < 0.0, 0.0, key_variance)
    ratio = key_variance / tl.where(value_variance < 1e-20, 1e-20, value_variance)

    square = tl.sum(key_centres * key_centres, 0) + ratio * tl.sum(value_centres * value_centres, 0)
    row = $sinks + last * $per + $keep  #? final
    level = tl.sum(((size >> tl.arange(0, 32)) > 1).to(tl.int32), 0)  #? final
    owners = row_owner + (level.to(tl.int64) * pairs + pair) * k_len  #? final
    numbers = tl.zeros([STEP, TILE], tl.float32)
    key_sum = tl.zeros([$dim_tile, TILE], tl.float32)
    value_sum = tl.zeros([$value_tile, TILE], tl.float32)
    for first in range(own_begin, own_stop, STEP):
        $points
        near = product(keys, key_centres) + ratio * product(values, value_centres)
        apart = square[None, :] - 2.0 * near
        # Where a key or value is not finite, no distance is a number: all belong to the first.
        apart = tl.where(used[None, :] & (apart == apart), apart, float("inf"))
        owner = tl.argmin(apart, 1)
        own = ((owner[:, None] == centre[None, :]) & here[:, None]).to(tl.float32)
        numbers += own
        key_sum += tl.trans(picked(tl.trans(own), keys))  #? wide
        value_sum += tl.trans(picked(tl.trans(own), values))  #? wide
        key_sum = tl.dot(tl.trans(keys)$wide_type, own.to(keys.dtype)$wide_type, key_sum)  #? not wide
        value_sum = tl.dot(tl.trans(values)$wide_type, own.to(values.dtype)$wide_type, value_sum)  #? not wide
        tl.store(owners + at, row + owner, mask=here)  #? final
    to = part_at * $centroids + centre
    tl.store(number_out + to, tl.sum(numbers, 0), mask=used)
    inside = used[None, :] & (feature < DIM)[:, None]
    tl.store(key_sum_out + to[None, :] * DIM + feature[:, None], key_sum, mask=inside)
    inside = used[None, :] & (value_feature < VALUE_DIM)[:, None]
    tl.store(value_sum_out + to[None, :] * VALUE_DIM + value_feature[:, None], value_sum, mask=inside)
"""

POINTS = """
at = first + tl.arange(0, STEP)
here = at < own_stop
here &= at >= $sinks  #? not valid
here &= tl.load(before + at + 1, mask=here, other=0) > tl.load(before + at, mask=here, other=0)  #? valid
here &= tl.sum((at[:, None] == kept[None, :]).to(tl.int32), 1) == 0  #? keep
place = at.to(tl.int64)[:, None]
wanted = here[:, None] & (feature < DIM)[None, :]
keys = tl.load(key_head + place * key_n + feature[None, :], mask=wanted, other=0.0)
wanted = here[:, None] & (value_feature < VALUE_DIM)[None, :]
values = tl.load(value_head + place * value_n + value_feature[None, :], mask=wanted, other=0.0)
"""

SUMS = """
number = tl.zeros([TILE], tl.float32)
key_sum = tl.zeros([$dim_tile, TILE], tl.float32)
value_sum = tl.zeros([$value_tile, TILE], tl.float32)
for other in range(0, part_count):
    of = (pair * parts + first_part + other * $long_levels) * $centroids + centre
    number += tl.load(part_number + of, mask=used, other=0.0)
    wanted = used[None, :] & (feature < DIM)[:, None]
    key_sum += tl.load(part_key_sum + of[None, :] * DIM + feature[:, None], mask=wanted, other=0.0)
    wanted = used[None, :] & (value_feature < VALUE_DIM)[:, None]
    value_sum += tl.load(part_value_sum + of[None, :] * VALUE_DIM + value_feature[:, None], mask=wanted, other=0.0)
share = 1.0 / tl.maximum(number, 1.0)
"""

ROWS = """
def segment_rows(
    $arguments
):
    DIM: tl.constexpr = $dim
    VALUE_DIM: tl.constexpr = $value_dim
    TILE: tl.constexpr = $tile
    program = tl.program_id(0)
    pair = (program // chunks).to(tl.int64)  # of batch and KV head
    last = program % chunks
    size = (last + 1) & -(last + 1)
    level = tl.sum(((size >> tl.arange(0, 32)) > 1).to(tl.int32), 0)
    block = (last + 1 - size) // $part_chunks
    first_part = tl.where(size < $part_chunks, last, chunks + block * $long_levels + level - $part_level)
    part_count = tl.maximum(size // $part_chunks, 1)
    feature = tl.arange(0, $dim_tile)
    value_feature = tl.arange(0, $value_tile)
    centre = tl.arange(0, TILE)
    used = centre < $centroids
    $sums
    to = pair * row_count + $sinks + last * $per + $keep + centre
    tl.store(row_index + to, tl.full([TILE], -1, tl.int32), mask=used)
    tl.store(row_bias + to, tl.where(number > 0.0, tl.log(tl.maximum(number, 1.0)), float("-inf")), mask=used)
    any_of = (number > 0.0)[None, :]  # of none, a sum is 0, or no number where a key of others is none
    key_mean = tl.where(any_of, key_sum * share[None, :], 0.0).to(row_key.dtype.element_ty)
    inside = used[None, :] & (feature < DIM)[:, None]
    tl.store(row_key + to[None, :] * DIM + feature[:, None], key_mean, mask=inside)
    value_mean = tl.where(any_of, value_sum * share[None, :], 0.0).to(row_value.dtype.element_ty)
    inside = used[None, :] & (value_feature < VALUE_DIM)[:, None]
    tl.store(row_value + to[None, :] * VALUE_DIM + value_feature[:, None], value_mean, mask=inside)
"""


@dataclass(frozen=True, kw_only=True)
class SegmentSpec(SummarySpec):
    """What the source depends on; ``dtype`` is one of ``spec.DTYPES``, ``target`` of ``spec.TARGETS``."""

    dtype: str
    target: str


def fits(plan: Plan, dim: int, value_dim: int) -> bool:
    """Whether the centres of a segment fit in a program's lanes."""
    if max(dim, value_dim) > MOST_FEATURES:
        return False
    return _tile(plan) * (tile_of(dim) + tile_of(value_dim)) <= MOST


def spec_of(sizes: SummarySpec, dtype: str, target: str) -> SegmentSpec:
    """That of ``rows``, with what else this kernel depends on."""
    return SegmentSpec(**asdict(sizes), dtype=dtype, target=target)


def segments_sources(spec: SegmentSpec) -> dict[str, str]:
    """Sources by the name of the kernel, in the order of their launches."""
    plan = spec.settings
    wide = spec.dtype == "float32"
    parts: dict[str, Any] = dict(
        dim=spec.dim,
        value_dim=spec.value_dim,
        dim_tile=tile_of(spec.dim),
        value_tile=tile_of(spec.value_dim),
        chunk=plan.chunk,
        step=min(STEP, plan.chunk),
        part=_chunks_of_part(plan) * plan.chunk,
        part_chunks=_chunks_of_part(plan),
        part_level=_level_of_part(plan),
        long_levels=LEVELS - _level_of_part(plan),
        centroids=plan.centroids,
        tile=_tile(plan),
        sinks=plan.sinks,
        keep=plan.keep,
        slots=max(16, power_of_two(plan.keep)),
        per=plan.rows_per_segment,
        valid=spec.valid,
        wide=wide,
        wide_type=widened(spec.dtype),
    )
    parts |= {"part_of": fill(PART_OF, parts), "members": fill(MEMBERS, parts)}
    parts |= {"points": fill(POINTS, parts), "sums": fill(SUMS, parts)}
    given = ["key", "value", "before", "chosen", "moments", "part_number", "part_key_sum", "part_value_sum"]
    given += ["number_out", "key_sum_out", "value_sum_out"]
    given += ["row_index", "row_owner", "row_key", "row_value", "row_bias", "key_b", "key_h", "key_n"]
    given += ["value_b", "value_h", "value_n", "pairs", "kv_heads", "k_len", "chunks", "parts", "row_count"]
    parts["arguments"] = arguments(given)

    kernels = {"segment_moments": fill(MOMENTS, parts)}
    functions = products.before(products.product(spec.dtype, spec.target), *[products.picked(spec.target)] * wide)
    for number, name in enumerate(ASSIGNED):
        own = {"step_number": number, "again": number > 0, "final": name == ASSIGNED[-1]}
        kernels[name] = functions + fill(ASSIGN, parts | own)
    kernels["segment_rows"] = fill(ROWS, parts)
    about = {"plan": spec.plan, "stage": "summarize, the centroids of segments"}
    return {name: source(name, about, text) for name, text in kernels.items()}


def segment_centroids(
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    chosen: torch.Tensor | None,
    rows: dict[str, torch.Tensor],
    plan: Plan,
) -> torch.Tensor:
    """``row_owner`` of a summary; the centroids are written to their places in ``rows``, its other fields of rows.

    ``chosen`` ``[B, Hkv, C, keep]`` int32: the selected keys of each segment, ascending, -1: none; None where ``keep``
    is 0. ``key`` and ``value`` have their features last in memory.
    """
    batch, heads, k_len, dim = key.shape
    value_dim = value.shape[3]
    owner = key.new_full((LEVELS, batch, heads, k_len), -1, dtype=torch.int32)
    before = None
    if valid is not None:
        before = torch.nn.functional.pad(members(valid, plan.sinks).cumsum(1, dtype=torch.int32), (1, 0))
    pairs, chunks = batch * heads, chunk_count(k_len, plan.chunk)
    parts = chunks + cdiv(chunks, _chunks_of_part(plan)) * (LEVELS - _level_of_part(plan))

    def sums(*shape: int) -> torch.Tensor:
        return key.new_empty((pairs, parts, *shape), dtype=torch.float32)

    values: dict[str, Any] = rows | strides("key", key) | strides("value", value) | dict(
        key=key, value=value, before=before, chosen=chosen, row_owner=owner, moments=sums(dim + value_dim + 2),
        pairs=pairs, kv_heads=heads, k_len=k_len, chunks=chunks, parts=parts, row_count=rows["row_index"].shape[2],
    )  # fmt: skip
    sizes = SummarySpec(dim=int(dim), value_dim=int(value_dim), plan=plan.text, valid=valid is not None)
    sources = segments_sources(spec_of(sizes, DTYPES[key.dtype], target()))
    kernels = {name: load(text, name) for name, text in sources.items()}
    launch(kernels["segment_moments"], (pairs * parts,), values, warps=WARPS, stages=1)
    for name in ASSIGNED:
        count = plan.centroids
        found = dict(number_out=sums(count), key_sum_out=sums(count, dim), value_sum_out=sums(count, value_dim))
        launch(kernels[name], (pairs * parts,), values | found, warps=WARPS, stages=1)
        values |= {f"part_{given.removesuffix('_out')}": tensor for given, tensor in found.items()}
    launch(kernels["segment_rows"], (pairs * chunks,), values, warps=WARPS, stages=1)
    return owner


def _chunks_of_part(plan: Plan) -> int:
    return max(1, PART // plan.chunk)


def _level_of_part(plan: Plan) -> int:
    """Of a segment as long as a part: it has 2^level chunks."""
    return _chunks_of_part(plan).bit_length() - 1


def _tile(plan: Plan) -> int:
    """Columns of the centres' matrix: what a tensor core takes."""
    return max(16, power_of_two(plan.centroids))
