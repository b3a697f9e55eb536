"""A softmax between two products: what it computes, proved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ..axes import Axes, Miss, Prover, about, prove
from ..calls import call_of
from ..compat import gradient_stops, value_of
from ..indices import coordinate
from ..memory import Memory
from ..site import Attention, Factor, operand
from .joint import joint_of
from .logits import Backward, Origin, Placed
from .near import REACH, reaches_back
from .operands import query_and_key, value_and_output
from .weights import Forward, Weights


def match(softmax: fx.Node, memory: Memory) -> tuple[fx.Node, Attention] | None:
    """The node that ``softmax`` and its surroundings can be replaced at, and what they compute.

    Returns:
        None where the softmax does not stand between two products.

    Raises:
        Miss: it does, but something is not proved; the first thing that is not.
    """
    if not reaches_back(call_of(softmax).get("input"), REACH):
        return None
    return prove(lambda axes, undo_repeats: _attempt(softmax, memory, axes, undo_repeats))


def _attempt(softmax: fx.Node, memory: Memory, axes: Axes, undo_repeats: bool) -> tuple[fx.Node, Attention] | None:
    joint = joint_of(softmax)
    # Where a learned sink joins the logits, the coordinates are of the keys alone.
    prover = Prover(value_of(joint.logits if joint else softmax).shape, memory, axes, undo_repeats)
    backward, forward = Backward(softmax, joint, prover), Forward(softmax, joint, prover)
    try:
        weights = forward.run()
    except Miss:
        backward.run()  # what is wrong before the softmax is told first
        raise
    if weights is None:
        return None
    origin = backward.run()
    if origin is None:
        raise Miss("unsupported_logits: the way from the product to the softmax is not followed")
    if joint is not None and origin is not backward.at_joint:
        raise Miss("extra_logits: something is done to the logits and a learned sink alike", joint.node)
    dim = call_of(softmax).get("dim", None)
    if not isinstance(dim, int):
        raise Miss(f"wrong_axis: softmax over dim={dim}")
    k = prover.index[dim % value_of(softmax).dim()]
    if k != 0 and not isinstance(k, sympy.Symbol):
        raise Miss("unproved_axes: the key axis is cut")
    proof = _Proof(softmax, origin, weights, backward.sink, prover)
    return weights.user, proof.attention(None if k == 0 else k, [*forward.dtypes, *backward.dtypes])


class _Proof:
    """Which axis of which operand is what."""

    def __init__(self, softmax: fx.Node, origin: Origin, weights: Weights, sink: Placed | None, prover: Prover) -> None:
        self.softmax, self.origin, self.weights, self.sink, self.prover = softmax, origin, weights, sink, prover

    def attention(self, k: Any, dtypes: Sequence[torch.dtype]) -> Attention:
        """What is computed; ``dtypes``: those between the products."""
        origin, weights, prover = self.origin, self.weights, self.prover
        d, e = coordinate("d"), coordinate("e")
        prover.cut([*origin.index, *weights.index, *(x for t in origin.terms for x in getattr(t, "index", ()))])
        with about(origin.node):
            query, key = query_and_key(origin, k, d, prover)
        with about(weights.user):
            value, out = value_and_output(weights, k, e, prover)
        self._has_gradients(query, key, value)
        query, key = self._of_few_bits(query, key, dtypes)
        query_at = prover.whole(*query, "query")
        key_at, value_at = prover.unrepeated(*key, "key", (k, d)), prover.unrepeated(*value, "value", (k, e))
        result = prover.whole(weights.user, out, "output")
        sink_at = prover.whole(*self.sink, "learned sink") if self.sink else None
        roles = prover.roles(query_at, key_at, value_at, k)
        self._unchanged([at.node for at in (query_at, key_at, value_at, sink_at) if at is not None])
        if weights.product.added is not None or weights.product.alpha != 1:
            raise Miss("weights_changed: baddbmm adds something to the output", weights.user)
        return Attention(
            query=query_at,
            key=key_at,
            value=value_at,
            result=result.axes,
            batch=roles.batch,
            heads=roles.heads,
            kv_heads=roles.kv_heads,
            q=roles.q,
            k=k,
            d=d if d in prover.sizes else None,
            e=e if e in prover.sizes else None,
            sizes=dict(prover.sizes),
            scale=self._scale(),
            factors=self._factors(k),
            terms=origin.terms,
            softcap=origin.softcap,
            sink_logit=sink_at,
            dropout=weights.dropout,
        )

    def _has_gradients(self, query: Placed, key: Placed, value: Placed) -> None:
        of_softmax = [query, key, *([self.sink] if self.sink else [])]
        for (node, _), made in (*((placed, self.softmax) for placed in of_softmax), (value, self.weights.user)):
            if gradient_stops(node, made):
                raise Miss("unsupported_logits: without a gradient that its operands want", node)

    def _of_few_bits(self, query: Placed, key: Placed, dtypes: Sequence[torch.dtype]) -> tuple[Placed, Placed]:
        """Query and key in the output's dtype where a cast can be left out; nothing between may have fewer bits."""
        dtype = value_of(self.weights.user).dtype
        rounded = [t for t in dtypes if torch.finfo(t).eps > torch.finfo(dtype).eps]
        if rounded:
            raise Miss(f"unsupported_logits: rounded to {rounded[0]}")
        query, key = ((self._uncast(node, dtype), at) for node, at in (query, key))
        finer = [n for n, _ in (query, key) if torch.finfo(value_of(n).dtype).eps < torch.finfo(dtype).eps]
        if finer and torch.finfo(value_of(self.origin.node).dtype).eps < torch.finfo(dtype).eps:
            raise Miss(f"unsupported_logits: of more bits than the output, {value_of(finer[0]).dtype}", finer[0])
        return query, key

    def _uncast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """What a cast to more bits is made from, where that has the dtype of the output."""
        call = call_of(node)
        source = call.get("input") if call.name == "to" else None
        if not isinstance(source, fx.Node) or value_of(source).dtype != dtype or self.prover.memory.stale(node):
            return node
        return source if torch.finfo(dtype).eps > torch.finfo(value_of(node).dtype).eps else node

    def _unchanged(self, nodes: Sequence[fx.Node]) -> None:
        memory = self.prover.memory
        for node in (*nodes, *(node for node, _, _ in self.origin.factors)):
            if memory.changes(node, self.weights.user) or memory.stale(node):
                raise Miss(f"modified_in_place: {node.name}", node)

    def _scale(self) -> Any:
        scale, cap, numbers = self.origin.scale, self.origin.softcap, self.origin.numbers
        scale = scale if cap is None else scale * cap
        if not numbers:
            return scale
        number, inverse = numbers[-1]
        if inverse:
            raise Miss("unsupported_logits: divided by a number of the run time", number)
        if len(numbers) > 1 or scale != 1:
            raise Miss("unsupported_logits: scaled by several numbers of the run time", number)
        return number

    def _factors(self, k: Any) -> tuple[Factor, ...]:
        found: list[Factor] = []
        for node, index, inverse in self.origin.factors:
            at = operand(node, index, value_of(node).shape, self.prover.sizes)
            if at is None or (k is not None and k in at.coordinates) or any(len(axis) > 1 for axis in at.axes):
                raise Miss("unsupported_logits: scaled by a tensor with a key axis", node)
            found.append(Factor(at, inverse))
        return tuple(found)
