"""What a language model says of the tokens that it reads: losses, and the likeliest next ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

POSITIONS = 1024
"""That are looked at together."""


def next_tokens(
    logits: torch.Tensor, ids: torch.Tensor, counted: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy (nats) of the token after each position but a row's last, and the likeliest one: ``[M]`` each.

    Args:
        logits: ``[B, N, V]``. ids: ``[B, N]``. counted: ``[B, N]`` bool, positions that are no padding; None: all are.
            A pair of positions counts where both do.
    """
    losses, best = [], []
    both = torch.ones_like(ids, dtype=torch.bool) if counted is None else counted.to(ids.device)
    for row, own, here in zip(logits, ids, both[:, :-1] & both[:, 1:], strict=True):
        at = here.nonzero().flatten()
        for some in at.split(POSITIONS):
            part = row[some].float()
            losses.append(F.cross_entropy(part, own[some + 1], reduction="none"))
            best.append(part.argmax(1))
    none = logits.new_empty(0, dtype=torch.float32)
    return torch.cat(losses or [none]), torch.cat(best or [none.long()])
