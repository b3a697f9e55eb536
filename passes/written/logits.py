"""What the logits of a softmax are: each operator on the way back is understood, or ends the match."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from ..axes import Miss, Prover, about
from ..calls import Call, call_of, dropout_of, is_float
from ..compat import known_equal, settled, symbolic, value_of
from ..contract import Product, product
from ..elements import Elements, NotClosedForm
from ..indices import ZERO, Index, NotAView, broadcast, pull
from ..site import Add, Fill, Term, Times
from .joint import Joint
from .near import REACH, VIEWS, reaches_back

_ROUNDS_NOTHING = 1e4
_BUFFERS = {"empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros"}
Placed = tuple[fx.Node, Index]


@dataclass(frozen=True)
class Origin:
    """Logits as made from one product: ``node[index]`` is the dot product.

    ``numbers`` of the run time scale them, too; with True: by their inverse.
    """

    node: fx.Node
    product: Product
    index: Index
    scale: float = 1.0
    numbers: tuple[tuple[fx.Node, bool], ...] = ()
    factors: tuple[tuple[fx.Node, Index, bool], ...] = ()
    terms: tuple[Term, ...] = ()
    softcap: float | None = None


class Backward:
    """From a softmax back to the product that its logits are made from.

    Attributes:
        dtypes: what the logits were on the way.
        sink: the learned sink that joined them, and which of its elements; None: none did.
        at_joint: the logits there.
    """

    def __init__(self, softmax: fx.Node, joint: Joint | None, prover: Prover) -> None:
        self.softmax, self.joint, self.prover = softmax, joint, prover
        self.dtypes: list[torch.dtype] = []
        self.sink: Placed | None = None
        self.at_joint: Origin | None = None
        self._not_logits: set[tuple[fx.Node, Index]] = set()

    def run(self) -> Origin | None:
        """What the logits are made from; None: not from a product, or in a way that is not followed."""
        return self._logits(call_of(self.softmax)["input"], self.prover.index)

    def _logits(self, node: Any, index: Index) -> Origin | None:
        if not isinstance(node, fx.Node) or not is_float(value_of(node)) or (node, index) in self._not_logits:
            return None
        with about(node):
            found = self._made(node, index)
        if found is None:  # what is used twice a step would double the work with each
            self._not_logits.add((node, index))
        return found

    def _made(self, node: fx.Node, index: Index) -> Origin | None:
        call = call_of(node)
        sums = call.name in ("add", "sub", "rsub")  # add(x, 0.5, y): an old way to write alpha
        unread = [key for key in call.args if sums and key.startswith("argument ")]
        if "out" in call.args and not _is_fresh(call.args["out"]):
            unread.append("out")  # into what may be read elsewhere
        if unread and reaches_back(node, REACH):
            raise Miss(f"unsupported_logits: {call.spelled} with {', '.join(unread)}")
        found = product(node, call)
        if found is not None:
            self.dtypes.append(value_of(node).dtype)
            if self.prover.memory.stale(node):
                raise Miss(f"modified_in_place: {node.name}")
            terms = () if found.added is None else (self._added(found.added, index, found.beta),)
            return self._scaled(Origin(node, found, index), found.alpha, terms)
        step = getattr(self, f"_back_{call.name}", None)
        if step is None and call.name in VIEWS:
            step = self._back_view
        logits: Origin | None = step(node, call, index) if step else None
        if logits is not None and self.prover.memory.stale(node):
            raise Miss(f"modified_in_place: {node.name}")
        if step is None and reaches_back(node, REACH):
            raise Miss(f"unsupported_logits: {call.spelled}")
        return logits

    def _scaled(self, logits: Origin, alpha: Any, terms: tuple[Term, ...]) -> Origin:
        number = number_of(alpha, (), self.prover)
        if number is None:
            raise Miss(f"unsupported_logits: alpha={alpha}")
        return replace(logits, scale=number, terms=terms)

    def _added(self, node: Any, index: Index, factor: Any) -> Add:
        number = number_of(factor, (), self.prover)
        if number is None:
            raise Miss(f"unsupported_logits: something times {factor} is added")
        return Add(node, inner(node, index), number)

    def _back_same(self, node: fx.Node, call: Call, index: Index) -> Origin | None:
        return self._logits(call.get("input"), index)

    def _back_detach(self, node: fx.Node, call: Call, index: Index) -> Origin | None:
        logits = self._logits(call.get("input"), index)
        if logits is not None and value_of(call["input"]).requires_grad:
            raise Miss("unsupported_logits: detach")
        return logits

    def _back_to(self, node: fx.Node, call: Call, index: Index) -> Origin | None:
        logits = self._logits(call.get("input"), index)
        self.dtypes.append(value_of(node).dtype)
        return logits

    def _back_dropout(self, node: fx.Node, call: Call, index: Index) -> Origin | None:
        logits = self._logits(call.get("input"), index)
        if logits is not None and dropout_of(call) != 0:
            raise Miss("dropout: on the logits")
        return logits

    def _back_view(self, node: fx.Node, call: Call, index: Index) -> Origin | None:
        try:
            source, moved = pull(node, call, index, self.prover.sizes)
        except NotAView as why:
            if reaches_back(node, REACH):
                raise Miss(f"unsupported_logits: {why}") from None
            return None
        return self._logits(source, moved)

    def _either(self, call: Call, index: Index) -> tuple[Origin | None, Any]:
        """Which of two operands is made from the product, and the other one."""
        a, b = call.get("input"), call.get("other")
        first = self._logits(a, inner(a, index))
        if first is not None:
            return first, b
        return self._logits(b, inner(b, index)), a

    def _back_add(self, node: fx.Node, call: Call, index: Index) -> Origin | None:
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

    def _back_sub(self, node: fx.Node, call: Call, index: Index) -> Origin | None:
        logits = self._logits(call.get("input"), inner(call.get("input"), index))
        other, alpha = call.get("other"), call.get("alpha", 1)
        if logits is None:
            if isinstance(other, fx.Node) and reaches_back(other, REACH):
                raise Miss("unsupported_logits: subtracted from something")
            return None
        if self._sums_away(logits, other, index):
            return logits
        self._not_broadcast(node, call["input"])
        if not isinstance(alpha, (int, float)):
            raise Miss(f"unsupported_logits: sub with alpha={alpha}")
        return replace(logits, terms=(*logits.terms, self._added(other, index, -alpha)))

    def _sums_away(self, logits: Origin, other: Any, index: Index) -> bool:
        """Whether adding it to the logits changes no softmax: it is one number for all keys of a query (a row's
        maximum, say) and for a learned sink. Only what is a maximum: any other tensor might be infinite."""
        if self.joint is not None and logits is not self.at_joint:
            return False
        if not isinstance(other, fx.Node):
            # A large number would round the logits away.
            return isinstance(other, (int, float)) and abs(other) <= _ROUNDS_NOTHING
        call = call_of(other)
        while call.name in ("getitem", "getattr", "detach", "same") and isinstance(call.get("input"), fx.Node):
            if call.get("index", 0) != 0 or call.get("name", "values") != "values":
                return False
            call = call_of(call["input"])
        if not isinstance(call.get("input"), fx.Node) or not reaches_back(call["input"], REACH):
            return False  # of something else, which may round the logits away
        dim = call_of(self.softmax).get("dim")
        key_axis = self.prover.index[dim] if isinstance(dim, int) else ZERO
        at = sympy.Tuple(*inner(other, index))
        named = call.name in ("amax", "max")
        return named and isinstance(key_axis, sympy.Symbol) and not at.has(key_axis)

    @staticmethod
    def _not_broadcast(node: fx.Node, main: Any) -> None:
        a, b = value_of(node).shape, value_of(main).shape
        if len(a) != len(b) or not all(known_equal(x, y) for x, y in zip(a, b, strict=True)):
            raise Miss("unsupported_logits: the logits are broadcast against a larger tensor")

    def _back_mul(self, node: fx.Node, call: Call, index: Index) -> Origin | None:
        logits, other = self._either(call, index)
        if logits is None:
            return None
        if isinstance(other, fx.Node) and reaches_back(other, 3) and is_float(value_of(other)):
            raise Miss("unsupported_logits: a product of logits with logits")
        return self._times(logits, other, index, inverse=False)

    def _back_div(self, node: fx.Node, call: Call, index: Index) -> Origin | None:
        logits = self._logits(call.get("input"), inner(call.get("input"), index))
        if logits is None:
            if isinstance(call.get("other"), fx.Node) and reaches_back(call["other"], REACH):
                raise Miss("unsupported_logits: the logits divide")
            return None
        if call.get("rounding_mode") is not None:
            raise Miss("unsupported_logits: rounded division")
        return self._times(logits, call["other"], index, inverse=True)

    def _times(self, logits: Origin, other: Any, index: Index, *, inverse: bool) -> Origin:
        number = number_of(other, index, self.prover)
        of_run_time = isinstance(value_of(other), torch.SymFloat) if number is None else False
        if of_run_time and logits.softcap is not None and not logits.terms:
            number = settled(value_of(other))
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
        if of_run_time:
            return replace(logits, numbers=(*logits.numbers, (other, inverse)))
        if not isinstance(value_of(other), torch.Tensor):
            raise Miss("unsupported_logits: divided by a size of the run time")
        return replace(logits, factors=(*logits.factors, (other, inner(other, index), inverse)))

    def _back_masked_fill(self, node: fx.Node, call: Call, index: Index) -> Origin | None:
        source = call.get("input")
        logits = self._logits(source, inner(source, index))
        if logits is None:
            return None
        self._not_broadcast(node, source)
        return self._filled(logits, call["mask"], True, call["value"], index)

    def _back_where(self, node: fx.Node, call: Call, index: Index) -> Origin | None:
        if "other" not in call.args:
            return None
        yes, no = call["input"], call["other"]
        logits = self._logits(yes, inner(yes, index))
        if logits is not None:
            self._not_broadcast(node, yes)
            return self._filled(logits, call["condition"], False, no, index)
        logits = self._logits(no, inner(no, index))
        if logits is None:
            return None
        self._not_broadcast(node, no)
        return self._filled(logits, call["condition"], True, yes, index)

    def _filled(self, logits: Origin, condition: Any, where: bool, value: Any, index: Index) -> Origin:
        if not isinstance(condition, fx.Node) or (isinstance(value, fx.Node) and reaches_back(value, 3)):
            raise Miss("unsupported_logits: a choice between logits")
        fill = Fill(condition, inner(condition, index), where, value, inner(value, index))
        return replace(logits, terms=(*logits.terms, fill))

    def _back_tanh(self, node: fx.Node, call: Call, index: Index) -> Origin | None:
        logits = self._logits(call.get("input"), index)
        if logits is None:
            return None
        if logits.terms or logits.softcap is not None:
            raise Miss("unsupported_logits: tanh of masked logits")
        scale = logits.scale
        for number, inverse in logits.numbers:  # a softcap is part of what is compiled
            value = settled(value_of(number))
            if not value:
                raise Miss("unsupported_logits: a softcap that is known at run time only")
            scale *= 1 / value if inverse else value
        return replace(logits, scale=scale, numbers=(), softcap=1.0)

    def _back_cat(self, node: fx.Node, call: Call, index: Index) -> Origin | None:
        tensors = call.get("tensors", ())
        if self.joint is not None and node is self.joint.node:
            self.at_joint = self._logits(self.joint.logits, index)
            self.sink = (self.joint.sink, inner(self.joint.sink, index))
            self.dtypes.append(value_of(node).dtype)
            return self.at_joint
        tensors = tensors if isinstance(tensors, (list, tuple)) else (tensors,)
        if any(isinstance(n, fx.Node) and reaches_back(n, REACH) for n in tensors):
            raise Miss("extra_logits: concatenated, and not one logit of a learned sink after those of the keys")
        return None


def number_of(what: Any, index: Index, prover: Prover) -> float | None:
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
        elements = Elements(prover.memory, prover.sizes, rounded=rounded)
        try:
            found = sympy.sympify(elements.at(what, inner(what, index)))
        except (NotClosedForm, KeyError, TypeError, AttributeError):
            continue
        if rounded and any(value_of(n).dtype not in (torch.float32, torch.float64) for n in elements.seen):
            return None  # of few bits: it is not the number that the arithmetic says
        return float(found) if found.is_number and found.is_real else None
    return None


def inner(node: Any, index: Index) -> Index:
    """The elements of an operand that ``index`` of the result is made from."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return broadcast(value.shape, index) if isinstance(value, torch.Tensor) else ()


def _is_fresh(out: Any) -> bool:
    """Whether nothing but one writer knows this buffer."""
    return isinstance(out, fx.Node) and len(out.users) == 1 and call_of(out).name in _BUFFERS
