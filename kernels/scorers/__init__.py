"""Scorers: one number a key, before any query that will read it is known.

Every scorer is a function ``(keys, mask, queries, scale, causal, seed) -> scores`` over a batch
of chunks: ``keys`` ``[M, L, D]`` float32, ``mask`` ``[M, L]`` bool (False: not a key), ``queries``
``[M, G, L, D]`` float32 of the chunk's own positions (G query heads share the KV head), ``scale``
the logit scale. It returns ``[M, L]`` float32, larger = kept first. Scores of masked keys are not
read. A chunk's scores depend on that chunk alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .kmeans import kmeans
from .leverage import leverage
from .peak import peak
from .random import random

Scorer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, bool, int], torch.Tensor]

SCORERS: dict[str, Scorer] = {
    "kmeans": kmeans,
    "leverage": leverage,
    "peak": peak,
    "random": random,
}

__all__ = ["SCORERS", "Scorer", "kmeans", "leverage", "peak", "random"]
