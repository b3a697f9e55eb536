"""Both operands of a product, axis by axis, from what the axes of the other ones are."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from ..axes import Miss, Prover
from ..compat import value_of
from ..contract import Labels, Product
from ..indices import ZERO, Index
from .logits import Origin, Placed
from .weights import Weights


def query_and_key(origin: Origin, k: Any, d: sympy.Symbol, prover: Prover) -> tuple[Placed, Placed]:
    """The operands of the product that logits are made from; ``k``: the axis of the softmax, None for one key.

    The operand that has the key axis is the key; with one key, the right one.
    """
    first, second = _of_logits(origin.product, origin.index, d, prover)
    if k is None:
        return first, second
    query, key = (second, first) if sympy.Tuple(*first[1]).has(k) else (first, second)
    if sympy.Tuple(*query[1]).has(k):
        raise Miss("wrong_axis: query and key share the axis of the softmax", query[0])
    if not sympy.Tuple(*key[1]).has(k):
        raise Miss("wrong_axis: the key has no axis that the softmax runs over", key[0])
    return query, key


def _of_logits(found: Product, index: Index, summed: sympy.Symbol, prover: Prover) -> tuple[Placed, Placed]:
    label = _summed(found)
    at: dict[int, Any] = {label: x for label, x in zip(found.out_labels, index, strict=True) if label is not None}
    if label not in found.left_labels or label not in found.right_labels:
        raise Miss("unproved_axes: a product that sums over an axis of one operand")
    at[label] = prover.new(summed, value_of(found.left).shape[found.left_labels.index(label)])
    left, right = ((node, _labelled(labels, at)) for node, labels in _operands(found))
    return left, right


def value_and_output(weights: Weights, k: Any, e: sympy.Symbol, prover: Prover) -> tuple[Placed, Index]:
    """The operand that weights meet, and the index of the output."""
    found = weights.product
    label = _summed(found)
    side = 0 if found.left is weights.node else 1
    (_, own), (node, others) = _operands(found) if side == 0 else reversed(_operands(found))
    at = {label: x for label, x in zip(own, weights.index, strict=True) if label is not None}
    if label not in at or (at[label] != k if k is not None else at[label] != 0):
        raise Miss("wrong_axis: the product with the values does not sum over the axis of the softmax")
    if label not in others:
        raise Miss("unproved_axes: a product that sums over an axis of one operand")
    free = [label for label in others if label is not None and label not in at]
    if len(free) > 1:
        raise Miss("unproved_axes: the value has several axes of its own")
    for label in free:
        at[label] = prover.new(e, value_of(node).shape[others.index(label)])
    if any(label not in at for label in found.out_labels if label is not None):
        raise Miss("unproved_axes: of the output")
    return (node, _labelled(others, at)), _labelled(found.out_labels, at)


def _summed(found: Product) -> int:
    if len(found.summed) != 1:
        raise Miss(f"unproved_axes: a product over {len(found.summed)} axes")
    return found.summed[0]


def _operands(found: Product) -> list[tuple[fx.Node, Labels]]:
    return [(found.left, found.left_labels), (found.right, found.right_labels)]


def _labelled(labels: Labels, at: dict[int, Any]) -> Index:
    return tuple(ZERO if label is None else at[label] for label in labels)
