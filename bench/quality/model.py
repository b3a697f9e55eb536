"""SmolLM2-135M with every attention of a forward replaced: what a method does to the model's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prescore_compile.kernels.reference import Operands

from .rivals import Attend

CHUNK = 512


class Replaced(TorchFunctionMode):
    """Runs ``attend`` in place of each SDPA call; ``before`` holds what each call is to find before its own keys.

    With ``keep`` the calls' queries, keys and values are kept in ``seen``.
    """

    def __init__(
        self, attend: Attend, before: list[Operands] | None = None, keep: bool = False, causal: bool = True
    ) -> None:
        super().__init__()
        self.attend, self.before, self.keep, self.causal = attend, before, keep, causal
        self.seen: list[Operands] = []
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            query, key, value = args[:3]
            scale = (kwargs or {}).get("scale") or query.shape[3] ** -0.5
            first = 0
            if self.before is not None:
                old = self.before[self.calls]
                first = old.query.shape[2]
                query, key, value = (torch.cat([a, b], 2) for a, b in zip(old[:3], (query, key, value), strict=True))
            site = Operands(query, key, value, None, self.causal, scale)
            self.calls += 1
            if self.keep:
                self.seen.append(site)
            return self.attend(site, first)


def hidden(model: Any, ids: Tensor, attend: Attend) -> Tensor:
    """Last hidden states ``[n, width]`` with every attention replaced.

    Raises:
        RuntimeError: the model made no SDPA call (nothing would have been measured).
    """
    with torch.no_grad(), Replaced(attend) as mode:
        found: Tensor = model.model(ids, use_cache=False).last_hidden_state[0]
    if not mode.calls:
        raise RuntimeError("the model made no scaled_dot_product_attention call")
    return found


def context(model: Any, ids: Tensor, attend: Attend) -> list[Operands]:
    """Every site's queries, keys and values of a forward over ``ids``."""
    with torch.no_grad(), Replaced(attend, keep=True) as mode:
        model.model(ids, use_cache=False)
    return mode.seen


def tail(model: Any, ids: Tensor, before: list[Operands], attend: Attend) -> Tensor:
    """Last hidden states ``[m, width]`` of ``ids`` ``[1, m]`` read after ``before``, with every attention replaced."""
    first = before[0].query.shape[2]
    positions = torch.arange(first, first + ids.shape[1])[None]
    with torch.no_grad(), Replaced(attend, before):
        found: Tensor = model.model(ids, position_ids=positions, use_cache=False).last_hidden_state[0]
    return found


@dataclass
class Compared:
    """A method's predictions against exact ones, over the scored positions.

    Attributes:
        loss, exact_loss: mean cross-entropy in nats. kl: mean KL(exact || method), nats.
        top1: share of positions with the same likeliest token. accuracy, exact_accuracy: likeliest token is right.
        error: standard error of ``loss - exact_loss``. positions: how many.
    """

    loss: float
    exact_loss: float
    kl: float
    top1: float
    accuracy: float
    exact_accuracy: float
    error: float
    positions: int


def compare(model: Any, exact: Tensor, other: Tensor, targets: Tensor) -> Compared:
    """Compare the predictions from two hidden states ``[m, width]`` for the tokens ``targets`` ``[m]``."""
    parts = []
    for at in range(0, len(targets), CHUNK):
        want = targets[at : at + CHUNK]
        with torch.no_grad():
            p, q = (F.log_softmax(model.lm_head(h[at : at + CHUNK]), 1) for h in (exact, other))
        best, others = p.argmax(1), q.argmax(1)
        kl = (p.exp() * (p - q)).sum(1)
        loss, exact_loss = -q.gather(1, want[:, None])[:, 0], -p.gather(1, want[:, None])[:, 0]
        same, right, exact_right = best == others, others == want, best == want
        parts.append(torch.stack([loss, exact_loss, kl, same, right, exact_right]).double())
    columns = torch.cat(parts, 1)
    means = columns.mean(1).tolist()
    error = (columns[0] - columns[1]).std() / len(targets) ** 0.5
    return Compared(*means[:2], *means[2:], error=error.item(), positions=len(targets))
