"""The eager reference: the attention of this project written down plainly. It defines the result.

For a query, ONE softmax over disjoint sources:

  (a) the exact keys of its window,                         logit = scale * q . k_j
  (b) rows: sinks, selected keys and centroids of the       logit = scale * q . k_r + bias_r
      segments that are finished before its window,
  (c) the exact keys of its routes: the clusters outside    logit = scale * q . k_j
      its window whose representative answers it best,
  (d) with a residual: the centroids of the other clusters   logit = scale * q . mean_c + log(count_c)
      outside its window,
  (e) a learned sink, which has weight and no value.         logit = sink_logit

Everything here is plain torch on any device and works through the queries in tiles, so no tensor
is n x n. Selection is a constant: gradients flow through the attended keys, values and rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .centroids import Centroids, centroids, members_gradient
from .heads import in_heads, pair_logits, per_query_head
from .layout import TILE, Span, chunk_of, outside, segments, spans
from .logits import NO_TENSORS, NOTHING, Logits, pair_places
from .plan import WHOLE, Plan
from .summary import Summary


class Operands(NamedTuple):
    """What is attended: tensors of one site and what the mask says of them.

    Attributes:
        query: ``[B, H, Nq, D]``. key: ``[B, Hkv, Nk, D]``. value: ``[B, Hkv, Nk, Dv]``.
        valid: ``[B, Nk]`` bool or None; False: padding, attended by no query.
        causal: query ``i`` attends keys up to ``i + Nk - Nq``. scale: of the logits.
        sink_logit: ``[B, H, Nq]`` or None; one more logit of each query's softmax, which belongs to no key: the learned
            attention sink of gpt-oss (OpenAI 2025, arXiv 2508.10925).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    valid: torch.Tensor | None
    causal: bool
    scale: float
    sink_logit: torch.Tensor | None = None


def exact(site: Operands) -> torch.Tensor:
    """Attention over every key, in the inputs' precision: what the plan approximates."""
    out = site.query.new_zeros(*site.query.shape[:3], site.value.shape[3])
    for span in _spans(site, WHOLE):
        logits = pair_logits(site.query[:, :, span.begin : span.end], site.key, site.scale)
        logits = logits.masked_fill(~_in_window(site, span), float("-inf"))
        weights = shared_softmax(with_sink([logits], site, span.begin, span.end))[0]
        out[:, :, span.begin : span.end] = _weigh(weights, site.value)
    return out


def mass(
    site: Operands,
    summary: Summary,
    plan: Plan,
    logits: Logits = NOTHING,
    tensors: Mapping[str, torch.Tensor] = NO_TENSORS,
) -> torch.Tensor:
    """Logarithm of the softmax's sum over each query's window, the sinks and a learned one: ``[B, H, Nq]`` float32.

    -inf: there is nothing.
    """
    query, sinks = site.query, slice(plan.sinks)
    found = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    for span in _spans(site, plan):
        here = query[:, :, span.begin : span.end].float()
        key_at, row_at = places_of(site, summary, span)
        keys = logits.applied(pair_logits(here, site.key.float(), site.scale), key_at, tensors)
        rows = logits.applied(pair_logits(here, summary.row_key.float(), site.scale), row_at, tensors)[..., sinks]
        read = per_query_head(_rows_read(summary, plan, span), query).unsqueeze(2)[..., sinks]
        parts = (keys, _in_window(site, span)), (rows, read)
        near = [logit.masked_fill(~seen, float("-inf")) for logit, seen in parts]
        found[:, :, span.begin : span.end] = torch.cat(with_sink(near, site, span.begin, span.end), 3).logsumexp(3)
    return found


def attend(
    site: Operands,
    summary: Summary,
    routes: torch.Tensor,
    plan: Plan,
    logits: Logits = NOTHING,
    tensors: Mapping[str, torch.Tensor] = NO_TENSORS,
) -> torch.Tensor:
    """Attention over window, rows, routes and residual: ``[B, H, Nq, Dv]`` in the inputs' precision.

    ``logits`` says what else is done to them, ``tensors`` what that reads. A query with no key at all
    gives 0, as ``F.scaled_dot_product_attention`` does.
    """
    out = site.query.new_zeros(*site.query.shape[:3], site.value.shape[3])
    rest = _residual(site, summary, plan)
    values = (site.value, summary.row_value, *([rest.value] if rest else []))
    for span in _spans(site, plan):
        weights = attention_weights(site, summary, routes, plan, span, rest, logits, tensors)
        tiles = [_weigh(part, value) for part, value in zip(weights, values, strict=False)]  # a learned sink has none
        out[:, :, span.begin : span.end] = torch.stack(tiles).sum(0)
    return out


def attention_weights(
    site: Operands,
    summary: Summary,
    routes: torch.Tensor,
    plan: Plan,
    span: Span,
    rest: Centroids | None,
    logits: Logits = NOTHING,
    tensors: Mapping[str, torch.Tensor] = NO_TENSORS,
) -> tuple[torch.Tensor, ...]:
    """Softmax weights of a span's queries on all keys ``[B, H, T, Nk]``, all rows ``[B, H, T, R]``, with a residual all
    centroids ``[B, H, T, clusters]``, and on a learned sink ``[B, H, T, 1]``.

    Raises:
        ValueError: a residual, whose centroids stand for several keys, with what is said of pairs.
    """
    if rest is not None and logits != NOTHING:
        raise ValueError(f"residual: got True with {logits.text!r}; allowed: False")
    query = site.query[:, :, span.begin : span.end]
    rows = _rows_read(summary, plan, span)
    keys = (_routed(site, summary, routes, plan, span) & ~_copied(summary, rows, site)) | _in_window(site, span)
    key_at, row_at = places_of(site, summary, span)
    key_logits = logits.applied(pair_logits(query, site.key, site.scale), key_at, tensors)
    key_logits = key_logits.masked_fill(~keys, float("-inf"))
    row_logits = logits.applied(pair_logits(query, summary.row_key, site.scale), row_at, tensors)
    row_logits = row_logits + per_query_head(summary.row_bias, query).unsqueeze(2).to(query.dtype)
    row_logits = row_logits.masked_fill(~per_query_head(rows, query).unsqueeze(2), float("-inf"))
    sources = [key_logits, row_logits]
    if rest is not None:
        bias = per_query_head(rest.bias, query).unsqueeze(2).to(query.dtype)
        unread = _read_residual(routes, rest, plan, span, site)
        sources.append((pair_logits(query, rest.key, site.scale) + bias).masked_fill(~unread, float("-inf")))
    return shared_softmax(with_sink(sources, site, span.begin, span.end))


def shared_softmax(sources: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """One softmax over the logits of all sources."""
    return softmax(torch.cat(sources, 3)).split([part.shape[3] for part in sources], 3)


def with_sink(logits: list[torch.Tensor], site: Operands, begin: int, end: int) -> list[torch.Tensor]:
    """The logits of the queries from ``begin`` to ``end``, those of a learned sink ``[B, H, T, 1]`` after them."""
    if site.sink_logit is None:
        return logits
    return [*logits, site.sink_logit[:, :, begin:end, None].to(logits[0].dtype)]


def places_of(site: Operands, summary: Summary, span: Span) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """b, h, q and k of a span's queries with all keys, and with all rows (an empty row: at key 0)."""
    batch, heads = site.query.shape[:2]
    q = torch.arange(span.begin, span.end, device=site.query.device)
    k = torch.arange(site.key.shape[2], device=site.query.device)
    rows = per_query_head(summary.row_index.long().clamp(min=0), site.query).unsqueeze(2)
    return pair_places(batch, heads, q, k), pair_places(batch, heads, q, rows)


def attend_backward(
    grad: torch.Tensor,
    site: Operands,
    summary: Summary,
    routes: torch.Tensor,
    plan: Plan,
    logits: Logits = NOTHING,
    tensors: Mapping[str, torch.Tensor] = NO_TENSORS,
) -> tuple[torch.Tensor, ...]:
    """Gradients of ``attend`` in query, key, value, row_key, row_value and, where there is one, sink_logit.

    Of the same shapes, float32 or wider. With P the weights, dP = dO V^T and dS = P * (dP - rowsum(dO * O)): the
    softmax backward of FlashAttention (Dao et al. 2022, appendix B), over keys, rows and a learned sink alike, whose
    dP is 0.
    """
    heads = site.key.shape[1]
    wide = torch.promote_types(grad.dtype, torch.float32)
    site = site._replace(query=site.query.to(wide), key=site.key.to(wide), value=site.value.to(wide))
    summary = summary._replace(row_key=summary.row_key.to(wide), row_value=summary.row_value.to(wide))
    rest = _residual(site, summary, plan)
    sources = [(site.key, site.value), (summary.row_key, summary.row_value)]
    if rest is not None:
        sources.append((rest.key, rest.value))
    d_query = torch.zeros_like(site.query)
    d_keys = [torch.zeros_like(key) for key, _ in sources]
    d_values = [torch.zeros_like(value) for _, value in sources]
    d_sink = [] if site.sink_logit is None else [torch.zeros_like(site.sink_logit, dtype=wide)]
    for span in _spans(site, plan):
        weights = attention_weights(site, summary, routes, plan, span, rest, logits, tensors)
        query = site.query[:, :, span.begin : span.end]
        d_out = grad[:, :, span.begin : span.end].to(wide)
        d_weights = [pair_logits(d_out, value, 1.0) for _, value in sources]
        pairs = list(zip(weights, d_weights, strict=False))
        inner = torch.stack([(p * d).sum(3, keepdim=True) for p, d in pairs]).sum(0)
        if d_sink:
            d_sink[0][:, :, span.begin : span.end] = -(weights[-1] * inner).squeeze(3)
        for s, (p, d) in enumerate(pairs):
            slope = logits.slope(pair_logits(query, sources[s][0], site.scale))
            d_logits = p * (d - inner) * slope * site.scale
            d_query[:, :, span.begin : span.end] += _weigh(d_logits, sources[s][0])
            d_keys[s] += in_heads(d_logits, heads).transpose(2, 3) @ in_heads(query, heads)
            d_values[s] += in_heads(p, heads).transpose(2, 3) @ in_heads(d_out, heads)
    if rest is not None:
        d_keys[0] += members_gradient(d_keys[2], summary.order, plan.cluster, site.key.shape[2])
        d_values[0] += members_gradient(d_values[2], summary.order, plan.cluster, site.key.shape[2])
    return d_query, d_keys[0], d_values[0], d_keys[1], d_values[1], *d_sink


def _residual(site: Operands, summary: Summary, plan: Plan) -> Centroids | None:
    return centroids(site.key, site.value, summary.order, plan.cluster) if plan.residual else None


def _read_residual(routes: torch.Tensor, rest: Centroids, plan: Plan, span: Span, site: Operands) -> torch.Tensor:
    """The centroids that each of the span's queries attends: ``[B, H, T, clusters]`` bool."""
    clusters = rest.bias.shape[2]
    here = routes[:, :, span.begin : span.end].long()
    routed = torch.zeros(*here.shape[:3], clusters + 1, dtype=torch.bool, device=here.device)
    routed.scatter_(3, here.where(here >= 0, clusters), True)
    there = per_query_head(rest.bias, site.query).unsqueeze(2) > float("-inf")
    first_key = chunk_of(clusters, plan, here.device) * plan.chunk
    return there & outside(first_key, span, site.causal, site.key.shape[2]) & ~routed[..., :clusters]


def _spans(site: Operands, plan: Plan) -> list[Span]:
    return list(spans(plan, site.causal, site.query.shape[2], site.key.shape[2], TILE))


def _in_window(site: Operands, span: Span) -> torch.Tensor:
    """Keys inside the window of each of the span's queries: broadcastable to ``[B, H, T, Nk]``."""
    q_len, k_len = site.query.shape[2], site.key.shape[2]
    j = torch.arange(k_len, device=site.key.device)
    inside = ((j >= span.low) & (j < span.high)).expand(span.end - span.begin, k_len)
    if site.causal:
        i = torch.arange(span.begin, span.end, device=site.key.device) + (k_len - q_len)
        inside = inside & (j <= i.unsqueeze(1))
    if site.valid is None:
        return inside[None, None]
    return inside & site.valid[:, None, None, :]


def _routed(site: Operands, summary: Summary, routes: torch.Tensor, plan: Plan, span: Span) -> torch.Tensor:
    """Keys inside the routes of each of the span's queries: ``[B, H, T, Nk]``."""
    batch, heads, q_len, _ = site.query.shape
    k_len = site.key.shape[2]
    keys = torch.zeros(batch, heads, span.end - span.begin, k_len + 1, dtype=torch.bool, device=site.key.device)
    if routes.shape[3]:
        here = routes[:, :, span.begin : span.end].long()
        places = here.unsqueeze(4) * plan.cluster + torch.arange(plan.cluster, device=here.device)
        order = per_query_head(summary.order.long(), site.query)
        index = order.gather(2, places.clamp(min=0).flatten(2)).view_as(places)
        index = index.where((here.unsqueeze(4) >= 0) & (index >= 0), k_len).flatten(3)
        keys.scatter_(3, index, True)
    return keys[..., :k_len]


def _rows_read(summary: Summary, plan: Plan, span: Span) -> torch.Tensor:
    """Rows the span's queries read: not empty, of a finished segment, not inside the window."""
    read = torch.zeros(summary.row_index.shape[2], dtype=torch.bool, device=summary.row_index.device)
    read[: plan.sinks] = span.finished > 0
    for segment in segments(span.finished):
        first = plan.sinks + segment * plan.rows_per_segment
        read[first : first + plan.rows_per_segment] = True
    index = summary.row_index
    outside = (index < span.low) | (index >= span.high)
    return read & (summary.row_bias > float("-inf")) & outside


def _copied(summary: Summary, rows: torch.Tensor, site: Operands) -> torch.Tensor:
    """Keys that stand in a row which is read, and so must not be read again: ``[B, H, 1, Nk]``."""
    k_len = site.key.shape[2]
    index = summary.row_index.long()
    copied = torch.zeros(*index.shape[:2], k_len + 1, dtype=torch.bool, device=index.device)
    copied.scatter_(2, index.where(rows & (index >= 0), k_len), True)
    return per_query_head(copied[..., :k_len], site.query).unsqueeze(2)


def softmax(logits: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(logits, 3)
    none = (logits == float("-inf")).all(3, keepdim=True)
    return weights.masked_fill(none, 0)


def _weigh(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``weights @ value``, ``[B, H, T, Dv]``, for grouped heads; a weight of 0 reads nothing."""
    grouped = in_heads(weights, value.shape[1])
    finite = value.isfinite()
    out = grouped @ value.where(finite, 0)
    if not finite.all():  # 0 * inf is NaN: it must reach only the queries that attend it
        met = (grouped > 0).to(out.dtype) @ (~finite).to(out.dtype) > 0
        out = out.masked_fill(met, float("nan"))
    return out.view(*weights.shape[:3], value.shape[3])
