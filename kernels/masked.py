"""Attention under a mask that is in memory, on a CPU: keys that it hides from all of a tile of queries are skipped.

What a mask hides only the run time knows, and with it what is faster: SDPA's kernel goes over every key, and over the
mask as numbers, but does not lay keys out anew for each tile. Nor is it known before whether the mask is no more than
causality and valid keys, with which a plan can run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import cpu
from .layout import by_query
from .plan import Plan
from .reads import HIDDEN, Read, mask_of
from .reference import Operands
from .summary import Summary

DENSEST = 0.6
"""Share of the blocks of keys that are not hidden, beyond which SDPA may be faster; docs/cpu.md has the measurement."""

LOWEST = -9e8
"""A logit that this is added to has no weight, in float32, beside one that nothing is added to: -1e9, as any
dtype rounds it."""
LOWEST_HALF = -6e4
"""The same for float16, which ends at -65504."""


def lowest_of(dtype: torch.dtype) -> float:
    """``LOWEST`` of logits of this dtype."""
    return LOWEST_HALF if dtype == torch.float16 else LOWEST


class Seen(NamedTuple):
    """What a mask holds.

    Attributes:
        mask: ``[B or 1, H or 1, Nq or 1, Nk or 1]``, bools (True: attended) or numbers to add.
        allowed: the same as bools; None where numbers do more than to hide keys.
        none: ``[B or 1, H or 1, Nq or 1]`` bool, which queries have no key, where finite numbers hide them and there
            are any.
    """

    mask: torch.Tensor
    allowed: torch.Tensor | None
    none: torch.Tensor | None = None


def see(reads: list[Read], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Seen:
    """Look at the tensors that are read; ``dtype``: of the logits that numbers are added to."""
    mask = mask_of(reads, tensors)
    if not mask.is_floating_point():
        allowed: torch.Tensor | None = mask
        none = mask.amax(3) == 0 if any(read.finite for read in reads) else None
    else:
        allowed, none = cpu.as_allowed(mask, lowest_of(dtype)) or (None, None)
    return Seen(mask, allowed, none if none is not None and none.any() else None)


def attend(
    site: Operands, summary: Summary, routes: torch.Tensor, plan: Plan, seen: Seen, softcap: float
) -> torch.Tensor:
    """``reference.attend`` of a plan without a limit, by ``cpu.attend`` or SDPA: ``[B, H, Nq, Dv]``.

    A mask of numbers goes with neither padding, causality, sinks nor softcaps.
    """
    by_sdpa = site.valid is None and not site.causal and site.sink_logit is None and not softcap
    allowed = seen.allowed
    if allowed is None or (by_sdpa and cpu.share(allowed, site.query.shape, site.key.shape) > DENSEST):
        out = _by_sdpa(site, seen.mask)
        return out if seen.mask.is_floating_point() else or_mean(out, site, seen)
    return or_mean(cpu.attend(site, summary, routes, plan, allowed=allowed, softcap=softcap), site, seen)


def recognized(site: Operands, seen: Seen) -> Operands | None:
    """``site`` with the causality and the valid keys that are all that its mask says.

    None: it says something else. ``valid`` is None where every key is valid. Where keys are more than queries, as in a
    cache that is not full, those after the last that is attended are left out, and the last query's own is the last.
    """
    if seen.allowed is None:
        return None
    (batch, _, queries, _), keys = site.query.shape, site.key.shape[2]
    whole = seen.allowed.expand(batch, seen.allowed.shape[1], queries, keys)
    first, last = whole[:, 0, 0], whole[:, 0, -1]
    causal, used = not torch.equal(first, last), keys
    if queries != keys:
        if queries > keys or not causal:
            return None
        attended = last.any(0).nonzero()
        used = max(int(attended[-1]) + 1 if len(attended) else 0, queries)
    if not cpu.recognized(seen.allowed, causal, site.query.shape, site.key.shape, used):
        return None
    key, value, valid = site.key[:, :, :used], site.value[:, :, :used], last[:, :used]
    return site._replace(key=key, value=value, causal=causal, valid=None if valid.all() else valid)


def or_mean(out: torch.Tensor, site: Operands, seen: Seen) -> torch.Tensor:
    """``out``, and what SDPA makes of the queries without a key: a finite number leaves them the mean of all values."""
    if seen.none is None:
        return out
    none = seen.none.expand(-1, -1, out.shape[2])
    at = none.flatten(0, 1).any(0).nonzero().flatten()
    mask = seen.mask.expand(-1, -1, out.shape[2], -1)[:, :, at]
    if not mask.is_floating_point():
        mask = torch.zeros(mask.shape, dtype=torch.float32).masked_fill(mask == 0, HIDDEN)
    few = _by_sdpa(site._replace(query=site.query[:, :, at]), mask)
    out[:, :, at] = torch.where(none[:, :, at, None], few, out[:, :, at])
    return out


def _by_sdpa(site: Operands, mask: torch.Tensor) -> torch.Tensor:
    query, grouped = site.query, site.query.shape[1] != site.key.shape[1]
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        mask = mask.float()
    with torch.no_grad():
        out = F.scaled_dot_product_attention(*site[:3], mask, scale=site.scale, enable_gqa=grouped)
    return by_query(out)  # as it mostly is
