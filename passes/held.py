"""What a node of a graph calls or reads beyond its name, as text: the same in every process."""

from __future__ import annotations

import hashlib
import re
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

READ = 4096
"""The most numbers of a tensor that are looked at: of a larger one, as many as lie evenly apart."""


def held(node: fx.Node) -> str:
    """Of a ``get_attr`` or ``call_module``: the tensor's kind and a digest of its numbers, the module as it prints.

    Of a function without a name of its own (a lambda, one inside another), a digest of its code. Else "".
    """
    if isinstance(node.target, FunctionType):
        return digest(_code(node.target.__code__)) if "<" in node.target.__qualname__ else ""
    value = holding(node)
    if not isinstance(value, (torch.Tensor, nn.Module)):
        return ""
    try:
        with _disable_current_modes():  # whoever traces meanwhile must not see this
            return _tensor(value) if isinstance(value, torch.Tensor) else _module(value)
    except Exception:  # a dtype that nothing reads
        return type(value).__name__


def holding(node: fx.Node) -> Any:
    """The object that a ``get_attr`` or ``call_module`` names; None where the graph does not say."""
    value: Any = node.graph.owning_module
    if value is None or node.op not in ("get_attr", "call_module"):
        return None
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value


def _tensor(tensor: torch.Tensor) -> str:
    kind = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    return kind if _no_numbers(tensor) else f"{kind} {digest(_numbers(tensor))}"


def _module(module: nn.Module) -> str:
    return f"{type(module).__name__} {digest(repr_of(module))}"


def writing(value: Any) -> tuple[Any, Any]:
    """What changes where another object is held, or that one is written to."""
    known = isinstance(value, torch.Tensor) and not value.is_inference()
    return value, value._version if known else None


def _no_numbers(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
    return not plain or isinstance(tensor, FakeTensor) or tensor.layout is not torch.strided or tensor.is_meta


def _numbers(tensor: torch.Tensor) -> str:
    step = max(-(-tensor.numel() // READ), 1)
    return str(torch.take(tensor.detach(), torch.arange(0, tensor.numel(), step, device=tensor.device)).tolist())


def _code(code: CodeType) -> str:
    consts = [
        _code(const)
        if isinstance(const, CodeType)
        else str(sorted(map(repr, const)))
        if isinstance(const, frozenset)
        else repr(const)
        for const in code.co_consts
    ]
    return f"{code.co_code.hex()} {consts} {code.co_names}"


def repr_of(value: Any) -> str:
    """Its ``repr`` without addresses; where that raises, which error."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__}: {type(error).__name__} in its repr>"
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def digest(text: str) -> str:
    """Twelve hexadecimal digits that another text does not have."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]
