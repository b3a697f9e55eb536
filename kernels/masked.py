"""Attention under a mask that is in memory, on a CPU: keys that it hides from all of a tile of queries are skipped.

What a mask hides only the run time knows, and with it what is faster: SDPA's kernel goes over every key, and over the
mask as numbers, but does not lay keys out anew for each tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import cpu
from .logits import Read
from .plan import Plan
from .reference import Operands
from .summary import Summary

DENSEST = 0.6
"""Share of the blocks of keys that are not hidden, beyond which SDPA may be faster; docs/cpu.md has the measurement."""

LOWEST = -9e8
"""A logit that this is added to has no weight, in float32, beside one that nothing is added to: -1e9, as any
dtype rounds it."""
LOWEST_HALF = -6e4
"""The same for float16, which ends at -65504."""


def attend(
    site: Operands, summary: Summary, routes: torch.Tensor, plan: Plan, read: Read, tensor: torch.Tensor, softcap: float
) -> torch.Tensor:
    """``reference.attend`` of a plan without a limit, by ``cpu.attend`` or SDPA: ``[B, H, Nq, Dv]``.

    ``read``: what ``tensor`` says of each pair. A mask of numbers goes with neither padding, causality, sinks nor
    softcaps.
    """
    mask = read.of_pairs(tensor)
    allowed = mask if read.says != "added" else _allowed(mask, site.query.dtype)
    by_sdpa = site.valid is None and not site.causal and site.sink_logit is None and not softcap
    if allowed is None or (by_sdpa and cpu.share(allowed, site.query.shape, site.key.shape) > DENSEST):
        return _by_sdpa(site, mask)
    return cpu.attend(site, summary, routes, plan, allowed=allowed, softcap=softcap)


def _allowed(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """What is left where numbers do no more than to hide keys."""
    return cpu.as_allowed(mask, LOWEST_HALF if dtype == torch.float16 else LOWEST)


def _by_sdpa(site: Operands, mask: torch.Tensor) -> torch.Tensor:
    query, grouped = site.query, site.query.shape[1] != site.key.shape[1]
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        mask = mask.float()
    with torch.no_grad():
        out = F.scaled_dot_product_attention(*site[:3], mask, scale=site.scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # as it mostly is
