"""Key norms: two controls that read nothing but a key's length."""

from __future__ import annotations

import torch


def norm(
    keys: torch.Tensor,
    mask: torch.Tensor,
    queries: torch.Tensor,
    scale: float,
    causal: bool,
    seed: int,
) -> torch.Tensor:
    """``score_j = || k_j ||_2``.

    What the paper's public code computes under the name "leverage": there the keys are multiplied
    by a random orthogonal matrix first, which leaves the norm as it is. Cost: L * D.
    """
    return keys.norm(dim=2)


def inverse_norm(
    keys: torch.Tensor,
    mask: torch.Tensor,
    queries: torch.Tensor,
    scale: float,
    causal: bool,
    seed: int,
) -> torch.Tensor:
    """``score_j = - || k_j ||_2``: short keys first (Devoto et al. 2024, arXiv 2406.11430). Cost: L * D."""
    return -keys.norm(dim=2)
