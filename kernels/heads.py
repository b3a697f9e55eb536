"""Grouped heads: several query heads share the keys and values of one."""

from __future__ import annotations

import torch


def pair_logits(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * q . k``, ``[B, H, T, Nk]``, for grouped heads."""
    grouped = in_heads(query, key.shape[1]) @ key.transpose(2, 3) * scale
    return grouped.view(*query.shape[:3], key.shape[2])


def in_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, H, T, X]`` -> ``[B, Hkv, G * T, X]``: the G query heads of a KV head are consecutive."""
    batch, all_heads, length, last = tensor.shape
    return tensor.reshape(batch, heads, all_heads // heads * length, last)


def per_query_head(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """``[B, Hkv, ...]`` -> ``[B, H, ...]``."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)
