"""Bands: what a mask says of pairs where it leaves each query one run of keys, as sliding windows and chunks do.

A band's ends are closed forms of the query that never fall, so that those of a tile of queries are the ends of its
first and last one: what lies outside need not be looked at.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

B, H, Q, K = sympy.symbols("b h q k", integer=True, nonnegative=True)
"""Batch, query head, query and key. One place: sympy's symbols are equal where their assumptions are, too."""


@dataclass(frozen=True)
class Band:
    """Keys from ``low`` to ``high``, both included, integers that rise with the query; None: no end on that side.

    ``rest``: what else a mask says.
    """

    low: Any = None
    high: Any = None
    rest: Any = sympy.true


Ends = tuple[Any, Any]
"""A low and a high one, each perhaps None."""


@functools.cache
def band(allowed: Any, of: sympy.Symbol, by: sympy.Symbol) -> Band:
    """The ends of ``of`` that follow from ``allowed``, by ``by``: keys by their query, or the other way round."""
    found = {term: _ends(term, of, by) for term in sympy.And.make_args(allowed)}
    low, high = _both(*filter(None, found.values()))
    return Band(low, high, sympy.And(*(term for term, ends in found.items() if ends is None)))


def _both(*ends: Ends) -> Ends:
    lows, highs = ([pair[side] for pair in ends if pair[side] is not None] for side in (0, 1))
    return (sympy.Max(*lows) if lows else None), (sympy.Min(*highs) if highs else None)


def _ends(term: Any, of: sympy.Symbol, by: sympy.Symbol) -> Ends | None:
    """What says the same as one term; None if no ends do."""
    if not isinstance(term, Relational) or term.free_symbols != {of, by} or term.atoms(AppliedUndef):
        return None
    if isinstance(term, sympy.Eq):
        return _same_block(term, of, by)
    if isinstance(term, sympy.Ne):
        return None
    less, more, strict = term.lts, term.gts, int(isinstance(term, (sympy.Lt, sympy.Gt)))
    if isinstance(less, sympy.Abs):  # |q - k| <= w
        sides = [_side(sign * less.args[0] - more + strict, of, by) for sign in (1, -1)]
        return None if None in sides else _both(*filter(None, sides))
    return _side(less - more + strict, of, by)


def _side(difference: Any, of: sympy.Symbol, by: sympy.Symbol) -> Ends | None:
    """Of ``difference <= 0``, over integers."""
    difference = sympy.expand(difference)
    sign = difference.coeff(of)
    if sign not in (1, -1):
        return None
    end = sympy.expand(of - sign * difference)
    if end.has(of) or not end.is_integer or not _rises(end, by):
        return None
    return (None, end) if sign == 1 else (end, None)


def _same_block(term: Any, of: sympy.Symbol, by: sympy.Symbol) -> Ends | None:
    """Of ``floor((k + a) / size) == floor((q + b) / size)``."""
    mine, other = (term.lhs, term.rhs) if term.lhs.has(of) else (term.rhs, term.lhs)
    if not isinstance(mine, sympy.floor) or mine.has(by) or not other.is_integer or not _rises(other, by):
        return None
    inside = sympy.expand(mine.args[0])
    part = inside.coeff(of)
    if not part.is_Rational or part <= 0 or part.p != 1:
        return None
    size = part.q
    offset = sympy.expand((inside - of * part) * size)
    if not offset.is_Integer:
        return None
    low = sympy.expand(size * other - offset)
    return low, sympy.expand(low + size - 1)


def _rises(expr: Any, by: sympy.Symbol) -> bool:
    """Whether it never falls with ``by``, of which alone it is made."""
    if expr == by or expr.is_Rational:
        return True
    if isinstance(expr, (sympy.Add, sympy.Max, sympy.Min, sympy.floor)):
        return all(_rises(part, by) for part in expr.args)
    if isinstance(expr, sympy.Mul):
        number, rest = expr.as_coeff_Mul()
        return bool(number.is_Rational and number > 0) and _rises(rest, by)
    return False
