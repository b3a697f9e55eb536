"""Scorers: one number a key, before any query that will read it is known.

Every scorer is a function ``(keys, mask, queries, scale, causal, seed) -> scores`` over a batch
of chunks: ``keys`` ``[M, L, D]`` float32, ``mask`` ``[M, L]`` bool (False: not a key), ``queries``
``[M, G, L, D]`` float32 of the chunk's own positions (G query heads share the KV head), ``scale``
the logit scale. It returns ``[M, L]`` float32, larger = kept first. Scores of masked keys are not
read. A chunk's scores depend on that chunk alone. A user's own function is called by ``custom``; the
one method that looks further than its chunk, ``window_peak``, is called with what it needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .kernel_kmeans import kernel_kmeans
from .kmeans import kmeans, kmeans_relative
from .kmedian import kmedian
from .leverage import leverage
from .norm import inverse_norm, norm
from .peak import peak
from .query import query
from .random import random

Scorer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, bool, int], torch.Tensor]

SCORERS: dict[str, Scorer] = {
    "kmeans": kmeans,
    "kmeans_relative": kmeans_relative,
    "kernel_kmeans": kernel_kmeans,
    "kmedian": kmedian,
    "leverage": leverage,
    "peak": peak,
    "random": random,
    "norm": norm,
    "inverse_norm": inverse_norm,
    "query": query,
}

READS_QUERIES = frozenset({"peak", "query", "window_peak"})
"""The scorers that are given queries; for the others the group is empty (G = 0)."""

__all__ = ["READS_QUERIES", "SCORERS", "Scorer"]
