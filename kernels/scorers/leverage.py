"""Statistical leverage: how much of a direction of key space only this key covers."""

from __future__ import annotations

import torch

RIDGE = 1e-3


def leverage(
    keys: torch.Tensor,
    mask: torch.Tensor,
    queries: torch.Tensor,
    scale: float,
    causal: bool,
    seed: int,
) -> torch.Tensor:
    """``score_j = k_j^T (K^T K + eps I)^-1 k_j`` on the chunk's centred keys, exactly.

    ``eps`` is 1e-3 of the mean eigenvalue of ``K^T K``, so the score does not change when all
    keys are scaled. Source: arXiv 2505.11040, section 3 (leverage scores); Drineas et al. 2012
    for the definition. Cost: L * D^2 + D^3 / 3 multiply-adds a chunk, no sketch needed for
    D <= 256. ``queries``, ``scale``, ``causal`` and ``seed`` are not read.
    """
    weight = mask.unsqueeze(2).to(keys.dtype)
    live = keys.where(mask.unsqueeze(2), 0)
    centred = (live - live.sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)) * weight
    gram = centred.transpose(1, 2) @ centred
    dim = keys.shape[2]
    mean_eigenvalue = gram.diagonal(dim1=1, dim2=2).mean(1)
    ridge = (RIDGE * mean_eigenvalue).clamp(min=torch.finfo(keys.dtype).tiny * dim)
    gram = gram + ridge[:, None, None] * torch.eye(dim, dtype=keys.dtype, device=keys.device)
    factor, _ = torch.linalg.cholesky_ex(gram)
    solved = torch.linalg.solve_triangular(factor, centred.transpose(1, 2), upper=False)
    return (solved * solved).sum(1)
