"""A sorting network on chip, as text that stands before a kernel.

Bitonic (Batcher 1968): places are axes of two, so that one step orders all pairs along one axis. An
exchange is a minimum and a maximum and moves nothing but the values; what must travel with a value
is packed into its low bits. ``tl.sort`` does the same with an exchange that the interpreter takes
minutes for.
"""

from __future__ import annotations

NETWORK = """def exchange(values, axis: tl.constexpr, turn: tl.constexpr, up: tl.constexpr):
    # The larger first; the smaller first where `up`, or at the second places along `turn`.
    axes: tl.constexpr = len(values.shape)
    second = tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (axes - 1 - axis))
    if turn > 0:
        second = second ^ tl.reshape(tl.arange(0, 2), [1] * turn + [2] + [1] * (axes - 1 - turn))
    most = tl.max(values, axis, keep_dims=True)
    least = tl.min(values, axis, keep_dims=True)
    return tl.where(second == up, most, least)


@triton.jit
def merge(values, log: tl.constexpr, turn: tl.constexpr, up: tl.constexpr):
    # Sort runs of 2^log that rise and fall.
    axes: tl.constexpr = len(values.shape)
    for i in tl.static_range(log):
        values = exchange(values, axes - log + i, turn, up)
    return values


@triton.jit
def rising(values, log: tl.constexpr):
    # Sort rows of 2^log, the smallest first.
    for i in tl.static_range(1, log):
        values = merge(values, i, log - i, 0)
    return merge(values, log, 0, 1)


@triton.jit
"""
