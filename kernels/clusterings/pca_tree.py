"""A tree of median cuts: each chunk is cut into equal groups of keys that lie near each other."""

from __future__ import annotations

import torch

POWER_ITERATIONS = 6


def pca_tree(keys: torch.Tensor, member: torch.Tensor, cluster: int) -> torch.Tensor:
    """Order a chunk's keys so that each run of ``cluster`` of them is one balanced cluster.

    Halves the chunk at the median along its leading principal direction, then each half, until
    the parts hold ``cluster`` keys (Sproull 1991, "Refinements to nearest-neighbor searching in
    k-dimensional trees"). The direction comes from ``POWER_ITERATIONS`` steps of power iteration
    from the member farthest from the mean, so nothing is drawn at random.

    Args:
        keys: ``[M, L, D]`` float32, ``L`` = ``cluster`` times a power of two.
        member: ``[M, L]`` bool; keys that are not members are ordered last.

    Returns:
        ``[M, L]`` int64, the position in the chunk of the key at each place.
    """
    chunks, length, dim = keys.shape
    live = keys.where(member.unsqueeze(2), 0)
    order = torch.arange(length, device=keys.device).expand(chunks, length)
    part = length
    while part > cluster:
        points = live.gather(1, order.unsqueeze(2).expand(-1, -1, dim)).view(-1, part, dim)
        here = member.gather(1, order).view(-1, part)
        along = project(points, here).masked_fill(~here, float("inf"))
        rank = along.argsort(dim=1, stable=True)
        order = order.reshape(-1, part).gather(1, rank).view(chunks, length)
        part //= 2
    return order


def project(points: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Coordinates ``[M, L]`` of centred points along their leading principal direction."""
    weight = mask.unsqueeze(2).to(points.dtype)
    centred = (points - points.sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)) * weight
    farthest = (centred * centred).sum(2).argmax(1)
    direction = centred[torch.arange(len(points), device=points.device), farthest].unsqueeze(2)
    covariance = centred.transpose(1, 2) @ centred
    for _ in range(POWER_ITERATIONS):
        direction = covariance @ torch.nn.functional.normalize(direction, dim=1)
    return (centred @ torch.nn.functional.normalize(direction, dim=1)).squeeze(2)
