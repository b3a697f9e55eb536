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
    """Uniform numbers from a generator of its own, seeded with ``seed``; reads no key."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.rand(mask.shape, generator=generator).to(keys.device)
