"""Products of float32 accuracy on tensor cores, as functions that stand before a kernel.

A float32 number is the sum of three numbers of 8 bits (bfloat16), or of three of 11 bits (TF32). A factor that
tensor cores take as it is (keys of 16 bits, zeros and ones) times each of the three, summed in float32,
is therefore a float32 product, and exact where the other factor only picks. Two
float32 factors are multiplied in three TF32 passes (``tf32x3``), which drop a relative 2^-22. AMD's
matrix cores multiply float32 as it is.
"""

from __future__ import annotations

from ..render import widened

_BFLOAT16 = """def $name(narrow, wide):
    # A factor of 16 bits times float32: three products of 8 bits each, of which none rounds.
    out = tl.zeros([narrow.shape[0], wide.shape[1]], tl.float32)
    for part in range(0, 3):
        high = wide.to(tl.bfloat16)
        out = tl.dot(narrow.to(tl.bfloat16)$wide_type, high$wide_type, out)
        wide -= high.to(tl.float32)
    return out
"""
_TF32 = """def $name(narrow, wide):
    # A factor of at most 11 bits times float32: three products of 11 bits each, of which none rounds.
    out = tl.zeros([narrow.shape[0], wide.shape[1]], tl.float32)
    for part in range(0, 3):
        high = (wide.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        out = tl.dot(narrow.to(tl.float32), high, out, input_precision="tf32")
        wide -= high
    return out
"""
_TF32X3 = """def $name(left, right):
    # Two float32 factors: what TF32 rounds off either of them takes part in two more products.
    out = tl.zeros([left.shape[0], right.shape[1]], tl.float32)
    for small in range(0, 3):
        first = (left.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        second = (right.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        first = tl.where(small == 0, left - first, first)
        second = tl.where(small == 1, right - second, second)
        out = tl.dot(first, second, out, input_precision="tf32")
    return out
"""
_ADDED = """def added(total, left, right):
    # Three TF32 passes into one sum, the small factors' first; a loop, so that one copy of a factor is alive.
    for small in range(0, 3):
        first = ((left.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        second = ((right.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        first = tl.where(small == 0, left - first, first)
        second = tl.where(small == 1, right - second, second)
        total = tl.dot(first, second, total, input_precision="tf32")
    return total
"""
_ADDED_PLAIN = """def added(total, left, right):
    return tl.dot(left, right, total)
"""
_PLAIN = """def $name(left, right):
    return tl.dot(left.to(tl.float32), right)
"""


def product(dtype: str, target: str) -> str:
    """``product(keys, wide)``: keys of ``dtype``, or zeros and ones, times float32; of 16 bits it rounds no product."""
    if dtype == "bfloat16":
        return _named(_BFLOAT16, "product", dtype)
    if target == "hip":
        return _named(_PLAIN, "product", dtype)
    return _named(_TF32 if dtype == "float16" else _TF32X3, "product", dtype)


def picked(target: str) -> str:
    """``picked(ones, wide)`` beside a ``product`` of float32 keys: zeros and ones times float32, exactly."""
    return _named(_PLAIN if target == "hip" else _TF32, "picked", "float32")


def added(target: str) -> str:
    """``added(total, left, right)``: the product of two float32 factors and what it is added to.

    Factors are rounded to the 11 bits of TF32, not cut: what is left over is a second factor.
    """
    return _ADDED_PLAIN if target == "hip" else _ADDED


def before(*functions: str) -> str:
    """Functions as text that stands before a kernel, each compiled by Triton."""
    return "".join(f"{text}\n\n@triton.jit\n" for text in functions)


def _named(text: str, name: str, dtype: str) -> str:
    return text.replace("$name", name).replace("$wide_type", widened(dtype))
