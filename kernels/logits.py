"""What a site does to its logits besides scale, causality and padding: softcap, bias, mask.

The bias and the mask are closed forms over b, h, q and k (q counts the queries, k the keys), as sympy
expressions; tensors that they read are undefined functions, ``document(b, k)``. They travel through
a graph as text, the tensors beside it in the order of their names.

Routes are chosen before any key is looked at, so that a cluster's chunk must do for its keys: ``reach`` says
whether a chunk can hold a key that a query may attend (never wrongly no), and the bias is taken at the
chunk's first key.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.printing.str import StrPrinter

from .band import B, Band, H, K, Q, band
from .triton.maths import factored, lifted
from .triton.spec import Lifted

CHUNK, LOW, HIGH = sympy.symbols("c k_low k_high", integer=True, nonnegative=True)
"""Of a cluster: its chunk, and that chunk's first and last key."""

_SYMBOLS = {str(symbol): symbol for symbol in (B, H, Q, K)}
_FOLDED: dict[Any, Any] = {
    sympy.And: operator.and_, sympy.Or: operator.or_, sympy.Xor: operator.xor, sympy.Add: operator.add,
    sympy.Mul: operator.mul, sympy.Max: torch.maximum, sympy.Min: torch.minimum, sympy.Eq: operator.eq,
    sympy.Ne: operator.ne, sympy.Lt: operator.lt, sympy.Le: operator.le, sympy.Gt: operator.gt,
    sympy.Ge: operator.ge, sympy.Mod: torch.remainder,
}  # fmt: skip
_OF_ONE: dict[Any, Any] = {
    sympy.Not: torch.logical_not,
    sympy.Abs: torch.abs,
    sympy.exp: torch.exp,
    sympy.log: torch.log,
}


@dataclass(frozen=True)
class Logits:
    """``softcap`` c of ``c * tanh(logits / c)`` (0.0: none), then ``bias``, then only where ``allowed``."""

    allowed: Any = sympy.true
    bias: Any = sympy.S.Zero
    softcap: float = 0.0

    @property
    def text(self) -> str:
        """How it travels; "" where nothing is done."""
        if self == NOTHING:
            return ""
        bias, allowed = (_Printer().doprint(expr) for expr in (self.bias, self.allowed))
        return f"softcap {self.softcap!r}; add {bias}; where {allowed}"

    @property
    def tensors(self) -> list[str]:
        """The names of the tensors that are read."""
        atoms = set().union(*(sympy.sympify(e).atoms(AppliedUndef) for e in (self.allowed, self.bias)))
        return sorted({atom.func.__name__ for atom in atoms})

    @property
    def lifted(self) -> Lifted:
        """For ``attend``."""
        return lifted(self.allowed, self.bias)

    def band(self, causal: bool = False, shift: Any = 0) -> Band:
        """The run of keys that is left to each query; ``causal``: of those up to ``q + shift``."""
        return band(sympy.And(self.allowed, sympy.Le(K, Q + shift)) if causal else self.allowed, K, Q)

    @property
    def uncapped(self) -> Logits:
        """The same without the softcap."""
        return replace(self, softcap=0.0)

    @property
    def only_band(self) -> bool:
        """Whether that is all that is said."""
        return self != NOTHING and replace(self, allowed=self.band().rest) == NOTHING

    @property
    def reach(self) -> Lifted:
        """For ``route``."""
        return lifted(reach(self.allowed), self.first_bias)

    @property
    def first_bias(self) -> Any:
        """The bias at a chunk's first key."""
        return sympy.sympify(self.bias).subs(K, LOW)

    def applied(self, logits: torch.Tensor, places: Mapping[str, Any], tensors: Mapping[str, Any]) -> torch.Tensor:
        """``logits`` ``[B, H, T, X]`` of the pairs at ``places``, tensors that broadcast to them."""
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.bias != 0:
            logits = logits + value(self.bias, places, tensors)
        if self.allowed != sympy.true:
            logits = logits.masked_fill(torch.logical_not(value(self.allowed, places, tensors)), float("-inf"))
        return logits

    def slope(self, logits: torch.Tensor) -> Any:
        """The derivative of what comes out, in logits that have not been capped."""
        return 1 - torch.tanh(logits / self.softcap).square() if self.softcap else 1


NOTHING = Logits()
NO_TENSORS: Mapping[str, torch.Tensor] = {}


class _Printer(StrPrinter):  # type: ignore[misc]
    def _print_Float(self, expr: Any) -> str:
        return repr(float(expr))


@functools.cache
def parse(text: str) -> Logits:
    """What has this text."""
    if not text:
        return NOTHING
    cap, bias, allowed = (part.split(" ", 1)[1] for part in text.split("; "))
    return Logits(_parsed(allowed), _parsed(bias), float(cap))


def settled(logits: Logits) -> Logits:
    """The same in the form that its text is read as, if there is one; as it is if not."""
    try:
        found = parse(logits.text)
        return found if parse(found.text).text == found.text else logits
    except Exception:  # a spelling that Python does not read back: the caller finds out with ``parse``
        return logits


def _parsed(text: str) -> Any:
    names = dict(_SYMBOLS)
    tree = sympy.sympify(sympy.parse_expr(text, local_dict=names))
    return tree.xreplace({number: sympy.Float(float(number)) for number in tree.atoms(sympy.Float)})


def named(logits: Logits, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by their names."""
    return dict(zip(logits.tensors, tensors, strict=True))


def reach(allowed: Any) -> Any:
    """Whether a chunk may hold a key that is allowed, over b, h, q and the chunk; true where that is not known."""
    if not allowed.has(K):
        return allowed
    if isinstance(allowed, (sympy.And, sympy.Or)):
        return allowed.func(*map(reach, allowed.args))
    if not isinstance(allowed, sympy.core.relational.Relational):
        return sympy.true
    if allowed.lhs.has(K) and allowed.rhs.has(K):
        return sympy.true
    if allowed.rhs.has(K):
        allowed = allowed.reversed
    key, other = allowed.lhs, allowed.rhs
    if isinstance(allowed, sympy.Ne):
        return sympy.true
    if isinstance(allowed, sympy.Eq) and isinstance(key, sympy.floor) and (K / key.args[0]).is_Integer:
        size = K / key.args[0]
        return sympy.And(size * other + size - 1 >= LOW, size * other <= HIGH)
    if key == K:
        low, high = LOW, HIGH
    elif isinstance(key, AppliedUndef) and key.args[-1] == K and not any(a.has(K) for a in key.args[:-1]):
        low, high = (sympy.Function(f"{key.func.__name__}_{end}")(*key.args[:-1], CHUNK) for end in ("low", "high"))
    else:
        return sympy.true
    if isinstance(allowed, (sympy.Le, sympy.Lt)):
        return allowed.func(low, other)
    if isinstance(allowed, (sympy.Ge, sympy.Gt)):
        return allowed.func(high, other)
    return sympy.And(low <= other, other <= high)


def by_chunk(logits: Logits, tensors: Mapping[str, torch.Tensor], chunk: int) -> dict[str, torch.Tensor]:
    """The tensors that ``reach`` and ``first_bias`` read: those given, and the bounds of each chunk."""
    found = dict(tensors)
    names = {atom.func.__name__ for atom in reach(logits.allowed).atoms(AppliedUndef)} - found.keys()
    for name in sorted({name.rsplit("_", 1)[0] for name in names}):
        keys = tensors[name].to(torch.int32)
        # What fills the last chunk is its last key, which changes no bound.
        last = keys.narrow(-1, keys.shape[-1] - 1, 1).expand(*keys.shape[:-1], -keys.shape[-1] % chunk)
        chunks = torch.cat([keys, last], -1).unflatten(-1, (-1, chunk))
        found |= {f"{name}_low": chunks.amin(-1), f"{name}_high": chunks.amax(-1)}
    return found


def pair_places(batch: int, heads: int, queries: torch.Tensor, keys: torch.Tensor) -> dict[str, torch.Tensor]:
    """b, h, q and k that broadcast to ``[B, H, T, X]``; ``queries`` ``[T]``, ``keys`` ``[X]`` or ``[B, H, 1, X]``."""
    at = functools.partial(torch.arange, device=queries.device)
    return {"b": at(batch).view(-1, 1, 1, 1), "h": at(heads).view(-1, 1, 1), "q": queries.view(-1, 1), "k": keys}


def value(expr: Any, at: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """The expression in torch: a number, or a tensor that broadcasts as ``at`` does."""
    expr = sympy.sympify(expr)
    if expr in (sympy.true, sympy.false):
        return torch.tensor(bool(expr), device=at["q"].device)
    if expr.is_Integer:
        return int(expr)
    if expr.is_number:
        return float(expr)
    if isinstance(expr, sympy.Symbol):
        return at[expr.name]
    if isinstance(expr, sympy.floor):
        above, below = sympy.fraction(sympy.together(expr.args[0]))
        return value(above, at, tensors) // value(below, at, tensors)
    if isinstance(expr, sympy.Piecewise):
        *parts, (found, _) = expr.args
        found = _tensor(value(found, at, tensors), at)
        for piece, where in reversed(parts):
            found = torch.where(value(where, at, tensors), _tensor(value(piece, at, tensors), at), found)
        return found
    if isinstance(expr, AppliedUndef):
        return tensors[expr.func.__name__][tuple(_tensor(value(a, at, tensors), at) for a in expr.args)]
    if isinstance(expr, sympy.Pow):
        return torch.pow(*(_tensor(value(a, at, tensors), at) for a in expr.args))
    if isinstance(expr, sympy.Add) and (found := factored(expr)) is not None:
        return value(found[0], at, tensors) * value(found[1], at, tensors)
    parts = [value(a, at, tensors) for a in expr.args]
    if expr.func in _OF_ONE:
        return _OF_ONE[expr.func](_tensor(parts[0], at))
    if isinstance(expr, (sympy.Max, sympy.Min, sympy.Mod)):
        parts = [_tensor(part, at) for part in parts]
    return functools.reduce(_FOLDED[expr.func], parts)


def _tensor(part: Any, at: Mapping[str, Any]) -> torch.Tensor:
    return torch.as_tensor(part, device=at["q"].device, dtype=torch.float32 if isinstance(part, float) else None)
