"""Symbolic evaluation: what one element of a node's tensor is, as a sympy expression.

``Elements.at(node, index)`` pulls an expression through the node's producers: views move the
index, elementwise operators combine, ``arange`` becomes its index, and a tensor that only the run
time knows becomes ``Load(node)(index)``. Nothing is executed and no tensor is built.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from torch import fx

from .compat import symbolic, value_of

Index = tuple[sympy.Expr, ...]

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "rsub": lambda a, b: b - a,
    "mul": operator.mul,
    "neg": operator.neg,
    "floordiv": lambda a, b: sympy.floor(a / b),
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
_SPELLINGS = {
    "__and__": "and",
    "and_": "and",
    "logical_and": "and",
    "bitwise_and": "and",
    "__or__": "or",
    "or_": "or",
    "logical_or": "or",
    "bitwise_or": "or",
    "__xor__": "xor",
    "logical_xor": "xor",
    "bitwise_xor": "xor",
    "__invert__": "not",
    "invert": "not",
    "inv": "not",
    "logical_not": "not",
    "bitwise_not": "not",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "not_equal": "ne",
}
_HOLDS_INDICES = (torch.int64, torch.int32, torch.float64, torch.float32)
_WRITES = {"setitem", "iadd", "isub", "imul", "iand", "ior", "ixor", "itruediv", "ifloordiv", "ipow", "imod"}
# Arguments by name that rules read, or that change no element.
_READ = {"start", "end", "step", "fill_value", "size", "diagonal", "dim", "prepend", "dtype"}
_HARMLESS = {"device", "layout", "pin_memory", "requires_grad", "memory_format", "non_blocking", "copy"}
_SAME = {"contiguous", "clone", "detach", "detach_", "alias", "to", "bool", "int", "long", "float", "type", "type_as"}


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
    """Evaluates elements of one graph's tensors and remembers which nodes it looked through."""

    def __init__(self, modified: frozenset[fx.Node]) -> None:
        self.modified = modified
        self.seen: dict[fx.Node, None] = {}
        self.loads: dict[str, fx.Node] = {}

    def at(self, node: Any, index: Index) -> Any:
        """The element of ``node`` at ``index`` (one expression an axis); a number stands for itself."""
        if not isinstance(node, fx.Node):
            if isinstance(node, (bool, int, float)):
                return sympy.sympify(node)
            raise NotClosedForm(f"constant {node!r}")
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            return symbolic(node)
        if node in self.modified:
            raise NotClosedForm(f"{node.name} is modified in place")
        self.seen[node] = None
        name = _name(node)
        if value.dtype not in _HOLDS_INDICES and name in (*_ARITHMETIC, "arange", "cumsum", "diff"):
            raise NotClosedForm(f"{node.name}: arithmetic that rounds or wraps around, in {value.dtype}")
        unread = set(node.kwargs) - _READ - _HARMLESS
        if unread or ("dtype" in node.kwargs and name == "cumsum"):
            raise NotClosedForm(f"{node.name}: argument {', '.join(sorted(unread) or ['dtype'])}")
        rule = getattr(self, f"_{name}", None)
        if rule is not None:
            return rule(node, index)
        if name in _SAME:
            return self._converted(node, index)
        if name in _ARITHMETIC:
            return _ARITHMETIC[name](*(_number(x) for x in self._finite(node, index)))
        if name in _COMPARE:
            return _compare(_COMPARE[name], *(_number(x) for x in self._finite(node, index)))
        if name in _LOGIC and value.dtype == torch.bool:
            return _LOGIC[name](*(_truth(x) for x in self._operands(node, index)))
        del self.seen[node]
        self.loads[node.name] = node
        found = load(node, index)
        return sympy.Ne(found, 0) if value.dtype == torch.bool else found

    def _finite(self, node: fx.Node, index: Index) -> list[Any]:
        """Operands that obey algebra: a float of the run time may be NaN, for which x != x."""
        found = self._operands(node, index)
        floats = [name for name, source in self.loads.items() if value_of(source).dtype.is_floating_point]
        read = {atom.func.__name__ for x in found for atom in sympy.sympify(x).atoms(sympy.core.function.AppliedUndef)}
        plain_zero_test = _name(node) in ("ne", "eq") and any(sympy.sympify(x).is_zero for x in found)
        if read & set(floats) and not plain_zero_test:
            raise NotClosedForm(f"{node.name}: arithmetic on floats that only the run time knows")
        return found

    def _converted(self, node: fx.Node, index: Index) -> Any:
        source: Any = node.args[0]
        old, new = value_of(source).dtype, value_of(node).dtype
        exact = old == new or torch.bool in (old, new) or (not old.is_floating_point and new in _HOLDS_INDICES)
        if not exact and not (old.is_floating_point and new in (torch.float32, torch.float64)):
            raise NotClosedForm(f"{node.name}: {old} does not always survive as {new}")
        found = self.at(source, index)
        if new == torch.int32 and old == torch.int64 and sympy.sympify(found).atoms(sympy.core.function.AppliedUndef):
            raise NotClosedForm(f"{node.name}: {old} of the run time does not always survive as {new}")
        return _cast(found, new)

    def _operands(self, node: fx.Node, index: Index) -> list[Any]:
        return [self.at(arg, _broadcast(arg, index)) for arg in node.args]

    def _arange(self, node: fx.Node, index: Index) -> Any:
        given: dict[str, Any] = dict(node.kwargs)
        names = ("end",) if len(node.args) == 1 and "end" not in given else ("start", "end", "step")
        given |= dict(zip(names, node.args, strict=False))
        start, step = symbolic(given.get("start", 0)), symbolic(given.get("step", 1))
        if not (start.is_integer and step.is_integer):
            raise NotClosedForm(f"{node.name}: a range that does not run over integers")
        return start + step * index[0]

    def _new_ones(self, node: fx.Node, index: Index) -> Any:
        return _cast(sympy.Integer(1), value_of(node).dtype)

    def _new_zeros(self, node: fx.Node, index: Index) -> Any:
        return _cast(sympy.Integer(0), value_of(node).dtype)

    _ones = _ones_like = _new_ones
    _zeros = _zeros_like = _new_zeros

    def _full(self, node: fx.Node, index: Index) -> Any:
        fill = node.args[1] if len(node.args) > 1 else node.kwargs["fill_value"]
        found, dtype = self.at(fill, ()), value_of(node).dtype
        if not dtype.is_floating_point and dtype != torch.bool and not found.is_integer:
            raise NotClosedForm(f"{node.name}: {fill} as {dtype}")
        return _cast(found, dtype)

    def _tril(self, node: fx.Node, index: Index) -> Any:
        return self._triangle(node, index, sympy.Le)

    def _triu(self, node: fx.Node, index: Index) -> Any:
        return self._triangle(node, index, sympy.Ge)

    def _triangle(self, node: fx.Node, index: Index, side: Any) -> Any:
        diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
        kept = side(index[-1], index[-2] + symbolic(diagonal))
        inside = self.at(node.args[0], index)
        if value_of(node).dtype == torch.bool:
            return sympy.And(kept, _truth(inside))
        return sympy.Piecewise((_number(inside), kept), (0, True))

    def _expand(self, node: fx.Node, index: Index) -> Any:
        return self.at(node.args[0], _broadcast(node.args[0], index))

    _expand_as = _broadcast_to = _expand

    def _unsqueeze(self, node: fx.Node, index: Index) -> Any:
        axis = _axis(node, 1, len(index))
        return self.at(node.args[0], index[:axis] + index[axis + 1 :])

    def _transpose(self, node: fx.Node, index: Index) -> Any:
        moved = list(index)
        a, b = _axis(node, 1, len(index)), _axis(node, 2, len(index))
        moved[a], moved[b] = moved[b], moved[a]
        return self.at(node.args[0], tuple(moved))

    def _view(self, node: fx.Node, index: Index) -> Any:
        """Only views that insert or drop axes of size 1."""
        source: Any = node.args[0]
        if value_of(source).dtype != value_of(node).dtype:
            raise NotClosedForm(f"{node.name}: bits seen as another dtype")
        rest = [(i, s) for i, s in zip(index, value_of(node).shape, strict=True) if not _is_one(s)]
        kept = [s for s in value_of(source).shape if not _is_one(s)]
        if len(kept) != len(rest) or any(symbolic(a) != symbolic(b) for (_, a), b in zip(rest, kept, strict=True)):
            raise NotClosedForm(f"{node.name}: a view that merges or splits axes")
        moved = iter(i for i, _ in rest)
        zero = sympy.Integer(0)
        return self.at(source, tuple(zero if _is_one(s) else next(moved) for s in value_of(source).shape))

    _reshape = _squeeze = _view

    def _getitem(self, node: fx.Node, index: Index) -> Any:
        source: Any = node.args[0]
        key: Any = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        shape = value_of(source).shape
        if Ellipsis in key:
            used = sum(1 for k in key if k is not None and k is not Ellipsis)
            at = key.index(Ellipsis)
            key = key[:at] + (slice(None),) * (len(shape) - used) + key[at + 1 :]
        key = key + (slice(None),) * (len(shape) - sum(1 for k in key if k is not None))
        tensors = [k for k in key if isinstance(k, fx.Node) and isinstance(value_of(k), torch.Tensor)]
        if tensors:
            return self._gather(node, source, key, index)
        moved, out = [], list(index)
        for k, size in zip((k for k in key if k is not None), shape, strict=True):
            while key and key[0] is None:
                out.pop(0)
                key = key[1:]
            key = key[1:]
            if isinstance(k, slice):
                moved.append(_slice_start(k, size) + (k.step or 1) * out.pop(0))
            else:
                place = symbolic(k)
                if place.is_negative is None:
                    raise NotClosedForm(f"{node.name}: an index of unknown sign")
                moved.append(place + symbolic(size) if place.is_negative else place)
        return self.at(source, tuple(moved))

    def _gather(self, node: fx.Node, source: Any, key: Sequence[Any], index: Index) -> Any:
        """``x[i, j, ...]`` with one index tensor for every axis, broadcast against each other."""
        if len(key) != len(value_of(source).shape) or any(k is None or isinstance(k, slice) for k in key):
            raise NotClosedForm(f"{node.name}: index tensors on some axes only")
        if any(value_of(k).dtype == torch.bool for k in key if isinstance(k, fx.Node)):
            raise NotClosedForm(f"{node.name}: indexed by a bool tensor")
        places = tuple(_number(self.at(k, _broadcast(k, index))) for k in key)
        if not all(place.is_nonnegative for place in places):
            raise NotClosedForm(f"{node.name}: an index that may count from the end")
        return self.at(source, places)

    def _where(self, node: fx.Node, index: Index) -> Any:
        condition, yes, no = self._operands(node, index)
        if node.op == "call_method":  # yes.where(condition, no)
            condition, yes = yes, condition
        return _choose(condition, yes, no)

    def _masked_fill(self, node: fx.Node, index: Index) -> Any:
        source, condition, fill = self._operands(node, index)
        return _choose(condition, fill, source)

    def _diff(self, node: fx.Node, index: Index) -> Any:
        """``torch.diff(x, prepend=p, dim=-1)`` where ``p`` continues ``x`` to the left."""
        source, axis = node.args[0], node.kwargs.get("dim", -1)
        prepend: Any = node.kwargs.get("prepend")
        if axis not in (-1, len(index) - 1) or prepend is None or len(node.args) > 1 or "n" in node.kwargs:
            raise NotClosedForm(f"{node.name}: only a diff along the last axis with prepend")
        before = index[-1] - 1
        one_left = _number(self.at(source, (*index[:-1], before)))
        edge = _number(self.at(prepend, (*index[:-1], sympy.Integer(0))))
        at_zero = _number(self.at(source, (*index[:-1], sympy.Integer(-1))))
        if not _is_one(value_of(prepend).shape[-1]) or sympy.simplify(at_zero - edge) != 0:
            raise NotClosedForm(f"{node.name}: the prepended element does not continue the tensor")
        return _number(self.at(source, index)) - one_left

    def _cumsum(self, node: fx.Node, index: Index) -> Any:
        axis = _axis(node, 1, len(index))
        step = sympy.Dummy("step", integer=True, nonnegative=True)
        term = _number(self.at(node.args[0], (*index[:axis], step, *index[axis + 1 :])))
        if term.has(step):
            raise NotClosedForm(f"{node.name}: a running sum of something that varies")
        return term * (index[axis] + 1)


def modified_in_place(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes whose tensor, or one that shares its memory, is written to after it was made.

    Dynamo runs each operator on fake tensors, so a write through whatever alias has raised a
    version counter, and tensors that share memory share a (fake) storage. Operators that write
    without a version are known by their names.
    """
    written: set[int] = set()
    for node in graph.nodes:
        value = value_of(node)
        if isinstance(value, torch.Tensor) and _version(value) > 0:
            written.add(_memory(value))
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        if name in _WRITES or (name.endswith("_") and name not in _SPELLINGS and name[-2:] != "__"):
            fx.map_arg(node.args[:1], lambda n: written.add(_memory(value_of(n))))
        if "out" in node.kwargs:
            fx.map_arg(node.kwargs["out"], lambda n: written.add(_memory(value_of(n))))
    tensors = ((node, value_of(node)) for node in graph.nodes)
    return frozenset(node for node, value in tensors if isinstance(value, torch.Tensor) and _memory(value) in written)


def _memory(value: Any) -> int:
    try:
        return value.untyped_storage()._cdata
    except (AttributeError, NotImplementedError, RuntimeError):  # no tensor, or a wrapper without a storage
        return id(value)


def _version(value: torch.Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", str(node.target))
    else:
        name = node.op
    return _SPELLINGS.get(name, name)


def _axis(node: fx.Node, position: int, rank: int) -> int:
    found = node.args[position] if len(node.args) > position else node.kwargs.get("dim", node.kwargs.get("axis"))
    if not isinstance(found, int):
        raise NotClosedForm(f"{node.name}: axis {found!r}")
    return found % rank


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _broadcast(node: Any, index: Index) -> Index:
    """The index of a tensor broadcast against one of rank ``len(index)``: axes of size 1 read 0."""
    if not isinstance(node, fx.Node) or not isinstance(value_of(node), torch.Tensor):
        return ()
    shape = value_of(node).shape
    own = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if _is_one(s) else i for i, s in zip(own, shape, strict=True))


def _slice_start(key: slice, size: Any) -> sympy.Expr:
    start = symbolic(key.start or 0)
    if (key.step or 1) < 0 or start.is_negative is None:
        raise NotClosedForm("a slice whose start is not known")
    return start + symbolic(size) if start.is_negative else start


def _is_truth(expr: Any) -> bool:
    # Not `Boolean`: every sympy Symbol is one.
    return isinstance(expr, (sympy.logic.boolalg.BooleanAtom, sympy.logic.boolalg.BooleanFunction, Relational))


def _truth(expr: Any) -> Any:
    return expr if _is_truth(expr) else sympy.Ne(expr, 0)


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
    """``relation(a, b)``; a truth value that was made 0 or 1 and is compared with a number comes back."""
    if isinstance(b, sympy.Piecewise):
        return _compare(lambda x, y: relation(y, x), b, a)
    if not (isinstance(a, sympy.Piecewise) and b.is_number and a.args[0][0] == 1 and a.args[1:] == ((0, True),)):
        return relation(a, b)
    holds = a.args[0][1]
    if_one, if_zero = relation(sympy.Integer(1), b), relation(sympy.Integer(0), b)
    return sympy.Or(sympy.And(holds, if_one), sympy.And(sympy.Not(holds), if_zero))


def _cast(expr: Any, dtype: torch.dtype) -> Any:
    return _truth(expr) if dtype == torch.bool else _number(expr)
