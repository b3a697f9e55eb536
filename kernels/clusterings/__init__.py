"""Clusterings: which keys of a chunk lie together, so that one representative stands for them.

Every clustering is a function ``(keys, member, cluster) -> order`` over a batch of chunks: ``keys``
``[M, L, D]`` float32, ``member`` ``[M, L]`` bool (False: sink, padding or no key). It returns
``[M, L]`` int64, the position in the chunk of the key at each place: each run of ``cluster`` places is
one cluster, members stand before all others. All clusters are full but the last that has a member.
A chunk is clustered alone, and nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .exchange import kmeans, kmedian
from .pca_tree import pca_tree
from .runs import contiguous, leverage, principal

Clustering = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]

CLUSTERINGS: dict[str, Clustering] = {
    "pca_tree": pca_tree,
    "kmeans": kmeans,
    "kmedian": kmedian,
    "leverage": leverage,
    "principal": principal,
    "contiguous": contiguous,
}

__all__ = ["CLUSTERINGS", "Clustering"]
