"""A sorting network on chip, as text.

Bitonic (Batcher 1968): the places of a row are axes of two, so that one step orders all pairs along
one axis. An exchange is a minimum or a maximum and moves nothing but the values; what must travel
with a value is packed into its low bits (integers only). ``tl.sort`` does the same with the bits in their own order,
written out.

Which axis stands for which bit of a place is free: ``bits[b]`` is the bit of the place in memory that
the network takes for its bit b. Its low bits take part in the most steps, so they should be those
that lie in the registers of one lane, where an exchange needs no shuffle.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from .render import fill

EXCHANGE = """def exchange(values, axis: tl.constexpr, turn: tl.constexpr, up: tl.constexpr):
    # The larger first; the smaller first where `up`, or at the second places along `turn`.
    axes: tl.constexpr = len(values.shape)
    second = tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (axes - 1 - axis))
    if turn > 0:
        second = second ^ tl.reshape(tl.arange(0, 2), [1] * turn + [2] + [1] * (axes - 1 - turn))
    other = $other
    return tl.where(second == up, tl.maximum(values, other), tl.minimum(values, other))


@triton.jit
def turned(values, axis: tl.constexpr):
    # In reversed order at the second places along an axis: the bits of an integer, inverted.
    axes: tl.constexpr = len(values.shape)
    second = tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (axes - 1 - axis))
    return values ^ -second


@triton.jit
"""

IN_LOOP = """
turn = ($place & ((1 << $last) - 1)) | (1 << $last)  # which runs of 2^bit rise: every second one, at last all
$name ^= -((turn >> $first) & 1)
for merge in range($first, $last + 1):
    $exchanges
    $name ^= -(((turn >> merge) ^ (turn >> (merge + 1))) & 1)
"""


def exchange() -> str:
    """Functions that stand before a kernel that sorts."""
    # One shuffle brings the other value of a pair. Triton's interpreter takes minutes for ``xor_sum``.
    other = "tl.xor_sum(values, axis, keep_dims=True) ^ values"
    if os.environ.get("TRITON_INTERPRET") == "1":
        other = "tl.sub(tl.sum(values, axis, keep_dims=True), values, sanitize_overflow=False)"
    return fill(EXCHANGE, {"other": other}) + "\n"


def in_loop(name: str, place: str, log: int, done: int = 0, last: int | str | None = None) -> str:
    """Lines that sort runs of 2^``last`` (None: all) numbers of ``name``, the smallest first.

    A loop over the sizes of runs that are merged, whose text is as long as one merge: networks of some thousand
    numbers, written out, take the assembler a minute.

    Args:
        name: ``[1, 2, 2, ...]``, ``log`` times 2. place: int32 of the same shape, from 0.
        done: runs of 2^``done`` are sorted already, the largest first, and every second one the smallest first.
    """
    last = log if last is None else last
    always = done if isinstance(last, int) else 0
    lines = []
    for bit in reversed(range(log)):
        line = f"{name} = exchange({name}, {log - bit}, 0, 0)"
        lines += [line] if bit <= always else [f"if merge > {bit}:", "    " + line]
    return fill(IN_LOOP, dict(first=done + 1, last=last, place=place, name=name, exchanges="\n".join(lines)))


def rising(name: str, bits: Sequence[int], own: int) -> str:
    """Lines that sort the rows of ``name`` ``[M, 2, 2, ...]``, the smallest first.

    Of ``bits``, the first ``own`` lie in one lane. Inside a lane, which of an exchange is
    larger is known when the text is compiled. A run whose direction depends on the lane is sorted in one direction,
    its numbers turned before and after.
    """
    return "\n".join(_run(name, bits, size, own) for size in range(1, len(bits) + 1))


def falling(name: str, bits: Sequence[int]) -> str:
    """Lines that sort rows that rise and then fall, the largest first."""
    return _runs(name, bits, len(bits), False, False)


def rank(place: str, bits: Sequence[int]) -> str:
    """The rank in a sorted row of what lies at ``place``."""
    return " | ".join(f"((({place}) >> {bit}) & 1) << {at}" for at, bit in enumerate(bits))


def _run(name: str, bits: Sequence[int], size: int, own: int) -> str:
    log = len(bits)
    if size == log or size < own:
        return _runs(name, bits, size, size < log, size == log)
    turn = f"{name} = turned({name}, {log - bits[size]})"
    return "\n".join([turn, _runs(name, bits, size, False, False), turn])


def _runs(name: str, bits: Sequence[int], size: int, turns: bool, up: bool) -> str:
    """Sort runs of 2^size, every second one the other way where it ``turns``."""
    axis = [len(bits) - bit for bit in bits]
    turn = axis[size] if turns else 0
    return "\n".join(f"{name} = exchange({name}, {axis[bit]}, {turn}, {int(up)})" for bit in reversed(range(size)))
