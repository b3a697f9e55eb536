"""k-median: as k-means, with centres that outliers do not drag along."""

from __future__ import annotations

import torch

from .kmeans import KEYS_PER_CENTROID, nearest, strided

ITERATIONS = 3
STEPS = 3


def kmedian(
    keys: torch.Tensor,
    mask: torch.Tensor,
    queries: torch.Tensor,
    scale: float,
    causal: bool,
    seed: int,
) -> torch.Tensor:
    """``score_j = || k_j - m(j) ||_2`` with m(j) the geometric median of j's cluster.

    The geometric median minimises the sum of Euclidean distances (not of squares, and not L1);
    each update takes the cluster's mean and then two steps of Weiszfeld's iteration (Weiszfeld 1937), a
    mean weighted by 1 / distance; begun at a key, it would not leave it. Source: pre-scoring, arXiv
    2505.11040, section 3 (k-median); one median for 16 keys, three rounds from evenly spaced keys.
    Cost: 2 * rounds * (1 + steps) * L * K * D multiply-adds a chunk. ``queries``, ``scale``,
    ``causal`` and ``seed`` are not read.
    """
    live = keys.where(mask.unsqueeze(2), 0)
    median = strided(keys, mask, max(1, keys.shape[1] // KEYS_PER_CENTROID))
    for _ in range(ITERATIONS):
        owner = nearest(live, median).unsqueeze(2)
        for step in range(STEPS):
            weight = mask.unsqueeze(2).to(keys.dtype)
            if step:
                distance = (live - median.gather(1, owner.expand_as(live))).norm(dim=2, keepdim=True)
                weight = weight / distance.clamp(min=1e-6)
            hot = torch.zeros(*mask.shape, median.shape[1], dtype=keys.dtype, device=keys.device)
            hot = hot.scatter(2, owner, weight).transpose(1, 2)
            total = hot.sum(2, keepdim=True)
            median = torch.where(total > 0, hot @ live / total.clamp(min=1e-30), median)
    return (live - median.gather(1, nearest(live, median).unsqueeze(2).expand_as(live))).norm(dim=2)
