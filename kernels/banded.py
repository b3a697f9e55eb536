"""A band's ends as numbers, and the gradients of its attention on a CPU."""

from __future__ import annotations

import functools

import torch

from .band import Band
from .heads import in_heads, pair_logits
from .logits import Logits, value
from .reference import Operands, shared_softmax, with_sink

TILE = 128
FAR = 2**16


def ends(found: Band, q_len: int, k_len: int, causal: bool) -> torch.Tensor:
    """The first and the last key of each query, causality counted in: ``[2, Nq]`` int64.

    Where there is none, the last lies before the first.
    """
    at = torch.arange(q_len)
    low, high = _values(found, at, k_len)
    if causal:
        high = torch.minimum(high, at + (k_len - q_len))
    return torch.stack([low.clamp(0, k_len), high.clamp(-1, k_len - 1)])


def within(site: Operands, ends: torch.Tensor) -> tuple[Operands, torch.Tensor]:
    """The site with the keys that any query attends and no other, bidirectional, and its ends."""
    if not ends.numel():
        return site, ends
    first, last = int(ends[0, 0]), int(ends[1, -1])
    count = max(last - first + 1, 0)
    key, value = (tensor.narrow(2, first, count) for tensor in (site.key, site.value))
    valid = None if site.valid is None else site.valid[:, first : first + count]
    return site._replace(key=key, value=value, valid=valid, causal=False), ends - first


@functools.cache
def keys_a_query(found: Band) -> tuple[float, int]:
    """How many keys a query of a long sequence is left: on average, and at most; (0.0, 0) where they grow with it."""
    if found.low is None or found.high is None:
        return 0.0, 0
    low, high = _values(found, torch.arange(FAR, 3 * FAR), 4 * FAR)
    count = (high - low + 1).clamp(min=0)
    near, far = count.chunk(2)
    return (float(count.double().mean()), int(count.max())) if near.max() == far.max() else (0.0, 0)


def _values(found: Band, queries: torch.Tensor, k_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = 0 if found.low is None else found.low, k_len - 1 if found.high is None else found.high
    return tuple(torch.as_tensor(value(end, {"q": queries}, {})).expand_as(queries) for end in (low, high))  # type: ignore[return-value]


def backward(grad: torch.Tensor, site: Operands, ends: torch.Tensor, softcap: float = 0.0) -> tuple[torch.Tensor, ...]:
    """``reference.attend_backward`` of a plan without a limit, tile by tile: of no keys but a tile's own.

    ``grad`` ``[B, H, Nq, Dv]``; ``ends``: with causality; ``softcap``: 0.0: none. Gradients of query, key, value and,
    where there is one, sink_logit, in float32 or wider.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    query, key, value = (t.to(wide) for t in site[:3])
    q_len, kv_heads = query.shape[2], key.shape[1]
    d_query, d_key, d_value = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    capped = Logits(softcap=softcap)
    d_sink = [] if site.sink_logit is None else [torch.zeros_like(site.sink_logit, dtype=wide)]
    for begin in range(0, q_len, TILE):
        end = min(begin + TILE, q_len)
        low, high = int(ends[0, begin]), int(ends[1, end - 1]) + 1
        if low >= high:
            continue
        at, i = torch.arange(low, high), torch.arange(begin, end)
        seen = (at >= ends[0, i, None]) & (at <= ends[1, i, None])
        if site.valid is not None:
            seen = seen & site.valid[:, None, None, low:high]
        q, d_out = query[:, :, begin:end], grad[:, :, begin:end].to(wide)
        k, v = key[:, :, low:high], value[:, :, low:high]
        uncapped = pair_logits(q, k, site.scale)
        logits = capped.applied(uncapped, {}, {}).masked_fill(~seen, float("-inf"))
        weights, *sink = shared_softmax(with_sink([logits], site, begin, end))
        d_weights = pair_logits(d_out, v, 1.0)
        inner = (weights * d_weights).sum(3, keepdim=True)
        d_logits = weights * (d_weights - inner) * capped.slope(uncapped) * site.scale
        rows = in_heads(d_logits, kv_heads)
        d_query[:, :, begin:end] = (rows @ k).view_as(q)
        d_key[:, :, low:high] += rows.mT @ in_heads(q, kv_heads)
        d_value[:, :, low:high] += in_heads(weights, kv_heads).mT @ in_heads(d_out, kv_heads)
        if d_sink:
            d_sink[0][:, :, begin:end] = -(sink[0] * inner).squeeze(3)
    return d_query, d_key, d_value, *d_sink
