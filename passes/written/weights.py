"""Where the weights that a softmax makes go: nothing else may see them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..axes import Miss, Prover, about
from ..calls import SHAPE_ONLY, Call, call_of, dropout_of, is_dead, is_float
from ..compat import known_equal, value_of
from ..contract import Product, product
from ..indices import Index, NotAView, pull, push
from .joint import Joint
from .logits import number_of
from .near import MOST, REACH, reaches_forward


@dataclass(frozen=True)
class Weights:
    """Weights as they meet the values in one product: ``node[index]``, of which some are dropped out."""

    node: fx.Node
    index: Index
    user: fx.Node
    product: Product
    dropout: Any


class Forward:
    """From a softmax forward to the product with the values.

    Attributes:
        dtypes: what the weights were on the way.
    """

    def __init__(self, softmax: fx.Node, joint: Joint | None, prover: Prover) -> None:
        self.softmax, self.joint, self.prover = softmax, joint, prover
        self.dtypes: list[torch.dtype] = [value_of(softmax).dtype]
        self._node, self._index = softmax, prover.index
        self._dropout: Any = 0.0
        self._without_sink = False

    def run(self) -> Weights | None:
        """The weights at the product with the values; None: no product is near."""
        for _ in range(MOST):
            users = [user for user in self._node.users if call_of(user).name not in SHAPE_ONLY and not is_dead(user)]
            goals = [user for user in users if reaches_forward(self._node, user, REACH)]
            if not goals:
                return None
            if len(users) > 1:
                other = next((u for u in users if u not in goals[:1]), users[-1])
                raise Miss(f"weights_observed: also by {other.name}", other)
            (user,) = users
            with about(user):
                found = self._values(user)
                if found is not None:
                    return Weights(self._node, self._index, user, found, self._dropout)
                self._step(user, call_of(user))
        raise Miss("weights_changed: too often")

    def _values(self, user: fx.Node) -> Product | None:
        """The product with the values, if ``user`` is it."""
        if "out" in user.kwargs or "out" in self.softmax.kwargs:
            raise Miss("modified_in_place: out=")
        found = product(user, call_of(user))
        if found is None:
            return None
        if found.left is found.right:
            raise Miss("unproved_axes: the weights meet themselves")
        if self._node is found.added:
            raise Miss("weights_changed: baddbmm adds them")
        if self.joint is not None and not self._without_sink:
            raise Miss("extra_logits: the weight of a learned sink meets the values")
        return found

    def _step(self, user: fx.Node, call: Call) -> None:
        if self.prover.memory.stale(self._node):
            raise Miss(f"modified_in_place: {self._node.name}")
        if call.name == "dropout":
            if self._dropout != 0:
                raise Miss("dropout: more than one")
            self._dropout = dropout_of(call)
            if call.spelled == "native_dropout":
                (user,) = (u for u in user.users if call_of(u).get("index") == 0)
        elif call.name in ("to", "same"):
            if not is_float(value_of(user)):
                raise Miss(f"weights_changed: {call.spelled}")
            self.dtypes.append(value_of(user).dtype)
        elif call.name == "detach":
            if value_of(self._node).requires_grad:
                raise Miss("weights_changed: detach")
        elif self._drops_sink(user, call):
            self._without_sink = True
        elif not (call.name == "where" and self._empty_rows(self._node, call)):
            try:
                self._index = push(user, call, self._index, self.prover.sizes)
            except NotAView as why:
                raise Miss(f"weights_changed: {why}") from None
        self._node = user

    def _drops_sink(self, user: fx.Node, call: Call) -> bool:
        """Whether ``user`` is all of the weights but those of the sink, which are the last."""
        if self.joint is None or self._without_sink or call.name not in ("getitem", "slice", "narrow"):
            return False
        old, new = value_of(self._node).shape, value_of(user).shape
        cut = [(a, b) for a, b in zip(old, new, strict=False) if not known_equal(a, b)]
        sizes = [value_of(node).shape[self.joint.axis] for node in (self.joint.node, self.joint.logits)]
        if len(old) != len(new) or len(cut) != 1 or not all(map(known_equal, cut[0], sizes)):
            return False
        try:
            return pull(user, call, self._index, self.prover.sizes)[1] == self._index
        except NotAView:
            return False

    def _empty_rows(self, weights: fx.Node, call: Call) -> bool:
        """ATen's ``_safe_softmax``, written out: 0 where every logit of the row is -inf."""
        yes, no, condition = call["input"], call["other"], call["condition"]
        if (
            no is not weights
            or number_of(yes, self.prover.index, self.prover) != 0
            or not isinstance(condition, fx.Node)
        ):
            return False
        names, node = [], condition
        for _ in range(4):
            found = call_of(node)
            names.append(found.name)
            source = found.get("input")
            if found.name == "eq":
                same_input = source is call_of(self.softmax)["input"]
                return same_input and found.get("other") == -math.inf and names == ["not", "any", "not", "eq"]
            if not isinstance(source, fx.Node):
                return False
            node = source
        return False
