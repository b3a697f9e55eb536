"""Nodes that bring a site's tensors to ``[batch, heads, length, features]`` and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from .compat import hint
from .indices import is_one
from .site import Attention, Coordinates, Operand


@dataclass(frozen=True)
class Sizes:
    """How many values each coordinate takes: an int, or the axis of a node that has just that size."""

    static: Mapping[sympy.Symbol, int]
    dynamic: Mapping[sympy.Symbol, tuple[fx.Node, int]]

    @classmethod
    def of(cls, attention: Attention) -> Sizes:
        dynamic: dict[sympy.Symbol, tuple[fx.Node, int]] = {}
        for operand in (attention.query, attention.key, attention.value):
            for axis, inside in enumerate(operand.axes):
                if len(inside) == 1:
                    dynamic.setdefault(inside[0], (operand.node, axis))
        return cls({c: size for c, size in attention.sizes.items() if isinstance(size, int)}, dynamic)

    def separable(self, axes: Sequence[Coordinates]) -> bool:
        """Whether each axis can be cut into its coordinates: at most one size may be unknown."""
        return all(sum(c not in self.static and c not in self.dynamic for c in axis) <= 1 for axis in axes)

    def emit(self, graph: fx.Graph, axis: Coordinates) -> tuple[Any, ...]:
        """The sizes that cut ``axis``, with -1 for one that is not static."""
        found: list[Any] = []
        unknown = [c for c in axis if c not in self.static]
        hidden = next((c for c in unknown if c not in self.dynamic), unknown[0] if unknown else None)
        for c in axis:
            if c in self.static:
                found.append(self.static[c])
            else:
                found.append(-1 if c is hidden else graph.call_method("size", self.dynamic[c]))
        return tuple(found)


def canonical(graph: fx.Graph, source: Operand, groups: Sequence[Coordinates], sizes: Sizes) -> fx.Node:
    """``source`` with one axis a group, where a group is the coordinates that are merged in that axis.

    An axis of size 1 is inserted for a group that ``source`` has no coordinate of.
    """
    node, axes = source.node, source.axes
    if tuple(groups) == axes:
        return node
    for axis in range(len(axes) - 1, -1, -1):
        if not axes[axis]:
            node = graph.call_method("squeeze", (node, axis))
        elif len(axes[axis]) > 1:
            node = graph.call_method("unflatten", (node, axis, sizes.emit(graph, axes[axis])))
    inside = [c for axis in axes for c in axis]
    found = [[c for c in group if c in inside] for group in groups]
    order = [c for group in found for c in group]
    if order != inside:
        node = graph.call_method("permute", (node, *(inside.index(c) for c in order)))
    for axis, group in enumerate(found):
        if not group:
            node = graph.call_method("unsqueeze", (node, axis))
        elif len(group) > 1:
            node = graph.call_method("flatten", (node, axis, axis + len(group) - 1))
    return node


def original(
    graph: fx.Graph, node: fx.Node, groups: Sequence[Coordinates], axes: Sequence[Coordinates], sizes: Sizes
) -> fx.Node:
    """The inverse: from one axis a group to the given axes."""
    return canonical(graph, Operand(node, tuple(groups)), axes, sizes)


def laid_out_as(graph: fx.Graph, node: fx.Node, like: Any) -> fx.Node:
    """``node`` in the memory layout of the fake tensor ``like``: code after it may rely on that."""
    if like.is_contiguous():
        return graph.call_method("contiguous", (node,))
    strides = [0 if is_one(size) else hint(stride) for size, stride in zip(like.shape, like.stride(), strict=True)]
    order = sorted(range(like.dim()), key=lambda axis: -strides[axis])
    dense = 1
    for axis in reversed(order):
        if strides[axis] not in (0, dense):
            return node  # with gaps or overlaps: as it comes
        dense *= hint(like.shape[axis])
    node = graph.call_method("contiguous", (graph.call_method("permute", (node, *order)),))
    return graph.call_method("permute", (node, *(order.index(axis) for axis in range(like.dim()))))
