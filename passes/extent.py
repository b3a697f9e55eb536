"""How large an expression is where it is written out as a tree: what algebra on it takes grows with that."""

from __future__ import annotations

import math
from typing import Any

import sympy

MOST = 2000
"""Of an expression that is looked into, some seconds' work. A mask of a dozen documents has a hundred."""
TOO_LARGE = f"more than {MOST} operations, written out"

DEGREES = 16
"""Of a power; beyond, it is too large in any case."""


class Extents:
    """Counts nodes, each expression once: what is shared is counted where it stands, but not walked through again."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}

    def of(self, expr: Any) -> int:
        """Nodes of the tree, with powers and products of sums multiplied out, and an exclusive or as ands and ors."""
        expr = sympy.sympify(expr)
        waiting = [expr]
        while waiting:
            at = waiting[-1]
            missing = [part for part in at.args if part not in self._known]
            if missing:
                waiting += missing
            else:
                self._known[waiting.pop()] = self._count(at)
        return self._known[expr]

    def _count(self, expr: Any) -> int:
        sizes = [self._known[part] for part in expr.args]
        count = 1 + sum(sizes)
        if isinstance(expr, sympy.Xor):
            return count * 2 ** (len(sizes) - 1)
        if isinstance(expr, (sympy.Max, sympy.Min)):  # each number is compared with each other one
            return count * len(sizes)
        if isinstance(expr, sympy.Mul):
            sums = [size for part, size in zip(expr.args, sizes, strict=True) if part.is_Add or part.is_Pow]
            return count + math.prod(sums)
        if isinstance(expr, sympy.Pow) and expr.base.is_Add and expr.exp.is_Integer:
            return int(sizes[0] ** min(abs(expr.exp), DEGREES))
        return count
