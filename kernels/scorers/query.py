"""Query: the attention that a chunk's last queries pay its keys."""

from __future__ import annotations

import torch

LAST = 32


def query(
    keys: torch.Tensor,
    mask: torch.Tensor,
    queries: torch.Tensor,
    scale: float,
    causal: bool,
    seed: int,
) -> torch.Tensor:
    """``score_j = mean_{h, i} softmax_{j'}(scale * q_hi . k_j')_j`` over the chunk's last 32 queries.

    The selection of SnapKV (Li et al. 2024, arXiv 2404.14469, section 4) with the chunk as the
    prompt and without its pooling. Causal sites mask later keys of the chunk. Cost: 32 * G * L * D
    multiply-adds a chunk. ``seed`` is not read.
    """
    length = keys.shape[1]
    position = torch.arange(length, device=keys.device)
    last = position[-LAST:]
    seen = position <= last.unsqueeze(1) if causal else position.new_ones(len(last), length, dtype=torch.bool)
    allowed = seen & mask[:, None, None, :]
    logits = scale * queries[:, :, -LAST:] @ keys.unsqueeze(1).transpose(2, 3)
    weights = torch.softmax(logits.masked_fill(~allowed, float("-inf")), dim=3)
    asked = mask[:, None, -LAST:, None] & allowed  # a query that is itself padding says nothing
    return weights.masked_fill(~asked, 0).mean((1, 2))
