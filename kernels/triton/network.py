"""A sorting network on chip, as text.

Bitonic (Batcher 1968): the places of a row are axes of two, so that one step orders all pairs along
one axis. An exchange is a minimum and a maximum and moves nothing but the values; what must travel
with a value is packed into its low bits (integers only). ``tl.sort`` does the same with an exchange that Triton's
interpreter takes minutes for.

Which axis stands for which bit of a place is free: ``bits[b]`` is the bit of the place in memory that
the network takes for its bit b. Its low bits take part in the most steps, so they should be those
that lie in the registers of one lane, where an exchange needs no shuffle.
"""

from __future__ import annotations

from collections.abc import Sequence

EXCHANGE = """def exchange(values, axis: tl.constexpr, turn: tl.constexpr, up: tl.constexpr):
    # The larger first; the smaller first where `up`, or at the second places along `turn`.
    axes: tl.constexpr = len(values.shape)
    second = tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (axes - 1 - axis))
    if turn > 0:
        second = second ^ tl.reshape(tl.arange(0, 2), [1] * turn + [2] + [1] * (axes - 1 - turn))
    most = tl.max(values, axis, keep_dims=True)
    least = tl.min(values, axis, keep_dims=True)
    return tl.where(second == up, most, least)


@triton.jit
def turned(values, axis: tl.constexpr):
    # In reversed order at the second places along an axis: the bits of an integer, inverted.
    axes: tl.constexpr = len(values.shape)
    second = tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (axes - 1 - axis))
    return values ^ -second


@triton.jit
"""
"""Stands before a kernel that sorts."""


def rising(name: str, bits: Sequence[int], own: int | None = None, done: int = 0) -> str:
    """Lines that sort the rows of ``name`` ``[M, 2, 2, ...]``, the smallest first.

    Of ``bits``, the first ``own`` lie in one lane (None: it does not matter). Inside a lane, which of an exchange is
    larger is known when the text is compiled. A run whose direction depends on the lane is sorted in one direction,
    its numbers turned before and after. Runs of 2^``done`` are sorted already: the largest first, and every second one
    the smallest first.
    """
    log = len(bits)
    return "\n".join(_run(name, bits, size, log if own is None else own) for size in range(done + 1, log + 1))


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
