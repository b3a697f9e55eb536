"""The input of a body (of a checkpoint, say) that is a mask which was made outside of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from .indices import Index


def told_apart(
    found: Any, index: Index, shape: Sequence[Any], sizes: Mapping[sympy.Symbol, Any]
) -> tuple[Any, Index] | None:
    """What the input says at ``index`` (``found``), as what is known without it, and where it says all the rest.

    ``k <= q & valid[b, k]`` says at the last query which keys are valid, whatever the query is. None: there is no such
    place, or it is not proved.

    Args:
        shape: of the input. sizes: how many values each coordinate takes.
    """
    terms = sympy.And.make_args(found)
    known = [term for term in terms if not term.atoms(AppliedUndef)]
    rest = [term for term in terms if term.atoms(AppliedUndef)]
    needed = {symbol for term in rest for symbol in term.free_symbols}
    last = {}
    for axis, at in enumerate(index):
        # At the last of its values, not the last place of the axis: what was found holds for no more.
        alone = isinstance(at, sympy.Symbol) and sum(sympy.sympify(other).has(at) for other in index) == 1
        known_sizes = isinstance(sizes.get(at), int) and isinstance(shape[axis], int)
        if alone and at not in needed and known_sizes and sizes[at] <= shape[axis]:
            last[at] = sympy.Integer(sizes[at] - 1)
    if not known or not rest or not last or not all(_always(term.subs(last), sizes) for term in known):
        return None
    return sympy.And(*known), tuple(last.get(at, at) for at in index)


def _always(term: Any, sizes: Mapping[sympy.Symbol, Any]) -> bool:
    """Whether a term holds for all values of its coordinates: an inequality that is linear, at its corners."""
    if term == sympy.true:
        return True
    if not isinstance(term, Relational) or isinstance(term, (sympy.Eq, sympy.Ne)):
        return False
    free = sorted(term.free_symbols, key=str)
    if not all(isinstance(sizes.get(symbol), int) for symbol in free):
        return False
    difference = sympy.expand(term.lhs - term.rhs)
    if not difference.is_polynomial(*free) or sympy.Poly(difference, *free).total_degree() > 1:
        return False
    corners = itertools.product(*((0, sizes[symbol] - 1) for symbol in free))
    return all(term.subs(dict(zip(free, corner, strict=True))) == sympy.true for corner in corners)
