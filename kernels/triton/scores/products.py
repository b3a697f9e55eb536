"""Products of float32 accuracy on tensor cores, as functions that stand before a kernel.

A float32 number is the sum of three numbers of 8 bits (bfloat16), or of three of 11 bits (TF32). A factor that
tensor cores take as it is (keys of 16 bits, zeros and ones) times each of the three, summed in float32 from
the smallest on, is therefore a float32 product, and exact where the other factor only picks. Two
float32 factors are multiplied in three TF32 passes (``tf32x3``), which drop a relative 2^-22. AMD's
matrix cores multiply float32 as it is.
"""

from __future__ import annotations

from ..route import widened

_BFLOAT16 = """def $name(narrow, wide):
    # A factor of 16 bits times float32 in three products, of which none rounds.
    narrow = narrow.to(tl.bfloat16)
    high = wide.to(tl.bfloat16)
    rest = wide - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    out = tl.dot(narrow$wide_type, low$wide_type)
    out = tl.dot(narrow$wide_type, middle$wide_type, out)
    return tl.dot(narrow$wide_type, high$wide_type, out)
"""
_TF32 = """def $name(narrow, wide):
    # A factor of at most 11 bits times float32 in three products, of which none rounds.
    narrow = narrow.to(tl.float32)
    high = (wide.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    rest = wide - high
    middle = (rest.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    out = tl.dot(narrow, rest - middle, input_precision="tf32")
    out = tl.dot(narrow, middle, out, input_precision="tf32")
    return tl.dot(narrow, high, out, input_precision="tf32")
"""
_TF32X3 = """def $name(left, right):
    return tl.dot(left, right, input_precision="tf32x3")
"""
_ROUNDED = """def rounded(wide):
    # To the 11 bits that TF32 keeps.
    return ((wide.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
"""
_PLAIN = """def $name(left, right):
    return tl.dot(left.to(tl.float32), right)
"""


def picked(dtype: str, target: str) -> str:
    """``picked(ones, wide)``: rows of a float32 matrix, exactly; zeros and ones times it."""
    if target == "hip" and dtype != "bfloat16":
        return _named(_PLAIN, "picked", dtype)
    return _named(_BFLOAT16 if dtype == "bfloat16" else _TF32, "picked", dtype)


def product(dtype: str, target: str) -> str:
    """``product(keys, wide)``: keys of ``dtype`` times float32."""
    if dtype == "bfloat16":
        return _named(_BFLOAT16, "product", dtype)
    if target == "hip":
        return _named(_PLAIN, "product", dtype)
    return _named(_TF32 if dtype == "float16" else _TF32X3, "product", dtype)


def rounded() -> str:
    """``rounded(wide)``: float32 numbers as TF32 has them. What it takes off is a second factor."""
    return _ROUNDED


def wide_precision(target: str) -> str:
    """What ``tl.dot`` is told of two float32 factors."""
    return ', input_precision="tf32x3"' if target == "cuda" else ""


def before(*functions: str) -> str:
    """Functions as text that stands before a kernel, each compiled by Triton."""
    return "".join(f"{text}\n\n@triton.jit\n" for text in functions)


def _named(text: str, name: str, dtype: str) -> str:
    return text.replace("$name", name).replace("$wide_type", widened(dtype))
