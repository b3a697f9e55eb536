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
    allowed, none = (mask, None) if read.says != "added" else _hiding(mask, site.query.dtype)
    by_sdpa = site.valid is None and not site.causal and site.sink_logit is None and not softcap
    if allowed is None or (by_sdpa and cpu.share(allowed, site.query.shape, site.key.shape) > DENSEST):
        return _by_sdpa(site, mask)
    out = cpu.attend(site, summary, routes, plan, allowed=allowed, softcap=softcap)
    return out if none is None else _or_by_sdpa(out, none, site, mask)


def _hiding(mask: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What is allowed where numbers do no more than to hide keys, and which queries have none, if any."""
    allowed, none = cpu.as_allowed(mask, LOWEST_HALF if dtype == torch.float16 else LOWEST) or (None, None)
    return allowed, none if none is not None and none.any() else None


def _or_by_sdpa(out: torch.Tensor, none: torch.Tensor, site: Operands, mask: torch.Tensor) -> torch.Tensor:
    """``out``, and what SDPA makes of the queries without a key: a finite number leaves them the mean of all values."""
    if mask.shape[2] == 1:
        return _by_sdpa(site, mask)
    at = none.flatten(0, 1).any(0).nonzero().flatten()
    few = _by_sdpa(site._replace(query=site.query[:, :, at]), mask[:, :, at])
    out[:, :, at] = torch.where(none[:, :, at, None], few, out[:, :, at])
    return out


def _by_sdpa(site: Operands, mask: torch.Tensor) -> torch.Tensor:
    query, grouped = site.query, site.query.shape[1] != site.key.shape[1]
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        mask = mask.float()
    with torch.no_grad():
        out = F.scaled_dot_product_attention(*site[:3], mask, scale=site.scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # as it mostly is
