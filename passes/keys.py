"""Nodes for a lifted mask that depends on batch and key only: which keys are valid, ``[B, Nk]``."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from ..kernels.band import B, K
from .compat import known_equal, value_of

_FUNCTIONS: dict[Any, Any] = {
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.Lt: operator.lt,
    sympy.Le: operator.le,
    sympy.Gt: operator.gt,
    sympy.Ge: operator.ge,
    sympy.And: operator.and_,
    sympy.Or: operator.or_,
    sympy.Xor: operator.xor,
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Mod: operator.mod,
    sympy.Max: torch.maximum,
    sympy.Min: torch.minimum,
    sympy.Not: torch.logical_not,
    sympy.Abs: torch.abs,
}


def only_of_keys(term: Any) -> bool:
    """Whether a term says something of keys and batch alone, in a form that ``Keys`` can emit."""
    known = (*_FUNCTIONS, sympy.floor, AppliedUndef, sympy.Symbol, sympy.Integer, sympy.Rational)
    parts = list(sympy.preorder_traversal(term))
    fine = all(isinstance(part, known) or part in (sympy.true, sympy.false) for part in parts)
    # A float that multiplies or divides would round as its own dtype rounds: none is let in.
    halves = [part for part in parts if isinstance(part, sympy.Rational) and not part.is_Integer]
    inside = [part for floor in term.atoms(sympy.floor) for part in sympy.preorder_traversal(floor)]
    return fine and not term.free_symbols - {B, K} and all(half in inside for half in halves)


@dataclass(frozen=True)
class Keys:
    """Keys for which ``expr`` holds, over b and k; ``loads`` are the nodes that its functions read."""

    expr: Any
    loads: Mapping[str, fx.Node]

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes that the expression reads."""
        return [self.loads[name] for name in sorted({a.func.__name__ for a in self.expr.atoms(AppliedUndef)})]

    def emit(self, graph: fx.Graph, query: fx.Node, key: fx.Node, sizes: tuple[Any, Any], device: Any) -> fx.Node:
        """A bool node ``[B, Nk]``, given the site's ``[B, H, Nq, D]`` and ``[B, Hkv, Nk, D]`` and ``(B, Nk)``."""
        terms = self.expr.args if isinstance(self.expr, sympy.And) else (self.expr,)
        found: fx.Node | None = None
        for term in terms:
            node = self._plain(graph, term, sizes) or General(graph, self.loads, _places(graph, query, key, device)).of(
                term
            )
            found = node if found is None else graph.call_function(operator.and_, (found, node))
        assert found is not None
        size = (graph.call_method("size", (query, 0)), graph.call_method("size", (key, 2)))
        return graph.call_method("expand", (found, *size))

    def _plain(self, graph: fx.Graph, term: Any, sizes: tuple[Any, Any]) -> fx.Node | None:
        """A tensor ``[B or 1, Nk]`` of the graph that says just this."""
        if not isinstance(term, (sympy.Ne, sympy.Eq)) or term.rhs != 0 or not isinstance(term.lhs, AppliedUndef):
            return None
        node, index = self.loads[term.lhs.func.__name__], term.lhs.args
        shape = value_of(node).shape
        if len(shape) != 2 or index[0] not in (B, 0) or index[1] != K or not known_equal(shape[1], sizes[1]):
            return None
        if not known_equal(shape[0], 1 if index[0] == 0 else sizes[0]):
            return None
        if isinstance(term, sympy.Eq):
            return graph.call_function(operator.eq, (node, 0))
        return node if value_of(node).dtype == torch.bool else graph.call_function(operator.ne, (node, 0))


def _places(graph: fx.Graph, query: fx.Node, key: fx.Node, device: Any) -> dict[sympy.Symbol, fx.Node]:
    """b ``[B, 1]`` and k ``[1, Nk]``."""
    found: dict[sympy.Symbol, fx.Node] = {}
    for symbol, node, axis, other in ((K, key, 2, 0), (B, query, 0, -1)):
        size = graph.call_method("size", (node, axis))
        at = graph.call_function(torch.arange, (size,), {"device": device})
        found[symbol] = graph.call_method("unsqueeze", (at, other))
    return found


class General:
    """Evaluates an expression on ``place``, tensors that broadcast against each other, one node an operator."""

    def __init__(self, graph: fx.Graph, loads: Mapping[str, fx.Node], place: Mapping[sympy.Symbol, fx.Node]):
        self.graph, self.loads, self.place = graph, loads, place
        self.first = next(iter(place.values()))

    def of(self, expr: Any) -> Any:
        """The node, or the number, that ``expr`` is."""
        if expr in (sympy.true, sympy.false):
            always = self.graph.call_function(operator.ge, (self.first, 0))
            return always if expr == sympy.true else self._call(torch.logical_not, always)
        if expr.is_Integer:
            return int(expr)
        if isinstance(expr, sympy.Symbol):
            return self.place[expr]
        if isinstance(expr, sympy.floor):
            above, below = sympy.fraction(sympy.together(expr.args[0]))
            return self._call(operator.floordiv, self.of(above), self.of(below))
        if isinstance(expr, AppliedUndef):
            index = tuple(self.tensor(self.of(at)) for at in expr.args)
            node = self.loads[expr.func.__name__]
            return node if not index else self._call(operator.getitem, node, index)
        function = _FUNCTIONS[expr.func]
        parts = [self.of(arg) for arg in expr.args]
        if isinstance(expr, (sympy.Max, sympy.Min)):
            parts = [self.tensor(part) for part in parts]
        found = self._call(function, *parts[:2])
        for part in parts[2:]:
            found = self._call(function, found, part)
        return found

    def tensor(self, part: Any) -> Any:
        """A number as a tensor that broadcasts against the others."""
        return part if isinstance(part, fx.Node) else self._call(operator.add, self._zero(), part)

    def _zero(self) -> fx.Node:
        return self._call(operator.mul, self.first, 0)

    def _call(self, function: Any, *args: Any) -> fx.Node:
        if len(args) == 1 and isinstance(args[0], int):
            args = (self.tensor(args[0]),)
        return self.graph.call_function(function, args)
