"""Two levels: chunks are chosen first, by representatives of their own, then clusters inside them.

Scoring every cluster for every query costs n^2 / cluster; scoring chunks costs n^2 / chunk, and the
clusters of ``plan.coarse`` chosen ones a constant a query. The chunks that are not chosen are out,
so a cluster that stands out inside a dull chunk can be missed: this is another attention than
``routing.route`` defines, used only where it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import routing
from .layout import Span, chunk_of
from .logits import NO_TENSORS, NOTHING, Logits
from .plan import Plan
from .summary import Summary, spread_factor


def coarse(summary: Summary, plan: Plan) -> Summary:
    """The summary with one representative a chunk: mean and spread ``[B, Hkv, C, D]``, bias ``[B, Hkv, C]``.

    The mean and variance of all keys of its clusters, by the law of total variance; NaN where a
    cluster of it is.
    """
    size = _grouped(summary.order >= 0, plan.cluster).sum(3).float()
    clusters = (size, summary.mean, summary.spread, summary.bias)
    count, mean, spread, bias = (_grouped(tensor, plan.chunk // plan.cluster) for tensor in clusters)
    total = count.sum(3)
    share = (count / total.clamp(min=1).unsqueeze(3)).unsqueeze(4)
    whole = (share * mean).sum(3)
    factor = spread_factor(count, plan).unsqueeze(4)  # one key has none
    variance = torch.where(factor > 0, spread / factor.clamp(min=1e-6), 0)
    off = mean - whole.unsqueeze(3)
    variance = (share * (variance + off * off)).sum(3)
    taint = bias.masked_fill(bias == float("-inf"), 0).sum(3)
    bias = taint.masked_fill(total == 0, float("-inf"))
    return summary._replace(mean=whole, spread=variance * spread_factor(total, plan).unsqueeze(3), bias=bias)


def _grouped(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """``[B, Hkv, N, ...]`` as ``[B, Hkv, N / size, size, ...]``."""
    return tensor.unflatten(2, (tensor.shape[2] // size, size))


def route(
    query: torch.Tensor,
    summary: Summary,
    plan: Plan,
    causal: bool,
    k_len: int,
    scale: float,
    logits: Logits = NOTHING,
    tensors: Mapping[str, torch.Tensor] = NO_TENSORS,
    mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """The clusters each query attends, of its ``plan.coarse`` best chunks; shapes and ties as ``routing.route``.

    That is what a plan of one level gets.
    """
    if not plan.coarse:
        return routing.route(query, summary, plan, causal, k_len, scale, logits, tensors, mass)
    per_chunk, clusters = plan.chunk // plan.cluster, summary.mean.shape[2]
    total = clusters // per_chunk
    best = best_chunks(query, coarse(summary, plan), plan, causal, k_len, scale, logits, tensors, mass).long()

    def inside(span: Span) -> torch.Tensor:
        tile = best[:, :, span.begin : span.end]
        read = torch.zeros(*tile.shape[:3], total + 1, dtype=torch.bool, device=query.device)
        read.scatter_(3, tile.where(tile >= 0, total), True)
        return read[..., :-1].repeat_interleave(per_chunk, 3)

    chunks = chunk_of(clusters, plan, query.device)
    return routing.chosen(query, summary, plan, causal, k_len, scale, logits, tensors, mass, chunks, inside)


def best_chunks(
    query: torch.Tensor,
    level: Summary,
    plan: Plan,
    causal: bool,
    k_len: int,
    scale: float,
    logits: Logits = NOTHING,
    tensors: Mapping[str, torch.Tensor] = NO_TENSORS,
    mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first of two levels: the chunks ``[B, H, Nq, min(plan.coarse, C)]`` that each query chooses, -1: none.

    ``query`` ``[B, H, Nq, D]``; ``level`` as ``coarse`` makes it; ``mass`` as for ``route``.
    """
    chunks = torch.arange(level.mean.shape[2], device=query.device)
    return routing.chosen(query, level, plan.first_level, causal, k_len, scale, logits, tensors, mass, chunks)
