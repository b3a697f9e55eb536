"""Rows on a GPU: the copies of sinks and selected keys that queries read beside each other, and their biases.

One program ``ROWS`` rows of one KV head. Padding may come first, so the sinks are found by a walk over
``valid`` that stops at the last of them. Centroids among the rows are ``segments``'s.
"""

from __future__ import annotations

import functools

import torch

from ..layout import chunk_count
from ..plan import Plan
from . import segments
from .cache import features_last, launch, load, strides
from .render import arguments, fill, source
from .scores.select import segments_fit
from .spec import SummarySpec, cdiv, power_of_two

ROWS = 16
"""Rows of a program."""
STEP = 256
"""Keys of which a program asks at once whether they are valid."""

KERNEL = """
def rows(
    $arguments
):
    DIM: tl.constexpr = $dim
    VALUE_DIM: tl.constexpr = $value_dim
    program = tl.program_id(0)
    pair = (program // blocks).to(tl.int64)  # of batch and KV head
    row = program % blocks * $rows + tl.arange(0, $rows)
    row_count = $sinks + of_segments
    key_head = key + pair // kv_heads * key_b + pair % kv_heads * key_h
    value_head = value + pair // kv_heads * value_b + pair % kv_heads * value_h
    index = tl.where((row < $sinks) & (row < k_len), row, -1)  #? not valid
    $first_valid
    among = row - $sinks  #? keep
    inside = (among >= 0) & (among < of_segments)  #? keep
    copied = (row < $sinks) | ((row - $sinks) % $per < $keep)  #? centroids
    inside &= copied  #? keep and centroids
    among += pair * of_segments  #? keep and not centroids
    among = (pair * (of_segments // $per) + among // $per) * $keep + among % $per  #? keep and centroids
    index = tl.where(inside, tl.load(chosen + among, mask=inside, other=-1), index)  #? keep

    here = index >= 0
    feature = tl.arange(0, $dim_tile)
    value_feature = tl.arange(0, $value_tile)
    at = index.to(tl.int64)[:, None]
    some = here[:, None] & (feature < DIM)[None, :]
    keys = tl.load(key_head + at * key_n + feature[None, :], mask=some, other=0.0)
    some = here[:, None] & (value_feature < VALUE_DIM)[None, :]
    values = tl.load(value_head + at * value_n + value_feature[None, :], mask=some, other=0.0)
    to = pair * row_count + row
    written = row < row_count
    written &= copied  #? centroids
    tl.store(row_index + to, index, mask=written)
    tl.store(row_bias + to, tl.where(here, 0.0, float("-inf")), mask=written)
    some = written[:, None] & (feature < DIM)[None, :]
    tl.store(row_key + to[:, None] * DIM + feature[None, :], keys, mask=some)
    some = written[:, None] & (value_feature < VALUE_DIM)[None, :]
    tl.store(row_value + to[:, None] * VALUE_DIM + value_feature[None, :], values, mask=some)
"""

FIRST_VALID = """
index = tl.full([$rows], -1, tl.int32)
first = program % blocks * $rows
wanted = tl.where(first < $sinks, tl.minimum(first + $rows, $sinks), 0)
filled = 0
begin = 0
while (filled < wanted) & (begin < k_len):
    place = begin + tl.arange(0, $step)
    there = tl.load(valid + pair // kv_heads * k_len + place, mask=place < k_len, other=0) != 0
    rank = filled + tl.cumsum(there.to(tl.int32), 0) - 1
    is_it = there[None, :] & (rank[None, :] == row[:, None]) & (row < $sinks)[:, None]
    index = tl.maximum(index, tl.max(tl.where(is_it, place[None, :], -1), 1))
    filled += tl.sum(there.to(tl.int32), 0)
    begin += $step
"""


def fits(plan: Plan, dim: int, value_dim: int) -> bool:
    """Whether the keys that rows copy are found on chip, and so are centroids."""
    return (not plan.keep or segments_fit(plan)) and (not plan.centroids or segments.fits(plan, dim, value_dim))


@functools.cache
def rows_source(spec: SummarySpec) -> str:
    """Source of ``rows``."""
    plan = spec.settings
    names = ["key", "value", "valid", "chosen", "row_index", "row_key", "row_value", "row_bias"]
    names += ["key_b", "key_h", "key_n", "value_b", "value_h", "value_n", "kv_heads", "k_len", "of_segments", "blocks"]
    parts: dict[str, object] = dict(
        arguments=arguments(names),
        dim=spec.dim,
        value_dim=spec.value_dim,
        dim_tile=power_of_two(spec.dim),
        value_tile=power_of_two(spec.value_dim),
        sinks=plan.sinks,
        keep=plan.keep,
        per=plan.rows_per_segment,
        centroids=plan.centroids,
        valid=spec.valid,
        rows=ROWS,
        step=STEP,
    )
    parts["first_valid"] = fill(FIRST_VALID, parts) if spec.valid else ""
    return source("rows", {"plan": spec.plan, "stage": "summarize, the rows"}, fill(KERNEL, parts))


def rows(
    key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor | None, chosen: torch.Tensor | None, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last five fields of ``Summary``.

    ``chosen`` ``[B, Hkv, C, keep]`` int32: the selected keys of each segment, -1: none; None where ``keep`` is 0.
    """
    batch, heads, k_len, dim = key.shape
    of_segments = chunk_count(k_len, plan.chunk) * plan.rows_per_segment
    shape = (batch, heads, plan.sinks + of_segments)
    key, value = (features_last(t) for t in (key, value))
    found = dict(
        row_index=key.new_empty(shape, dtype=torch.int32),
        row_key=key.new_empty((*shape, dim)),
        row_value=value.new_empty((*shape, value.shape[3])),
        row_bias=key.new_empty(shape, dtype=torch.float32),
    )
    if plan.sinks or plan.keep:
        blocks = cdiv(shape[2], ROWS)
        values = strides("key", key) | strides("value", value) | dict(
            key=key, value=value, valid=None if valid is None else valid.contiguous(), chosen=chosen,
            kv_heads=heads, k_len=k_len, of_segments=of_segments, blocks=blocks,
        )  # fmt: skip
        spec = SummarySpec(dim=int(dim), value_dim=int(value.shape[3]), plan=plan.text, valid=valid is not None)
        launch(load(rows_source(spec), "rows"), (batch * heads * blocks,), values | found, warps=4, stages=1)
    if plan.centroids:
        owner = segments.segment_centroids(key, value, valid, chosen, found, plan)
    else:
        owner = key.new_empty((0, batch, heads, k_len), dtype=torch.int32)
    return found["row_index"], owner, found["row_key"], found["row_value"], found["row_bias"]
