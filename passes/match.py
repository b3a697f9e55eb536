"""Hand-written attention: from a softmax back to ``q . k`` and forward to ``weights . v``.

Nothing is compared with a list of subgraphs. Backward, each operator either changes the logits in
a way that is understood (scale, mask, softcap, cast, view) or ends the match; every axis of every
tensor on the way is followed as an index expression, and at the end these prove which axes are
batch, head, query, key and feature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from .axes import Axes, Miss, Prover, about, prove
from .calls import SHAPE_ONLY, Call, call_of, dropout_of, is_dead, is_float
from .compat import gradient_stops, known_equal, symbolic, value_of
from .contract import Labels, Product, product
from .elements import Elements, NotClosedForm
from .indices import ZERO, Index, NotAView, broadcast, coordinate, is_one, pull, push
from .memory import Memory
from .site import Add, Attention, Factor, Fill, Term, Times, operand

_VIEWS = {"view", "permute", "transpose", "movedim", "mT", "t", "T", "expand", "getitem", "slice", "select", "narrow"}
_FREE = _VIEWS | {"same", "to"}
# A search for a product that explains a near miss does not pass these: they begin something else.
_ENDS = {"linear", "addmm", "embedding", "softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm"} | {
    *("batch_norm", "native_layer_norm", "native_group_norm", "topk", "sum", "mean", "conv1d", "conv2d", "conv3d"),
    *("convolution", "scaled_dot_product_attention", "placeholder", "get_attr", "output", "opaque"),
}
# How many operators it does pass, views not counted.
_REACH = 12
_MOST = 200
_ROUNDS_NOTHING = 1e4
# What makes several tensors of weights, of which one may go on.
_TUPLES = {"native_dropout", "split", "split_with_sizes", "tensor_split", "chunk", "unbind"}
_BUFFERS = {"empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros"}
_Placed = tuple[fx.Node, Index]


@dataclass(frozen=True)
class _Logits:
    """Logits as made from one product: ``node[index]`` is the dot product."""

    node: fx.Node
    product: Product
    index: Index
    scale: float = 1.0
    numbers: tuple[fx.Node, ...] = ()
    factors: tuple[tuple[fx.Node, Index, bool], ...] = ()
    terms: tuple[Term, ...] = ()
    softcap: float | None = None


@dataclass
class _Weights:
    """The way of the softmax's output to the product with the values."""

    node: fx.Node
    index: Index
    user: fx.Node | None = None
    product: Product | None = None
    dropout: Any = 0.0
    without_sink: bool = False


@dataclass(frozen=True)
class _Joint:
    """Where one logit that belongs to no key is put after those of the keys, along an axis of all three nodes."""

    node: fx.Node
    logits: fx.Node
    sink: fx.Node
    axis: int


def match(softmax: fx.Node, memory: Memory) -> tuple[fx.Node, Attention] | None:
    """The node that ``softmax`` and its surroundings can be replaced at, and what they compute.

    Returns:
        None where the softmax does not stand between two products.

    Raises:
        Miss: it does, but something is not proved; the first thing that is not.
    """
    if not isinstance(call_of(softmax).get("input"), fx.Node):
        return None
    return prove(lambda axes, undo_repeats: _Matcher(softmax, memory, axes, undo_repeats).run())


class _Matcher(Prover):
    """A softmax between two products.

    Where a learned sink joins the logits, the coordinates are of the keys alone.
    """

    def __init__(self, softmax: fx.Node, memory: Memory, axes: Axes, undo_repeats: bool) -> None:
        self.joint = _joint(softmax)
        super().__init__(value_of(self.joint.logits if self.joint else softmax).shape, memory, axes, undo_repeats)
        self.softmax = softmax
        self._sink: _Placed | None = None
        self._at_joint: _Logits | None = None
        self.dtypes: list[torch.dtype] = [value_of(softmax).dtype]
        self._not_logits: set[tuple[fx.Node, Index]] = set()

    def run(self) -> tuple[fx.Node, Attention] | None:
        call = call_of(self.softmax)
        inside = call["input"]
        if not _reaches_back(inside, _REACH):
            return None
        try:
            weights = self._follow()
        except Miss:
            self._logits(inside, self.index)  # what is wrong before the softmax is told first
            raise
        if weights is None:
            return None
        logits = self._logits(inside, self.index)
        if logits is None:
            raise Miss("unsupported_logits: the way from the product to the softmax is not followed")
        if self.joint is not None and logits is not self._at_joint:
            raise Miss("extra_logits: something is done to the logits and a learned sink alike", self.joint.node)
        rank = value_of(self.softmax).dim()
        dim = call.get("dim", None)
        if not isinstance(dim, int):
            raise Miss(f"wrong_axis: softmax over dim={dim}")
        assert weights.user is not None
        return weights.user, self._attention(logits, weights, self.index[dim % rank])

    # Backward: what the logits are.

    def _logits(self, node: Any, index: Index) -> _Logits | None:
        if not isinstance(node, fx.Node) or not is_float(value_of(node)) or (node, index) in self._not_logits:
            return None
        with about(node):
            found = self._made(node, index)
        if found is None:  # what is used twice a step would double the work with each
            self._not_logits.add((node, index))
        return found

    def _made(self, node: fx.Node, index: Index) -> _Logits | None:
        call = call_of(node)
        sums = call.name in ("add", "sub", "rsub")  # add(x, 0.5, y): an old way to write alpha
        unread = [key for key in call.args if sums and key.startswith("argument ")]
        if "out" in call.args and not _is_fresh(call.args["out"]):
            unread.append("out")  # into what may be read elsewhere
        if unread and _reaches_back(node, _REACH):
            raise Miss(f"unsupported_logits: {call.spelled} with {', '.join(unread)}")
        found = product(node, call)
        if found is not None:
            self.dtypes.append(value_of(node).dtype)
            if self.memory.stale(node):
                raise Miss(f"modified_in_place: {node.name}")
            terms = () if found.added is None else (self._added(found.added, index, found.beta),)
            return self._scaled(_Logits(node, found, index), found.alpha, terms)
        step = getattr(self, f"_back_{call.name}", None)
        if step is None and call.name in _VIEWS:
            step = self._back_view
        logits: _Logits | None = step(node, call, index) if step else None
        if logits is not None and self.memory.stale(node):
            raise Miss(f"modified_in_place: {node.name}")
        if step is None and _reaches_back(node, _REACH):
            raise Miss(f"unsupported_logits: {call.spelled}")
        return logits

    def _scaled(self, logits: _Logits, alpha: Any, terms: tuple[Term, ...]) -> _Logits:
        number = self._number(alpha, ())
        if number is None:
            raise Miss(f"unsupported_logits: alpha={alpha}")
        return replace(logits, scale=number, terms=terms)

    def _added(self, node: Any, index: Index, factor: Any) -> Add:
        number = self._number(factor, ())
        if number is None:
            raise Miss(f"unsupported_logits: something times {factor} is added")
        return Add(node, self._inner(node, index), number)

    @staticmethod
    def _inner(node: Any, index: Index) -> Index:
        value = value_of(node) if isinstance(node, fx.Node) else None
        return broadcast(value.shape, index) if isinstance(value, torch.Tensor) else ()

    def _back_same(self, node: fx.Node, call: Call, index: Index) -> _Logits | None:
        return self._logits(call.get("input"), index)

    def _back_detach(self, node: fx.Node, call: Call, index: Index) -> _Logits | None:
        logits = self._logits(call.get("input"), index)
        if logits is not None and value_of(call["input"]).requires_grad:
            raise Miss("unsupported_logits: detach")
        return logits

    def _back_to(self, node: fx.Node, call: Call, index: Index) -> _Logits | None:
        logits = self._logits(call.get("input"), index)
        self.dtypes.append(value_of(node).dtype)
        return logits

    def _back_dropout(self, node: fx.Node, call: Call, index: Index) -> _Logits | None:
        logits = self._logits(call.get("input"), index)
        if logits is not None and dropout_of(call) != 0:
            raise Miss("dropout: on the logits")
        return logits

    def _back_view(self, node: fx.Node, call: Call, index: Index) -> _Logits | None:
        try:
            source, moved = pull(node, call, index, self.sizes)
        except NotAView as why:
            if _reaches_back(node, _REACH):
                raise Miss(f"unsupported_logits: {why}") from None
            return None
        return self._logits(source, moved)

    def _either(self, call: Call, index: Index) -> tuple[_Logits | None, Any]:
        """Which of two operands is made from the product, and the other one."""
        a, b = call.get("input"), call.get("other")
        first = self._logits(a, self._inner(a, index))
        if first is not None:
            return first, b
        return self._logits(b, self._inner(b, index)), a

    def _back_add(self, node: fx.Node, call: Call, index: Index) -> _Logits | None:
        logits, other = self._either(call, index)
        if logits is None:
            return None
        main = call.get("input") if other is call.get("other") else call.get("other")
        alpha = call.get("alpha", 1)
        if not isinstance(alpha, (int, float)) or (alpha != 1 and other is call.get("input")):
            raise Miss(f"unsupported_logits: add with alpha={alpha}")
        if self._sums_away(logits, other, index):
            return logits
        self._not_broadcast(node, main)
        return replace(logits, terms=(*logits.terms, self._added(other, index, alpha)))

    def _back_sub(self, node: fx.Node, call: Call, index: Index) -> _Logits | None:
        logits = self._logits(call.get("input"), self._inner(call.get("input"), index))
        other, alpha = call.get("other"), call.get("alpha", 1)
        if logits is None:
            if isinstance(other, fx.Node) and _reaches_back(other, _REACH):
                raise Miss("unsupported_logits: subtracted from something")
            return None
        if self._sums_away(logits, other, index):
            return logits
        self._not_broadcast(node, call["input"])
        if not isinstance(alpha, (int, float)):
            raise Miss(f"unsupported_logits: sub with alpha={alpha}")
        return replace(logits, terms=(*logits.terms, self._added(other, index, -alpha)))

    def _sums_away(self, logits: _Logits, other: Any, index: Index) -> bool:
        """Whether adding it to the logits changes no softmax: it is one number for all keys of a query (a row's
        maximum, say) and for a learned sink. Only what is a maximum: any other tensor might be infinite."""
        if self.joint is not None and logits is not self._at_joint:
            return False
        if not isinstance(other, fx.Node):
            # A large number would round the logits away.
            return isinstance(other, (int, float)) and abs(other) <= _ROUNDS_NOTHING
        call = call_of(other)
        while call.name in ("getitem", "getattr", "detach", "same") and isinstance(call.get("input"), fx.Node):
            if call.get("index", 0) != 0 or call.get("name", "values") != "values":
                return False
            call = call_of(call["input"])
        if not isinstance(call.get("input"), fx.Node) or not _reaches_back(call["input"], _REACH):
            return False  # of something else, which may round the logits away
        dim = call_of(self.softmax).get("dim")
        key_axis = self.index[dim] if isinstance(dim, int) else ZERO
        at = sympy.Tuple(*self._inner(other, index))
        named = call.name in ("amax", "max")
        return named and isinstance(key_axis, sympy.Symbol) and not at.has(key_axis)

    @staticmethod
    def _not_broadcast(node: fx.Node, main: Any) -> None:
        a, b = value_of(node).shape, value_of(main).shape
        if len(a) != len(b) or not all(known_equal(x, y) for x, y in zip(a, b, strict=True)):
            raise Miss("unsupported_logits: the logits are broadcast against a larger tensor")

    def _back_mul(self, node: fx.Node, call: Call, index: Index) -> _Logits | None:
        logits, other = self._either(call, index)
        if logits is None:
            return None
        if isinstance(other, fx.Node) and _reaches_back(other, 3) and is_float(value_of(other)):
            raise Miss("unsupported_logits: a product of logits with logits")
        return self._times(logits, other, index, inverse=False)

    def _back_div(self, node: fx.Node, call: Call, index: Index) -> _Logits | None:
        logits = self._logits(call.get("input"), self._inner(call.get("input"), index))
        if logits is None:
            if isinstance(call.get("other"), fx.Node) and _reaches_back(call["other"], _REACH):
                raise Miss("unsupported_logits: the logits divide")
            return None
        if call.get("rounding_mode") is not None:
            raise Miss("unsupported_logits: rounded division")
        return self._times(logits, call["other"], index, inverse=True)

    def _times(self, logits: _Logits, other: Any, index: Index, *, inverse: bool) -> _Logits:
        number = self._number(other, index)
        if number is not None:
            if (number == 0 and inverse) or not math.isfinite(number):
                raise Miss(f"unsupported_logits: scaled by {number}")
            factor = 1 / number if inverse else number
            terms = (*logits.terms, Times(factor)) if logits.terms else ()
            if logits.softcap is not None:
                return replace(logits, softcap=logits.softcap * factor, terms=terms)
            return replace(logits, scale=logits.scale * factor, terms=terms)
        if logits.terms or logits.softcap is not None:
            raise Miss("unsupported_logits: masked logits times a tensor")
        if isinstance(value_of(other), torch.SymFloat) and not inverse:
            return replace(logits, numbers=(*logits.numbers, other))
        if not isinstance(value_of(other), torch.Tensor):
            raise Miss("unsupported_logits: divided by a number of the run time")
        return replace(logits, factors=(*logits.factors, (other, self._inner(other, index), inverse)))

    def _number(self, what: Any, index: Index) -> float | None:
        """The number that ``what`` is everywhere; None if it is a tensor or known at run time only."""
        if isinstance(what, (int, float)):
            return float(what)
        if not isinstance(what, fx.Node):
            return None
        value = value_of(what)
        if not isinstance(value, torch.Tensor):
            found = symbolic(what)
            return float(found) if found.is_number else None
        for rounded in (False, True):
            elements = Elements(self.memory, self.sizes, rounded=rounded)
            try:
                found = sympy.sympify(elements.at(what, self._inner(what, index)))
            except (NotClosedForm, KeyError, TypeError, AttributeError):
                continue
            if rounded and any(value_of(n).dtype not in (torch.float32, torch.float64) for n in elements.seen):
                return None  # of few bits: it is not the number that the arithmetic says
            return float(found) if found.is_number and found.is_real else None
        return None

    def _back_masked_fill(self, node: fx.Node, call: Call, index: Index) -> _Logits | None:
        source = call.get("input")
        logits = self._logits(source, self._inner(source, index))
        if logits is None:
            return None
        self._not_broadcast(node, source)
        return self._filled(logits, call["mask"], True, call["value"], index)

    def _back_where(self, node: fx.Node, call: Call, index: Index) -> _Logits | None:
        if "other" not in call.args:
            return None
        yes, no = call["input"], call["other"]
        logits = self._logits(yes, self._inner(yes, index))
        if logits is not None:
            self._not_broadcast(node, yes)
            return self._filled(logits, call["condition"], False, no, index)
        logits = self._logits(no, self._inner(no, index))
        if logits is None:
            return None
        self._not_broadcast(node, no)
        return self._filled(logits, call["condition"], True, yes, index)

    def _filled(self, logits: _Logits, condition: Any, where: bool, value: Any, index: Index) -> _Logits:
        if not isinstance(condition, fx.Node) or (isinstance(value, fx.Node) and _reaches_back(value, 3)):
            raise Miss("unsupported_logits: a choice between logits")
        fill = Fill(condition, self._inner(condition, index), where, value, self._inner(value, index))
        return replace(logits, terms=(*logits.terms, fill))

    def _back_tanh(self, node: fx.Node, call: Call, index: Index) -> _Logits | None:
        logits = self._logits(call.get("input"), index)
        if logits is None:
            return None
        if logits.terms or logits.softcap is not None:
            raise Miss("unsupported_logits: tanh of masked logits")
        return replace(logits, softcap=1.0)

    def _back_cat(self, node: fx.Node, call: Call, index: Index) -> _Logits | None:
        tensors = call.get("tensors", ())
        if self.joint is not None and node is self.joint.node:
            self._at_joint = self._logits(self.joint.logits, index)
            self._sink = (self.joint.sink, self._inner(self.joint.sink, index))
            self.dtypes.append(value_of(node).dtype)
            return self._at_joint
        tensors = tensors if isinstance(tensors, (list, tuple)) else (tensors,)
        if any(isinstance(n, fx.Node) and _reaches_back(n, _REACH) for n in tensors):
            raise Miss("extra_logits: concatenated, and not one logit of a learned sink after those of the keys")
        return None

    # Forward: where the weights go.

    def _follow(self) -> _Weights | None:
        way = _Weights(self.softmax, self.index)
        for _ in range(_MOST):
            users = [user for user in way.node.users if call_of(user).name not in SHAPE_ONLY and not is_dead(user)]
            goals = [user for user in users if _reaches_forward(way.node, user, _REACH)]
            if not goals:
                return None
            if len(users) > 1:
                other = next((u for u in users if u not in goals[:1]), users[-1])
                raise Miss(f"weights_observed: also by {other.name}", other)
            (user,) = users
            with about(user):
                if self._arrives(way, user):
                    return way
                self._step(way, user, call_of(user))
        raise Miss("weights_changed: too often")

    def _arrives(self, way: _Weights, user: fx.Node) -> bool:
        """Whether ``user`` is the product with the values."""
        if "out" in user.kwargs or "out" in self.softmax.kwargs:
            raise Miss("modified_in_place: out=")
        found = product(user, call_of(user))
        if found is None:
            return False
        if found.left is found.right:
            raise Miss("unproved_axes: the weights meet themselves")
        if way.node is found.added:
            raise Miss("weights_changed: baddbmm adds them")
        if self.joint is not None and not way.without_sink:
            raise Miss("extra_logits: the weight of a learned sink meets the values")
        way.user, way.product = user, found
        return True

    def _step(self, way: _Weights, user: fx.Node, call: Call) -> None:
        if self.memory.stale(way.node):
            raise Miss(f"modified_in_place: {way.node.name}")
        if call.name == "dropout":
            if way.dropout != 0:
                raise Miss("dropout: more than one")
            way.dropout = dropout_of(call)
            if call.spelled == "native_dropout":
                (user,) = (u for u in user.users if call_of(u).get("index") == 0)
        elif call.name in ("to", "same"):
            if not is_float(value_of(user)):
                raise Miss(f"weights_changed: {call.spelled}")
            self.dtypes.append(value_of(user).dtype)
        elif call.name == "detach":
            if value_of(way.node).requires_grad:
                raise Miss("weights_changed: detach")
        elif self._drops_sink(way, user, call):
            way.without_sink = True
        elif not (call.name == "where" and self._empty_rows(way.node, call)):
            try:
                way.index = push(user, call, way.index, self.sizes)
            except NotAView as why:
                raise Miss(f"weights_changed: {why}") from None
        way.node = user

    def _drops_sink(self, way: _Weights, user: fx.Node, call: Call) -> bool:
        """Whether ``user`` is all of the weights but those of the sink, which are the last."""
        if self.joint is None or way.without_sink or call.name not in ("getitem", "slice", "narrow"):
            return False
        old, new = value_of(way.node).shape, value_of(user).shape
        cut = [(a, b) for a, b in zip(old, new, strict=False) if not known_equal(a, b)]
        sizes = [value_of(node).shape[self.joint.axis] for node in (self.joint.node, self.joint.logits)]
        if len(old) != len(new) or len(cut) != 1 or not all(map(known_equal, cut[0], sizes)):
            return False
        try:
            return pull(user, call, way.index, self.sizes)[1] == way.index
        except NotAView:
            return False

    def _empty_rows(self, weights: fx.Node, call: Call) -> bool:
        """ATen's ``_safe_softmax``, written out: 0 where every logit of the row is -inf."""
        yes, no, condition = call["input"], call["other"], call["condition"]
        if no is not weights or self._number(yes, self.index) != 0 or not isinstance(condition, fx.Node):
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

    # Together: which axis is what.

    def _attention(self, logits: _Logits, weights: _Weights, key_axis: Any) -> Attention:
        if weights.product is None or weights.user is None:
            raise Miss("weights_changed: no product follows")
        if any(not isinstance(c, sympy.Symbol) for c in (key_axis,)) and key_axis != 0:
            raise Miss("unproved_axes: the key axis is cut")
        k = None if key_axis == 0 else key_axis
        d, e = coordinate("d"), coordinate("e")
        self.cut([*logits.index, *weights.index, *(x for t in logits.terms for x in getattr(t, "index", ()))])
        with about(logits.node):
            first, second = self._sides(logits.product, logits.index, d)
        # The operand that has the key axis is the key; with one key, the right one.
        query, key = (second, first) if k is not None and sympy.Tuple(*first[1]).has(k) else (first, second)
        if k is not None and sympy.Tuple(*query[1]).has(k):
            raise Miss("wrong_axis: query and key share the axis of the softmax", query[0])
        if k is not None and not sympy.Tuple(*key[1]).has(k):
            raise Miss("wrong_axis: the key has no axis that the softmax runs over", key[0])
        with about(weights.user):
            value, out = self._value(weights, k, e)
        of_softmax = [query, key, *([self._sink] if self._sink else [])]
        for (node, _), made in (*((placed, self.softmax) for placed in of_softmax), (value, weights.user)):
            if gradient_stops(node, made):
                raise Miss("unsupported_logits: without a gradient that its operands want", node)
        dtype = value_of(weights.user).dtype
        rounded = [t for t in self.dtypes if torch.finfo(t).eps > torch.finfo(dtype).eps]
        if rounded:
            raise Miss(f"unsupported_logits: rounded to {rounded[0]}")
        query, key = ((self._uncast(node, dtype), at) for node, at in (query, key))
        finer = [n for n, _ in (query, key) if torch.finfo(value_of(n).dtype).eps < torch.finfo(dtype).eps]
        if finer and torch.finfo(value_of(logits.node).dtype).eps < torch.finfo(dtype).eps:
            raise Miss(f"unsupported_logits: of more bits than the output, {value_of(finer[0]).dtype}", finer[0])
        query_at = self.whole(query[0], query[1], "query")
        key_at, value_at = self.unrepeated(*key, "key", (k, d)), self.unrepeated(*value, "value", (k, e))
        result = operand(weights.user, out, value_of(weights.user).shape, self.sizes)
        if result is None:
            raise Miss("unproved_axes: of the output", weights.user)
        sink_at = self.whole(*self._sink, "learned sink") if self._sink else None
        roles = self.roles(query_at, key_at, value_at, k)
        of_sink = [sink_at.node] if sink_at else []
        read = (query_at.node, key_at.node, value_at.node, *of_sink, *(node for node, _, _ in logits.factors))
        for node in read:
            if self.memory.changes(node, weights.user) or self.memory.stale(node):
                raise Miss(f"modified_in_place: {node.name}", node)
        if weights.product.added is not None or weights.product.alpha != 1:
            raise Miss("weights_changed: baddbmm adds something to the output", weights.user)
        scale = logits.scale if logits.softcap is None else logits.scale * logits.softcap
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
            d=d if d in self.sizes else None,
            e=e if e in self.sizes else None,
            sizes=dict(self.sizes),
            scale=self._scale(scale, logits.numbers),
            factors=self._factors(logits, k),
            terms=logits.terms,
            softcap=logits.softcap,
            sink_logit=sink_at,
            dropout=weights.dropout,
        )

    def _uncast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """What a cast to more bits is made from, where that has the dtype of the output."""
        call = call_of(node)
        source = call.get("input") if call.name == "to" else None
        if not isinstance(source, fx.Node) or value_of(source).dtype != dtype or self.memory.stale(node):
            return node
        return source if torch.finfo(dtype).eps > torch.finfo(value_of(node).dtype).eps else node

    @staticmethod
    def _scale(scale: float, numbers: tuple[fx.Node, ...]) -> Any:
        if not numbers:
            return scale
        if len(numbers) > 1 or scale != 1:
            raise Miss("unsupported_logits: scaled by several numbers of the run time", numbers[-1])
        return numbers[0]

    def _factors(self, logits: _Logits, k: Any) -> tuple[Factor, ...]:
        found: list[Factor] = []
        for node, index, inverse in logits.factors:
            at = operand(node, index, value_of(node).shape, self.sizes)
            if at is None or (k is not None and k in at.coordinates) or any(len(axis) > 1 for axis in at.axes):
                raise Miss("unsupported_logits: scaled by a tensor with a key axis", node)
            found.append(Factor(at, inverse))
        return tuple(found)

    def _sides(self, found: Product, index: Index, summed: sympy.Symbol) -> tuple[_Placed, _Placed]:
        """Both operands of a product with their indices, given that of its output."""
        if len(found.summed) != 1:
            raise Miss(f"unproved_axes: a product over {len(found.summed)} axes")
        at: dict[int, Any] = {label: x for label, x in zip(found.out_labels, index, strict=True) if label is not None}
        (label,) = found.summed
        if label not in found.left_labels or label not in found.right_labels:
            raise Miss("unproved_axes: a product that sums over an axis of one operand")
        at[label] = self.new(summed, self._size_of(found, label))
        left, right = ((node, self._labelled(labels, at)) for node, labels in _operands(found))
        return left, right

    def _size_of(self, found: Product, label: int) -> Any:
        for node, labels in _operands(found):
            if label in labels:
                return value_of(node).shape[labels.index(label)]
        raise AssertionError(label)

    @staticmethod
    def _labelled(labels: Labels, at: dict[int, Any]) -> Index:
        return tuple(ZERO if label is None else at[label] for label in labels)

    def _value(self, weights: _Weights, k: Any, e: sympy.Symbol) -> tuple[_Placed, Index]:
        """The value operand with its index, and the index of the output."""
        found = weights.product
        assert found is not None
        if len(found.summed) != 1:
            raise Miss(f"unproved_axes: a product over {len(found.summed)} axes")
        side = 0 if found.left is weights.node else 1
        (_, own), (node, others) = _operands(found) if side == 0 else reversed(_operands(found))
        at = {label: x for label, x in zip(own, weights.index, strict=True) if label is not None}
        (label,) = found.summed
        if label not in at or (at[label] != k if k is not None else at[label] != 0):
            raise Miss("wrong_axis: the product with the values does not sum over the axis of the softmax")
        if label not in others:
            raise Miss("unproved_axes: a product that sums over an axis of one operand")
        free = [label for label in others if label is not None and label not in at]
        if len(free) > 1:
            raise Miss("unproved_axes: the value has several axes of its own")
        for label in free:
            at[label] = self.new(e, value_of(node).shape[others.index(label)])
        missing = [label for label in found.out_labels if label not in at and label is not None]
        if missing:
            raise Miss("unproved_axes: of the output")
        return (node, self._labelled(others, at)), self._labelled(found.out_labels, at)


def _joint(softmax: fx.Node) -> _Joint | None:
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
    if not whole or not _reaches_back(logits, _REACH) or not is_one(value_of(sink).shape[axis]):
        return None
    return _Joint(node, logits, sink, axis % rank)


def _is_fresh(out: Any) -> bool:
    """Whether nothing but one writer knows this buffer."""
    return isinstance(out, fx.Node) and len(out.users) == 1 and call_of(out).name in _BUFFERS


def _operands(found: Product) -> list[tuple[fx.Node, Labels]]:
    return [(found.left, found.left_labels), (found.right, found.right_labels)]


def _reaches_back(node: Any, steps: int) -> bool:
    """Whether a product lies behind ``node``, through operators that keep a tensor of logits one."""
    todo, seen = [(node, steps)], set()
    while todo:
        at, left = todo.pop()
        if not isinstance(at, fx.Node) or at in seen or not is_float(value_of(at)):
            continue
        seen.add(at)
        call = call_of(at)
        if product(at, call) is not None:
            return True
        if call.name in _ENDS or not left or len(seen) > _MOST:
            continue
        cost = 0 if call.name in _FREE else 1
        todo += [(source, left - cost) for source in at.all_input_nodes]
    return False


def _reaches_forward(weights: fx.Node, node: fx.Node, steps: int) -> bool:
    """Whether what ``node`` makes of the weights becomes the operand of a product."""
    todo = [(weights, node, steps)]
    seen: set[fx.Node] = set()
    while todo:
        source, at, left = todo.pop()
        call = call_of(at)
        found = product(at, call)
        if found is not None:
            if source in (found.left, found.right):
                return True
            continue
        value = value_of(at)
        tuple_of = isinstance(value, (tuple, list)) and call.spelled.strip("_") in _TUPLES
        if call.name in _ENDS or at in seen or not left or not (is_float(value) or tuple_of):
            continue
        seen.add(at)
        cost = 0 if call.name in _FREE else 1
        if len(seen) < _MOST:
            todo += [(at, user, left - cost) for user in at.users]
    return False
