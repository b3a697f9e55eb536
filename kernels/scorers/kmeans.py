"""k-means: a key far from the centroid of its cluster is informative."""

from __future__ import annotations

import torch

KEYS_PER_CENTROID = 16
ITERATIONS = 3


def lloyd(
    points: torch.Tensor, mask: torch.Tensor, centroids: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's iterations on a batch of point sets.

    Args:
        points: ``[M, L, D]``. mask: ``[M, L]`` bool, the points that count.
        centroids: ``[M, K, D]``, where to start. iterations: at least 1.

    Returns:
        ``(centroids [M, K, D], owner [M, L] int64)``; the owners are those of the last update.
        A centroid that owns no point keeps its place.
    """
    weight = mask.to(points.dtype)
    owner = mask.new_zeros(mask.shape, dtype=torch.long)
    for _ in range(iterations):
        owner = nearest(points, centroids)
        hot = torch.zeros(*owner.shape, centroids.shape[1], dtype=points.dtype, device=points.device)
        hot.scatter_(2, owner.unsqueeze(2), weight.unsqueeze(2))
        count = hot.sum(1).unsqueeze(2)
        mean = hot.transpose(1, 2) @ points.where(mask.unsqueeze(2), 0) / count.clamp(min=1)
        centroids = torch.where(count > 0, mean, centroids)
    return centroids, owner


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the centroid nearest to each point, ``[M, L]`` int64; ties go to the earlier."""
    square = (centroids * centroids).sum(2).unsqueeze(1)
    return (square - 2 * points @ centroids.transpose(1, 2)).argmin(2)


def strided(points: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` of each set's valid points, evenly spaced by rank: ``[M, count, D]``."""
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    valid = mask.sum(1, keepdim=True).clamp(min=1)
    rank = torch.arange(count, device=points.device) * valid // count
    index = order.gather(1, rank).unsqueeze(2).expand(-1, -1, points.shape[2])
    return points.gather(1, index)


def kmeans(
    keys: torch.Tensor,
    mask: torch.Tensor,
    queries: torch.Tensor,
    scale: float,
    causal: bool,
    seed: int,
) -> torch.Tensor:
    """``score_j = || k_j - c(j) ||_2`` with c(j) the centroid of j's k-means cluster.

    Source: pre-scoring, arXiv 2505.11040, section 3 (k-means); one centroid for 16 keys, three
    Lloyd iterations from evenly spaced keys. Cost: 2 * iterations * L * K * D multiply-adds a
    chunk. ``queries``, ``scale``, ``causal`` and ``seed`` are not read.
    """
    return _distances(keys, mask)[0]


def kmeans_relative(
    keys: torch.Tensor,
    mask: torch.Tensor,
    queries: torch.Tensor,
    scale: float,
    causal: bool,
    seed: int,
) -> torch.Tensor:
    """``score_j = || k_j - c(j) ||_2 / sum of these distances over j's cluster``.

    The form of the paper's public code: a key of a small or tight cluster weighs more. Otherwise as
    ``kmeans``.
    """
    distance, owner = _distances(keys, mask)
    counted = distance.masked_fill(~mask, 0)
    total = torch.zeros_like(counted).scatter_add(1, owner, counted)
    return distance / total.gather(1, owner).clamp(min=torch.finfo(keys.dtype).tiny)


def _distances(keys: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance of each key to its own centroid, and which that is."""
    centroids = strided(keys, mask, max(1, keys.shape[1] // KEYS_PER_CENTROID))
    centroids, owner = lloyd(keys, mask, centroids, ITERATIONS)
    own = centroids.gather(1, owner.unsqueeze(2).expand_as(keys))
    return (keys - own).norm(dim=2), owner
