"""Attention under a mask that is in memory, on a CPU: keys that it hides from all of a tile of queries are skipped.

What a mask hides only the run time knows, and with it what is faster: SDPA's kernel goes over every key, and over the
mask as numbers, but does not lay keys out anew for each tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import cpu
from .plan import Plan
from .reference import Operands
from .summary import Summary

DENSEST = 0.6
"""Share of the blocks of keys that are not hidden, beyond which SDPA may be faster; docs/cpu.md has the measurement."""


def attend(
    site: Operands, summary: Summary, routes: torch.Tensor, plan: Plan, allowed: torch.Tensor, softcap: float
) -> torch.Tensor:
    """``cpu.attend`` of a plan without a limit, or what SDPA makes of it: ``[B, H, Nq, Dv]``.

    ``allowed``: a bool tensor that broadcasts to ``[B, H, Nq, Nk]``.
    """
    by_sdpa = site.valid is None and not site.causal and site.sink_logit is None and not softcap
    if by_sdpa and cpu.share(allowed, site.query.shape, site.key.shape) > DENSEST:
        grouped = site.query.shape[1] != site.key.shape[1]
        with torch.no_grad():
            out = F.scaled_dot_product_attention(*site[:3], allowed, scale=site.scale, enable_gqa=grouped)
        return out.transpose(1, 2).contiguous().transpose(1, 2)  # as it mostly is
    return cpu.attend(site, summary, routes, plan, allowed=allowed, softcap=softcap)
