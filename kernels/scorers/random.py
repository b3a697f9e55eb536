"""Random: the control that every scorer must beat."""

from __future__ import annotations

import torch


def random(
    keys: torch.Tensor,
    mask: torch.Tensor,
    queries: torch.Tensor,
    scale: float,
    causal: bool,
    seed: int,
) -> torch.Tensor:
    """``frac(10^4 |k_j . r|)`` with ``r`` drawn from ``seed``: numbers without meaning.

    A hash of the key instead of a draw for each key, so that a chunk's scores depend on that chunk
    alone, however long the sequence grows. Cost: L * D.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    direction = torch.randn(keys.shape[2], generator=generator).to(keys.device)
    return ((keys * direction).sum(2).abs() * 1e4).frac()
