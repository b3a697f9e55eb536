"""``attend_uniform``: attention whose logits are all the same number, and the gradients that they still have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    mean = value.mean(2).repeat_interleave(query.shape[1] // key.shape[1], 1)
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
    wide = torch.promote_types(query.dtype, torch.float32)
    (batch, heads, _, dim), (_, kv_heads, k_len, _) = query.shape, key.shape
    of_query = query.new_zeros(query.shape)
    of_key, k, v = key.new_zeros(key.shape, dtype=wide), key.to(wide), value.to(wide)

    def grouped(tensor: Tensor) -> Tensor:
        """The query heads of a KV head one after the other: ``[B, Hkv, H / Hkv * rows, features]``."""
        return tensor.to(wide).reshape(batch, kv_heads, -1, tensor.shape[3])

    total = grouped(grad.sum(2, keepdim=True, dtype=wide)).sum(2, keepdim=True)
    of_value = (total / k_len).to(value.dtype).expand_as(value).contiguous()
    apart = (v - v.mean(2, keepdim=True)).mT / k_len
    some = (grad != 0).any(3).flatten(0, 1).any(0).nonzero().flatten()
    for part in some.split(max(1, AT_ONCE // max(1, batch * heads * k_len))):
        rows = grouped(query[:, :, part])
        slope = grouped(grad[:, :, part]) @ apart * scale
        if softcap:
            slope *= 1 - (rows @ k.mT * (scale / softcap)).tanh().square()
        of_query[:, :, part] = (slope @ k).reshape(batch, heads, -1, dim).to(query.dtype)
        of_key += slope.mT @ rows
    return of_query, of_key.to(key.dtype), of_value
