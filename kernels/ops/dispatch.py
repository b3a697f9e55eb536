"""What runs an operator, and what operators have in common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .. import cpu, library
from ..triton import device
from ..triton.spec import MOST_FEATURES

MAY_WAIT = (torch.Tag.cudagraph_unsafe,)
"""Of operators that may wait for the device, as with a user's scorer: Inductor leaves them out of graphs."""


def as_they_are(tensor: Tensor) -> AbstractContextManager[Any]:
    """Torch operations in an operator keep its tensors' dtypes under autocast, too: it is a module's, not theirs."""
    return torch.autocast(tensor.device.type, enabled=False)


def constant_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)
    ctx.nothing = tuple([None] * len(given) if isinstance(given, (list, tuple)) else None for given in inputs)


def constant_backward(ctx: Any, grad: Tensor | None) -> Any:
    """What is chosen is a constant: no gradient flows through a score or a route."""
    return ctx.nothing


def no_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Of a backward that raises, for which nothing is kept."""


def no_gradient(name: str) -> Callable[..., Any]:
    """The backward of the operator ``prescore::name``, which has none."""

    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError(
            f"prescore::{name}: got a backward; allowed: none, as the graph was compiled without gradients"
        )

    return backward


def no_second_derivative(ctx: Any, *grads: Tensor | None) -> Any:
    """The backward of a backward."""
    raise NotImplementedError(
        "prescore: got a backward through the gradients of attention (create_graph=True); allowed: first derivatives. "
        "Exclude these sites: options={'exclude': ['*']} keeps every one as it is"
    )


def compiled(query: Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype in cpu.DTYPES and library.available()


def generated(query: Tensor, value: Tensor | None = None) -> bool:
    """Whether the generated kernels run: on a GPU, and of as many features as they are written for.

    ``value``: where it is read, as its features may be others.
    """
    features = max(query.shape[-1], 0 if value is None else value.shape[-1])
    return query.dtype in cpu.DTYPES and features <= MOST_FEATURES and not device.why_not(query.device)
