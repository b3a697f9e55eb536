"""Which axis is what: coordinates, and the proof that operands fit together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import sympy
from torch import fx

from .calls import call_of
from .compat import gradient_stops, value_of
from .indices import ZERO, Index, NotAView, coordinate, is_one, pull
from .memory import Memory
from .site import Coordinates, Operand, operand

Result = TypeVar("Result")


class Miss(Exception):
    """Nearly an attention; the message is a coded reason.

    ``node``: what did not hold is about it. A miss that is raised without one gets that of the innermost ``about``.
    """

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.node = node


@contextmanager
def about(node: fx.Node) -> Iterator[None]:
    """What is missed inside is about ``node``, where nothing nearer is named."""
    try:
        yield
    except Miss as miss:
        miss.node = miss.node or node
        raise


@dataclass
class Axes:
    """The axes of a softmax as coordinates; ``split`` says which are cut in two, and where."""

    split: dict[int, list[Any]] = field(default_factory=dict)
    sizes: dict[sympy.Symbol, Any] = field(default_factory=dict)

    def index(self, shape: Sequence[Any]) -> Index:
        self.sizes.clear()
        found: list[Any] = []
        for axis, size in enumerate(shape):
            if is_one(size):
                found.append(ZERO)
                continue
            rest, at = size, ZERO
            for part, minor in enumerate(self.split.get(axis, ())):
                at = at + self._new(f"x{axis}_{part}", rest // minor) * minor
                rest = minor
            found.append(at + self._new(f"x{axis}", rest))
        return tuple(found)

    def _new(self, name: str, size: Any) -> Any:
        if is_one(size):
            return ZERO
        self.sizes[coordinate(name)] = size
        return coordinate(name)

    def refine(self, exprs: Sequence[Any]) -> bool:
        """Cut the axes where the expressions divide them; False if there is nothing to cut."""
        for expr in exprs:
            for floor in sympy.sympify(expr).atoms(sympy.floor):
                numerator, by = sympy.fraction(sympy.together(floor.args[0]))
                if not by.is_Integer or numerator not in self.sizes or not str(numerator).startswith("x"):
                    continue
                axis, _, part = str(numerator)[1:].partition("_")
                cuts = self.split.setdefault(int(axis), [])
                stride = cuts[int(part)] if part else 1
                size = self.sizes[numerator]
                if not isinstance(size, int) or size % int(by) == 0:
                    cuts.append(stride * int(by))
                    cuts.sort(reverse=True)
                    return True
        return False


class Cut(Exception):
    """Axes have to be cut in two: the expressions that say where."""

    def __init__(self, exprs: Sequence[Any]) -> None:
        super().__init__()
        self.exprs = list(exprs)


class Regroup(Exception):
    """Keys and values are not repeated alike: take them as they are."""


class Roles(NamedTuple):
    """Coordinates of ``site.Attention``."""

    batch: Coordinates
    heads: Coordinates
    kv_heads: Coordinates
    q: sympy.Symbol | None


class Prover:
    """Coordinates of the logits of one attention and what is proved about its operands.

    Args:
        shape: of the logits. undo_repeats: look for the keys and values that ``repeat_kv`` repeats.
    """

    def __init__(self, shape: Sequence[Any], memory: Memory, axes: Axes, undo_repeats: bool) -> None:
        self.memory = memory
        self.undo_repeats = undo_repeats
        self.index = axes.index(shape)
        self.sizes: dict[sympy.Symbol, Any] = axes.sizes
        self.first = {next(iter(c for c in self.sizes if sympy.sympify(at).has(c)), None) for at in self.index[:1]}

    def cut(self, exprs: Sequence[Any]) -> None:
        """Ask for axes to be cut where these expressions divide them."""
        cut = [x for x in exprs if sympy.sympify(x).has(sympy.floor)]
        if cut:
            raise Cut(cut)

    def new(self, symbol: sympy.Symbol, size: Any) -> Any:
        if is_one(size):
            return ZERO
        self.sizes[symbol] = size
        return symbol

    def whole(self, node: fx.Node, index: Index, role: str) -> Operand:
        found = operand(node, index, value_of(node).shape, self.sizes)
        if found is None:
            raise Miss(f"unproved_axes: of the {role}", node)
        return found

    def unrepeated(self, node: fx.Node, index: Index, role: str, own: Sequence[Any]) -> Operand:
        """The operand, or what it repeats head by head; ``own``: the coordinates that stay, length and features."""
        best = (node, index)
        at: Any = node
        while self.undo_repeats:
            try:
                source, moved = pull(at, call_of(at), index, self.sizes)
            except NotAView:
                break
            if value_of(source).dtype != value_of(at).dtype or self.memory.stale(at) or call_of(at).name == "repeat":
                break
            if gradient_stops(source, at):
                break
            if call_of(at).name in ("expand", "repeat_interleave"):
                self.cut([x for x in moved if sympy.sympify(x).has(sympy.floor)])
                found = operand(source, moved, value_of(source).shape, self.sizes)
                if found is not None and all(c in found.coordinates for c in own if _has(best[1], c)):
                    best = (source, moved)
                elif any(sympy.sympify(x).has(sympy.floor) for x in moved):
                    break
            at, index = source, moved
        return self.whole(*best, role)

    def roles(self, query: Operand, key: Operand, value: Operand, k: Any) -> Roles:
        """Batch, heads, kv heads and query, in the order of the logits' axes.

        Raises:
            Miss: the operands do not fit together.
        """
        mine = [c for at in self.index for c in self.sizes if sympy.sympify(at).has(c) and c != k]
        in_q, in_k, in_v = ({c for c in mine if c in o.coordinates} for o in (query, key, value))
        if in_k - in_q:
            raise Miss("broadcast_query: the key has an axis that the query lacks", key.node)
        if set(mine) != in_q:
            raise Miss("unproved_axes: the logits have an axis that neither query nor key has")
        if in_v != in_k:
            if self.undo_repeats:
                raise Regroup
            raise Miss("broadcast_value: key and value do not have the same batch and head axes", value.node)
        alone = [c for c in mine if c not in in_k]
        shared = [c for c in mine if c in in_k]
        # The last shared axis is the heads; anything before it counts as batch. A first axis is batch.
        kv_heads, batch = tuple(shared[-1:]), tuple(shared[:-1])
        if len(shared) == 1 and shared[0] in self.first:
            batch, kv_heads = kv_heads, ()
        # With one query there is no such axis, and what is left are heads.
        one = self.index[-1] == k and len(self.index) > 1 and sympy.sympify(self.index[-2]).is_number
        group, last = (alone, []) if one else (alone[:-1], alone[-1:])
        return Roles(batch, (*kv_heads, *group), kv_heads, last[0] if last else None)


def _has(index: Index, coordinate: Any) -> bool:
    return isinstance(coordinate, sympy.Symbol) and any(sympy.sympify(at).has(coordinate) for at in index)


def prove(attempt: Callable[[Axes, bool], Result]) -> Result:
    """Call ``attempt(axes, undo_repeats)`` until it asks for no finer axes.

    Raises:
        Miss: what is not proved.
    """
    axes, undo_repeats = Axes(), True
    for _ in range(8):
        try:
            return attempt(axes, undo_repeats)
        except Cut as cut:
            if not axes.refine(cut.exprs):
                if not undo_repeats:
                    raise Miss("unproved_axes: an axis is cut in a way that is not followed") from None
                undo_repeats, axes = False, Axes()
        except Regroup:
            undo_repeats, axes = False, Axes()
    raise Miss("unproved_axes: axes are merged and cut too often")
