"""``wgmma``: products of four warps, with matrices that lie in shared memory (Hopper; PTX ISA, 9.7.15)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from . import lanes

GROUP = 4 * lanes.WARP
ROWS = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of a row of eight by a descriptor's kind of swizzle."""


def places(descriptor: Any, size: int, count: int, depth: int, transposed: bool) -> Any:
    """Bytes from the start of shared memory: (groups, count, depth) numbers of ``size`` bytes.

    A matrix lies in blocks of eight rows of ``ROWS`` bytes (canonical layouts of CUTLASS, cute/arch/mma_sm90_desc.hpp):
    rows are what is counted (K-major) or, ``transposed``, what is summed over. Bits 4 to 6 of an address are swizzled
    with bits 7 to 9.
    """
    wide = descriptor.astype(np.int64)[:, None, None]
    start, leading, stride = ((wide >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    swizzle = int(wide.reshape(-1)[0] >> 62 & 3)
    if (wide >> 62 & 3 != swizzle).any() or (wide >> 49 & 7).any():
        raise ValueError("descriptors of one instruction differ, or have an offset of their base")
    row = ROWS[swizzle]
    outer, inner = np.arange(count)[None, :, None], np.arange(depth)[None, None, :]
    if transposed:
        outer, inner = inner, outer
    along, whole = inner * size % row, inner * size // row
    if swizzle == 0 and transposed:  # steps along the rows and across them change places
        leading, stride = stride, leading
    at = start + outer // 8 * stride + outer % 8 * row + whole * leading + along
    mask = row // 16 - 1
    return at ^ ((at >> 7 & mask) << 4)


def rows_of(registers: list[Any], kind: str, count: int) -> Any:
    """(groups, 64, depth): the left factor, where it lies in registers, 16 rows a warp."""
    return lanes.left_factor(kind, registers, count).reshape(count // GROUP, 64, -1)


def product(left: Any, right: Any, sums: list[Any], adds: Any, count: int) -> list[Any]:
    """Sums of 64 rows; ``left``: (groups, 64, depth), ``right``: (groups, columns, depth); ``adds``: to ``sums``."""
    out = torch.bmm(torch.from_numpy(left), torch.from_numpy(right).transpose(1, 2)).numpy()
    out = out.reshape(-1, 16, out.shape[2])  # of warps
    found = []
    for at, before in enumerate(sums):
        row, column = 8 * (at // 2 % 2), 8 * (at // 4)
        new = out[:, row : row + 8, column + at % 2 : column + 8 : 2].reshape(-1)
        old = np.broadcast_to(before, count).view(np.float32)
        found.append(np.where(adds, new + old, new).view(np.uint32))
    return found
