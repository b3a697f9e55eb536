"""Bands: what a mask says of pairs where it leaves each query one run of keys, as sliding windows and chunks do.

A band's ends are closed forms of the query that never fall, so that those of a tile of queries are the ends of its
first and last one: what lies outside need not be looked at.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.core.relational import Relational


@dataclass(frozen=True)
class Band:
    """Keys from ``low`` to ``high``, both included, integers that rise with the query; None: no end on that side.

    ``rest``: what else a mask says.
    """

    low: Any = None
    high: Any = None
    rest: Any = sympy.true


@functools.cache
def band(allowed: Any, of: sympy.Symbol, by: sympy.Symbol) -> Band:
    """The ends of ``of`` that follow from ``allowed``, by ``by``: keys by their query, or the other way round."""
    lows, highs, rest = [], [], []
    for term in sympy.And.make_args(allowed):
        found = _ends(term, of, by)
        if found is None:
            rest.append(term)
            continue
        low, high = found
        lows += [] if low is None else [low]
        highs += [] if high is None else [high]
    return Band(
        sympy.Max(*lows) if lows else None, sympy.Min(*highs) if highs else None, sympy.And(*rest) if rest else sympy.true
    )


def _ends(term: Any, of: sympy.Symbol, by: sympy.Symbol) -> tuple[Any, Any] | None:
    """The two ends that say the same as one term, None for one that it does not set; None: there are no such ends."""
    if not isinstance(term, Relational) or term.free_symbols != {of, by} or term.atoms(sympy.core.function.AppliedUndef):
        return None
    if isinstance(term, sympy.Eq):
        return _same_block(term, of, by)
    if isinstance(term, sympy.Ne):
        return None
    less, more = (term.lts, term.gts)
    strict = int(isinstance(term, (sympy.Lt, sympy.Gt)))
    if isinstance(less, sympy.Abs):  # |q - k| <= w, a number or not
        first, second = (_side(sign * less.args[0] - more + strict, of, by) for sign in (1, -1))
        return None if first is None or second is None else _merged(first, second)
    return _side(less - more + strict, of, by)


def _side(difference: Any, of: sympy.Symbol, by: sympy.Symbol) -> tuple[Any, Any] | None:
    """Of ``difference <= 0``, over integers."""
    difference = sympy.expand(difference)
    sign = difference.coeff(of)
    if sign not in (1, -1):
        return None
    end = sympy.expand(of - sign * difference)
    if end.has(of) or not end.is_integer or not _rises(end, by):
        return None
    return (None, end) if sign == 1 else (end, None)


def _merged(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    lows, highs = ([end for end in ends if end is not None] for ends in zip(a, b, strict=True))
    return (sympy.Max(*lows) if lows else None), (sympy.Min(*highs) if highs else None)


def _same_block(term: Any, of: sympy.Symbol, by: sympy.Symbol) -> tuple[Any, Any] | None:
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
