"""Peak: the most attention that any query of the key's own chunk pays it."""

from __future__ import annotations

import torch

GAP = 8


def peak(
    keys: torch.Tensor,
    mask: torch.Tensor,
    queries: torch.Tensor,
    scale: float,
    causal: bool,
    seed: int,
) -> torch.Tensor:
    """``score_j = max_{h, i} softmax_{j'}(scale * q_hi . k_j')_j`` inside one chunk.

    ``h`` runs over the query heads of the KV head, ``i`` over the chunk's queries at least
    ``GAP`` = 8 positions away from ``j`` (every key is attended by its neighbours; only attention
    from afar tells), ``j'`` over the chunk's keys, up to ``i`` where the site is causal. The last
    8 keys of a causal chunk score 0. Source: measured in docs/quality.md; the maximum beats the
    sum. Cost: G * L^2 * D multiply-adds a chunk. ``seed`` is not read.
    """
    length = keys.shape[1]
    position = torch.arange(length, device=keys.device)
    ahead = position.unsqueeze(1) - position
    seen = ahead >= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    allowed = seen & mask[:, None, None, :]
    logits = scale * queries @ keys.unsqueeze(1).transpose(2, 3)
    weights = torch.softmax(logits.masked_fill(~allowed, float("-inf")), dim=3)
    far = (ahead if causal else ahead.abs()) >= GAP
    # A query that is itself padding says nothing about its keys.
    counts = far & allowed & mask[:, None, :, None]
    return weights.masked_fill(~counts, 0).amax((1, 2))
