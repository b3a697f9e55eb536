"""A learned sink: one logit that belongs to no key, beside those of the keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..calls import call_of
from ..compat import value_of
from ..indices import is_one
from .near import REACH, reaches_back


@dataclass(frozen=True)
class Joint:
    """Where one logit that belongs to no key is put after those of the keys, along an axis of all three nodes."""

    node: fx.Node
    logits: fx.Node
    sink: fx.Node
    axis: int


def joint_of(softmax: fx.Node) -> Joint | None:
    dim, node = call_of(softmax).get("dim", None), call_of(softmax).get("input")
    while isinstance(node, fx.Node) and call_of(node).name in ("same", "to", "detach", "sub"):
        node = call_of(node).get("input")
    if not isinstance(node, fx.Node) or call_of(node).name != "cat" or not isinstance(dim, int):
        return None
    call, rank = call_of(node), value_of(node).dim()
    tensors, axis = call.get("tensors", ()), call.get("dim", 0)
    if (
        not isinstance(tensors, (list, tuple))
        or len(tensors) != 2
        or not isinstance(axis, int)
        or axis % rank != dim % rank
    ):
        return None
    logits, sink = tensors
    whole = all(isinstance(n, fx.Node) and value_of(n).dim() == rank for n in tensors)
    if not whole or not reaches_back(logits, REACH) or not is_one(value_of(sink).shape[axis]):
        return None
    return Joint(node, logits, sink, axis % rank)
