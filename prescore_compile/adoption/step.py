"""One run of a model: its output, and in a trial of training the gradients of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..batches import module_of, tensors_in
from ..drift import member
from ..kernels.plan import OptionError

Loss = Callable[[Any], torch.Tensor]
"""Of a model's output: a tensor of one number, with gradients."""


@dataclass(frozen=True)
class Ran:
    """``loss`` and ``gradients`` (of all parameters that ask for them, dense) of a training step; NaN and none: it is
    none."""

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
        if loss is not None and any(parameter.is_inference() for parameter in self.parameters):
            raise OptionError("model", "one made in inference mode", "with a loss: one whose parameters can be trained")
        if loss is not None and not self.parameters:
            raise OptionError("model", model, "with a loss: a module with parameters that ask for gradients")

    @property
    def trains(self) -> bool:
        return self.loss is not None

    def of(self, output: Any) -> Ran:
        """The run that gave ``output``, which its backward is part of.

        Raises:
            OptionError: what the loss gives cannot be trained with, or it writes into the output.
            ValueError: the backward writes into parameters.
        """
        if self.loss is None:
            return Ran(output)
        tensors = [*(tensor for tensor in tensors_in(output) if not tensor.is_inference()), *self.parameters]
        before = [tensor._version for tensor in tensors]
        loss = self.loss(tree_map(lambda leaf: leaf, output))  # containers of its own: it may take members out
        if why := _not_a_loss(loss):
            raise OptionError("loss", why, "a function that gives a tensor of one number, with gradients")
        gradients = self._backward(loss.sum())
        written = [was != tensor._version for was, tensor in zip(before, tensors, strict=True)]
        if any(written[: -len(self.parameters)]):
            raise OptionError("loss", "one that writes into the output", "one that leaves it as it is")
        if any(written):
            raise ValueError(
                "the backward changes parameters, as an optimizer in a hook does; allowed: gradients alone"
            )
        if all(gradient is None for gradient in gradients):
            raise OptionError("loss", "no gradient in any parameter", "one that depends on the model's output")
        return Ran(output, float(loss.detach()), tuple(map(_dense, gradients, self.parameters)))

    def _backward(self, loss: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradients, each parameter's own put back. Not by ``torch.autograd.grad``, which reentrant checkpoints
        refuse, and which does not run hooks on parameters."""
        own = [parameter.grad for parameter in self.parameters]
        try:
            for parameter in self.parameters:
                parameter.grad = None
            loss.backward()
            return [parameter.grad for parameter in self.parameters]
        finally:
            for parameter, gradient in zip(self.parameters, own, strict=True):
                parameter.grad = gradient


def _not_a_loss(loss: Any) -> str:
    """Why there is no backward of it; "": there is."""
    if not isinstance(loss, torch.Tensor):
        return type(loss).__name__
    if loss.numel() != 1 or not loss.is_floating_point():
        return f"{loss.dtype} {list(loss.shape)}"
    return "" if loss.requires_grad else "a tensor without gradients"


def _dense(gradient: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor:
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


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
