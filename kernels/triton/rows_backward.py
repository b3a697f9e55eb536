"""The backward of rows on a GPU: each key collects the gradients of the rows that stand for it.

One program a block of keys of one chunk: no atomics, and sums in one order. A key is copied by at most one sink
and one row of each segment that it lies in, and has a share of at most one centroid of each, which ``row_owner``
names: a segment a level of sizes, or none.
"""

from __future__ import annotations

import functools

import torch

from ..layout import chunk_count
from ..plan import Plan
from .cache import launch, load
from .clusters import tile_of
from .render import arguments, fill, source
from .spec import cdiv, power_of_two

KEYS = 32
"""Keys of a program."""
SLOTS = 64
"""The most rows that are compared at once."""

KERNEL = """
def rows_backward(
    $arguments
):
    DIM: tl.constexpr = $dim
    KEYS: tl.constexpr = $keys
    program = tl.program_id(0)
    pair = (program // blocks).to(tl.int64)  # of batch and KV head
    at = program % blocks * KEYS + tl.arange(0, KEYS)
    feature = tl.arange(0, $dim_tile)
    own_rows = pair * row_count
    total = tl.zeros([KEYS, $dim_tile], tl.float32)
    begin = own_rows  #? sinks
    $sink_copies
    chunk = program % blocks * KEYS // $chunk  #? segments
    level = 0  #? segments
    while (1 << level) <= chunks:  #? segments
        run = chunk >> level  #? segments
        last = (run + 1) * (1 << level) - 1  #? segments
        inside = (run % 2 == 0) & (last < chunks)  #? segments
        if inside:  #? segments
            begin = own_rows + $sinks + last * $per  #? keep
            $kept_copies
            $members
        level += 1  #? segments
    written = (at < k_len)[:, None] & (feature < DIM)[None, :]
    to = (pair * k_len + at)[:, None] * DIM + feature[None, :]
    tl.store(grad + to, total.to(grad.dtype.element_ty), mask=written)
"""

COPIES = """
for first in range(0, $count, $slots):
    slot = first + tl.arange(0, $slots)
    copied = tl.load(row_index + begin + slot, mask=slot < $count, other=-1)
    same = at[:, None] == copied[None, :]
    is_copied = tl.sum(same.to(tl.int32), 1) > 0
    row = begin + tl.sum(tl.where(same, slot[None, :], 0), 1)
    wanted = is_copied[:, None] & (feature < DIM)[None, :]
    total += tl.load(grad_row + row[:, None] * DIM + feature[None, :], mask=wanted, other=0.0).to(tl.float32)
"""

MEMBERS = """
owner = tl.load(row_owner + (level * pairs + pair) * k_len + at, mask=at < k_len, other=-1)
owned = owner >= 0
share = tl.exp(-tl.load(row_bias + own_rows + owner, mask=owned, other=0.0))  # 1 / members
wanted = owned[:, None] & (feature < DIM)[None, :]
given = tl.load(grad_row + (own_rows + owner)[:, None] * DIM + feature[None, :], mask=wanted, other=0.0)
total += given.to(tl.float32) * share[:, None]
"""


@functools.cache
def rows_backward_source(plan: Plan, dim: int) -> str:
    """Source of ``rows_backward``."""
    names = ["grad_row", "row_index", "row_owner", "row_bias", "grad"]
    names += ["pairs", "k_len", "chunks", "row_count", "blocks"]
    parts: dict[str, object] = dict(
        arguments=arguments(names),
        dim=dim,
        dim_tile=tile_of(dim),
        keys=min(KEYS, plan.chunk),
        chunk=plan.chunk,
        sinks=plan.sinks,
        keep=plan.keep,
        segments=plan.rows_per_segment,
        per=plan.rows_per_segment,
        members=MEMBERS if plan.centroids else "",
    )
    for name, count in (("sink_copies", plan.sinks), ("kept_copies", plan.keep)):
        slots = min(SLOTS, max(16, power_of_two(count)))
        parts[name] = fill(COPIES, {"count": count, "slots": slots}) if count else ""
    about = {"plan": plan.text, "stage": "backward of summarize, the rows"}
    return source("rows_backward", about, fill(KERNEL, parts))


def rows_backward(
    grad_row: torch.Tensor, index: torch.Tensor, owner: torch.Tensor, bias: torch.Tensor, length: int, plan: Plan
) -> torch.Tensor:
    """``summary.scatter_rows`` for one of key and value: ``[B, Hkv, length, D]`` of the gradient's dtype.

    ``grad_row`` ``[B, Hkv, R, D]``; ``index``, ``owner`` and ``bias`` are the row_index, row_owner and row_bias of a
    ``Summary``.
    """
    batch, heads, row_count, dim = grad_row.shape
    grad = grad_row.new_empty((batch, heads, length, dim))
    blocks = cdiv(length, min(KEYS, plan.chunk))
    values = dict(
        grad_row=grad_row.contiguous(), row_index=index, row_owner=owner, row_bias=bias, grad=grad,
        pairs=batch * heads, k_len=length, chunks=chunk_count(length, plan.chunk), row_count=row_count, blocks=blocks,
    )  # fmt: skip
    kernel = load(rows_backward_source(plan, int(dim)), "rows_backward")
    launch(kernel, (batch * heads * blocks,), values, warps=4, stages=1)
    return grad
