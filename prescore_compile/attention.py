"""The eager twin: prescored attention without torch.compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .kernels import ops
from .kernels.reference import Operands
from .passes import Config
from .passes.compat import forward_mode, function_gradient


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    config: Config | None = None,
) -> torch.Tensor:
    """``F.scaled_dot_product_attention`` with pre-scored keys, differentiable.

    Args:
        query: ``[B, H, Nq, D]``, float32, bfloat16 or float16, on a CPU or a GPU that there are
            kernels for (docs/triton.md); any other float dtype or device, and on a GPU more than 256 features, run the
            reference.
        key: ``[B, Hkv, Nk, D]``. value: ``[B, Hkv, Nk, Dv]``. ``H`` may be a multiple of ``Hkv`` with
            ``enable_gqa=True``.
        attn_mask: None, or a bool key padding mask ``[B or 1, 1, 1, Nk]`` (False: padding); with
            ``is_causal=True`` both hold, unlike in torch, which refuses the pair.
        dropout_p: only 0. scale: default ``D ** -0.5``.
        is_causal: query ``i`` attends keys up to ``i``; needs ``Nq == Nk``.
        config: default ``Config()``. Fewer keys than ``config.min_seq_len`` run exact. No gain is asked for, as with
            ``only_if_faster=False``; what is for a graph (``plan``, ``include``, ``exclude``, ``inner``, ``dump``) is
            an error.

    Returns:
        ``[B, H, Nq, Dv]`` in the query's dtype.

    Raises:
        ValueError: what was got and what is allowed.
    """
    config = Config.of(config)
    if names := config.of_graphs():
        allowed = "settings of one plan, min_seq_len and only_if_faster"
        raise ValueError(f"config: got {', '.join(names)}, which is for a graph and its sites; allowed: {allowed}")
    valid = _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, config)
    if forward_mode():
        raise ValueError("got forward-mode AD (a dual level is open); allowed: gradients in reverse mode")
    if function_gradient():  # the operators' gradients are those of torch.library, which torch.func does not take
        raise ValueError("got torch.func.grad, vjp or jacrev; allowed: torch.autograd.grad and backward()")
    where = query.device.type
    # As SDPA does. Not is_autocast_available, which Dynamo of torch 2.11 does not trace.
    if where != "meta" and torch.is_autocast_enabled(where):
        dtype = torch.get_autocast_dtype(where)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    scale = max(query.shape[3], 1) ** -0.5 if scale is None else float(scale)
    empty = 0 in (*query.shape, *key.shape, *value.shape)
    if empty or key.shape[2] < config.min_seq_len:
        return _exact(query, key, value, valid, is_causal, scale)
    return ops.prescored(
        Operands(query, key, value, valid, is_causal, scale),
        config.plan_for(is_causal, query.device.type, key.shape[2]),
    )


def _exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    gqa = query.shape[1] != key.shape[1]
    if valid is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    mask = valid[:, None, None, :]
    if is_causal:
        mask = mask & torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
    config: Config,
) -> torch.Tensor | None:
    """Validate the call; returns the key validity ``[B, Nk]``."""
    given = {"query": query, "key": key, "value": value} | ({} if attn_mask is None else {"attn_mask": attn_mask})
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: got {type(tensor).__name__}; allowed: a tensor")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise ValueError(f"{name}: got {flag!r}; allowed: a bool")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"got {shapes}; allowed: three tensors [batch, heads, length, head_dim]")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(f"got {query.dtype}, {key.dtype}, {value.dtype}; allowed: one floating dtype for all three")
    if not query.device == key.device == value.device:
        raise ValueError(f"got {query.device}, {key.device}, {value.device}; allowed: one device for all three")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"got {shapes}; allowed: query and key of the same head_dim")
    if not query.shape[0] == key.shape[0] == value.shape[0] or key.shape[1:3] != value.shape[1:3]:
        raise ValueError(f"got {shapes}; allowed: one batch size, and key and value of the same heads and length")
    if query.shape[1] != key.shape[1] and (not enable_gqa or not key.shape[1] or query.shape[1] % key.shape[1]):
        raise ValueError(f"got {shapes}, enable_gqa={enable_gqa}; allowed: equal heads, or a multiple with enable_gqa")
    if dropout_p:
        raise ValueError(f"got dropout_p={dropout_p}; allowed: 0.0")
    if query.shape[2] != key.shape[2]:
        if is_causal:
            raise ValueError(f"got {shapes}, is_causal=True; allowed: as many queries as keys")
        if config.window is not None and key.shape[2] >= config.min_seq_len:
            raise ValueError(f"got {shapes}; allowed: as many queries as keys (no window is near a cross query)")
    if attn_mask is None:
        return None
    batch, k_len = key.shape[0], key.shape[2]
    allowed = [(1, 1, 1, k_len), (batch, 1, 1, k_len)]
    if attn_mask.device != key.device:
        raise ValueError(f"attn_mask: got one on {attn_mask.device}; allowed: on {key.device}, as query, key and value")
    if attn_mask.dtype != torch.bool or tuple(attn_mask.shape) not in allowed:
        raise ValueError(
            f"attn_mask: got {attn_mask.dtype} {tuple(attn_mask.shape)}; allowed: a bool key padding mask "
            f"[{batch} or 1, 1, 1, {k_len}], together with is_causal=True where the site is causal"
        )
    return attn_mask[:, 0, 0, :].expand(batch, k_len)
