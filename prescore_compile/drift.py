"""How far a model's output is from the exact model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .batches import Tell, tensors_in
from .kernels.plan import OptionError

ROWS = 256
"""Positions that are compared at a time."""
Measure = Callable[[Any, Any], Any]
"""The user's own: drift of an output (second) from the exact model's (first), 0 where there is none."""


ROUNDING, NOISE = 1e-5, 1e-3
"""Drift from one run of the exact model to the next: more is told, and more than that is an error."""
MEASURES = "'kl', 'cosine' or a function of two outputs (exact first)"
GIVES = "a function that gives a number, 0 for equal outputs and more for others"


@dataclass(frozen=True)
class Drift:
    """A sum over positions, and how many there were."""

    total: float = 0.0
    positions: int = 0

    def __add__(self, other: Drift) -> Drift:
        return Drift(self.total + other.total, self.positions + other.positions)

    @property
    def mean(self) -> float:
        return self.total / max(self.positions, 1)


def resolve(measure: object, output: Any) -> str | Measure:
    """The measure that is meant: "kl" for a model with logits, else "cosine".

    Raises:
        OptionError: it is none, or cannot be taken of this output.
    """
    if measure is None:
        measure = "kl" if member(output, "logits") is not None else "cosine"
    if callable(measure):
        return measure
    if measure not in ("kl", "cosine"):
        raise OptionError("measure", measure, MEASURES)
    tensor = compared(output)
    if tensor.shape[-1] < 2:
        allowed = f"a function of two outputs (exact first): the output is {list(tensor.shape)}, with one feature"
        raise OptionError("measure", measure, allowed)
    return str(measure)


class Reference:
    """The exact model's output for one batch, to compare others with."""

    def __init__(self, output: Any, batch: Mapping[str, Any], measure: str | Measure) -> None:
        self.measure = measure
        if callable(measure):  # a copy: a model may write its next output where this one is
            self.output = tree_map(_kept, output)
            return
        tensor = compared(output)
        self.rows = counted(tensor, batch)
        rows = tensor[self.rows]
        if not len(rows):
            raise ValueError("attention_mask pads every position of a batch; allowed: one that counts, or more")
        # Logits may be -inf, where something forbids a token.
        bad = ~torch.isfinite(rows) & ~((rows == -math.inf) & (measure == "kl"))
        if bool(bad.any()) or not bool(torch.isfinite(rows).any(-1).all()):
            raise ValueError("the exact model's output is not finite, so nothing can be compared with it")
        self.output = _logarithms(tensor) if measure == "kl" else tensor.clone()

    def drift(self, output: Any) -> Drift:
        """Of another output for the same batch; infinite where it is not a number."""
        if callable(self.measure):
            found = Drift(_number(self.measure(self.output, output)), 1)
            if found.total < -1e-6:
                raise OptionError("measure", found.total, GIVES)
        else:
            exact, other = self.output[self.rows], compared(output)[self.rows]
            compare = _kl if self.measure == "kl" else _cosine
            parts = zip(exact.split(ROWS), other.split(ROWS), strict=True)
            found = Drift(sum(compare(a, b) for a, b in parts), len(exact))
        return Drift(math.inf if math.isnan(found.total) else max(found.total, 0.0), found.positions)


def _kept(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _number(found: Any) -> float:
    """What the user's measure gave."""
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):  # None; a word; a tensor of several numbers
        raise OptionError("measure", found, GIVES) from None


def difference(exact: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> tuple[float, float, float]:
    """The relative L2 error of ``other``, its largest difference, and the largest value of ``exact``.

    What is the same in both, infinite or no number too, does not differ; what is finite in one alone, infinitely.
    """
    if [tensor.shape for tensor in exact] != [tensor.shape for tensor in other]:
        return math.inf, math.inf, math.nan
    apart, whole, most, largest = 0.0, 0.0, 0.0, 0.0
    for a, b in zip(_pieces(exact), _pieces(other), strict=True):
        one, two = a.double(), b.double()
        same = (one == two) | (one.isnan() & two.isnan())
        gap = torch.where(same, 0.0, (one - two).abs()).nan_to_num(math.inf, math.inf)
        finite = torch.where(one.isfinite(), one, 0.0)
        apart, whole = apart + gap.square().sum().item(), whole + finite.square().sum().item()
        most, largest = max(most, gap.max().item()), max(largest, finite.abs().max().item())
    return math.sqrt(apart) / math.sqrt(whole) if whole else (math.inf if apart else 0.0), most, largest


def _pieces(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Some rows at a time: logits of many tokens are large."""
    for tensor in tensors:
        rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)
        yield from (piece for piece in rows.split(ROWS) if piece.numel())


def check_repeats(reference: Reference, output: Any, tell: Tell) -> None:
    """Raise ``ValueError`` where the exact model does not repeat itself: its noise would be taken for drift.

    ``output``: what it gave for the reference's batch, once more.
    """
    again = reference.drift(output).mean
    if callable(reference.measure) and math.isinf(again):
        raise OptionError("measure", "no number for the exact model's output, twice", GIVES)
    if ROUNDING < again <= NOISE:
        tell(f"the exact model's output differs from run to run, by a drift of {again:.3g}: so do all drifts")
    if again > NOISE:
        raise ValueError(
            f"the exact model's output differs from run to run, by a drift of {again:.3g}: dropout, noise, or "
            "something that it keeps from one call to the next"
        )


def _kl(exact: torch.Tensor, other: torch.Tensor) -> float:
    found = exact.exp() * (exact - _logarithms(other))
    return found.masked_fill_(exact == -math.inf, 0.0).sum(-1).double().sum().item()


def _cosine(exact: torch.Tensor, other: torch.Tensor) -> float:
    found = 1 - torch.cosine_similarity(exact.double(), other.double(), dim=-1)
    return found.masked_fill((exact == other).all(-1), 0.0).sum().item()  # rows of zeros, too


def _logarithms(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1)


def counted(tensor: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Which positions count: those that the batch's ``attention_mask`` does not pad."""
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and tensor.dim() == 3 and mask.shape == tensor.shape[:2]:
        return mask.to(tensor.device) != 0
    return torch.ones(tensor.shape[:-1], dtype=torch.bool, device=tensor.device)


def compared(output: Any) -> torch.Tensor:
    """What is compared: the logits, the last hidden state, or the first floating tensor of an output."""
    for name in ("logits", "last_hidden_state"):
        found = member(output, name)
        if found is not None:
            return found.detach()
    leaves = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.dim()]
    if not leaves:
        raise ValueError(
            f"the model returned {type(output).__name__} without a floating tensor to compare; looked for: logits, "
            "last_hidden_state, tensors in tuples, lists and dicts"
        )
    return leaves[0].detach()


def member(output: Any, name: str) -> torch.Tensor | None:
    """The tensor of that name in an output, a mapping's or an attribute; None: there is none."""
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, torch.Tensor) else None
