"""Where a chunk's keys lie along the directions in which its parts are widest, on tensor cores.

A step of a power iteration is two products of a matrix and a vector, ``centred^T (centred direction)``. Here the
directions of all parts of a level, up to eight, are the columns of one matrix, so that a step is two products of the
chunk's keys, which stay in shared memory: ``keys directions``, of which each key reads the column of its part, and
``keys^T`` times what was read, each in the column of its part. Keys are not centred; what their centre adds
is taken off the products. Keys are bfloat16, and the other factor, float32, is three columns of 8 bits each
(as in ``scores.products``), so that no product rounds: 16 columns for up to four parts, 32 for eight.

The first direction is that of the key farthest from its part's centre, by squares that the centre is a part of: where
that is a thousand times as far from zero as the keys are from it, rounding may take another key.
A number that is not finite reaches all columns, so that a chunk that has one is cut as its keys come.
"""

from __future__ import annotations

from typing import Any

from .render import fill
from .route import widened

NUMBERS = 32_768
"""Keys times features of the largest chunk."""
MANY = 16_384
"""From more than these on, a chunk takes eight warps; on four, one of 32,768 numbers spills on sm_80."""

COORDINATES = """def coordinates($parameters):
    # Where each key lies along the direction in which its part of PART keys is widest.
    DIM: tl.constexpr = $dim
    CHUNK: tl.constexpr = $chunk
    SLOTS: tl.constexpr = CHUNK // PART if CHUNK // PART > 4 else 4  # of parts
    COLUMNS: tl.constexpr = 4 * SLOTS
    at = order
    $here
    feature = tl.arange(0, $dim_tile)
    points = tl.load(
        key_head + at.to(tl.int64)[:, None] * key_n + feature[None, :],
        mask=here[:, None] & (feature < DIM)[None, :],
        other=0.0,
    )
    column = tl.arange(0, COLUMNS)
    third = (column // SLOTS)[None, :]
    place = tl.arange(0, CHUNK)
    own = (place[:, None] // PART == (column % SLOTS)[None, :]) & here[:, None]
    count = tl.maximum(tl.sum(own.to(tl.float32), 0), 1.0)[None, :]
    once = (own & (third == 0)).to(tl.float32).to(tl.bfloat16)
    centre = gathered(tl.dot(tl.trans(points)$wide_type, once$wide_type), SLOTS) / count
    # The first direction is that of the key that is farthest from the centre: |x|^2 - 2 x c is the greatest.
    far = tl.zeros([CHUNK], tl.float32)
    for first in range(0, $dim_tile, $some):  # all of them as float32 would spill
        features = first + tl.arange(0, $some)
        wide = tl.load(
            key_head + at.to(tl.int64)[:, None] * key_n + features[None, :],
            mask=here[:, None] & (features < DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
        far += tl.sum(wide * wide, 1)
    towards = tl.dot(points$wide_type, thirds(centre, third).to(tl.bfloat16)$wide_type)
    far -= 2.0 * tl.sum(tl.where(own, towards, 0.0), 1)
    farthest = tl.argmax(tl.where(own, far[:, None], float("-inf")), 0)
    once = (own & (third == 0) & (place[:, None] == farthest[None, :])).to(tl.float32).to(tl.bfloat16)
    direction = gathered(tl.dot(tl.trans(points)$wide_type, once$wide_type), SLOTS) - centre
    along = tl.zeros([CHUNK], tl.float32)
    for step in range(0, $steps + 1):
        direction /= tl.maximum(tl.sqrt(tl.sum(direction * direction, 0)), 1e-12)[None, :]
        offset = tl.where(third == 0, tl.sum(direction * centre, 0)[None, :], 0.0)
        towards = tl.dot(points$wide_type, thirds(direction, third).to(tl.bfloat16)$wide_type)
        along = tl.sum(tl.where(own, towards - offset, 0.0), 1)
        weight = tl.where(own, thirds(along[:, None], third), 0.0).to(tl.bfloat16)
        whole = tl.sum(tl.where(own, along[:, None], 0.0), 0)[None, :]
        direction = gathered(tl.dot(tl.trans(points)$wide_type, weight$wide_type), SLOTS) - centre * whole
    return along


@triton.jit
def thirds(wide, third):
    # Which of the three numbers of 8 bits, whose sum a float32 number is, each column holds; the fourth holds none.
    high = (wide.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    rest = wide - high
    middle = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return tl.where(third == 0, high, tl.where(third == 1, middle, tl.where(third == 2, rest - middle, 0.0)))


@triton.jit
def gathered(sums, SLOTS: tl.constexpr):
    # The sums of the thirds, in each of a part's columns.
    ROWS: tl.constexpr = sums.shape[0]
    whole = tl.sum(tl.reshape(sums, [ROWS, 4, SLOTS]), 1)
    return tl.reshape(tl.broadcast_to(whole[:, None, :], [ROWS, 4, SLOTS]), [ROWS, 4 * SLOTS])


@triton.jit
"""


def fits(dtype: str, target: str, chunk: int, dim_tile: int) -> bool:
    """Whether the keys of a chunk fit in shared memory (83 KB are taken), and tensor cores take them as they are."""
    return dtype == "bfloat16" and target == "cuda" and chunk * dim_tile <= NUMBERS


def coordinates(parts: dict[str, Any]) -> str:
    """The function ``coordinates``, with the parameters that ``clusters`` calls it with."""
    return fill(COORDINATES, parts | {"wide_type": widened("bfloat16"), "some": min(32, parts["dim_tile"])})
