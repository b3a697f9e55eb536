"""The data of the matcher: a site, its operands' axes, and what its logits go through."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from .compat import known_equal, value_of
from .indices import Index, Ranges, ranges
from .memory import Memory

Coordinates = tuple[sympy.Symbol, ...]


@dataclass(frozen=True)
class Operand:
    """A node whose axes are proved: ``axes[i]`` are the coordinates merged in axis i, major first;
    none for an axis of size 1."""

    node: fx.Node
    axes: tuple[Coordinates, ...]

    @property
    def coordinates(self) -> set[sympy.Symbol]:
        return {c for axis in self.axes for c in axis}


@dataclass(frozen=True)
class Add:
    """Logits plus ``factor * what[index]``; ``what`` is a node or a number."""

    what: Any
    index: Index
    factor: float = 1.0


@dataclass(frozen=True)
class Fill:
    """Logits replaced by ``value[value_index]`` where ``condition[index]`` is ``where``."""

    condition: fx.Node
    index: Index
    where: bool
    value: Any
    value_index: Index = ()


@dataclass(frozen=True)
class Times:
    """Logits, with all that was done to them before, times a number."""

    factor: float


Term = Add | Fill | Times


@dataclass(frozen=True)
class Factor:
    """Logits times (or divided by) a tensor without a key axis."""

    operand: Operand
    inverse: bool


@dataclass(frozen=True)
class Attention:
    """What a site is proved to compute: ``softmax(terms(scale * q . k)) @ v``.

    Attributes:
        query, key, value: unexpanded: ``repeat_kv`` and ``enable_gqa`` are undone.
        result: the axes of the site's output.
        batch, heads, kv_heads: coordinates; ``heads`` begins with ``kv_heads``, the rest is the group.
        q, k, d, e: query, key, feature and value feature; None where that size is 1.
        sizes: how many values a coordinate takes.
        scale: number or node. factors: tensors without a key axis that multiply the logits, too.
        terms: what the logits go through, in order. softcap: ``c`` of ``c * tanh(logits / c)`` before the terms.
        sink_logit: one more logit of each query's softmax, after the terms, which belongs to no key: a learned sink.
        is_causal: ``k <= q``. dropout: its probability, 0.0 where off.
        dtype: of the result, and under autocast of the products; None: of the query.
        asked: the device that was asked about, see ``rewrite``; "" for the one that the tensors are on.
    """

    query: Operand
    key: Operand
    value: Operand
    result: tuple[Coordinates, ...]
    batch: Coordinates
    heads: Coordinates
    kv_heads: Coordinates
    q: sympy.Symbol | None
    k: sympy.Symbol | None
    d: sympy.Symbol | None
    e: sympy.Symbol | None
    sizes: Mapping[sympy.Symbol, Any]
    scale: Any
    factors: tuple[Factor, ...] = ()
    terms: tuple[Term, ...] = ()
    softcap: float | None = None
    sink_logit: Operand | None = None
    is_causal: bool = False
    dropout: Any = 0.0
    dtype: torch.dtype | None = None
    asked: str = ""

    @property
    def device(self) -> torch.device:
        """Where it is decided to run; AMD's GPUs go by the name of NVIDIA's."""
        if self.asked:
            return torch.device("cuda" if self.asked == "hip" else self.asked)
        found: torch.device = value_of(self.query.node).device
        return found

    @property
    def trained(self) -> bool:
        """Whether gradients are asked for."""
        return any(value_of(operand.node).requires_grad for operand in (self.query, self.key, self.value))

    def size(self, *coordinates: sympy.Symbol | None) -> Any:
        """How many values the coordinates take together, as int or SymInt."""
        found: Any = 1
        for c in coordinates:
            found = found if c is None else found * self.sizes[c]
        return found


@dataclass(frozen=True)
class Site:
    """One attention of a graph.

    Attributes:
        output: the node that computes it now; the softmax where nothing more is proved.
        kind: "sdpa" or "hand-written" (or what ``expand`` took it from).
        attention: what it computes; None where that is not proved.
        reason: why not, a code of ``reasons.REASONS`` perhaps with detail; "" if it is.
        module, source, code: where the user wrote it.
        memory: of its graph.
        missed: the node that the reason is about, where one is known.
        transformed: it lies between the begin and the end of a torch.func transform.
    """

    output: fx.Node
    kind: str
    attention: Attention | None
    reason: str
    module: str
    source: str
    code: str
    memory: Memory
    missed: fx.Node | None = None
    transformed: bool = False


def merged(expr: Any, sizes: Mapping[sympy.Symbol, Any]) -> Coordinates | None:
    """The coordinates that ``expr`` merges into one axis, major first; None if it is something else."""
    return _merged(sympy.sympify(expr), ranges(sizes))


@functools.lru_cache(4096)
def _merged(expr: Any, known: Ranges) -> Coordinates | None:
    expr, sizes = sympy.expand(expr), dict(known)
    rest = {s: expr.coeff(s) for s in expr.free_symbols if s in sizes}
    if sympy.expand(expr - sum(c * s for s, c in rest.items())) != 0:
        return None
    stride: Any = sympy.Integer(1)
    found: list[sympy.Symbol] = []
    while rest:
        minor = next((s for s, c in rest.items() if sympy.expand(c - stride) == 0), None)
        if minor is None:
            return None
        del rest[minor]
        found.insert(0, minor)
        stride = stride * sizes[minor]
    return tuple(found)


def operand(node: fx.Node, index: Index, shape: Sequence[Any], sizes: Mapping[sympy.Symbol, Any]) -> Operand | None:
    """``node`` with the coordinates of its axes; None if an axis is not wholly made of coordinates."""
    axes: list[Coordinates] = []
    for at, size in zip(index, shape, strict=True):
        axis = merged(at, sizes)
        if axis is None:
            return None
        if not known_equal(math.prod([sizes[c] for c in axis]), size):
            return None
        axes.append(axis)
    flat = [c for axis in axes for c in axis]
    return Operand(node, tuple(axes)) if len(set(flat)) == len(flat) else None
