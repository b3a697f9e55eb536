"""Matrix products, however they are spelled, as one thing: labelled operands, as in einsum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .calls import Call
from .compat import value_of
from .indices import is_one

Labels = tuple["int | None", ...]
"""One label an axis; None for an axis of size 1 that is broadcast."""


@dataclass(frozen=True)
class Product:
    """``out[...] = sum over the labels that out lacks of left[...] * right[...]``.

    For ``baddbmm``, ``alpha`` multiplies that and ``beta * added`` joins it.
    """

    left: fx.Node
    right: fx.Node
    left_labels: Labels
    right_labels: Labels
    out_labels: Labels
    added: fx.Node | None = None
    alpha: Any = 1
    beta: Any = 1

    @property
    def summed(self) -> list[int]:
        """Labels that are summed over."""
        inside = {*self.left_labels, *self.right_labels} - {None, *self.out_labels}
        return sorted(label for label in inside if label is not None)

    def labels(self, operand: fx.Node, side: int | None = None) -> Labels:
        if side is None:
            side = 0 if operand is self.left else 1
        return (self.left_labels, self.right_labels)[side]


def product(node: fx.Node, call: Call) -> Product | None:
    """The product that ``node`` is; None if it is none of two tensors."""
    if call.name in ("matmul", "bmm", "mm"):
        other = call.args.get("other", call.args.get("mat2"))
        return _matmul(call.get("input"), other)
    if call.name == "baddbmm":
        plain = _matmul(call.get("batch1"), call.get("batch2"))
        if plain is None or not isinstance(call.get("input"), fx.Node):
            return None
        alpha, beta = call.get("alpha", 1), call.get("beta", 1)
        added = call["input"] if beta != 0 else None
        return Product(
            plain.left, plain.right, plain.left_labels, plain.right_labels, plain.out_labels, added, alpha, beta
        )
    if call.name == "einsum":
        return _einsum(node)
    return None


def _rank(node: Any) -> int:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _matmul(left: Any, right: Any) -> Product | None:
    a, b = _rank(left), _rank(right)
    if min(a, b) < 2:
        return None
    row, inner, column = -1, -2, -3
    out_rank = max(a, b)
    batch: list[int | None] = list(range(out_rank - 2))

    def batch_of(node: fx.Node, rank: int, other: fx.Node, other_rank: int) -> list[int | None]:
        found: list[int | None] = []
        for label in batch[out_rank - rank :]:
            assert label is not None
            size = value_of(node).shape[label - out_rank + rank]
            wide = label >= out_rank - other_rank and not is_one(value_of(other).shape[label - out_rank + other_rank])
            found.append(None if is_one(size) and wide else label)
        return found

    return Product(
        left,
        right,
        (*batch_of(left, a, right, b), row, inner),
        (*batch_of(right, b, left, a), inner, column),
        (*batch, row, column),
    )


def _einsum(node: fx.Node) -> Product | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or not all(_rank(n) for n in operands):
        return None
    left, right = operands
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    named = [_spell_out(term, _rank(n)) for term, n in zip(terms, operands, strict=True)]
    if any(term is None or len(set(term)) != len(term) for term in named):
        return None
    (a, b), dots = named, max((term for term in named if term), key=lambda t: sum(c.isdigit() for c in t))
    assert a is not None and b is not None and dots is not None
    ellipsis = [c for c in dots if c.isdigit()]
    letters = sorted({c for c in inputs if c.isalpha()})
    if arrow:
        before, dotted, after = out.partition("...")
        written = [*before, *(ellipsis if dotted else []), *after]
    else:
        written = [*ellipsis, *(c for c in letters if (a + b).count(c) == 1)]
    if not set(written) <= set(a + b) or len(set(written)) != len(written):
        return None
    number = {c: at for at, c in enumerate([*ellipsis, *letters])}
    shapes = [value_of(n).shape for n in (left, right)]
    wide = {
        c for term, shape in zip((a, b), shapes, strict=True) for c, s in zip(term, shape, strict=True) if not is_one(s)
    }

    def labels(term: list[str], shape: Any) -> Labels:
        return tuple(None if is_one(s) and c in wide else number[c] for c, s in zip(term, shape, strict=True))

    return Product(left, right, labels(a, shapes[0]), labels(b, shapes[1]), tuple(number[c] for c in written))


def _spell_out(term: str, rank: int) -> list[str] | None:
    """One character an axis; the axes of an ellipsis are digits, counted from its right end."""
    before, dotted, after = term.partition("...")
    free = rank - len(before) - len(after)
    if free < 0 or free > 9 or (free and not dotted) or (not (before + after).isalpha() and before + after):
        return None
    return [*before, *(str(9 - d) for d in range(free, 0, -1)), *after]
