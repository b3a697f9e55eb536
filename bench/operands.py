"""The inputs of the benchmarks of attention alone, and the pairs that their plans attend."""

from __future__ import annotations

from dataclasses import replace

import torch

from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands

PEAKED = 4.0
"""Queries are so many times as large as keys, so that some keys matter more than others."""


def smooth(
    length: int, heads: int, group: int, dim: int, causal: bool, dtype: torch.dtype, device: str = "cpu"
) -> Operands:
    """Smooth along the sequence, as real queries and keys are; ``heads / group`` KV heads, batch 1."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(count: int, steps: int) -> torch.Tensor:
        return torch.randn(1, count, steps, dim, generator=generator, device=device)

    def one(count: int) -> torch.Tensor:
        noise, steps = draw(count, length), draw(count, length // 64 + 1)
        return (noise / 2 + steps.repeat_interleave(64, 2)[:, :, :length]).to(dtype)

    query, key, value = one(heads), one(heads // group), one(heads // group)
    return Operands(PEAKED * query, key, value, None, causal, dim**-0.5)


def counted(plan: Plan, taken: float | None) -> Plan:
    """The plan with the routes that a query takes on average in place of a share, where they were counted."""
    return replace(plan, share=0.0, routes=round(taken)) if plan.share and taken is not None else plan
