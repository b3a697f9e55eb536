"""Index arithmetic: where the elements of a view come from, proved by shapes.

An index is one sympy expression an axis, over coordinates: symbols that run from 0 to a known
size. ``pull`` moves an index from a view to what it views, ``push`` the other way where the view
is a bijection. ``divide`` knows the ranges, so that splitting and merging axes cancel out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .calls import Call
from .compat import symbolic, value_of

Index = tuple[Any, ...]
Sizes = Mapping[sympy.Symbol, Any]
"""How many values each coordinate takes: ints or SymInts."""

Ranges = tuple[tuple[sympy.Symbol, sympy.Expr], ...]
"""The same as expressions. Layers that are alike ask the same of them, which is worked out once."""

ZERO = sympy.Integer(0)
_MOST_KNOWN = 4096


class NotAView(Exception):
    """The operator's elements are not elements of its input, or not provably so."""


def coordinate(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, nonnegative=True)


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def broadcast(shape: Sequence[Any], index: Index) -> Index:
    """The index of a tensor of ``shape`` broadcast against one of rank ``len(index)``."""
    own = index[len(index) - len(shape) :]
    return tuple(ZERO if is_one(size) else at for at, size in zip(own, shape, strict=True))


def ranges(sizes: Sizes) -> Ranges:
    return tuple((c, symbolic(size)) for c, size in sizes.items())


def divide(value: Any, by: Any, sizes: Sizes) -> tuple[Any, Any]:
    """``(value // by, value % by)`` for non-negative ``value``, simplified by the coordinates' ranges."""
    return _divided(value, by, ranges(sizes))


@functools.lru_cache(_MOST_KNOWN)
def _divided(value: Any, by: Any, known: Ranges) -> tuple[Any, Any]:
    whole, rest, sizes = ZERO, ZERO, dict(known)
    for term in sympy.Add.make_args(sympy.expand(value)):
        quotient = sympy.cancel(term / by)
        if sympy.denom(quotient) == 1:
            whole += quotient
        else:
            rest += term
    if not _below(rest, by, sizes):
        floor = sympy.floor(rest / by)
        whole, rest = whole + floor, rest - by * floor
    return whole, sympy.expand(rest)


def _below(value: Any, limit: Any, sizes: Mapping[sympy.Symbol, sympy.Expr]) -> bool:
    """Whether ``0 <= value < limit`` whatever the coordinates are."""
    highest = ZERO
    for term in sympy.Add.make_args(value):
        inside = [s for s in term.free_symbols if s in sizes]
        if len(inside) > 1 or not term.is_nonnegative or (inside and sympy.degree(term, inside[0]) != 1):
            return False
        highest += term.subs(inside[0], sizes[inside[0]] - 1) if inside else term
    return bool(sympy.expand(limit - 1 - highest).is_nonnegative)


def regroup(index: Index, shape: Sequence[Any], other: Sequence[Any], sizes: Sizes) -> Index:
    """The index in ``other`` of element ``index`` of ``shape``, both row-major over the same elements."""
    return _moved(index, tuple(map(symbolic, shape)), tuple(map(symbolic, other)), ranges(sizes))


@functools.lru_cache(_MOST_KNOWN)
def _moved(index: Index, old: tuple[Any, ...], new: tuple[Any, ...], known: Ranges) -> Index:
    found: list[Any] = []
    i = j = 0
    while i < len(old) or j < len(new):
        begin, start = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while not _same(math.prod(old[begin:i]), math.prod(new[start:j])):
            left, right = math.prod(old[begin:i]), math.prod(new[start:j])
            if i < len(old) and (j == len(new) or sympy.denom(sympy.cancel(right / left)) == 1):
                i += 1
            elif j < len(new) and (i == len(old) or sympy.denom(sympy.cancel(left / right)) == 1):
                j += 1
            elif i < len(old) and j < len(new):
                i, j = i + 1, j + 1
            else:
                raise NotAView(f"shapes {old} and {new} hold different elements")
        found += _regrouped(index[begin:i], old[begin:i], new[start:j], known)
    return tuple(found)


def _regrouped(index: Index, old: Sequence[Any], new: Sequence[Any], known: Ranges) -> list[Any]:
    kept = [at for at, size in zip(index, old, strict=True) if size != 1]
    if len(kept) == 1 and sum(size != 1 for size in new) == 1:
        return [ZERO if size == 1 else kept[0] for size in new]
    linear = ZERO
    for at, size in zip(index, old, strict=True):
        linear = linear * size + at
    found: list[Any] = []
    for size in reversed(new[1:]):
        linear, rest = (linear, ZERO) if size == 1 else _divided(linear, size, known)
        found.append(rest)
    return [sympy.expand(linear), *reversed(found)] if new else []


def _same(a: Any, b: Any) -> bool:
    return bool(sympy.expand(a - b) == 0)


def permutation(call: Call, rank: int) -> tuple[int, ...] | None:
    """``p`` with output axis ``i`` = input axis ``p[i]``; None where the call does not permute."""
    axes = list(range(rank))
    if call.name == "permute":
        dims = call["dims"]
        return tuple(d % rank for d in dims)
    if call.name in ("transpose", "mT", "t", "T"):
        a, b = (call["dim0"], call["dim1"]) if call.name == "transpose" else (-2, -1)
        if rank < 2 or (call.name in ("t", "T") and rank != 2):
            return tuple(axes) if call.name == "t" else None
        axes[a % rank], axes[b % rank] = axes[b % rank], axes[a % rank]
        return tuple(axes)
    if call.name == "movedim":
        source, to = ([d] if isinstance(d, int) else list(d) for d in (call["source"], call["destination"]))
        order = [axis for axis in axes if axis not in [d % rank for d in source]]
        for at, axis in sorted(zip([d % rank for d in to], [d % rank for d in source], strict=True)):
            order.insert(at, axis)
        return tuple(order)
    return None


def pull(node: fx.Node, call: Call, index: Index, sizes: Sizes) -> tuple[fx.Node, Index]:
    """The node that ``node`` views (or repeats), and the index there of element ``index``.

    Raises:
        NotAView: the node computes something, or its indices cannot be followed.
    """
    source = call.args.get("input")
    if not isinstance(source, fx.Node) or not isinstance(value_of(source), torch.Tensor):
        raise NotAView(f"{call.spelled} of no tensor")
    rule = _PULL.get(call.name)
    if rule is None:
        raise NotAView(call.spelled)
    return source, rule(node, call, value_of(source).shape, index, sizes)


def push(node: fx.Node, call: Call, index: Index, sizes: Sizes) -> Index:
    """The index in ``node`` of element ``index`` of its input, for views that lose and repeat nothing."""
    if not isinstance(call["input"], fx.Node) or not isinstance(value_of(node), torch.Tensor):
        raise NotAView(call.spelled)
    shape, out = value_of(call["input"]).shape, value_of(node).shape
    if call.name in ("to", "same"):
        return index
    if call.name == "view":
        return regroup(index, shape, out, sizes)
    order = permutation(call, len(shape))
    if order is not None:
        return tuple(index[axis] for axis in order)
    if call.name == "expand" and len(shape) == len(out) and all(map(_same, map(symbolic, shape), map(symbolic, out))):
        return index
    raise NotAView(call.spelled)


def _permuted(node: fx.Node, call: Call, shape: Any, index: Index, sizes: Sizes) -> Index:
    order = permutation(call, len(shape))
    if order is None:
        raise NotAView(call.spelled)
    moved: list[Any] = [ZERO] * len(shape)
    for out, axis in enumerate(order):
        moved[axis] = index[out]
    return tuple(moved)


def _viewed(node: fx.Node, call: Call, shape: Any, index: Index, sizes: Sizes) -> Index:
    if value_of(node).dtype != value_of(call["input"]).dtype:
        raise NotAView(f"{call.spelled}: bits seen as another dtype")
    return regroup(index, value_of(node).shape, shape, sizes)


def _expanded(node: fx.Node, call: Call, shape: Any, index: Index, sizes: Sizes) -> Index:
    return broadcast(shape, index)


def _repeated(node: fx.Node, call: Call, shape: Any, index: Index, sizes: Sizes) -> Index:
    own = index[len(index) - len(shape) :]
    whole = value_of(node).shape[len(index) - len(shape) :]
    return tuple(
        at if _same(symbolic(size), symbolic(new)) else divide(at, symbolic(size), sizes)[1]
        for at, size, new in zip(own, shape, whole, strict=True)
    )


def _interleaved(node: fx.Node, call: Call, shape: Any, index: Index, sizes: Sizes) -> Index:
    times, axis = call.get("repeats"), call.get("dim")
    if not isinstance(times, int) or not isinstance(axis, int):
        raise NotAView(f"{call.spelled} {times} times")
    moved = list(index)
    moved[axis % len(shape)] = divide(moved[axis % len(shape)], sympy.Integer(times), sizes)[0]
    return tuple(moved)


def _selected(node: fx.Node, call: Call, shape: Any, index: Index, sizes: Sizes) -> Index:
    axis = call.get("dim", 0) % len(shape)
    return (*index[:axis], _place(call["index"], shape[axis]), *index[axis:])


def _narrowed(node: fx.Node, call: Call, shape: Any, index: Index, sizes: Sizes) -> Index:
    axis, step = call.get("dim", 0) % len(shape), call.get("step", 1)
    start = _place(call.get("start", 0), shape[axis])
    return (*index[:axis], start + step * index[axis], *index[axis + 1 :])


def full_key(key: Any, rank: int) -> tuple[Any, ...]:
    """The key of ``x[key]`` with one entry for each of the ``rank`` axes, ``...`` written out, ``None`` kept."""
    key = key if isinstance(key, tuple) else (key,)  # a list is one index, of several elements
    used = sum(1 for k in key if k is not None and k is not Ellipsis)
    fill = (slice(None),) * (rank - used)
    at = next((i for i, k in enumerate(key) if k is Ellipsis), len(key))
    return (*key[:at], *fill, *key[at + 1 :])


def _got(node: fx.Node, call: Call, shape: Any, index: Index, sizes: Sizes) -> Index:
    moved: list[Any] = []
    rest = list(index)
    key = full_key(call["index"], len(shape))
    for k in key:
        if k is None:
            rest.pop(0)
            continue
        size = shape[len(moved)]
        if isinstance(k, slice):
            step = k.step or 1
            if not isinstance(step, int) or step < 0:
                raise NotAView(f"a slice with step {step}")
            moved.append(_place(k.start or 0, size) + step * rest.pop(0))
        elif isinstance(k, (list, tuple)):  # x[:, [3]]: an axis of size 1 stays
            if len(k) != 1 or not isinstance(k[0], int) or not all(x is k or isinstance(x, slice) for x in key):
                raise NotAView("indexed by a list")
            rest.pop(0)
            moved.append(_place(k[0], size))
        elif isinstance(k, bool) or (isinstance(k, fx.Node) and isinstance(value_of(k), torch.Tensor)):
            raise NotAView("indexed by a tensor or a bool")
        else:
            moved.append(_place(k, size))
    return tuple(moved)


def _place(at: Any, size: Any) -> Any:
    """A start or an index, which counts from the end where it is negative."""
    found = symbolic(at)
    if found.is_negative is None:
        raise NotAView("an index of unknown sign")
    if not found.is_negative:
        # A slice that starts past the end is empty: clamping does not change what it holds.
        return found
    return sympy.Max(found + symbolic(size), 0) if isinstance(size, torch.SymInt) else max(found + size, ZERO)


def _unchanged(node: fx.Node, call: Call, shape: Any, index: Index, sizes: Sizes) -> Index:
    return index


_PULL = {
    "permute": _permuted,
    "transpose": _permuted,
    "movedim": _permuted,
    "mT": _permuted,
    "t": _permuted,
    "T": _permuted,
    "view": _viewed,
    "expand": _expanded,
    "repeat": _repeated,
    "repeat_interleave": _interleaved,
    "select": _selected,
    "narrow": _narrowed,
    "slice": _narrowed,
    "getitem": _got,
    "same": _unchanged,
    "detach": _unchanged,
}
