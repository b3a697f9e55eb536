"""Where a chunk's keys lie along the directions in which its parts are widest, on tensor cores.

A step of a power iteration is two products of a matrix and a vector, ``centred^T (centred direction)``. Here the
directions of all parts of a level, up to eight, are the columns of one matrix, so that a step is two products of the
chunk's keys, which stay in shared memory: ``keys directions``, of which each key needs the column of its part, and
``keys^T`` times those, each in the column of its part. Keys are not centred; what their centre adds
is taken off the products. Keys are bfloat16, and the other factor, float32, is three columns of 8 bits each
(as in ``scores.products``), so that no product rounds: 16 columns for up to four parts, 32 for eight. All levels run
the same text, in a loop: written out four times, it took half a minute to compile.

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
FEW_PARTS = 4
"""Whose columns are half as many."""

FUNCTIONS = """def distances($given):
    # The first key, and how far each is from it, squared: from near by, rounding does not hide which is the farthest.
    DIM: tl.constexpr = $dim
    at = order
    $here
    first_key = tl.min(tl.where(here, at, k_len), 0)
    far = tl.zeros([$chunk], tl.float32)
    for begin in range(0, $dim_tile, $some):  # all of them as float32 would spill
        feature = begin + tl.arange(0, $some)
        wide = tl.load(
            key_head + at.to(tl.int64)[:, None] * key_n + feature[None, :],
            mask=here[:, None] & (feature < DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
        $origin
        wide -= origin[None, :]
        far += tl.sum(wide * wide, 1)
    return far, first_key


@triton.jit
def coordinates($given, far, first_key, log, SLOTS: tl.constexpr):
    # Where each key lies along the direction in which its part, of 2^log keys, is widest; up to SLOTS parts.
    DIM: tl.constexpr = $dim
    CHUNK: tl.constexpr = $chunk
    place = tl.arange(0, CHUNK)
    at = order
    $here
    feature = tl.arange(0, $dim_tile)
    points = tl.load(
        key_head + at.to(tl.int64)[:, None] * key_n + feature[None, :],
        mask=here[:, None] & (feature < DIM)[None, :],
        other=0.0,
    )
    own = here[:, None] & ((place >> log)[:, None] == tl.arange(0, SLOTS)[None, :])
    count = tl.maximum(tl.sum(own.to(tl.float32), 0), 1.0)[None, :]
    centre = products(tl.trans(points), own.to(tl.float32)) / count
    # The first direction is that of the key x that is farthest from the centre c: |x - o|^2 - 2 x (c - o) is the
    # greatest, o being any key.
    $origin
    apart = tl.gather(far, order % CHUNK, 0)[:, None] - 2.0 * products(points, centre - origin[:, None])
    farthest = tl.argmax(tl.where(own, apart, float("-inf")), 0)
    direction = products(tl.trans(points), (own & (place[:, None] == farthest[None, :])).to(tl.float32)) - centre
    along = tl.zeros([CHUNK, SLOTS], tl.float32)
    for step in range(0, $steps + 1):
        both = tl.sum(tl.join(direction * direction, direction * centre), 0)
        length, offset = tl.split(both)
        length = tl.maximum(tl.sqrt(length), 1e-12)
        direction /= length[None, :]
        along = tl.where(own, products(points, direction) - (offset / length)[None, :], 0.0)
        direction = products(tl.trans(points), along) - centre * tl.sum(along, 0)[None, :]
    return tl.sum(along, 1)


@triton.jit
def products(keys, wide):
    # keys wide: each number of float32 as the three of 8 bits whose sum it is, in columns of their own.
    SLOTS: tl.constexpr = wide.shape[1]
    high = (wide.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    rest = wide - high
    middle = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    # The bits of a column's number: of the number of 8 bits, the part's, and again one of the former. The first and
    # the last are those that one lane holds.
    columns = tl.join(tl.join(high, rest - middle), tl.join(middle, tl.zeros_like(high)))
    columns = tl.reshape(tl.permute(columns, (0, 2, 1, 3)), [wide.shape[0], 4 * SLOTS]).to(tl.bfloat16)
    sums = tl.dot(keys$wide_type, columns$wide_type)
    return tl.sum(tl.sum(tl.reshape(sums, [keys.shape[0], 2, SLOTS, 2]), 3), 1)


@triton.jit
"""

ORIGIN = """
origin = tl.load(
    key_head + first_key.to(tl.int64) * key_n + feature, mask=(feature < DIM) & (first_key < k_len), other=0.0
).to(tl.float32)
"""

LEVELS = """

# Halve parts of 2^log keys along the directions in which they are widest, level by level.
far, first_key = distances($given)
for level in range(0, $levels):
    log = $log - level
    at = order
    $here
    if level > $few_levels:  #? many
        along = coordinates($given, far, first_key, log, $slots)  #? many
    else:  #? many
        along = coordinates($given, far, first_key, log, $few)  #? many
    along = coordinates($given, far, first_key, log, $few)  #? not many
    order = ordered(order, along, here, log)
"""


def fits(dtype: str, target: str, chunk: int, dim_tile: int) -> bool:
    """Whether the keys of a chunk fit in shared memory (83 KB are taken), and tensor cores take them as they are."""
    return dtype == "bfloat16" and target == "cuda" and chunk * dim_tile <= NUMBERS


def texts(parts: dict[str, Any]) -> tuple[str, str]:
    """The functions, and the levels that call them, or no text where there are none; ``parts``: of ``clusters``."""
    parts = parts | {"wide_type": widened("bfloat16"), "some": min(32, parts["dim_tile"])}
    parts["origin"] = fill(ORIGIN, parts)
    few_levels = FEW_PARTS.bit_length() - 1
    parts |= dict(levels=parts["clusters"].bit_length() - 1, few=FEW_PARTS, few_levels=few_levels)
    parts |= dict(many=parts["levels"] > few_levels + 1, slots=2 * FEW_PARTS)
    return fill(FUNCTIONS, parts), fill(LEVELS, parts) if parts["levels"] else ""
