"""Balanced k-means and k-median: the clusters of ``pca_tree``, improved by exchanging keys.

Each round puts a centre into every cluster and then lets two keys of different clusters change places
where that brings them nearer to their centres. Every key names the partner with the largest gain;
the pairs that name each other are exchanged at once. With the centres fixed their gains add up, and the
best pair of all is always among them, so a round never makes the clustering worse, and the
clusters stay as large as they are. The exchange method of Späth (1985, "Cluster dissection
and analysis") on pairs. Cost: rounds * (L * K * D + 3 * L^2) a chunk on top of the tree, with K clusters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .pca_tree import pca_tree

ROUNDS = 8
WEISZFELD_STEPS = 3
PAIRS_AT_ONCE = 2**21
"""Pairs of keys that one step looks at: they and their gains stay in the cache."""

Centre = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def kmeans(keys: torch.Tensor, member: torch.Tensor, cluster: int) -> torch.Tensor:
    """Least sum of squared distances to the clusters' means, among clusters of ``cluster`` keys."""
    return _exchange(keys, member, cluster, _mean, 2)


def kmedian(keys: torch.Tensor, member: torch.Tensor, cluster: int) -> torch.Tensor:
    """Least sum of distances to the clusters' geometric medians (see ``kernels.scorers.kmedian``)."""
    return _exchange(keys, member, cluster, _median, 1)


def _exchange(keys: torch.Tensor, member: torch.Tensor, cluster: int, centre: Centre, power: int) -> torch.Tensor:
    size = max(1, PAIRS_AT_ONCE // max(keys.shape[1] ** 2, 1))
    orders = []
    for points, inside in zip(keys.split(size), member.split(size), strict=True):
        points = points.where(inside.unsqueeze(2) & points.isfinite(), 0)
        order = pca_tree(points, inside, cluster)
        for _ in range(ROUNDS):
            swapped = _round(points, inside, order, cluster, centre, power)
            if torch.equal(swapped, order):
                break
            order = swapped
        orders.append(order)
    return torch.cat(orders)


def _round(
    points: torch.Tensor, member: torch.Tensor, order: torch.Tensor, cluster: int, centre: Centre, power: int
) -> torch.Tensor:
    """The order after the exchanges of one round."""
    sorted_points = points.gather(1, order.unsqueeze(2).expand_as(points))
    inside = member.gather(1, order)
    groups = sorted_points.unflatten(1, (-1, cluster))
    centres = centre(groups, inside.unflatten(1, (-1, cluster)).unsqueeze(3).to(points.dtype))
    far = torch.cdist(sorted_points, centres, compute_mode="donot_use_mm_for_euclid_dist") ** power
    own = far.gather(2, (torch.arange(order.shape[1], device=order.device) // cluster).expand_as(order).unsqueeze(2))
    # What it costs the key at place i to move to the cluster of place j, and both of them to change places.
    move = (far - own).masked_fill(~inside.unsqueeze(2), float("inf")).repeat_interleave(cluster, dim=2)
    cost, partner = (move + move.transpose(1, 2)).min(2)
    # An exchange must gain more than rounding can feign, or equal keys would change places for ever.
    own, place = own.squeeze(2), torch.arange(order.shape[1], device=order.device)
    worth = -cost > 1e-5 * (own + own.gather(1, partner))
    mutual = worth & (partner.gather(1, partner) == place)
    return order.gather(1, partner.where(mutual, place))


def _mean(groups: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (groups * weight).sum(2) / weight.sum(2).clamp(min=1e-30)


def _median(groups: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """By Weiszfeld's iteration from the mean."""
    median = _mean(groups, weight)
    for _ in range(WEISZFELD_STEPS):
        distance = (groups - median.unsqueeze(2)).norm(dim=3, keepdim=True)
        median = _mean(groups, weight / distance.clamp(min=1e-6))
    return median
