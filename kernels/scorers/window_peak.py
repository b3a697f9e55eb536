"""Window peak: the most attention that any query pays a key while it still attends it exactly."""

from __future__ import annotations

import torch

from .peak import GAP

CHUNKS_AT_ONCE = 64


def window_peak(
    keys: torch.Tensor,
    mask: torch.Tensor,
    queries: torch.Tensor,
    sinks: torch.Tensor,
    sink_place: torch.Tensor,
    scale: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    """``score_j = max_{h, i} softmax_{j'}(scale * q_hi . k_j')_j`` over the queries that see j in their window.

    ``h`` runs over the query heads of the KV head, ``i`` over the queries of j's own chunk and, of the
    next chunk, those whose window reaches back to j's (its first ``window``), at least ``GAP`` = 8 positions
    away; ``j'`` over the keys of that window, of which just the chunk before and the query's own are
    looked at, and over the sinks. It compares between heads and layers, so one ``threshold`` serves all.

    Causal: a query reads the rows of a chunk only once that chunk lies before its window. Windows
    begin later and later, so every query that has the chunk in its window stands before every query that
    reads its rows. A bidirectional site has no such order; there the queries of the chunk before
    are left out as well. Source: measured in docs/quality.md. Cost: G * L * (2 L + sinks) * D
    multiply-adds a chunk.

    Args:
        keys: ``[N, C, L, D]`` float32, C chunks of N heads. mask: ``[N, C, L]`` bool.
        queries: ``[N, C, G, L, D]`` float32. sinks: ``[N, S, D]`` float32.
        sink_place: ``[N, S]``, the position of each; -1: none.

    Returns:
        ``[N, C, L]`` float32.
    """
    heads, chunks, length, _ = keys.shape
    by_own, by_next = keys.new_zeros(2, heads, chunks, length)  # at the queries' chunk
    step = torch.arange(length, device=keys.device)
    ahead = step.unsqueeze(1) - step
    seen = ahead >= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    far = (ahead if causal else ahead.abs()) >= GAP
    near = (step < window).unsqueeze(1)  # the queries whose window holds the chunk before
    for task in torch.arange(heads * chunks, device=keys.device).split(CHUNKS_AT_ONCE):
        head, chunk = task // chunks, task % chunks
        before = (chunk - 1).clamp(min=0)
        begin = (chunk.view(-1, 1, 1) - near.to(chunk.dtype)) * length  # of the query's window
        place = sink_place[head].unsqueeze(1)
        sink = (place >= 0) & (place < begin)
        old = near & (mask[head, before] & (chunk > 0).unsqueeze(1)).unsqueeze(1)
        own = seen & mask[head, chunk].unsqueeze(1)
        context = torch.cat([sinks[head], keys[head, before], keys[head, chunk]], 1)
        logits = scale * queries[head, chunk] @ context.unsqueeze(1).transpose(2, 3)
        allowed = torch.cat([sink, old, own], 2)
        weights = torch.softmax(logits.masked_fill(~allowed.unsqueeze(1), float("-inf")), 3)
        # A query that is itself padding says nothing about its keys.
        counts = mask[head, chunk].unsqueeze(2) & torch.cat([old & (ahead + length >= GAP), own & far], 2)
        best = weights[..., sinks.shape[1] :].masked_fill(~counts.unsqueeze(1), 0).amax((1, 2))
        by_next[head, chunk], by_own[head, chunk] = best[:, :length], best[:, length:]
    by_own[:, :-1] = torch.maximum(by_own[:, :-1], by_next[:, 1:])
    return by_own
