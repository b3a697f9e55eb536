"""Where a chunk's keys lie along the directions in which its parts are widest, on tensor cores.

A step of a power iteration is two products of a matrix and a vector, ``centred^T (centred direction)``. Here the
directions of a level's parts, up to four, are the columns of one matrix, so that a step is two products of the
chunk's keys, which stay in shared memory: ``keys directions``, of which each key needs the column of its part, and
``keys^T`` times those, each in the column of its part. Keys are not centred; what their centre adds
is taken off the products. A factor is split into bfloat16 numbers of 8 bits each (as in ``scores.products``), so that
no product rounds: keys of float16 into two, the other factor, float32, into three columns (and one of zeros). Keys of
float32 have too many bits for that: where a part's keys lie near each other and far from zero, what rounding leaves
would not order them. All levels run the same text, in a loop: written out four times, it took half a minute to compile.

A number that is not finite reaches all columns, so that a chunk that has one is cut as its keys come.
"""

from __future__ import annotations

from typing import Any

import torch

from .render import fill, widened
from .spec import cdiv

PIECES = {"bfloat16": 1, "float16": 2}
"""Numbers of 8 bits that a key's number is the sum of."""
NUMBERS = 65_536
"""Of them in the largest chunk, two bytes each in shared memory; half of them on a GPU that has less."""
MANY = 16_384
"""From more than these on, a chunk takes eight warps; on four, one of 32,768 numbers spills on sm_80."""
PARTS = 4
"""Parts whose directions are columns of one product; with eight, it spills on sm_80."""

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
    return tl.gather(far, tl.arange(0, $chunk), 0), first_key  # one a lane, not a copy in each that summed it


@triton.jit
def coordinates($given, far, first_key, log, part):
    # Where each key lies along the direction in which its part, of 2^log keys, is widest; of SLOTS parts, from `part`.
    SLOTS: tl.constexpr = $slots
    DIM: tl.constexpr = $dim
    CHUNK: tl.constexpr = $chunk
    place = tl.arange(0, CHUNK)
    at = order
    $here
    feature = tl.arange(0, $dim_tile)
    inside = here[:, None] & (feature < DIM)[None, :]
    where = at.to(tl.int64)[:, None] * key_n + feature[None, :]  #? not more
    where = at.to(tl.int64)[:, None] * DIM + feature[None, :]  #? more
    points = tl.load(key_head + where, mask=inside, other=0.0)  #? not more
    points = tl.load(piece + where, mask=inside, other=0.0)  #? more
    rest_points = tl.load(piece + piece_size + where, mask=inside, other=0.0)  #? more
    slot = tl.where(here, (place >> log) - part, -1)
    own = slot[:, None] == tl.arange(0, SLOTS)[None, :]
    count = tl.maximum(tl.sum(own.to(tl.float32), 0), 1.0)[None, :]
    centre = products($turned, own.to(tl.float32)) / count
    # The first direction is that of the key x that is farthest from the centre c: |x - o|^2 - 2 x (c - o) is the
    # greatest, o being any key.
    $origin
    apart = tl.gather(far, order % CHUNK, 0)[:, None] - 2.0 * products($keys, centre - origin[:, None])
    farthest = tl.argmax(tl.where(own, apart, float("-inf")), 0)
    direction = products($turned, (own & (place[:, None] == farthest[None, :])).to(tl.float32)) - centre
    along = tl.zeros([CHUNK, SLOTS], tl.float32)
    for step in range(0, $steps + 1):
        both = tl.sum(tl.join(direction * direction, direction * centre), 0)
        length, offset = tl.split(both)
        inverse = 1.0 / tl.maximum(tl.sqrt(length), 1e-12)
        direction *= inverse[None, :]
        along = tl.where(own, products($keys, direction) - (offset * inverse)[None, :], 0.0)
        if step < $steps:
            direction = products($turned, along) - centre * tl.sum(along, 0)[None, :]
    return tl.gather(tl.sum(along, 1), place, 0)  # one a lane, or the network sorts copies as well


@triton.jit
def high(wide):
    # The upper 8 bits of float32 numbers.
    return (wide.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def products($keys, wide):
    # Of keys and wide: each number of float32 as the three of 8 bits whose sum it is, in columns of their own.
    SLOTS: tl.constexpr = wide.shape[1]
    most = high(wide)
    rest = wide - most
    middle = high(rest)
    # The bits of a column's number: of the number of 8 bits, the part's, and again one of the former. The first and
    # the last are those that one lane holds.
    less = (rest - middle).to(tl.bfloat16)
    columns = tl.join(tl.join(most.to(tl.bfloat16), less), tl.join(middle.to(tl.bfloat16), tl.zeros_like(less)))
    columns = tl.reshape(tl.permute(columns, (0, 2, 1, 3)), [wide.shape[0], 4 * SLOTS])
    sums = tl.dot(points$wide_type, columns$wide_type)
    sums = tl.dot(rest_points$wide_type, columns$wide_type, sums)  #? more
    return tl.sum(tl.sum(tl.reshape(sums, [points.shape[0], 2, SLOTS, 2]), 3), 1)


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
level = 0
part = 0
for some in range(0, $passes):  # a few parts of a level; the others stay as they are
    log = $log - level
    at = order
    $here
    order = ordered(order, coordinates($given, far, first_key, log, part), here, log)
    part += $slots
    if part >= 1 << level:
        level += 1
        part = 0
"""


def numbers(dtype: str, chunk: int, dim_tile: int) -> int:
    """Of 8 bits, that a chunk's keys are the sums of."""
    return PIECES[dtype] * chunk * dim_tile


def fits(dtype: str, target: str, small: bool, chunk: int, dim_tile: int) -> bool:
    """Whether they fit in the shared memory of an NVIDIA GPU (``small``: one of 99 KiB), where they take most of it."""
    return dtype in PIECES and target == "cuda" and numbers(dtype, chunk, dim_tile) <= NUMBERS >> small


def pieces(key: torch.Tensor) -> torch.Tensor:
    """Keys ``[B, H, N, D]`` of float16 as sums of bfloat16 numbers ``[2, B, H, N, D]``.

    In memory, since a product takes from shared memory what was loaded, but in registers what was calculated.
    """
    high = key.bfloat16()
    return torch.stack((high, (key.float() - high.float()).bfloat16()))


def texts(parts: dict[str, Any], dtype: str) -> tuple[str, str]:
    """The functions, and the levels that call them, or no text where there are none; ``parts``: of ``clusters``."""
    keys = ("points", "rest_points")[: PIECES[dtype]]
    parts = parts | {"wide_type": widened("bfloat16"), "some": min(32, parts["dim_tile"])}
    parts |= {"keys": ", ".join(keys), "turned": ", ".join(f"tl.trans({name})" for name in keys)}
    parts["origin"] = fill(ORIGIN, parts)
    levels = range(parts["clusters"].bit_length() - 1)
    parts |= dict(slots=PARTS, passes=sum(cdiv(1 << level, PARTS) for level in levels))
    return fill(FUNCTIONS, parts), fill(LEVELS, parts) if levels else ""
