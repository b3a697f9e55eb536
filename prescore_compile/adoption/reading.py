"""How a causal language model reads: its losses and likeliest next tokens, exact and prescored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..batches import Call
from ..drift import compared, counted
from ..passes import Report
from ..tokens import next_tokens

Read = tuple[torch.Tensor, torch.Tensor]
"""Losses and likeliest tokens of one output."""


class Reading:
    """Sums over batches, of models whose logits are about the batch's own next tokens.

    Such a model has a rewritten site that is causal, or may turn out to be.
    """

    def __init__(self, model: Any, reports: Sequence[Report]) -> None:
        rewritten = [site for report in reports for site in report.rewritten]
        self.causal = any(site.causal or "causal" in site.recognized for site in rewritten)
        self.decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.exact, self.other, self.same, self.count = 0.0, 0.0, 0, 0

    def of(self, call: Call, output: Any) -> Read | None:
        """Of one output; None where it has no logits of the batch's tokens."""
        part = "decoder_" if self.decoder or "decoder_input_ids" in call.kwargs else ""
        ids = call.kwargs.get(f"{part}input_ids", call.args[0] if call.args and not part else None)
        if not self.causal or not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
            return None
        try:
            logits = compared(output)
        except ValueError:
            return None
        if logits.dim() != 3 or ids.shape != logits.shape[:2] or not ids.numel() or ids.max() >= logits.shape[2]:
            return None
        mask = {"attention_mask": call.kwargs.get(f"{part}attention_mask")}
        return next_tokens(logits, ids.long().to(logits.device), counted(logits, mask))

    def add(self, exact: Read | None, other: Read | None) -> None:
        """One batch of both."""
        if exact is not None and other is not None:
            self.exact += exact[0].double().sum().item()
            self.other += other[0].double().sum().item()
            self.same += int((exact[1] == other[1]).sum())
            self.count += len(exact[0])

    @property
    def evidence(self) -> dict[str, Any]:
        """Share of likeliest tokens that stay, and perplexity = exp(mean natural-log cross-entropy), of both."""
        if not self.count:
            return {}
        before, after = (_exp(total / self.count) for total in (self.exact, self.other))
        return {"top1_agreement": self.same / self.count, "exact_perplexity": before, "perplexity": after}

    def __str__(self) -> str:
        found = self.evidence
        if not found:
            return ""
        before, after = found["exact_perplexity"], found["perplexity"]
        ratio = f" ({after / before:.4f}x)" if math.isfinite(before) and math.isfinite(after) else ""
        agreement = f"top-1 agreement {100 * found['top1_agreement']:.1f}%"
        return f"{agreement}; perplexity {before:.4g} -> {after:.4g}{ratio}"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
