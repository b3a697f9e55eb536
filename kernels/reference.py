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

import math
from collections.abc import Mapping
from typing import NamedTuple

import sympy
import torch

from .centroids import Centroids, centroids, members_gradient
from .layout import Span, segments, spans
from .logits import NOTHING, Logits, by_chunk, pair_places, reach, value
from .plan import Plan
from .summary import Summary

TILE = 256
MOST_GAIN = 70.0
"""Of a cluster in one head, as a logarithm: float32 holds the sum of as many as there can be."""
NO_TENSORS: Mapping[str, torch.Tensor] = {}


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
    plan = Plan(window=None, sinks=0, routes=0)
    for span in _spans(site, plan):
        logits = pair_logits(site.query[:, :, span.begin : span.end], site.key, site.scale)
        logits = logits.masked_fill(~_in_window(site, span), float("-inf"))
        weights = shared_softmax(with_sink([logits], site, span.begin, span.end))[0]
        out[:, :, span.begin : span.end] = _weigh(weights, site.value)
    return out


def routing_scores(query: torch.Tensor, summary: Summary, scale: float) -> torch.Tensor:
    """Routing score of every cluster for every query: ``[B, H, Nq, clusters]``.

    ``scale * q . mean_c + |scale| * sqrt(sum_i q_i^2 * 2 ln(count) var_ci)``: the expected best
    logit of the cluster's keys, were they normal with its mean and variance (the expected maximum
    of n normals is about sqrt(2 ln n) standard deviations above the mean); with ``plan.spread``, that many times
    the standard deviation.
    """
    spread = pair_logits(query * query, summary.spread.to(query.dtype), 1.0).sqrt()
    return (
        pair_logits(query, summary.mean.to(query.dtype), scale)
        + abs(scale) * spread
        + _per_query_head(summary.bias, query).unsqueeze(2)
    )


def route(
    query: torch.Tensor,
    summary: Summary,
    plan: Plan,
    causal: bool,
    k_len: int,
    scale: float,
    logits: Logits = NOTHING,
    tensors: Mapping[str, torch.Tensor] = NO_TENSORS,
    mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """The clusters each query attends: ``[B, H, Nq, min(routes, clusters)]`` int32, ascending, -1: none.

    Per query and per head, among the clusters of the chunks outside the query's window: causal
    sites look at finished chunks only. Ties go to the earlier cluster; NaN ranks first. With a ``plan.share``,
    only clusters that ``worth`` holds for; with ``plan.group_routes``, by what ``together`` gives. ``mass`` is what
    the function of that name gives, where the plan needs it.
    """
    batch, heads, q_len, _ = query.shape
    clusters = summary.mean.shape[2]
    count = min(plan.routes, clusters)
    routes = torch.full((batch, heads, q_len, count), -1, dtype=torch.int32, device=query.device)
    chunks = chunk_of(clusters, plan, query.device)
    for span in spans(plan, causal, q_len, k_len, TILE):
        eligible = outside(chunks * plan.chunk, span, causal, k_len)
        scores = routing_scores(query[:, :, span.begin : span.end].float(), summary, scale)
        scores = reached(scores, span, chunks, plan, k_len, logits, tensors)
        near = None if mass is None else mass[:, :, span.begin : span.end]
        best = choose(scores, summary, eligible, count, plan, near)
        routes[:, :, span.begin : span.end] = best.where(best < clusters, -1)
    return routes


def choose(
    scores: torch.Tensor,
    summary: Summary,
    eligible: torch.Tensor,
    count: int,
    plan: Plan,
    mass: torch.Tensor | None,
) -> torch.Tensor:
    """The ``count`` clusters, or fewer, that each query head routes to: ``[B, H, T, count]``, as ``best_of`` has them.

    Of the ``eligible``, broadcastable to ``scores`` ``[B, H, T, clusters]``; ``mass`` ``[B, H, T]`` where the plan
    needs it.
    """
    group = plan.together(scores.shape[1] // summary.mean.shape[1])
    if group > 1:
        assert mass is not None
        scores, mass = together(scores, mass, group)
        eligible = eligible[:, ::group] if eligible.dim() == 4 else eligible
    return best_of(scores, summary, eligible, count, plan.share, mass).repeat_interleave(group, 1)


def together(scores: torch.Tensor, mass: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores ``[B, Hkv, T, clusters]`` and mass ``[B, Hkv, T]`` of the ``group`` query heads of each KV head as one.

    What a cluster adds to the softmax's sum of a head is counted in that head's ``mass``, and summed over the heads:
    in each of them, window and sinks weigh one. A gain of NaN is the most there is. A head whose mass is NaN or inf is
    passed over (routes would not change its result); one of -inf counts as if it were 0.
    """
    unit = mass.masked_fill(mass == -math.inf, 0).to(scores.dtype).unsqueeze(3)
    gains = (scores - unit).nan_to_num(nan=MOST_GAIN, neginf=-math.inf).clamp(max=MOST_GAIN)
    gains = gains.masked_fill(~(unit < math.inf), -math.inf)
    heard = mass.isfinite().unflatten(1, (-1, group)).sum(2)
    return gains.unflatten(1, (-1, group)).logsumexp(2), heard.to(scores.dtype).log()


def best_of(
    scores: torch.Tensor,
    summary: Summary,
    eligible: torch.Tensor,
    count: int,
    share: float = 0.0,
    mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """The ``count`` best of the last axis, ascending; where there are fewer, its length.

    Of the ``eligible`` that are not empty and, with a ``share``, for which ``worth`` holds. NaN ranks first.
    """
    scores = scores.nan_to_num(nan=math.inf, neginf=-math.inf, posinf=math.inf)
    empty = _per_query_head(summary.bias, scores).unsqueeze(2) == float("-inf")
    scores = scores.masked_fill(~eligible | empty, float("-inf"))
    if share:
        assert mass is not None
        scores = scores.masked_fill(~worth(scores, mass, share), float("-inf"))
    best = scores.argsort(dim=3, descending=True, stable=True)[..., :count]
    return best.where(scores.gather(3, best) > float("-inf"), scores.shape[3]).sort(3).values


def worth(scores: torch.Tensor, mass: torch.Tensor, share: float) -> torch.Tensor:
    """Whether a cluster is expected to have ``share`` of a query's softmax, for scores ``[B, H, T, clusters]``.

    A score stands for the logarithm of what its cluster adds to the softmax's sum, ``mass`` ``[B, H, T]`` for that
    of the keys that the query attends anyway. NaN hides nothing.
    """
    total = torch.logaddexp(scores.logsumexp(3), mass.to(scores.dtype))
    return ~(scores < (total + math.log(share)).unsqueeze(3))


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
        read = _per_query_head(_rows_read(summary, plan, span), query).unsqueeze(2)[..., sinks]
        parts = (keys, _in_window(site, span)), (rows, read)
        near = [logit.masked_fill(~seen, float("-inf")) for logit, seen in parts]
        found[:, :, span.begin : span.end] = torch.cat(with_sink(near, site, span.begin, span.end), 3).logsumexp(3)
    return found


def reached(
    scores: torch.Tensor,
    span: Span,
    chunks: torch.Tensor,
    plan: Plan,
    k_len: int,
    logits: Logits,
    tensors: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Scores of clusters, or of chunks, of ``chunks``: with the bias, -inf where no key may be attended."""
    if not logits.allowed.has(sympy.Symbol) and logits.bias == 0:
        return scores
    q = torch.arange(span.begin, span.end, device=scores.device)
    at = pair_places(scores.shape[0], scores.shape[1], q, chunks)
    at |= {"c": chunks, "k_low": chunks * plan.chunk, "k_high": ((chunks + 1) * plan.chunk).clamp(max=k_len) - 1}
    known = by_chunk(logits, tensors, plan.chunk)
    scores = scores + value(logits.first_bias, at, known)
    return scores.masked_fill(~value(reach(logits.allowed), at, known), float("-inf"))


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
    row_logits = row_logits + _per_query_head(summary.row_bias, query).unsqueeze(2).to(query.dtype)
    row_logits = row_logits.masked_fill(~_per_query_head(rows, query).unsqueeze(2), float("-inf"))
    sources = [key_logits, row_logits]
    if rest is not None:
        bias = _per_query_head(rest.bias, query).unsqueeze(2).to(query.dtype)
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
    rows = _per_query_head(summary.row_index.long().clamp(min=0), site.query).unsqueeze(2)
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
    there = _per_query_head(rest.bias, site.query).unsqueeze(2) > float("-inf")
    first_key = chunk_of(clusters, plan, here.device) * plan.chunk
    return there & outside(first_key, span, site.causal, site.key.shape[2]) & ~routed[..., :clusters]


def chunk_of(clusters: int, plan: Plan, device: torch.device | None) -> torch.Tensor:
    """The chunk of each cluster: ``[clusters]``."""
    return torch.arange(clusters, device=device) * plan.cluster // plan.chunk


def outside(first_key: torch.Tensor, span: Span, causal: bool, k_len: int) -> torch.Tensor:
    """Whether chunks that begin at ``first_key`` lie outside a span's window; causal: finished ones only."""
    high = span.low if causal else k_len
    return (first_key < high) & ~((first_key >= span.low) & (first_key < span.high))


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
        order = _per_query_head(summary.order.long(), site.query)
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
    return _per_query_head(copied[..., :k_len], site.query).unsqueeze(2)


def softmax(logits: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(logits, 3)
    none = (logits == float("-inf")).all(3, keepdim=True)
    return weights.masked_fill(none, 0)


def pair_logits(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * q . k``, ``[B, H, T, Nk]``, for grouped heads."""
    grouped = in_heads(query, key.shape[1]) @ key.transpose(2, 3) * scale
    return grouped.view(*query.shape[:3], key.shape[2])


def _weigh(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``weights @ value``, ``[B, H, T, Dv]``, for grouped heads; a weight of 0 reads nothing."""
    grouped = in_heads(weights, value.shape[1])
    finite = value.isfinite()
    out = grouped @ value.where(finite, 0)
    if not finite.all():  # 0 * inf is NaN: it must reach only the queries that attend it
        met = (grouped > 0).to(out.dtype) @ (~finite).to(out.dtype) > 0
        out = out.masked_fill(met, float("nan"))
    return out.view(*weights.shape[:3], value.shape[3])


def in_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, H, T, X]`` -> ``[B, Hkv, G * T, X]``: the G query heads of a KV head are consecutive."""
    batch, all_heads, length, last = tensor.shape
    return tensor.reshape(batch, heads, all_heads // heads * length, last)


def _per_query_head(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """``[B, Hkv, ...]`` -> ``[B, H, ...]``."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)
