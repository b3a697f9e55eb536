"""Leverage on chip: the formula of ``kernels.scorers.leverage`` by the inverse of a Cholesky factor.

With ``A = X^T X + eps I`` of the centred keys ``X`` and ``A = C C^T``, the leverage of a key x is
``|C^-1 x|^2``. ``C^-1`` is made in the place of A, sixteen rows a step: the pivot block is factored and its
factor inverted by elimination in the lanes, the rows are multiplied by that inverse, and what they explain
is taken off the rows below by a product of rank 16. Columns that are done hold ``C^-1``, the others
what is left of A. Then all keys are multiplied by it. That is 2 D^3 + 4 L D^2 flops, all but 16 D^2 of
them on tensor cores, and one matrix [D, D] in the lanes whatever the chunk.

Why the factor's inverse and not A's: ``eps`` bounds the condition number by 1000 D + 1, and scores have to
survive it. The error of ``C^-1 x`` grows with the root of it; that of an A^-1 that is written down, by
Newton-Schulz iterations or by elimination, with all of it, and 22 iterations of two products of D^3 are 15
times the flops. docs/triton.md has the figures.
"""

from __future__ import annotations

from ...scorers.leverage import RIDGE

FEATURES = 128
"""The most features whose Gram matrix fits on chip."""
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
    CHUNK: tl.constexpr = $chunk
    STEP: tl.constexpr = $step
    BLOCK: tl.constexpr = $block
    BLOCKS: tl.constexpr = $blocks
    program = tl.program_id(0)
    pair = (program // chunks).to(tl.int64)  # of batch and KV head
    chunk = program % chunks
    key_head = key + pair // kv_heads * key_b + pair % kv_heads * key_h
    feature = tl.arange(0, DIM_TILE)

    # The mean key, and the Gram matrix of the keys less their mean.
    total = tl.zeros([DIM_TILE], tl.float32)
    count = 0.0
    for begin in range(0, CHUNK, STEP):
        $points
        total += tl.sum(points, 0)
        count += tl.sum(here.to(tl.float32), 0)
    mean = total / tl.maximum(count, 1.0)
    gram = tl.zeros([DIM_TILE, DIM_TILE], tl.float32)
    for begin in range(0, CHUNK, STEP):
        $points
        points = tl.where(here[:, None], points - mean[None, :], 0.0)
        gram = tl.dot(tl.trans(points), points, gram$wide_precision)
    diagonal = feature[:, None] == feature[None, :]
    trace = tl.sum(tl.sum(tl.where(diagonal, gram, 0.0), 1), 0)
    gram += tl.where(diagonal, tl.maximum(trace * $ridge, $least), 0.0)

    # The inverse of its Cholesky factor, in its place.
    block = tl.arange(0, BLOCKS)
    row = tl.arange(0, BLOCK)
    identity = (row[:, None] == row[None, :]).to(tl.float32)
    for step in range(0, BLOCKS):
        mine = block == step
        tile = tl.reshape(gram, [BLOCKS, BLOCK, DIM_TILE])
        rows = tl.sum(tl.where(mine[:, None, None], tile, 0.0), 0)
        pivot = tl.sum(tl.where(mine[None, :, None], tl.reshape(rows, [BLOCK, BLOCKS, BLOCK]), 0.0), 1)
        $invert
        rows = tl.dot(inverse, rows$wide_precision)
        done = feature < (step + 1) * BLOCK
        less = tl.trans(tl.where(done[None, :], 0.0, -rows))
        rows = tl.reshape(rows, [BLOCK, BLOCKS, BLOCK])
        rows = tl.reshape(tl.where(mine[None, :, None], inverse[:, None, :], rows), [BLOCK, DIM_TILE])
        gram = tl.where((feature // BLOCK == step)[None, :], 0.0, gram)
        tile = tl.reshape(gram, [BLOCKS, BLOCK, DIM_TILE])
        own = tl.where(done[None, :], rows, 0.0)[None, :, :]
        gram = tl.reshape(tl.where(mine[:, None, None], own, tile), [DIM_TILE, DIM_TILE])
        gram = tl.dot(less, rows, gram)  #? not passes
        # Three TF32 passes into one sum, the small factors' first; a loop, so that one copy of a factor is alive.
        for small in range(0, 3):  #? passes
            left = tl.where(small == 0, less - rounded(less), rounded(less))  #? passes
            right = tl.where(small == 1, rows - rounded(rows), rounded(rows))  #? passes
            gram = tl.dot(left, right, gram, input_precision="tf32")  #? passes

    for begin in range(0, CHUNK, STEP):
        $points
        points = tl.where(here[:, None], points - mean[None, :], 0.0)
        white = tl.dot(points, tl.trans(gram)$wide_precision)
        result = tl.sum(white * white, 1)
        $store
"""

POINTS = """
at = chunk * CHUNK + begin + tl.arange(0, STEP)
points = tl.load(
    key_head + at.to(tl.int64)[:, None] * key_n + feature[None, :],
    mask=(at < k_len)[:, None] & (feature < DIM)[None, :],
    other=0.0,
).to(tl.float32)
finite = tl.sum(points * 0.0, 1) == 0.0  # 0 * x is NaN for what is not finite
here = (at < k_len) & finite  #? not valid
here = finite & (tl.load(member + pair // kv_heads * k_len + at, mask=at < k_len, other=0) != 0)  #? valid
points = tl.where(here[:, None], points, 0.0)
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


def names(dim: int, dim_tile: int, chunk: int) -> dict[str, object]:
    """Sizes and numbers of the template."""
    return dict(
        step=min(STEP, chunk),
        block=BLOCK,
        blocks=dim_tile // BLOCK,
        ridge=repr(RIDGE / dim),
        least=repr(dim * 1.1754943508222875e-38),
    )
