"""Attention of few queries, as where a sequence is continued, over every key that a mask in memory allows."""

from __future__ import annotations

import torch

from .reference import Operands

MOST = 127
"""Queries. Of more, products of matrices are faster (of 64, by a tenth), and prompts are approximated."""


def reference(
    site: Operands, allowed: torch.Tensor | None, added: torch.Tensor | None, softcap: float = 0.0
) -> torch.Tensor:
    """``[B, H, Nq, Dv]`` in the query's dtype, computed in float32 or the query's if that is wider.

    Logits are capped, then numbers are added, then keys are hidden: as models do it. A query without keys gets zeros.

    Args:
        site: neither causal nor with ``valid``; keys and values of ``H / group`` heads.
        allowed: which keys each query may attend, bools that broadcast to ``[B, H, Nq, Nk]``; None: all.
        added: numbers that logits are added to, which broadcast so, too; None: none. softcap: ``c`` of
            ``c * tanh(logits / c)``; 0.0: none.
    """
    query, key, value = (t if t.dtype == torch.float64 else t.float() for t in site[:3])
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    logits = query @ key.transpose(2, 3) * site.scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if added is not None:
        logits = logits + added
    if allowed is not None:
        logits = logits.masked_fill(allowed.logical_not(), -torch.inf)
        value = value.masked_fill(_hidden_from_all(allowed, logits)[..., None], 0.0)
    if site.sink_logit is not None:
        logits = torch.cat([logits, site.sink_logit.to(logits.dtype)[..., None]], 3)
    weights = torch.where((logits == -torch.inf).all(3, True), 0.0, torch.softmax(logits, 3))
    return (weights[..., : key.shape[2]] @ value).to(site.query.dtype)


def _hidden_from_all(allowed: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Keys that no query of a head attends, ``[B, H, Nk]``: what their values are does not matter, be it NaN."""
    return allowed.expand(logits.shape).logical_not().all(2)
