"""What instructions do with the registers of all lanes: arrays of one number a lane, in bits (unsigned), or scalars."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = Any
WARP = 32
U16, U32, U64 = np.uint16, np.uint32, np.uint64
F16, F32 = np.float16, np.float32


def flushed(value: Array) -> Array:
    """``.ftz``: subnormal numbers are 0."""
    return np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(F32(0), value), value)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(U32) << U32(16)).view(F32)


def to_bf16(value: Array) -> Array:
    """Bits, rounded to the nearest, ties to even."""
    bits = np.asarray(value, dtype=F32).view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(value), U32(0x7FFF), rounded).astype(U16)


def from_f16(bits: Array) -> Array:
    return bits.view(F16).astype(F32)


def to_f16(value: Array) -> Array:
    return np.asarray(value, dtype=F32).astype(F16).view(U16)


def pair(low: Array, high: Array) -> Array:
    """Two numbers of 16 bits in one of 32."""
    return low.astype(U32) | (high.astype(U32) << U32(16))


def low(bits: Array) -> Array:
    return bits.astype(U16)


def high(bits: Array) -> Array:
    return (bits >> U32(16)).astype(U16)


def as_floats(bits: Array, kind: str) -> Array:
    """What tensor cores read: numbers of 16 bits, or of 32, of which TF32 is without the last 13."""
    if kind == "tf32":
        return (bits & U32(0xFFFFE000)).view(F32)
    return from_bf16(bits) if kind == "bf16" else from_f16(bits)


def to_tf32(value: Array) -> Array:
    """``cvt.rna``: 10 bits of mantissa, ties away from 0."""
    bits = value.view(U32)
    return np.where(np.isfinite(value), (bits + U32(0x1000)) & U32(0xFFFFE000), bits)


def fused(one: Array, two: Array, three: Array) -> Array:
    """``fma``: what double precision makes of it, rounded once more."""
    return (one.astype(np.float64) * two + three).astype(F32)


def to_integer(value: Array, kind: type) -> Array:
    """``cvt.rzi``: towards 0, held within the type's range; NaN is 0."""
    info = np.iinfo(kind)
    wide = np.trunc(np.nan_to_num(value.astype(np.float64), nan=0.0))
    inside = np.clip(wide, float(info.min), np.nextafter(float(info.max), 0) if info.bits == 64 else info.max)
    return inside.astype(kind)


def quotient(one: Array, two: Array) -> Array:
    """Towards 0, as a GPU divides integers; all bits set where the divisor is 0."""
    kind = one.dtype.type
    safe = np.where(two == 0, kind(1), two)
    whole = np.floor_divide(one, safe)
    whole = whole + ((whole < 0) & (whole * safe != one)).astype(kind)
    return np.where(two == 0, ~kind(0), whole)


def remainder(one: Array, two: Array) -> Array:
    return one - quotient(one, two) * two


def upper_half(one: Array, two: Array) -> Array:
    """``mul.hi``: of two integers of 16, 32 or 64 bits."""
    kind = one.dtype.type
    if one.dtype.itemsize < 8:
        wide = np.int64 if one.dtype.kind == "i" else U64
        return ((one.astype(wide) * two.astype(wide)) >> wide(8 * one.dtype.itemsize)).astype(kind)
    a, b, half, mask = one.astype(U64), two.astype(U64), U64(32), U64(0xFFFFFFFF)
    across = (a >> half) * (b & mask)
    other = (a & mask) * (b >> half) + (across & mask) + ((a & mask) * (b & mask) >> half)
    out = (a >> half) * (b >> half) + (across >> half) + (other >> half)
    if one.dtype.kind == "i":
        out = out - np.where(one < 0, b, U64(0)) - np.where(two < 0, a, U64(0))
    return out.astype(kind)


def shifted(name: str, value: Array, by: Array) -> Array:
    """``shl`` and ``shr``: what is shifted by more bits than there are is 0, or its sign."""
    bits = value.dtype.itemsize * 8
    inside = np.minimum(by.astype(U32), U32(bits - 1)).astype(value.dtype)
    moved = np.left_shift(value, inside) if name == "shl" else np.right_shift(value, inside)
    signed = name == "shr" and value.dtype.kind == "i"
    return moved if signed else np.where(by.astype(U32) >= bits, value.dtype.type(0), moved)


def field(value: Array, at: Array, length: Array) -> Array:
    """``bfe``: ``length`` bits from bit ``at`` on, with their sign where the type has one."""
    if value.dtype.kind == "u":
        kind = value.dtype.type
        mask = (kind(1) << length.astype(kind)) - kind(1)
        return shifted("shr", value, at) & np.where(length >= value.dtype.itemsize * 8, ~kind(0), mask)
    wide = value.astype(np.int64)
    room = 64 - at.astype(np.int64) - length.astype(np.int64)
    return np.where(length == 0, 0, (wide << room) >> (64 - length.astype(np.int64))).astype(value.dtype)


def inserted(value: Array, into: Array, at: Array, length: Array) -> Array:
    """``bfi``: the low ``length`` bits of ``value`` in place of those from bit ``at`` on."""
    at, length = (np.minimum(each, U32(32)).astype(U64) for each in (at, length))
    mask = ((U64(1) << length) - U64(1)) << at
    return ((into.astype(U64) & ~mask) | (value.astype(U64) << at & mask)).astype(U32)


def permuted(one: Array, two: Array, selector: Array) -> Array:
    """``prmt``: bytes of two words, those that the selector's digits name."""
    both = one.astype(U64) | (two.astype(U64) << U64(32))
    out = U32(0)
    for at in range(4):
        digit = (selector >> U32(4 * at)) & U32(0xF)
        byte = (both >> ((digit & U32(7)) * U32(8)).astype(U64)).astype(U32) & U32(0xFF)
        signs = np.where(byte & U32(0x80), U32(0xFF), U32(0))
        out = out | (np.where(digit & U32(8), signs, byte) << U32(8 * at))
    return out


def logic(one: Array, two: Array, three: Array, table: int) -> Array:
    """``lop3``: any function of three bits."""
    out = U32(0)
    for at in range(8):
        if table >> at & 1:
            out = out | ((one if at & 4 else ~one) & (two if at & 2 else ~two) & (three if at & 1 else ~three))
    return out


def funnel(name: str, one: Array, two: Array, by: Array, wraps: bool) -> Array:
    """``shf``: 32 of the 64 bits of two words (``two`` is the upper one)."""
    both = one.astype(U64) | (two.astype(U64) << U64(32))
    by = by & U32(31) if wraps else np.minimum(by, U32(32))
    if name == "l":
        return ((both << by.astype(U64)) >> U64(32)).astype(U32)
    return (both >> by.astype(U64)).astype(U32)


def leading_zeros(value: Array) -> Array:
    value = np.asarray(value)
    bits = value.dtype.itemsize * 8
    out = np.full(value.shape, bits, U32)
    for at in range(bits):
        out = np.where((value >> value.dtype.type(at)) & value.dtype.type(1), U32(bits - 1 - at), out)
    return out


def reversed_bits(value: Array) -> Array:
    out = U32(0)
    for at in range(32):
        out = out | (((value >> U32(at)) & U32(1)) << U32(31 - at))
    return out


def compared(how: str, one: Array, two: Array) -> Array:
    """``setp``: of floats, ``equ`` and the like hold where one is NaN, too."""
    if how == "num":
        return ~(np.isnan(one) | np.isnan(two))
    if how == "nan":
        return np.isnan(one) | np.isnan(two)
    compare = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    }  # fmt: skip
    if one.dtype.kind != "f":
        return compare[how](one, two)
    unordered = np.isnan(one) | np.isnan(two)
    if how.endswith("u") and len(how) == 3:
        return compare[how[:2]](one, two) | unordered
    return compare[how](one, two) & ~unordered


# ---- between the lanes of a warp


def by_warp(value: Array, lanes: int) -> Array:
    return np.broadcast_to(value, lanes).reshape(-1, WARP)


def shuffled(how: str, value: Array, by: Array, clamp: Array, lanes: int) -> tuple[Array, Array]:
    """``shfl.sync``: another lane's number; and whether there was one (else it is the lane's own)."""
    lane = np.arange(WARP, dtype=np.int64)[None, :]
    by, clamp = by_warp(by, lanes).astype(np.int64), by_warp(clamp, lanes).astype(np.int64)
    segment = clamp >> 8 & 31
    last = (lane & segment) | (clamp & 31 & ~segment)
    if how == "up":
        source = lane - (by & 31)
        inside = source >= last
    elif how == "down":
        source = lane + (by & 31)
        inside = source <= last
    elif how == "bfly":
        source = lane ^ (by & 31)
        inside = source <= last
    else:
        source = (lane & segment) | (by & 31 & ~segment)
        inside = source <= last
    source = np.where(inside, source, lane)
    return np.take_along_axis(by_warp(value, lanes), source, 1).reshape(-1), inside.reshape(-1)


def reduced(how: str, value: Array, active: Array, lanes: int) -> Array:
    """``redux.sync``: of all lanes of a warp that take part."""
    value = by_warp(value, lanes)
    taking = np.ones_like(value, dtype=bool) if active is None else by_warp(active, lanes)
    kind = value.dtype.type
    if how == "add":
        out = np.where(taking, value, kind(0)).sum(1, dtype=kind)
    elif how in ("min", "max"):
        info = np.iinfo(kind)
        neutral = kind(info.max if how == "min" else info.min)
        out = getattr(np, how)(np.where(taking, value, neutral), axis=1)
    else:
        function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[how]
        out = function.reduce(np.where(taking, value, ~kind(0) if how == "and" else kind(0)), axis=1)
    return np.repeat(out, WARP)


def voted(how: str, value: Array, active: Array, lanes: int) -> Array:
    """``vote.sync``: ``ballot``, ``any`` or ``all``."""
    value = by_warp(value, lanes)
    taking = np.ones_like(value) if active is None else by_warp(active, lanes)
    if how == "any":
        return np.repeat((value & taking).any(1), WARP)
    if how == "all":
        return np.repeat((value | ~taking).all(1), WARP)
    bits = np.where(value & taking, U32(1) << np.arange(WARP, dtype=U32), U32(0))
    return np.repeat(bits.sum(1, dtype=U32), WARP)


# ---- tensor cores


def _numbers(kind: str, register: Array, lanes: int) -> Array:
    """Eight rows of each warp: a lane has two numbers of 16 bits, or one of TF32, whose last 13 bits are not read."""
    bits = by_warp(register, lanes)
    if kind == "tf32":
        return as_floats(bits, kind).reshape(-1, 8, 4)
    return as_floats(np.stack([low(bits), high(bits)], -1), kind).reshape(-1, 8, 8)


def left_factor(kind: str, registers: list[Array], lanes: int) -> Array:
    """(warps, 16, columns): rows 0 to 7, rows 8 to 15, then the same of the next columns (PTX ISA, 9.7.14.5)."""
    parts = [_numbers(kind, register, lanes) for register in registers]
    return np.concatenate([np.concatenate(parts[half::2], axis=2) for half in (0, 1)], axis=1)


def product(kind: str, left: list[Array], right: list[Array], sums: list[Array], lanes: int) -> list[Array]:
    """``mma.sync``: 16 rows by 8 columns of a warp; ``right`` is column by column."""
    columns = np.concatenate([_numbers(kind, register, lanes) for register in right], axis=2)
    rows = left_factor(kind, left, lanes)
    out = torch.bmm(torch.from_numpy(rows), torch.from_numpy(columns).transpose(1, 2)).numpy()
    found = []
    for at in range(4):
        half = out[:, 8 * (at // 2) : 8 * (at // 2) + 8, at % 2 :: 2].reshape(-1)
        found.append((half + np.broadcast_to(sums[at], lanes).view(F32)).view(U32))
    return found


def fragments(rows: Array, transposed: bool) -> Array:
    """``ldmatrix``: what the lanes get of 8 rows of 8 numbers each (warps, 8, 8)."""
    if transposed:
        rows = rows.transpose(0, 2, 1)
    pairs = np.ascontiguousarray(rows).reshape(-1, WARP, 2)
    return pair(pairs[..., 0], pairs[..., 1]).reshape(-1)


def rows_from(register: Array, transposed: bool, lanes: int) -> Array:
    """``stmatrix``: the 8 rows of 8 numbers that a register of each lane holds; the other way round."""
    bits = by_warp(register, lanes)
    rows = np.stack([low(bits), high(bits)], -1).reshape(-1, 8, 8)
    return rows.transpose(0, 2, 1) if transposed else rows
