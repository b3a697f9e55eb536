"""One run of a model: its output, and in a trial of training the gradients of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..batches import module_of
from ..drift import member
from ..kernels.plan import OptionError

Loss = Callable[[Any], torch.Tensor]
"""Of a model's output: a tensor of one number, with gradients."""


@dataclass(frozen=True)
class Ran:
    """``loss`` and ``gradients`` (of all parameters that ask for them) of a training step; NaN and none: it is none."""

    output: Any
    loss: float = math.nan
    gradients: tuple[torch.Tensor, ...] = ()


class Step:
    """What is run: the model alone, or, where there is a ``loss``, forward and backward.

    Raises:
        OptionError: there is a loss, and no parameter to train.
    """

    def __init__(self, model: Callable[..., Any], loss: Loss | None) -> None:
        module = module_of(model)
        found = module.parameters() if isinstance(module, nn.Module) else ()
        self.loss = loss
        self.parameters = [parameter for parameter in found if parameter.requires_grad]
        if loss is not None and not callable(loss):
            raise OptionError("loss", loss, "a function of the model's output, or None")
        if loss is not None and not self.parameters:
            raise OptionError("model", model, "with a loss: a module with parameters that ask for gradients")

    @property
    def trains(self) -> bool:
        return self.loss is not None

    def of(self, output: Any) -> Ran:
        """The run that gave ``output``, which its backward is part of."""
        if self.loss is None:
            return Ran(output)
        loss = self.loss(output)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            shown = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise OptionError("loss", shown, "a function that gives a tensor of one number, with gradients")
        gradients = torch.autograd.grad(loss.sum(), self.parameters, allow_unused=True, materialize_grads=True)
        return Ran(output, float(loss.detach()), gradients)


def own_loss(output: Any) -> torch.Tensor:
    """The loss that models of transformers give for ``labels``: ``output.loss`` or ``output["loss"]``.

    Raises:
        OptionError: there is none.
    """
    found = member(output, "loss")
    if found is None:
        raise OptionError("loss", type(output).__name__, "an output with a loss: inputs with labels")
    return found


def apart(exact: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """1 - cosine of two gradients, of all parameters together; infinite where one is no number."""
    inner, one, two = 0.0, 0.0, 0.0
    for a, b in zip(exact, other, strict=True):
        a, b = a.flatten().double(), b.flatten().double()
        inner, one, two = inner + float(a @ b), one + float(a @ a), two + float(b @ b)
    if not math.isfinite(inner) or not math.isfinite(one + two):
        return math.inf
    if not one or not two:
        return 0.0 if one == two else 1.0
    return max(1 - inner / math.sqrt(one * two), 0.0)
