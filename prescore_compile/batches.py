"""What a model is called with, as ``calibrate`` and ``trial`` take it."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .kernels.plan import OptionError

Tell = Callable[[str], None]
"""Is to_stderr a line at a time what goes on."""


@dataclass(frozen=True)
class Call:
    """What a model is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def copied(self) -> Call:
        """The same on inputs of its own: a model may write into what it is given, or add to it (caches).

        What is one object stays one. An object that cannot be copied is passed as it is; its tensors, where it is a
        container that torch knows, are copies.
        """
        known: dict[int, Any] = {}

        def detached(leaf: Any) -> Any:
            return known.setdefault(id(leaf), leaf.detach().clone()) if isinstance(leaf, torch.Tensor) else leaf

        own = Call(*tree_map(detached, (self.args, dict(self.kwargs))))
        try:
            return copy.deepcopy(own)
        except Exception:  # of locks, or of tensors that were computed with gradients
            return own


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors in what a model is given or returns, in tuples, lists, dicts and what else torch looks into."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def calls_of(batches: object) -> list[Call]:
    """The batches, each a tensor, a tuple of positional or a dict of keyword arguments, or a ``Call``.

    Raises:
        OptionError: they are something else, or none.
    """
    for kind, name in ((torch.Tensor, "tensor"), (Mapping, "dict")):
        if isinstance(batches, kind):
            raise OptionError("batches", f"a {name}", f"a list of batches, as in [{name}]")
    if not isinstance(batches, Iterable):
        raise OptionError("batches", batches, "a list of batches")
    calls = [_call(batch) for batch in batches]
    if not calls:
        raise OptionError("batches", [], "one batch or more")
    return calls


def _call(batch: Any) -> Call:
    if isinstance(batch, Call):
        return batch
    if isinstance(batch, Mapping):
        return Call(kwargs=dict(batch))
    if isinstance(batch, (tuple, list)):
        return Call(tuple(batch))
    if isinstance(batch, torch.Tensor):
        return Call((batch,))
    raise OptionError("batches", batch, "tensors, tuples of positional or dicts of keyword arguments")


def check_model(model: object) -> None:
    """Raise ``OptionError`` where it cannot be called, or it, or a module inside it, is in training mode."""
    if not callable(model):
        raise OptionError("model", model, "a module or a function")
    model = module_of(model)
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if module.training:
            which = f"{type(module).__name__} {name!r}" if name else type(module).__name__
            raise OptionError("model", f"{which} in training mode", "a model in eval mode: call model.eval()")


def module_of(model: object) -> object:
    """The module that a partial or a bound method is of; anything else itself."""
    while isinstance(model, (functools.partial, MethodType)):
        model = model.func if isinstance(model, functools.partial) else model.__self__
    return model


def to_stderr(line: str) -> None:
    """The default ``progress``: a line to standard error."""
    with contextlib.suppress(OSError):  # who reads it may be gone, which ends no work
        print(line, file=sys.stderr, flush=True)


def teller(progress: object) -> Tell:
    """A ``progress`` argument: itself, or silence for None.

    Raises:
        OptionError: it cannot be called.
    """
    if progress is not None and not callable(progress):
        raise OptionError("progress", progress, "a function of a line, or None")
    return progress or _silent


def _silent(line: str) -> None:
    pass
