"""Leverage on chip: the formula of ``kernels.scorers.leverage`` by the inverse of a Cholesky factor.

With ``A = X^T X + eps I`` of the centred keys ``X`` and ``A = C C^T``, the leverage of a key x is
``|C^-1 x|^2``. ``C^-1`` is made in the place of A, sixteen rows a step: the pivot block is factored and its
factor inverted by elimination in the lanes, the rows are multiplied by that inverse, and what they explain
is taken off the rows below by a product of rank 16. Columns that are done hold ``C^-1``, the others
what is left of A. Then all keys are multiplied by it.

A matrix of more than ``FEATURES`` rows is factored by parts of so many, a launch each, as a left-looking block Cholesky
(Golub and Van Loan, Matrix Computations, 4.2.9). ``whites`` has ``Y``, the features of ``C^-1 x`` of all parts before:
``L = X_b^T Y`` are the factor's columns before the diagonal block of part b, that block is the factor of
``A_b - L L^T``, and ``C_b^-1 (x_b - L y)`` are the features that are new. One block's matrices are in the lanes.

Why the factor's inverse and not A's: ``eps`` bounds the condition number by 1000 D + 1, and scores have to
survive it. The error of ``C^-1 x`` grows with the root of it; that of an A^-1 that is written down, by
Newton-Schulz iterations or by elimination, with all of it, and 22 iterations of two products of D^3 are 15
times the flops. docs/triton.md has the figures.
"""

from __future__ import annotations

from typing import Any

import torch

from ...scorers.leverage import RIDGE
from ..render import fill

FEATURES = 64
"""Features of a part."""
STEP = 16
"""Keys of one step of a product with all keys."""
BLOCK = 16
"""Rows of a step: the least that a tensor core takes."""

KERNEL = """
def score(
    $arguments
):
    DIM: tl.constexpr = $dim
    DIM_TILE: tl.constexpr = $dim_tile
    PARTS: tl.constexpr = $parts
    PART: tl.constexpr = $width
    CHUNK: tl.constexpr = $chunk
    STEP: tl.constexpr = $step
    BLOCK: tl.constexpr = $block
    BLOCKS: tl.constexpr = $blocks
    program = tl.program_id(0)
    pair = (program // chunks).to(tl.int64)  # of batch and KV head
    chunk = program % chunks
    key_head = key + pair // kv_heads * key_b + pair % kv_heads * key_h
    whites += (pair * chunks + chunk) * CHUNK * DIM_TILE  #? in_parts
    lefts += (pair * chunks + chunk) * (DIM_TILE - PART) * PART  #? in_parts
    feature = tl.arange(0, DIM_TILE)
    own = tl.arange(0, PART)
    block = tl.arange(0, BLOCKS)
    row = tl.arange(0, BLOCK)
    identity = (row[:, None] == row[None, :]).to(tl.float32)

    # The mean key.
    total = tl.zeros([DIM_TILE], tl.float32)
    count = 0.0
    for begin in range(0, CHUNK, STEP):
        $keys
        points = tl.where(here[:, None], points, 0.0)
        total += tl.sum(points, 0)
        count += tl.sum(here.to(tl.float32), 0)
    mean = total / tl.maximum(count, 1.0)
    squares = tl.zeros([DIM_TILE], tl.float32)  #? in_parts
    for begin in range(0, CHUNK, STEP):  #? in_parts
        $squares
    trace = tl.sum(squares, 0)  #? in_parts
    # The mean of this part's features.  #? in_parts
    own_feature = part * PART + own  #? in_parts
    own_mean = tl.gather(mean, own_feature, 0)  #? in_parts

    $before

    # The Gram matrix of the keys less their mean, less what parts before this one explain.
    gram = tl.zeros([PART, PART], tl.float32)
    for begin in range(0, CHUNK, STEP):
        $own_points
        gram = tl.dot(tl.trans(points), points, gram$wide_precision)
    diagonal = own[:, None] == own[None, :]
    trace = tl.sum(tl.sum(tl.where(diagonal, gram, 0.0), 1), 0)  #? not in_parts
    gram += tl.where(diagonal, tl.maximum(trace * $ridge, $least), 0.0)
    for earlier in range(0, part):  #? in_parts
        left = tl.load(lefts + $left_at + earlier * PART * PART)  #? in_parts
        gram = added(gram, tl.trans(-left), left)  #? in_parts

    # The inverse of its Cholesky factor, in its place.
    for step in range(0, BLOCKS):
        mine = block == step
        tile = tl.reshape(gram, [BLOCKS, BLOCK, PART])
        rows = tl.sum(tl.where(mine[:, None, None], tile, 0.0), 0)
        pivot = tl.sum(tl.where(mine[None, :, None], tl.reshape(rows, [BLOCK, BLOCKS, BLOCK]), 0.0), 1)
        $invert
        rows = tl.dot(inverse, rows$wide_precision)
        done = own < (step + 1) * BLOCK
        less = tl.trans(tl.where(done[None, :], 0.0, -rows))
        rows = tl.reshape(rows, [BLOCK, BLOCKS, BLOCK])
        rows = tl.reshape(tl.where(mine[None, :, None], inverse[:, None, :], rows), [BLOCK, PART])
        gram = tl.where((own // BLOCK == step)[None, :], 0.0, gram)
        tile = tl.reshape(gram, [BLOCKS, BLOCK, PART])
        kept = tl.where(done[None, :], rows, 0.0)[None, :, :]
        gram = tl.reshape(tl.where(mine[:, None, None], kept, tile), [PART, PART])
        gram = added(gram, less, rows)

    for begin in range(0, CHUNK, STEP):
        $own_points
        result = tl.zeros([STEP], tl.float32)  #? in_parts
        for earlier in range(0, part):  #? in_parts
            white = tl.load(whites + $white_at + earlier * PART)  #? in_parts
            left = tl.load(lefts + $left_at + earlier * PART * PART)  #? in_parts
            result += tl.sum(white * white, 1)  #? in_parts
            points = added(points, -white, left)  #? in_parts
        white = tl.dot(points, tl.trans(gram)$wide_precision)
        tl.store(whites + $white_at + part * PART, white)  #? in_parts
        result += tl.sum(white * white, 1)  #? in_parts
        result = tl.sum(white * white, 1)  #? not in_parts
        $store
"""

SQUARES = """
$keys
points = tl.where(here[:, None], points - mean[None, :], 0.0)
squares += tl.sum(points * points, 0)
"""

BEFORE = """
# The factor's rows of this part, transposed, in the columns of each part before it.
for earlier in range(0, part):
    left = tl.zeros([PART, PART], tl.float32)
    for begin in range(0, CHUNK, STEP):
        $own_points
        white = tl.load(whites + $white_at + earlier * PART)
        left = tl.dot(tl.trans(white), points, left$wide_precision)
    tl.store(lefts + $left_at + earlier * PART * PART, left)
tl.debug_barrier()  # other lanes read it
"""

KEYS = """
at = chunk * CHUNK + begin + tl.arange(0, STEP)
points = tl.load(
    key_head + at.to(tl.int64)[:, None] * key_n + feature[None, :],
    mask=(at < k_len)[:, None] & (feature < DIM)[None, :],
    other=0.0,
).to(tl.float32)
finite = tl.sum(points * 0.0, 1) == 0.0  # 0 * x is NaN for what is not finite
here = (at < k_len) & finite  #? not valid
here = finite & (tl.load(member + pair // kv_heads * k_len + at, mask=at < k_len, other=0) != 0)  #? valid
"""

OWN_POINTS = """
$keys
points = tl.load(  #? in_parts
    key_head + at.to(tl.int64)[:, None] * key_n + own_feature[None, :],  #? in_parts
    mask=here[:, None] & (own_feature < DIM)[None, :],  #? in_parts
    other=0.0,  #? in_parts
).to(tl.float32)  #? in_parts
points = tl.where(here[:, None], points - own_mean[None, :], 0.0)  #? in_parts
points = tl.where(here[:, None], points - mean[None, :], 0.0)  #? not in_parts
"""

INVERT = """
# The inverse of the pivot block's factor: eliminate below the diagonal, in the block and in ones beside it.
both = tl.join(pivot, identity)
is_pivot = tl.arange(0, 2)[None, None, :] == 0
for pivot_row in tl.static_range(0, BLOCK):
    line = tl.sum(tl.where((row == pivot_row)[:, None, None], both, 0.0), 0)
    column = tl.where(is_pivot & (row == pivot_row)[None, :, None], both, 0.0)
    column = tl.sum(tl.sum(column, 2), 1)
    head = tl.sum(tl.where(row == pivot_row, column, 0.0), 0)
    factor = tl.where(row > pivot_row, column / head, 0.0)
    both -= factor[:, None, None] * line[None, :, :]
upper = tl.sum(tl.where(is_pivot, both, 0.0), 2)
inverse = tl.sum(tl.where(is_pivot, 0.0, both), 2)
inverse /= tl.sqrt(tl.sum(upper * identity, 1))[:, None]
"""


def parts(dim_tile: int) -> int:
    """Parts of features, a launch each."""
    return max(dim_tile // FEATURES, 1)


def scratch(like: torch.Tensor, dim_tile: int, chunk: int, programs: Any) -> dict[str, torch.Tensor]:
    """``whites`` and ``lefts`` of all chunks, float32, on the device of ``like``; empty where there is one part."""
    before = dim_tile - min(dim_tile, FEATURES)
    whites = like.new_empty((programs, chunk * dim_tile if before else 0))
    return dict(whites=whites, lefts=like.new_empty((programs, before * FEATURES)))


def body(given: dict[str, Any]) -> str:
    """The kernel; ``given``: what ``kernel.score_source`` knows."""
    dim, dim_tile, chunk = given["dim"], given["dim_tile"], given["chunk"]
    in_parts, width = parts(dim_tile) > 1, min(dim_tile, FEATURES)
    names = given | dict(
        parts=parts(dim_tile),
        in_parts=in_parts,
        width=width,
        step=min(STEP, chunk),
        block=BLOCK,
        blocks=width // BLOCK,
        ridge=repr(RIDGE / dim),
        least=repr(dim * 1.1754943508222875e-38),
        invert=INVERT,
        white_at="(begin + tl.arange(0, STEP))[:, None] * DIM_TILE + own[None, :]",
        left_at="own[:, None] * PART + own[None, :]",
    )
    names["keys"] = fill(KEYS, names)
    names["own_points"] = fill(OWN_POINTS, names)
    names["squares"] = fill(SQUARES, names) if in_parts else ""
    names["before"] = fill(BEFORE, names) if in_parts else ""
    return fill(KERNEL, names)
