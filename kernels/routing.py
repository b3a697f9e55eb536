"""Which clusters each query attends: the reference of routing, plain torch on any device, tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import sympy
import torch

from .heads import pair_logits, per_query_head
from .layout import TILE, Span, chunk_of, outside, spans
from .logits import NO_TENSORS, NOTHING, Logits, by_chunk, pair_places, reach, value
from .plan import Plan
from .summary import Summary

MOST_GAIN = 70.0
"""Of a cluster in one head, as a logarithm: float32 holds the sum of as many as there can be."""


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
    ``reference.mass`` gives, where the plan needs it.
    """
    chunks = chunk_of(summary.mean.shape[2], plan, query.device)
    return chosen(query, summary, plan, causal, k_len, scale, logits, tensors, mass, chunks)


def chosen(
    query: torch.Tensor,
    summary: Summary,
    plan: Plan,
    causal: bool,
    k_len: int,
    scale: float,
    logits: Logits,
    tensors: Mapping[str, torch.Tensor],
    mass: torch.Tensor | None,
    chunks: torch.Tensor,
    eligible: Callable[[Span], torch.Tensor] | None = None,
) -> torch.Tensor:
    """``route`` for representatives of ``chunks``, of which a span's queries may choose the ``eligible``, broadcastable
    to ``[B, H, T, clusters]``; None: those outside their window.
    """
    total = len(chunks)
    count = min(plan.routes, total)
    found = torch.full((*query.shape[:3], count), -1, dtype=torch.int32, device=query.device)
    for span in spans(plan, causal, query.shape[2], k_len, TILE):
        at = slice(span.begin, span.end)
        among = eligible(span) if eligible else outside(chunks * plan.chunk, span, causal, k_len)
        scores = routing_scores(query[:, :, at].float(), summary, scale)
        scores = reached(scores, span, chunks, plan, k_len, logits, tensors)
        best = choose(scores, summary, among, count, plan, None if mass is None else mass[:, :, at])
        found[:, :, at] = best.where(best < total, -1)
    return found


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
        + per_query_head(summary.bias, query).unsqueeze(2)
    )


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
    empty = per_query_head(summary.bias, scores).unsqueeze(2) == float("-inf")
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
