"""Symbolic evaluation: what one element of a node's tensor is, as a sympy expression.

``Elements.at(node, index)`` pulls an expression through the node's producers: views move the
index, elementwise operators combine, ``arange`` becomes its index, and a tensor that only the run
time knows becomes ``Load(node)(index)``. Nothing is executed and no tensor is built.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch import fx

from .calls import Call, call_of
from .compat import OUTSIDE, symbolic, value_of
from .constants import closed_form, constant_of
from .exactness import holds
from .extent import MOST, TOO_LARGE, Extents
from .indices import ZERO, Index, NotAView, Sizes, broadcast, full_key, is_one, pull
from .memory import Memory
from .outside import told_apart

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "rsub": lambda a, b: b - a,
    "mul": operator.mul,
    "neg": operator.neg,
    "abs": sympy.Abs,
    "maximum": sympy.Max,
    "minimum": sympy.Min,
}
# Exact for integers, rounded for floats.
_INTEGER: dict[str, Callable[..., Any]] = {
    "floordiv": lambda a, b: sympy.floor(a / b),
    "remainder": sympy.Mod,
}
# Rounded always: good for printing only.
_ROUNDED: dict[str, Callable[..., Any]] = {
    "div": operator.truediv,
    "rdiv": lambda a, b: b / a,
    "pow": operator.pow,
    "rpow": lambda a, b: b**a,
    "exp": sympy.exp,
    "exp2": lambda a: 2**a,
    "log": sympy.log,
    "sqrt": sympy.sqrt,
}
_COMPARE: dict[str, Any] = {
    "eq": sympy.Eq,
    "ne": sympy.Ne,
    "lt": sympy.Lt,
    "le": sympy.Le,
    "gt": sympy.Gt,
    "ge": sympy.Ge,
}
_LOGIC: dict[str, Any] = {"and": sympy.And, "or": sympy.Or, "xor": sympy.Xor, "not": sympy.Not}
_BOOL_ARITHMETIC = {"mul": "and", "add": "or"}
_HALVES = (torch.bfloat16, torch.float16)
_TOO_LARGE = "numbers that may be too large, or between those that are held, for"
_WIDE = (torch.int64, torch.int32, torch.uint64, torch.uint32)
_HOLDS_INDICES = (torch.int64, torch.int32, torch.float64, torch.float32)
# Arguments by name that rules read, or that change no element.
_READ = {
    *("input", "other", "condition", "mask", "value", "start", "end", "step", "fill_value", "size", "diagonal", "dim"),
    *("prepend", "dtype", "index", "dims", "dim0", "dim1", "repeats", "length", "s", "source", "destination", "n"),
    *("min", "max", "output_size"),
}
_HARMLESS = {"device", "layout", "pin_memory", "requires_grad", "memory_format", "non_blocking", "copy", "implicit"}


class NotClosedForm(Exception):
    """A node whose elements have no closed form in the indices."""


def load(node: fx.Node, index: Index) -> sympy.Expr:
    """The run-time element ``node[index]``, with only those assumptions that its dtype gives."""
    dtype = value_of(node).dtype
    if dtype == torch.bool:
        return sympy.Function(node.name, integer=True, nonnegative=True)(*index)
    if dtype.is_floating_point:
        return sympy.Function(node.name, extended_real=True)(*index)
    return sympy.Function(node.name, integer=True)(*index)


class Elements:
    """Evaluates elements of one graph's tensors and remembers which nodes it looked through.

    Args:
        memory: of the graph. sizes: how many values each coordinate of an index takes.
        rounded: follow arithmetic that rounds, too: the result is for a reader's eyes only.
        near: follow float32 arithmetic that rounds, too, but for what becomes a truth: the result is good for
            biases, which rounding does not change by more than itself.
    """

    def __init__(self, memory: Memory, sizes: Sizes, *, rounded: bool = False, near: bool = False) -> None:
        self.memory = memory
        self.sizes = sizes
        self.rounded = rounded
        self.seen: dict[fx.Node, None] = {}
        self.loads: dict[str, fx.Node] = {}
        self._known: dict[tuple[fx.Node, Index], Any] = {}
        self._extents = Extents()
        self._exact: Elements | None = None
        if near:
            self._exact = Elements(memory, sizes)
            self._exact.seen, self._exact.loads = self.seen, self.loads

    def at(self, node: Any, index: Index) -> Any:
        """The element of ``node`` at ``index`` (one expression an axis); a number stands for itself."""
        if not isinstance(node, fx.Node):
            if isinstance(node, (bool, int, float)):
                return sympy.sympify(node)
            raise NotClosedForm(f"constant {node!r}")
        if (node, index) not in self._known:  # what is used twice a step would double the work with each
            found = self._at(node, index)
            if self.too_large(found):
                raise NotClosedForm(f"{node.name}: {TOO_LARGE}")
            self._known[node, index] = found
        return self._known[node, index]

    def too_large(self, *exprs: Any) -> bool:
        """Whether these have more than ``MOST`` operations together, so that algebra on them may not end."""
        return sum(map(self._extents.of, exprs)) > MOST

    def _at(self, node: fx.Node, index: Index) -> Any:
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            return symbolic(node)
        if self._exact is not None and value.dtype == torch.bool:
            return self._exact.at(node, index)
        if self.memory.stale(node):
            raise NotClosedForm(f"{node.name} is modified in place")
        self.seen[node] = None
        call = call_of(node)
        counts = call.name in (*_ARITHMETIC, *_INTEGER, "arange", "cumsum", "diff")
        as_logic = value.dtype == torch.bool and call.name in _BOOL_ARITHMETIC
        if counts and not as_logic and value.dtype in _HALVES and call.name in _ARITHMETIC and not self.rounded:
            return self._rounded(node, call, value.dtype, index)
        if counts and not as_logic and value.dtype not in _HOLDS_INDICES:
            self._inexact(f"{node.name}: arithmetic that rounds or wraps around, in {value.dtype}")
        unread = {key for key, got in call.args.items() if got is not None} - _READ - _HARMLESS
        if call.get("alpha", 1) == 1:
            unread -= {"alpha"}
        if call.name == "div" and call.get("rounding_mode") == "floor":
            call, unread = Call("floordiv", call.args, call.spelled), unread - {"rounding_mode"}
        if call.name in ("placeholder", "get_attr"):
            constant = constant_of(node)
            found = None if constant is None else closed_form(constant, index)
            if OUTSIDE in node.meta:
                return self._outside(node, index)
            return self._load(node, index) if found is None else found
        rule = getattr(self, f"_{call.name}", None)
        known = rule or call.name in _ALL_NAMES
        if known and (unread or ("dtype" in call.args and call.name == "cumsum")):
            raise NotClosedForm(f"{node.name}: argument {', '.join(sorted(unread) or ['dtype'])}")
        if rule is not None:
            return rule(node, call, index)
        try:
            source, moved = pull(node, call, index, self.sizes)
        except NotAView as why:
            if known and call.name in _VIEW_NAMES:
                raise NotClosedForm(f"{node.name}: {why}") from None
        else:
            return self._converted(node, source, moved)
        return self._combined(node, call, value, index)

    def _combined(self, node: fx.Node, call: Call, value: torch.Tensor, index: Index) -> Any:
        name = call.name
        if value.dtype == torch.bool:
            name = _BOOL_ARITHMETIC.get(name, name)
        if name in _ARITHMETIC and value.dtype != torch.bool:
            parts = [sympy.sympify(_number(x)) for x in self._finite(node, call, index)]
            if value.dtype == torch.int32 and any(part.atoms(AppliedUndef) for part in parts):
                self._inexact(f"{node.name}: {_TOO_LARGE} {value.dtype}")
            return self._held(node, _ARITHMETIC[name](*parts))
        if name in _INTEGER:
            if value.dtype.is_floating_point:
                self._inexact(f"{node.name}: {call.spelled} of floats")
            return _INTEGER[name](*(_number(x) for x in self._finite(node, call, index)))
        near = self._exact is not None and value.dtype in (torch.float32, torch.float64)
        if name in _ROUNDED and (self.rounded or near):
            return _ROUNDED[name](*(_number(x) for x in self._finite(node, call, index)))
        if name in _COMPARE:
            return self._compared(node, call, index)
        if name in _LOGIC and value.dtype == torch.bool:
            return _LOGIC[name](*(_truth(x) for x in self._operands(call, index)))
        return self._load(node, index)

    def _held(self, node: fx.Node, found: Any, dtype: torch.dtype | None = None) -> Any:
        """``found``, which the node, or ``dtype``, holds; what rounds is good enough for a bias."""
        dtype = dtype or value_of(node).dtype
        near = self._exact is not None and dtype.is_floating_point
        if not near and not holds(found, dtype, self.sizes):
            self._inexact(f"{node.name}: {_TOO_LARGE} {dtype}")
        return found

    def _compared(self, node: fx.Node, call: Call, index: Index) -> Any:
        parts = [_number(x) for x in self._finite(node, call, index)]
        values = [value_of(x) for x in call.args.values() if isinstance(x, fx.Node)]
        tensors = [x.dtype for x in values if isinstance(x, torch.Tensor)]
        dtype = functools.reduce(torch.promote_types, tensors) if tensors else None
        if dtype is not None and dtype.is_floating_point:
            # An integer that only the run time knows is rounded: on the same side of any index, not of another one.
            read = {atom for part in parts for atom in sympy.sympify(part).atoms(AppliedUndef)}
            if sum(value_of(self.loads[atom.func.__name__]).dtype in _WIDE for atom in read) > 1:
                self._inexact(f"{node.name}: integers of the run time, compared as {dtype}")
            parts = [self._held(node, part, dtype) for part in parts]
        return _compare(_COMPARE[call.name], *parts)

    def _rounded(self, node: fx.Node, call: Call, dtype: torch.dtype, index: Index) -> Any:
        """Arithmetic of few bits on numbers (a mask made of 0, 1 and the lowest), rounded as it rounds."""
        found = _ARITHMETIC[call.name](*(_number(x) for x in self._finite(node, call, index)))
        folded = sympy.piecewise_fold(found)
        known = _rounded_numbers(folded, dtype) if call.get("alpha", 1) == 1 else None
        if known is None:
            raise NotClosedForm(f"{node.name}: arithmetic that rounds, in {dtype}")
        return known

    def _load(self, node: fx.Node, index: Index) -> Any:
        self.seen.pop(node, None)
        self.loads[node.name] = node
        found = load(node, index)
        return sympy.Ne(found, 0) if value_of(node).dtype == torch.bool else found

    def _outside(self, node: fx.Node, index: Index) -> Any:
        """The input of a body (of a checkpoint, say), evaluated where the body is called."""
        source = node.meta[OUTSIDE]
        around = Elements(Memory(source.graph), self.sizes, rounded=self.rounded)
        found = around.at(source, index)
        if not around.loads:
            return found
        # What depends on the run time there cannot be read from here, but as an input.
        value = value_of(node)
        parts = told_apart(found, index, value.shape, self.sizes) if value.dtype == torch.bool else None
        return self._load(node, index) if parts is None else sympy.And(parts[0], self._load(node, parts[1]))

    def _inexact(self, why: str) -> None:
        if not self.rounded:
            raise NotClosedForm(why)

    def _finite(self, node: fx.Node, call: Call, index: Index) -> list[Any]:
        """Operands that obey algebra: a float of the run time may be NaN, for which x != x."""
        found = self._operands(call, index)
        floats = {name for name, source in self.loads.items() if value_of(source).dtype.is_floating_point}
        read = {atom.func.__name__ for x in found for atom in sympy.sympify(x).atoms(AppliedUndef)}
        plain_zero_test = call.name in ("ne", "eq") and any(sympy.sympify(x).is_zero for x in found)
        if read & floats and not plain_zero_test and self._exact is None:
            self._inexact(f"{node.name}: arithmetic on floats that only the run time knows")
        return found

    def _operands(self, call: Call, index: Index) -> list[Any]:
        names = ("condition", "input", "mask", "other", "value")
        return [self.at(call[name], self._broadcast(call[name], index)) for name in names if name in call.args]

    @staticmethod
    def _broadcast(node: Any, index: Index) -> Index:
        value = value_of(node) if isinstance(node, fx.Node) else None
        return broadcast(value.shape, index) if isinstance(value, torch.Tensor) else ()

    def _to(self, node: fx.Node, call: Call, index: Index) -> Any:
        return self._converted(node, call["input"], index)

    def _converted(self, node: fx.Node, source: fx.Node, index: Index) -> Any:
        """The element of ``source``, in the dtype of ``node``."""
        old, new = value_of(source).dtype, value_of(node).dtype
        if old.is_floating_point and new.is_floating_point and old != new:
            known = _rounded_numbers(self.at(source, index), new)
            if known is not None:
                return known
        exact = old == new or torch.bool in (old, new) or (not old.is_floating_point and new in _HOLDS_INDICES)
        if not exact and not (old.is_floating_point and new in (torch.float32, torch.float64)):
            self._inexact(f"{node.name}: {old} does not always survive as {new}")
        found = self.at(source, index)
        self._held(node, found)
        if new == torch.int32 and old == torch.int64 and sympy.sympify(found).atoms(AppliedUndef):
            raise NotClosedForm(f"{node.name}: {old} of the run time does not always survive as {new}")
        return _cast(found, new)

    def _arange(self, node: fx.Node, call: Call, index: Index) -> Any:
        # The names of the first two arguments depend on how many there are.
        given: dict[str, Any] = dict(node.kwargs)
        names = ("end",) if len(node.args) == 1 and "end" not in given else ("start", "end", "step")
        given |= dict(zip(names, node.args, strict=False))
        return self._ranged(node, given.get("start", 0), given.get("step", 1), index)

    def _iota(self, node: fx.Node, call: Call, index: Index) -> Any:
        return self._ranged(node, call.get("start", 0), call.get("step", 1), index)

    def _ranged(self, node: fx.Node, first: Any, by: Any, index: Index) -> Any:
        start, step = symbolic(first), symbolic(by)
        if not (start.is_integer and step.is_integer):
            raise NotClosedForm(f"{node.name}: a range that does not run over integers")
        return self._held(node, start + step * index[0])

    def _ones(self, node: fx.Node, call: Call, index: Index) -> Any:
        return _cast(sympy.Integer(1), value_of(node).dtype)

    def _zeros(self, node: fx.Node, call: Call, index: Index) -> Any:
        return _cast(ZERO, value_of(node).dtype)

    _ones_like = _new_ones = _ones
    _zeros_like = _new_zeros = _zeros

    def _full(self, node: fx.Node, call: Call, index: Index) -> Any:
        fill = call.args.get("fill_value", call.args.get("s"))
        found, dtype = self.at(fill, ()), value_of(node).dtype
        if not dtype.is_floating_point and dtype != torch.bool and not found.is_integer:
            raise NotClosedForm(f"{node.name}: {fill} as {dtype}")
        return _made(found, dtype)

    def _tensor(self, node: fx.Node, call: Call, index: Index) -> Any:
        if index or set(call.args) - {"input", "dtype", "device"}:
            raise NotClosedForm(f"{node.name}: a tensor of literals")
        found, dtype = self.at(call["input"], ()), value_of(node).dtype
        if not dtype.is_floating_point and dtype != torch.bool and not _number(found).is_integer:
            raise NotClosedForm(f"{node.name}: {found} as {dtype}")
        return _made(found, dtype)

    _full_like = _new_full = _scalar_tensor = _full

    def _tril(self, node: fx.Node, call: Call, index: Index) -> Any:
        return self._triangle(node, call, index, sympy.Le)

    def _triu(self, node: fx.Node, call: Call, index: Index) -> Any:
        return self._triangle(node, call, index, sympy.Ge)

    def _triangle(self, node: fx.Node, call: Call, index: Index, side: Any) -> Any:
        kept = side(index[-1], index[-2] + symbolic(call.get("diagonal", 0)))
        inside = self.at(call["input"], index)
        if value_of(node).dtype == torch.bool:
            return sympy.And(kept, _truth(inside))
        return sympy.Piecewise((_number(inside), kept), (0, True))

    def _getitem(self, node: fx.Node, call: Call, index: Index) -> Any:
        source, key = call["input"], call["index"]
        if not isinstance(value_of(source), torch.Tensor):
            return self._load(node, index)
        key = full_key(key, len(value_of(source).shape))
        if any(isinstance(k, fx.Node) and isinstance(value_of(k), torch.Tensor) for k in key):
            return self._indexed(node, source, key, index)
        try:
            return self.at(*pull(node, call, index, self.sizes))
        except NotAView as why:
            raise NotClosedForm(f"{node.name}: {why}") from None

    def _index(self, node: fx.Node, call: Call, index: Index) -> Any:
        key = [slice(None) if k is None else k for k in call["index"]]
        return self._indexed(node, call["input"], full_key(key, len(value_of(call["input"]).shape)), index)

    def _indexed(self, node: fx.Node, source: Any, key: Sequence[Any], index: Index) -> Any:
        """``x[i, :, j, ...]``: index tensors, broadcast against each other, on neighbouring axes; others whole."""
        if any(k is None or (isinstance(k, slice) and k != slice(None)) for k in key):
            raise NotClosedForm(f"{node.name}: index tensors beside a slice")
        if any(isinstance(k, bool) or (isinstance(k, fx.Node) and value_of(k).dtype == torch.bool) for k in key):
            raise NotClosedForm(f"{node.name}: indexed by a bool tensor")
        axes = [axis for axis, k in enumerate(key) if not isinstance(k, slice)]
        if axes[-1] - axes[0] >= len(axes):
            raise NotClosedForm(f"{node.name}: index tensors on both sides of a whole axis")
        rank = len(index) - (len(key) - len(axes))  # of the index tensors together
        inside = index[axes[0] : axes[0] + rank]
        places = [self._place(node, key[axis], self._broadcast(key[axis], inside)) for axis in axes]
        return self.at(source, (*index[: axes[0]], *places, *index[axes[0] + rank :]))

    def _place(self, node: fx.Node, which: Any, index: Index) -> Any:
        place = _number(self.at(which, index))
        if not place.is_nonnegative:
            self._inexact(f"{node.name}: an index that may count from the end")
        return place

    def _gather(self, node: fx.Node, call: Call, index: Index) -> Any:
        axis = call["dim"] % len(index)
        # A negative index is an error there.
        place = _number(self.at(call["index"], index))
        return self.at(call["input"], (*index[:axis], place, *index[axis + 1 :]))

    def _where(self, node: fx.Node, call: Call, index: Index) -> Any:
        if "other" not in call.args:
            raise NotClosedForm(f"{node.name}: where without values")
        condition, yes, no = (
            self.at(call[name], self._broadcast(call[name], index)) for name in ("condition", "input", "other")
        )
        return self._chosen(node, condition, yes, no)

    def _masked_fill(self, node: fx.Node, call: Call, index: Index) -> Any:
        source, condition, fill = (
            self.at(call[name], self._broadcast(call[name], index)) for name in ("input", "mask", "value")
        )
        return self._chosen(node, condition, fill, source)

    @staticmethod
    def _chosen(node: fx.Node, condition: Any, yes: Any, no: Any) -> Any:
        dtype = value_of(node).dtype
        if dtype == torch.bool:
            return _choose(condition, yes, no)
        yes, no = _number(yes), _number(no)
        if not dtype.is_floating_point and not (yes.is_integer and no.is_integer):
            raise NotClosedForm(f"{node.name}: a fraction as {dtype}")
        return _choose(condition, yes, no)

    def _clamp(self, node: fx.Node, call: Call, index: Index) -> Any:
        found = _number(self.at(call["input"], index))
        for name, bound in (("min", sympy.Max), ("max", sympy.Min)):
            if call.get(name) is not None:
                found = bound(found, _number(self.at(call[name], self._broadcast(call[name], index))))
        if value_of(node).dtype.is_floating_point:
            self._inexact(f"{node.name}: {call.spelled} of floats")
        return found

    _clamp_min = _clamp_max = _clamp

    def _diff(self, node: fx.Node, call: Call, index: Index) -> Any:
        """``torch.diff(x, prepend=p, dim=-1)`` where ``p`` continues ``x`` to the left."""
        source, prepend = call["input"], call.get("prepend")
        if call.get("dim", -1) not in (-1, len(index) - 1) or prepend is None or call.get("n", 1) != 1:
            raise NotClosedForm(f"{node.name}: only a diff along the last axis with prepend")
        before = index[-1] - 1
        one_left = _number(self.at(source, (*index[:-1], before)))
        edge = _number(self.at(prepend, (*index[:-1], ZERO)))
        at_zero = _number(self.at(source, (*index[:-1], sympy.Integer(-1))))
        if not is_one(value_of(prepend).shape[-1]) or sympy.simplify(at_zero - edge) != 0:
            raise NotClosedForm(f"{node.name}: the prepended element does not continue the tensor")
        return self._held(node, _number(self.at(source, index)) - one_left)

    def _cumsum(self, node: fx.Node, call: Call, index: Index) -> Any:
        axis = call["dim"] % len(index)
        step = sympy.Dummy("step", integer=True, nonnegative=True)
        term = _number(self.at(call["input"], (*index[:axis], step, *index[axis + 1 :])))
        if term.has(step):
            raise NotClosedForm(f"{node.name}: a running sum of something that varies")
        return self._held(node, term * (index[axis] + 1))


_VIEW_NAMES = {
    "view",
    "permute",
    "transpose",
    "movedim",
    "expand",
    "repeat",
    "repeat_interleave",
    "select",
    "slice",
    "narrow",
    "t",
    "T",
    "mT",
    "same",
    "detach",
}
_ALL_NAMES = {*_ARITHMETIC, *_INTEGER, *_ROUNDED, *_COMPARE, *_LOGIC, *_VIEW_NAMES}


def _is_truth(expr: Any) -> bool:
    # Not `Boolean`: every sympy Symbol is one.
    return isinstance(expr, (sympy.logic.boolalg.BooleanAtom, sympy.logic.boolalg.BooleanFunction, Relational))


def _truth(expr: Any) -> Any:
    if _is_truth(expr):
        return expr
    if isinstance(expr, sympy.Piecewise) and all(value.is_number for value, _ in expr.args):
        return sympy.Or(*(where for value, where in _cases(expr) if not value.is_zero))
    return sympy.Ne(expr, 0)


def _rounded_numbers(expr: Any, dtype: torch.dtype) -> Any:
    """Numbers, or a choice between numbers, as ``dtype`` holds them; None for anything else."""

    def rounded(value: Any) -> Any:
        return sympy.sympify(torch.tensor(float(value), dtype=torch.float64).to(dtype).item())

    if isinstance(expr, sympy.Piecewise) and all(
        value.is_number and value.is_real is not None for value, _ in expr.args
    ):
        return sympy.Piecewise(*((rounded(value), condition) for value, condition in expr.args))
    return rounded(expr) if not _is_truth(expr) and expr.is_number else None


def _made(expr: Any, dtype: torch.dtype) -> Any:
    """A number as a tensor of ``dtype`` holds it."""
    known = _rounded_numbers(expr, dtype) if dtype in _HALVES else None
    return _cast(expr, dtype) if known is None else known


def _number(expr: Any) -> Any:
    if not _is_truth(expr):
        return expr
    if expr == sympy.true or expr == sympy.false:
        return sympy.Integer(int(expr == sympy.true))
    return sympy.Piecewise((1, expr), (0, True))


def _choose(condition: Any, yes: Any, no: Any) -> Any:
    """``yes`` where the condition holds, else ``no``: truth values or numbers."""
    condition = _truth(condition)
    if _is_truth(yes) or _is_truth(no):
        return sympy.Or(sympy.And(condition, _truth(yes)), sympy.And(sympy.Not(condition), _truth(no)))
    return sympy.Piecewise((yes, condition), (no, True))


def _compare(relation: Any, a: Any, b: Any) -> Any:
    """``relation(a, b)``; of choices between numbers (a truth value made 0 or 1, say), where it holds."""
    pairs = [(x, y) for x in _cases(a) for y in _cases(b)]
    if len(pairs) == 1 or not all(x.is_number and y.is_number for (x, _), (y, _) in pairs):
        return relation(a, b)
    return sympy.Or(*(sympy.And(here, there, relation(x, y)) for (x, here), (y, there) in pairs))


def _cases(expr: Any) -> list[tuple[Any, Any]]:
    """The values of a choice, each with where it is taken."""
    if not isinstance(expr, sympy.Piecewise):
        return [(expr, sympy.true)]
    found, before = [], sympy.false
    for value, condition in expr.args:
        found.append((value, sympy.And(condition, sympy.Not(before))))
        before = sympy.Or(before, condition)
    return found


def _cast(expr: Any, dtype: torch.dtype) -> Any:
    return _truth(expr) if dtype == torch.bool else _number(expr)
