"""A band's ends as numbers."""

from __future__ import annotations

import functools

import torch

from .band import Band
from .logits import value
from .reference import Operands

FAR = 2**16


def ends(found: Band, q_len: int, k_len: int, causal: bool) -> torch.Tensor:
    """The first and the last key of each query, causality counted in: ``[2, Nq]`` int64.

    Where there is none, the last lies before the first.
    """
    at = torch.arange(q_len)
    low, high = _values(found, at, k_len)
    if causal:
        high = torch.minimum(high, at + (k_len - q_len))
    return torch.stack([low.clamp(0, k_len), high.clamp(-1, k_len - 1)])


def within(site: Operands, ends: torch.Tensor) -> tuple[Operands, torch.Tensor]:
    """The site with the keys that any query attends and no other, bidirectional, and its ends."""
    if not ends.numel():
        return site, ends
    first, last = int(ends[0, 0]), int(ends[1, -1])
    count = max(last - first + 1, 0)
    key, value = (tensor.narrow(2, first, count) for tensor in (site.key, site.value))
    valid = None if site.valid is None else site.valid[:, first : first + count]
    return site._replace(key=key, value=value, valid=valid, causal=False), ends - first


@functools.cache
def keys_a_query(found: Band) -> tuple[float, int]:
    """How many keys a query of a long sequence is left: on average, and at most; (0.0, 0) where they grow with it."""
    if found.low is None or found.high is None:
        return 0.0, 0
    low, high = _values(found, torch.arange(FAR, 3 * FAR), 4 * FAR)
    count = (high - low + 1).clamp(min=0)
    near, far = count.chunk(2)
    return (float(count.double().mean()), int(count.max())) if near.max() == far.max() else (0.0, 0)


def _values(found: Band, queries: torch.Tensor, k_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = 0 if found.low is None else found.low, k_len - 1 if found.high is None else found.high
    return tuple(torch.as_tensor(value(end, {"q": queries}, {})).expand_as(queries) for end in (low, high))  # type: ignore[return-value]
