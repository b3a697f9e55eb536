"""A user's own scorer: a function that a plan names as ``"module:function"``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

ALLOWED = "'module:function', a function at the top level of a module that can be imported"
SIGNATURES = "(keys, mask) or (keys, mask, queries, scale, causal, seed)"


def name_of(function: Callable[..., Any]) -> str:
    """``"module:function"`` of a function; ``ValueError`` for one that cannot be found by it again."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name or "<" in name:
        raise ValueError(f"{ALLOWED}; a lambda, a nested function or an object has no such name")
    path = f"{module}:{name}"
    if find(path) is not function:
        raise ValueError(f"{ALLOWED}; {path} is something else now")
    return path


def find(path: str) -> Callable[..., Any]:
    """The function of that name; ``ValueError`` where there is none or it takes other arguments.

    Nothing is remembered: a function that was defined again is the new one.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{ALLOWED}; {error}") from error
    if not callable(found) or _arity(found) not in (2, 6):
        raise ValueError(f"a function {SIGNATURES}; {path} is not")
    return found


def reads_queries(path: str) -> bool:
    """Whether the function takes all six arguments of a scorer."""
    return _arity(find(path)) == 6


def call(
    path: str,
    keys: torch.Tensor,
    mask: torch.Tensor,
    queries: torch.Tensor,
    scale: float,
    causal: bool,
    seed: int,
) -> torch.Tensor:
    """Score with the function of that name and check what it returns.

    It is given copies: whatever it does to them, the model's own tensors stay as they are.
    """
    function = find(path)
    given = (keys.clone(), mask.clone())
    scores = function(*given) if _arity(function) == 2 else function(*given, queries.clone(), scale, causal, seed)
    good = isinstance(scores, torch.Tensor) and scores.shape == mask.shape and scores.device == keys.device
    if not good or not scores.is_floating_point():
        got = type(scores).__name__
        if isinstance(scores, torch.Tensor):
            got = f"{scores.dtype} {tuple(scores.shape)} on {scores.device}"
        raise ValueError(
            f"scorer {path}: got {got}; allowed: one floating-point score a key, {tuple(mask.shape)} on {keys.device}"
        )
    return scores.detach().float()


def _arity(function: Callable[..., Any]) -> int:
    """How many positional arguments it needs; -1 where it needs others too, or cannot say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return -1
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return -1 if any(p.kind == p.KEYWORD_ONLY for p in needed) else len(needed)
