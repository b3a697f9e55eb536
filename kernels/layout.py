"""Where chunks, windows and segments lie: integer arithmetic shared by every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .plan import Plan

TILE = 256
"""Queries that the references work through at a time."""


def chunk_count(length: int, chunk: int) -> int:
    """Chunks that cover ``length`` keys, the last one perhaps partial."""
    return (length + chunk - 1) // chunk


def smaller(one: Any, other: Any) -> Any:
    """The minimum of two sizes: one of them where it is known which, for every length that the guards admit.

    From torch 2.14 on a tensor with a size that is a minimum of one value only gets a guard that torch cannot prove: an
    error where the user has fixed the range of a length (``mark_dynamic`` with ``min`` or ``max``).
    """
    if statically_known_true(one <= other):
        return one
    return other if statically_known_true(other <= one) else torch.sym_min(one, other)


def segments(prefix: int) -> list[int]:
    """Split the first ``prefix`` chunks into O(log prefix) segments by binary expansion.

    A segment is named by its last chunk ``s``; it spans ``lowbit(s + 1)`` chunks. The names are
    those of a Fenwick tree (Fenwick 1994), so ``C`` chunks need exactly ``C`` segments.

    >>> segments(13)  # [0, 8), [8, 12), [12, 13)
    [12, 11, 7]
    """
    found = []
    while prefix > 0:
        found.append(prefix - 1)
        prefix -= prefix & -prefix
    return found


@dataclass(frozen=True)
class Span:
    """Queries ``[begin, end)`` that share the window's chunk borders.

    ``low`` and ``high`` bound the window's keys; a causal query further stops at itself.
    ``finished`` counts the chunks whose segments give these queries their rows.
    """

    begin: int
    end: int
    low: int
    high: int
    finished: int


def spans(plan: Plan, causal: bool, q_len: int, k_len: int, tile: int) -> Iterator[Span]:
    """Cut the queries into spans of at most ``tile`` that see one window and one set of rows.

    Query ``i`` stands at key position ``i + k_len - q_len`` (0 shift unless a causal site
    continues a cache).
    """
    shift = k_len - q_len if causal else 0
    chunk, window = plan.chunk, plan.window
    total = chunk_count(k_len, chunk)
    begin = 0
    while begin < q_len:
        end = min(begin + tile, q_len)
        at = begin + shift
        if window is None:
            low, high, finished = 0, k_len, 0
        elif causal:
            first = (at - window) // chunk
            end = min(end, (first + 1) * chunk + window - shift)
            low, high = max(0, first) * chunk, k_len
            finished = low // chunk
        elif window == 0:
            low, high, finished = 0, 0, total
        else:
            first, last = (at - window) // chunk, (at + window) // chunk
            end = min(end, (first + 1) * chunk + window, (last + 1) * chunk - window)
            low, high = max(0, first) * chunk, min((last + 1) * chunk, k_len)
            finished = total
        yield Span(begin, end, low, high, finished)
        begin = end


def chunk_of(clusters: int, plan: Plan, device: torch.device | None) -> torch.Tensor:
    """The chunk of each cluster: ``[clusters]``."""
    return torch.arange(clusters, device=device) * plan.cluster // plan.chunk


def by_query(out: torch.Tensor) -> torch.Tensor:
    """``[B, H, Nq, Dv]``, laid out ``[B, Nq, H, Dv]`` in memory, as SDPA's CPU kernel does."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def outside(first_key: torch.Tensor, span: Span, causal: bool, k_len: int) -> torch.Tensor:
    """Whether chunks that begin at ``first_key`` lie outside a span's window; causal: finished ones only."""
    high = span.low if causal else k_len
    return (first_key < high) & ~((first_key >= span.low) & (first_key < span.high))
