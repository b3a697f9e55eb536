"""Centroids of clusters: what stands in for the clusters that a query does not route to."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Centroids(NamedTuple):
    """One row for each cluster.

    Attributes:
        key, value: ``[B, Hkv, clusters, D]`` and ``[.., Dv]``, the means of its keys and values, of their dtype.
        bias: ``[B, Hkv, clusters]`` float32 (float64 for float64 keys), log(count), added to the logit; -inf where
            it has no key.
    """

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor


def centroids(key: torch.Tensor, value: torch.Tensor, order: torch.Tensor, cluster: int) -> Centroids:
    """The centroids of the clusters that ``order`` ``[B, Hkv, clusters * cluster]`` lists (-1: no key).

    Sums are float32, or float64 for float64 keys.
    """
    inside, count = _members(order, cluster)
    share = 1 / count.clamp(min=1).unsqueeze(3)

    def mean(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        at = order.clamp(min=0).long().unsqueeze(3).expand(-1, -1, -1, tensor.shape[3])
        members = tensor.gather(2, at).to(wide).masked_fill(~inside.unsqueeze(3), 0)
        total = members.unflatten(2, (count.shape[2], cluster)).sum(3)
        return (total * share).to(tensor.dtype)

    return Centroids(mean(key), mean(value), count.to(torch.promote_types(key.dtype, torch.float32)).log())


def members_gradient(grad: torch.Tensor, order: torch.Tensor, cluster: int, length: int) -> torch.Tensor:
    """Gradient of centroids ``[B, Hkv, clusters, D]`` in their ``length`` keys: 1 / count to each member."""
    inside, count = _members(order, cluster)
    each = (grad / count.clamp(min=1).unsqueeze(3)).repeat_interleave(cluster, 2)
    # A key is in one cluster at most, so the spare row alone is written more than once, and it is dropped.
    at = order.long().where(inside, length).unsqueeze(3).expand_as(each)
    spare = grad.new_zeros(*grad.shape[:2], length + 1, grad.shape[3])
    return spare.scatter(2, at, each)[:, :, :length]


def _members(order: torch.Tensor, cluster: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which places hold a key ``[B, Hkv, clusters * cluster]``, and how many of each cluster's do."""
    inside = order >= 0
    return inside, inside.unflatten(2, (order.shape[2] // cluster, cluster)).sum(3)
