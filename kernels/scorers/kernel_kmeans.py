"""Kernel k-means: k-means in the feature space of a Gaussian kernel."""

from __future__ import annotations

import torch

from .kmeans import ITERATIONS, KEYS_PER_CENTROID, nearest, strided


def kernel_kmeans(
    keys: torch.Tensor,
    mask: torch.Tensor,
    queries: torch.Tensor,
    scale: float,
    causal: bool,
    seed: int,
) -> torch.Tensor:
    """``score_j = || phi(k_j) - c(j) ||``, c(j) the mean of ``phi`` over j's cluster, ``phi`` never computed.

    With ``k(x, y) = phi(x) . phi(y) = exp(-|x - y|^2 / (2 s^2))`` and C the cluster,
    ``score_j^2 = k(j, j) - 2 / |C| sum_{y in C} k(j, y) + 1 / |C|^2 sum_{x, y in C} k(x, y)``.
    ``s^2`` is the keys' mean squared distance from their mean, so the score does not change when all
    keys are scaled or moved. Source: pre-scoring, arXiv 2505.11040, for the idea;
    Schölkopf, Smola and Müller 1998 for the method; the width is our choice. One cluster for 16 keys, three
    iterations, begun with the key nearest of evenly spaced ones. Cost: L^2 * D + iterations *
    L^2 * K multiply-adds a chunk. ``queries``, ``scale``, ``causal`` and ``seed`` are not read.
    """
    weight = mask.unsqueeze(2).to(keys.dtype)
    live = keys.where(mask.unsqueeze(2), 0)
    centred = (live - live.sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)) * weight
    square = (centred * centred).sum(2, keepdim=True)
    width = square.sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    apart = (square + square.transpose(1, 2) - 2 * centred @ centred.transpose(1, 2)).clamp(min=0)
    kernel = torch.exp(-apart / (2 * width.clamp(min=torch.finfo(keys.dtype).tiny)))
    clusters = max(1, keys.shape[1] // KEYS_PER_CENTROID)
    owner = nearest(live, strided(live, mask, clusters))
    distance = torch.zeros_like(kernel[..., :clusters])
    for step in range(ITERATIONS):
        if step:
            owner = distance.argmin(2)
        hot = torch.zeros_like(distance).scatter(2, owner.unsqueeze(2), weight)
        count = hot.sum(1, keepdim=True)
        between = kernel @ hot / count.clamp(min=1)
        within = (hot * between).sum(1, keepdim=True) / count.clamp(min=1)
        distance = (1 - 2 * between + within).masked_fill(count == 0, float("inf"))
    return distance.gather(2, owner.unsqueeze(2)).squeeze(2).clamp(min=0).sqrt()
