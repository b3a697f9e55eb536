"""``attend_uniform``: attention whose logits are all the same number, and the gradients that they still have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..heads import in_heads, per_query_head
from ..logits import Logits
from . import dispatch
from .attending import like_output

AT_ONCE = 2**24
"""Pairs that the backward holds at once, of all heads."""


@torch.library.custom_op("prescore::attend_uniform", mutates_args=())
def attend_uniform(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float) -> Tensor:
    """The mean of all values for each query, as where a finite number is added that leaves nothing of the logits.

    What is added hides logits, not their gradients: those in query and key are of ``scale * query @ key.mT``, or with a
    ``softcap`` (0: none) of ``softcap * tanh(scale * query @ key.mT / softcap)``, at weights that are all ``1 / Nk``.

    Args:
        query: ``[B, H, Nq, D]``. key: ``[B, Hkv, Nk, D]``. value: ``[B, Hkv, Nk, Dv]``.

    Returns:
        ``[B, H, Nq, Dv]``, laid out ``[B, Nq, H, Dv]`` in memory.
    """
    mean = per_query_head(value.mean(2), query)
    return mean[:, None].expand(-1, query.shape[2], -1, -1).contiguous().transpose(1, 2)


attend_uniform.register_fake(like_output)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(query, key, value)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*attend_uniform_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.softcap), None, None)


attend_uniform.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("prescore::attend_uniform_backward", mutates_args=(), tags=dispatch.MAY_WAIT)
def attend_uniform_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``attend_uniform`` in query, key and value; it waits for the device.

    Only queries that have a gradient cost anything: a loss mostly leaves out what padding is.
    """
    with dispatch.as_they_are(query):
        return _gradients(grad, query, key, value, scale, softcap)


@attend_uniform_backward.register_fake
def _(grad, query, key, value, scale, softcap):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


attend_uniform_backward.register_autograd(dispatch.no_second_derivative, setup_context=dispatch.no_setup)


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key, of_value = (tensor.new_zeros(tensor.shape) for tensor in (query, key, value))
    some = (grad != 0).any(3).flatten(0, 1).any(0).nonzero().flatten()
    if not some.numel():
        return of_query, of_key, of_value
    wide = torch.promote_types(query.dtype, torch.float32)
    (batch, heads, *_), (_, kv_heads, k_len, _) = query.shape, key.shape
    k, v = key.to(wide), value.to(wide)
    apart, d_key = v - v.mean(2, keepdim=True), k.new_zeros(k.shape)
    of_value += in_heads(grad.sum(2, keepdim=True, dtype=wide), kv_heads).sum(2, keepdim=True) / k_len
    for part in some.split(max(1, AT_ONCE // (batch * heads * k_len))):
        q, d_out = (in_heads(tensor[:, :, part].to(wide), kv_heads) for tensor in (query, grad))
        d_logits = d_out @ apart.mT * (scale / k_len)
        if softcap:
            d_logits *= Logits(softcap=softcap).slope(q @ k.mT * scale)
        of_query[:, :, part] = (d_logits @ k).view(batch, heads, len(part), -1).to(query.dtype)
        d_key += d_logits.mT @ q
    return of_query, d_key.to(key.dtype), of_value
