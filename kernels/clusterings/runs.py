"""Keys put in one order and cut into runs: the cheapest clusterings, and controls for the others."""

from __future__ import annotations

import torch

from ..scorers.leverage import leverage as leverage_score
from .pca_tree import project


def leverage(keys: torch.Tensor, member: torch.Tensor, cluster: int) -> torch.Tensor:
    """By falling leverage score: what is unlike everything else lies together.

    The score of ``kernels.scorers.leverage`` (arXiv 2505.11040, section 3), used as an index. Cost:
    L * D^2 + D^3 / 3 multiply-adds a chunk.
    """
    live = _live(keys, member)
    score = leverage_score(live, member, live.new_empty(len(live), 0, *live.shape[1:]), 1.0, True, 0)
    return score.masked_fill(~member, float("-inf")).argsort(dim=1, descending=True, stable=True)


def principal(keys: torch.Tensor, member: torch.Tensor, cluster: int) -> torch.Tensor:
    """Along the leading principal direction: ``pca_tree`` without its later levels. Cost: L * D^2 a chunk."""
    along = project(_live(keys, member), member)
    return along.masked_fill(~member, float("inf")).argsort(dim=1, stable=True)


def contiguous(keys: torch.Tensor, member: torch.Tensor, cluster: int) -> torch.Tensor:
    """As they come: runs of neighbours, as the blocks of MoBA (Lu et al. 2025, arXiv 2502.13189)."""
    return (~member).to(torch.int8).argsort(dim=1, stable=True)


def _live(keys: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """The members' keys, and 0 for what is no member or not finite."""
    return keys.where(member.unsqueeze(2) & keys.isfinite(), 0)
