"""Whether a tensor's dtype holds what is computed from indices: beyond, arithmetic rounds or wraps around."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction

BELOW = {torch.float32: 2**24, torch.float64: 2**53, torch.int32: 2**31, torch.int64: 2**63}
LONGEST = 2**20
"""What a size that is not known yet is taken to be at most."""


def holds(expr: Any, dtype: torch.dtype, sizes: Mapping[sympy.Symbol, Any]) -> bool:
    """Whether ``dtype`` holds ``expr``, over coordinates of these ``sizes``, whatever their values.

    Of what is no index this says nothing: a choice between numbers, or an element that only the run time knows. Numbers
    with a point are held where they are multiples of a power of two, which they are counted in.
    """
    expr = sympy.sympify(expr)
    if dtype not in BELOW or not _is_index(expr):
        return True
    unit = math.lcm(1, *(int(sympy.Rational(number).q) for number in _floats(expr)))
    return bool(_most(expr, sizes) * unit < BELOW[dtype])


def _inside(expr: Any) -> tuple[Any, ...]:
    """The parts that are numbers: no conditions, and no places of what is read."""
    if isinstance(expr, AppliedUndef | Relational | BooleanAtom | BooleanFunction):
        return ()
    if isinstance(expr, sympy.Piecewise):
        return tuple(value for value, _ in expr.args)
    return tuple(expr.args)


@functools.lru_cache(4096)
def _is_index(expr: Any) -> bool:
    return isinstance(expr, sympy.Symbol) or any(map(_is_index, _inside(expr)))


def _floats(expr: Any) -> list[Any]:
    return [expr] if isinstance(expr, sympy.Float) else [found for part in _inside(expr) for found in _floats(part)]


def _most(expr: Any, sizes: Mapping[sympy.Symbol, Any]) -> Any:
    """The largest size that a number, or one on the way to it, can have."""
    if expr.is_number:
        return abs(expr)
    if isinstance(expr, sympy.Symbol):
        size = sizes.get(expr)
        return max(size - 1, 0) if isinstance(size, int) else LONGEST
    parts = [_most(part, sizes) for part in _inside(expr)]
    if isinstance(expr, sympy.Mul):
        return math.prod(parts)
    if isinstance(expr, sympy.Add):
        return sum(parts)
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
        return parts[0] ** expr.exp
    known = isinstance(
        expr, sympy.floor | sympy.Mod | sympy.Abs | sympy.Max | sympy.Min | sympy.Piecewise | AppliedUndef
    )
    return max(parts, default=0) if known else sympy.oo
