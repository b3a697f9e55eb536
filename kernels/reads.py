"""What is done to logits, where that is no more than to read tensors at each pair: as one mask, of bools or numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from sympy.core.function import AppliedUndef

from .band import B, H, K, Q
from .logits import Logits

HIDDEN = float(torch.finfo(torch.float32).min)
"""A finite number that hides a key: no float32 logit shows beside it, and a query without keys attends all alike."""


class Read(NamedTuple):
    """A tensor that is read once for each pair.

    Attributes:
        name: of the tensor. axes: of each axis, b, h, q, k, each at most once, merged as in ``H*b + h``, or 0.
        says: "allowed" or "hidden", of a tensor that is not 0; "added", of numbers.
        factor: of numbers. hides: the number that is added to what is hidden.
    """

    name: str
    axes: tuple[Any, ...]
    says: str
    factor: float = 1.0
    hides: float = -math.inf

    @property
    def finite(self) -> bool:
        """Whether a query without keys attends what is hidden."""
        return math.isfinite(self.hides)

    def of_pairs(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where a pair is attended, or what is added: ``[B or 1, H or 1, Nq or 1, Nk or 1]``."""
        if len(self.axes) == 4 and all(axis in (0, at) for axis, at in zip(self.axes, (B, H, Q, K), strict=True)):
            return self._said(tensor)
        merged = [digits(axis) for axis in self.axes]
        assert None not in merged
        left = [at for some in merged for at, _ in some or ()]
        found = tensor.squeeze(tuple(axis for axis, some in enumerate(merged) if not some))
        for axis, some in reversed([*enumerate(filter(None, merged))]):
            if len(some) > 1:
                found = found.unflatten(axis, [size for _, size in some])
        found = found.permute([left.index(at) for at in (B, H, Q, K) if at in left])
        for axis, at in enumerate((B, H, Q, K)):
            if at not in left:
                found = found.unsqueeze(axis)
        return self._said(found)

    def _said(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.says == "added":
            return tensor if self.factor == 1 else tensor.float() * self.factor
        return tensor.logical_not() if self.says == "hidden" else tensor


@functools.cache
def digits(axis: Any) -> list[tuple[Any, int]] | None:
    """The coordinates that are merged in an axis, major first, with how many values each takes (-1: those left).

    None: it is no such axis.
    """
    parts = [part.as_coeff_Mul() for part in sympy.Add.make_args(sympy.sympify(axis)) if part != 0]
    if any(at not in (B, H, Q, K) or not step.is_Integer or step < 1 for step, at in parts):
        return None
    found: list[tuple[Any, int]] = []
    minor = 1
    for step, at in sorted(parts, key=lambda part: int(part[0])):  # minor first; each one's size is told by the next
        if step % minor or (step > minor) != bool(found):
            return None
        if found:
            found[-1] = found[-1][0], int(step) // minor
        found.append((at, -1))
        minor = int(step)
    return found[::-1]


def hides(says: Any, number: float) -> Any:
    """``Read.hides``, a finite number, as a bias; ``says``: which keys are allowed."""
    return sympy.Piecewise((sympy.S.Zero, says), (sympy.Float(number), sympy.true))


def reads_of(logits: Logits) -> list[Read] | None:
    """The tensors that are read, where a mask is all that they and numbers come to; None: there is more to it."""
    bias = sympy.sympify(logits.bias)
    found = [_hiding(part) for part in sympy.And.make_args(logits.allowed) if part != sympy.true]
    found += [_added(part) for part in sympy.Add.make_args(bias) if part != 0]
    reads = [read for read in found if read is not None]
    if logits.softcap or not reads or len(reads) < len(found):
        return None
    return reads


def mask_of(reads: list[Read], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One mask ``[B or 1, H or 1, Nq or 1, Nk or 1]`` of bools (attended), as far as they say it, or numbers."""
    if len(reads) == 1:
        return reads[0].of_pairs(tensors[reads[0].name])
    allowed, added = parts_of(reads, tensors)
    if added is None:
        assert allowed is not None
        return allowed
    return added if allowed is None else torch.where(allowed, added, -torch.inf)


def parts_of(
    reads: Sequence[Read], tensors: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which pairs are attended, bools, and what is added to their logits, float32; None: all, and nothing.

    ``[B or 1, H or 1, Nq or 1, Nk or 1]``.
    """
    parts = [(read, read.of_pairs(tensors[read.name])) for read in reads]
    allowed = [part for read, part in parts if read.says != "added" and not read.finite]
    numbers = [part for read, part in parts if read.says == "added"]
    numbers += [torch.where(part != 0, 0.0, read.hides) for read, part in parts if read.finite]
    return _all(allowed) if allowed else None, _sum(numbers) if numbers else None


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float()
    for more in parts[1:]:
        total = total + more
    return total


def _all(parts: list[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    found = parts[0] != 0  # bytes of bools that are neither 0 nor 1 have no bit in common
    for part in parts[1:]:
        found = found & (part != 0)
    return found


def _hiding(says: Any, number: float = -math.inf) -> Read | None:
    if not isinstance(says, (sympy.Eq, sympy.Ne)) or says.rhs != 0:
        return None
    return _read(says.lhs, "hidden" if isinstance(says, sympy.Eq) else "allowed", hides=number)


def _added(part: Any) -> Read | None:
    if isinstance(part, sympy.Piecewise):
        (usual, says), (number, other) = part.args[0], part.args[-1]
        of_two = len(part.args) == 2 and usual == 0 and number.is_Float and other == sympy.true
        return _hiding(says, float(number)) if of_two else None
    factor, atom = part.as_coeff_Mul()
    return _read(atom, "added", factor=float(factor))


def _read(atom: Any, says: str, factor: float = 1.0, hides: float = -math.inf) -> Read | None:
    if not isinstance(atom, AppliedUndef):
        return None
    merged = [digits(axis) for axis in atom.args]
    found = [at for some in merged for at, _ in some or ()]
    if None in merged or len(set(found)) < len(found):
        return None
    return Read(atom.func.__name__, atom.args, says, factor, hides)
