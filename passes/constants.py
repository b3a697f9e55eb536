"""Tensors that are part of a graph: constants that tracing left behind."""

from __future__ import annotations

import re
from typing import Any

import sympy
import torch
from torch import fx

from .indices import Index

# Names that symbolic_trace, make_fx and torch.export give to tensors that the traced code made.
# Anything else that a graph holds (a buffer) may be written to between two calls.
_MADE_BY_TRACING = re.compile(r"(.*[._])?(_tensor_constant|lifted_tensor_|_prescore_constant)\d+$")
_MOST = 2**24


def constant_of(node: fx.Node) -> torch.Tensor | None:
    """The tensor that ``node`` gets, if nothing can change it."""
    if node.op != "get_attr" or not _MADE_BY_TRACING.match(str(node.target)):
        return None
    found: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, torch.Tensor) and 0 < found.numel() <= _MOST else None


def closed_form(constant: torch.Tensor, index: Index) -> Any:
    """Its element at ``index``: one number everywhere, or one on and below a diagonal and another above.

    None: it is neither.
    """
    if type(constant) is not torch.Tensor or constant.is_complex():
        return None  # a fake tensor, say
    first = constant.flatten()[0]
    if bool((constant == first).all()):
        return _number(first)
    if constant.dim() < 2:
        return None
    matrix = constant.flatten(0, -3)[0] if constant.dim() > 2 else constant
    if not bool((constant == matrix).all()):
        return None
    rows, columns = matrix.shape
    shift = int((matrix[0] == first).long().cumprod(0).sum()) - 1
    below = torch.arange(columns) <= torch.arange(rows)[:, None] + shift
    other = matrix[0, shift + 1] if shift + 1 < columns else matrix[-1, 0]
    if not bool((matrix == torch.where(below, first, other)).all()):
        return None
    inside = sympy.Le(index[-1], index[-2] + shift)
    if constant.dtype == torch.bool:
        return inside if bool(first) else sympy.Not(inside)
    return sympy.Piecewise((_number(first), inside), (_number(other), True))


def _number(element: torch.Tensor) -> Any:
    if element.dtype == torch.bool:
        return sympy.true if bool(element) else sympy.false
    return sympy.sympify(element.item())
