"""Scorers as users write them: functions of a module of theirs."""

from __future__ import annotations

import torch


def widest(keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return keys.abs().amax(2)


def asked(
    keys: torch.Tensor, mask: torch.Tensor, queries: torch.Tensor, scale: float, causal: bool, seed: int
) -> torch.Tensor:
    return scale * (queries.mean((1, 2)).unsqueeze(1) * keys).sum(2)


def scribbling(keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    keys.zero_()
    return keys.sum(2)


def of_one_chunk(keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return keys[0].sum(1)


def of_integers(keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return keys.argmax(2)


def of_three(keys: torch.Tensor, mask: torch.Tensor, more: int) -> torch.Tensor:
    return keys.sum(2)
