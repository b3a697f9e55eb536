"""What queries read instead of all keys: rows (sinks, selected keys, centroids) and clusters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .clusterings import CLUSTERINGS
from .layout import chunk_count
from .plan import Plan
from .scorers import SCORERS, custom
from .scorers.kmeans import lloyd, strided
from .scorers.window_peak import window_peak

CHUNKS_AT_ONCE = 256
RESIDUAL_ITERATIONS = 2
LEVELS = 20
"""Segment sizes that ``row_owner`` has room for: up to 2^19 chunks."""
NEG_INF = float("-inf")


Clusters = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Plan], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
]


class Summary(NamedTuple):
    """Rows and clusters of one site; ``C`` chunks, ``P = C * chunk`` places.

    Rows come in the order: ``sinks``, then for each of the ``C`` segments (see
    ``layout.segments``) its ``keep`` selected keys and its ``centroids``.

    Attributes:
        order: ``[B, Hkv, P]`` int32, the key at each place, cluster after cluster; -1: no key.
        mean: ``[B, Hkv, P / cluster, D]`` float32, mean key of each cluster.
        spread: same shape, elementwise key variance times ``spread_factor``.
        bias: ``[B, Hkv, P / cluster]`` float32: 0, or -inf (no key), or NaN (a key or value in it
            is not finite: every query must meet it, as in exact attention).
        row_index: ``[B, Hkv, R]`` int32, the key that a row copies; -1: centroid or empty.
        row_owner: ``[LEVELS, B, Hkv, Nk]`` int32, the centroid row that stands in for a key in the
            segment of 2^level chunks; -1: none. Without centroids, no levels.
        row_key, row_value: ``[B, Hkv, R, D]`` and ``[B, Hkv, R, Dv]``, of the keys' dtype.
        row_bias: ``[B, Hkv, R]`` float32, added to the logit: 0, log(count) or -inf (empty).

    A plan without routes leaves ``order``, ``mean``, ``spread`` and ``bias`` empty (0 places).
    """

    order: torch.Tensor
    mean: torch.Tensor
    spread: torch.Tensor
    bias: torch.Tensor
    row_index: torch.Tensor
    row_owner: torch.Tensor
    row_key: torch.Tensor
    row_value: torch.Tensor
    row_bias: torch.Tensor

    @classmethod
    def of_clusters(cls, order: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor, bias: torch.Tensor) -> Summary:
        """For what reads no rows."""
        none = mean.new_empty(0)
        return cls(order, mean, spread, bias, none, none, none, none, none)

    @classmethod
    def of_rows(cls, order: torch.Tensor, *rows: torch.Tensor) -> Summary:
        """For what reads no representatives; ``rows``: the last five fields."""
        none = order.new_empty(0)
        return cls(order, none, none, none, *rows)


def score(
    query: torch.Tensor,
    key: torch.Tensor,
    valid: torch.Tensor | None,
    plan: Plan,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """Scores ``[B, Hkv, Nk]`` float32 of the plan's method, chunk by chunk.

    ``query`` ``[B, H, Nk, D]`` stands at the same positions as ``key`` ``[B, Hkv, Nk, D]``;
    ``valid`` ``[B, Nk]`` bool. A key that is not finite scores +inf: it must be met, not hidden.
    """
    batch, heads, length, dim = key.shape
    finite = key.isfinite().all(3)
    keys = _chunks(key.float(), plan.chunk)
    mask = _chunk_mask(key, valid, plan.chunk) & _pad_places(finite, plan.chunk).view(keys.shape[:4])
    queries = keys.new_empty(*keys.shape[:3], 0, plan.chunk, dim)
    if plan.reads_queries:
        queries = _chunks(query.float(), plan.chunk).unflatten(1, (heads, query.shape[1] // heads)).transpose(2, 3)
    if plan.method == "window_peak":
        place = sink_index(key, valid, plan.sinks).unsqueeze(1).expand(-1, heads, -1)
        sinks = _take(key.float(), place)
        place = place.where(sinks.isfinite().all(3), -1)
        window = plan.chunk if plan.window is None else plan.window
        k, m, q, sinks, place = (tensor.flatten(0, 1) for tensor in (keys, mask, queries, sinks, place))
        scores = window_peak(k, m, q, sinks, place, scale, causal, window)
    else:
        scorer = SCORERS.get(plan.method) or functools.partial(custom.call, plan.method)
        flat = (tensor.flatten(0, 2).split(CHUNKS_AT_ONCE) for tensor in (keys, mask, queries))
        parts = [scorer(k, m, q, scale, causal, plan.seed) for k, m, q in zip(*flat, strict=True)]
        scores = torch.cat(parts)
    return scores.reshape(batch, heads, keys.shape[2] * plan.chunk)[..., :length].masked_fill(~finite, math.inf)


def sink_index(key: torch.Tensor, valid: torch.Tensor | None, sinks: int) -> torch.Tensor:
    """The first ``sinks`` valid keys of each sequence: ``[B, sinks]`` int64, -1 where none."""
    batch, length = key.shape[0], key.shape[2]
    if valid is None:
        index = torch.arange(sinks, device=key.device)
        return index.where(index < length, -1).expand(batch, sinks)
    first = (~valid).to(torch.int8).argsort(dim=1, stable=True)[:, :sinks]
    first = first.where(valid.gather(1, first), -1)
    return pad(first, (0, sinks - first.shape[1]), value=-1)


def summarize(
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    scores: torch.Tensor | None,
    plan: Plan,
    cluster: Clusters | None = None,
    best: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Summary:
    """Cluster and select the keys of every chunk; see ``Summary``.

    Args:
        key: ``[B, Hkv, Nk, D]``. value: ``[B, Hkv, Nk, Dv]``. valid: ``[B, Nk]`` bool or None.
        scores: ``[B, Hkv, Nk]`` float32; needed when ``plan.keep`` is not 0.
        cluster: default ``clusters``. best: what ``_best_of_chunks`` gives, where that was found elsewhere.
    """
    sink = sink_index(key, valid, plan.sinks)
    member = _chunk_mask(key, valid, plan.chunk).flatten(2)
    member = _without(member, sink.unsqueeze(1).expand(-1, key.shape[1], -1))
    if plan.routes:
        order, mean, spread, bias = (cluster or clusters)(key, value, member, plan)
    else:
        none = key.new_zeros(*key.shape[:2], 0, dtype=torch.float32)
        wide = key.new_zeros(*key.shape[:2], 0, key.shape[3], dtype=torch.float32)
        order, mean, spread, bias = none.int(), wide, wide.clone(), none
    if plan.keep and best is None:
        assert scores is not None
        best = _best_of_chunks(scores, member, plan)
    index, owner = _rows(key, value, member, sink, best, plan)
    return Summary(order, mean, spread, bias, index, owner, *gather_rows(key, value, index, owner))


def gather_rows(
    key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, owner: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row keys, values and biases from the discrete choice ``(index, owner)``.

    A centroid is the mean of its members' keys and of their values, with bias log(count);
    differentiable in ``key`` and ``value`` (1 / count to each member).
    """
    bias = torch.zeros(index.shape, dtype=torch.float32, device=key.device)
    bias = bias.masked_fill(index < 0, NEG_INF)
    row_key, row_value = _take(key, index), _take(value, index)
    if owner.shape[0]:
        wide = torch.promote_types(key.dtype, torch.float32)
        count = _add_members(torch.ones_like(key[..., :1], dtype=wide), owner, index)
        size = count.clamp(min=1)
        row_key = (row_key + _add_members(key.to(wide), owner, index) / size).to(key.dtype)
        row_value = (row_value + _add_members(value.to(wide), owner, index) / size).to(value.dtype)
        bias = torch.where(count.squeeze(3) > 0, count.squeeze(3).log().float(), bias)
    return row_key.contiguous(), row_value.contiguous(), bias


def scatter_rows(grad_row: torch.Tensor, index: torch.Tensor, owner: torch.Tensor, length: int) -> torch.Tensor:
    """The transpose of ``gather_rows`` for one of key and value: ``[B, Hkv, length, D]`` float32."""
    rows = grad_row.to(torch.promote_types(grad_row.dtype, torch.float32))
    grad = rows.new_zeros(*rows.shape[:2], length + 1, rows.shape[3])
    grad = _add_at(grad, index.long().where(index >= 0, length), rows)[:, :, :length]
    if owner.shape[0]:
        ones = rows.new_ones(*rows.shape[:2], length, 1)
        size = _add_members(ones, owner, index).clamp(min=1)
        for level in _levels_used(owner, index):
            grad = grad + _take(rows / size, level)
    return grad.contiguous()


def clusters(
    key: torch.Tensor, value: torch.Tensor, member: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``order``, ``mean``, ``spread`` and ``bias`` of ``Summary``; member ``[B, Hkv, P]`` bool."""
    batch, heads, _, dim = key.shape
    keys = _chunks(key.float(), plan.chunk)
    places = keys.shape[2] * plan.chunk
    keys, inside = keys.flatten(0, 2), member.reshape(-1, plan.chunk)
    parts = [
        _represent(keys[at : at + CHUNKS_AT_ONCE], inside[at : at + CHUNKS_AT_ONCE], plan)
        for at in range(0, len(keys), CHUNKS_AT_ONCE)
    ]
    if not parts:
        parts = [_represent(keys, inside, plan)]
    order, mean, spread, size = (torch.cat(p) for p in zip(*parts, strict=True))
    first = torch.arange(0, places, plan.chunk, device=key.device)
    order = order.view(batch, heads, places // plan.chunk, plan.chunk) + first.unsqueeze(1)
    order = order.view(batch, heads, places)
    order = order.where(member.gather(2, order), -1)
    shape = (batch, heads, places // plan.cluster)
    bias = torch.zeros(shape, device=key.device, dtype=torch.float32).masked_fill(size.view(shape) == 0, NEG_INF)
    # 0 * x is NaN for a key or value that is not finite, and 0 for any other.
    taint = (key.float() * 0).sum(3) + (value.float() * 0).sum(3)
    bias = bias + _take(taint.unsqueeze(3), order.int()).view(*shape, plan.cluster).sum(3)
    return order.int(), mean.view(*shape, dim), spread.view(*shape, dim), bias


def spread_factor(count: torch.Tensor, plan: Plan) -> torch.Tensor:
    """What a cluster's variance is multiplied by, for ``count`` keys."""
    return plan.spread_factor * count.clamp(min=1).log()


def _represent(
    keys: torch.Tensor, member: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order of the chunks' keys by cluster, and each cluster's mean, spread and size."""
    cluster = plan.cluster
    order = CLUSTERINGS[plan.clustering](keys, member, cluster)
    live = keys.where(member.unsqueeze(2), 0)
    inside = live.gather(1, order.unsqueeze(2).expand_as(keys)).unflatten(1, (-1, cluster))
    weight = member.gather(1, order).unflatten(1, (-1, cluster)).unsqueeze(3).to(keys.dtype)
    size = weight.sum(2)
    count = size.clamp(min=1)
    mean = inside.sum(2) / count
    off = (inside - mean.unsqueeze(2)) * weight
    spread = (off * off).sum(2) / count * spread_factor(count, plan)
    return order, mean, spread, size.squeeze(2)


def _rows(
    key: torch.Tensor,
    value: torch.Tensor,
    member: torch.Tensor,
    sink: torch.Tensor,
    best: tuple[torch.Tensor, torch.Tensor] | None,
    plan: Plan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which key each row copies, and which centroid row owns each key at each segment size.

    ``best``: of each chunk, see ``_best_of_chunks``; needed when ``plan.keep`` is not 0.
    """
    batch, heads, length, _ = key.shape
    total = chunk_count(length, plan.chunk)
    sinks = sink.unsqueeze(1).expand(batch, heads, plan.sinks)
    table = torch.full((batch, heads, total, plan.rows_per_segment), -1, device=key.device)
    owners = []
    size = 1
    while plan.rows_per_segment and size <= total:
        named = slice(size - 1, total, 2 * size)
        begin, inside = _of_size(member, size, plan.chunk)
        chosen = inside.new_zeros((*inside.shape[:3], 0), dtype=torch.long)
        if best is not None:
            best = _merged(best, plan.keep) if size > 1 else best
            place, score = (tensor[:, :, ::2] for tensor in best)
            chosen = place.where(score > NEG_INF, -1)
            table[:, :, named, : plan.keep] = chosen
            chosen = chosen.where(chosen < 0, chosen - begin[:, None])
        if plan.centroids:
            rest = _without(inside, chosen)
            owner = _residual(key, value, rest, plan)
            row = plan.sinks + torch.arange(total, device=key.device)[named] * plan.rows_per_segment + plan.keep
            owner = owner.where(owner < 0, owner + row[:, None])
            owners.append(_place_back(owner, member.shape[2])[..., :length])
        size *= 2
    index = torch.cat([sinks, table.flatten(2)], 2).int()
    levels = LEVELS if plan.centroids else 0
    owner = torch.full((levels, batch, heads, length), -1, dtype=torch.int32, device=key.device)
    for level, members in enumerate(owners):
        owner[level] = members
    return index, owner


def _levels_used(owner: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The levels that can hold a member: with R rows there are at most R segments."""
    return owner[: index.shape[2].bit_length()]


def _best_of_chunks(scores: torch.Tensor, member: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Places ``[B, Hkv, C, keep]`` of each chunk's ``keep`` best members, ascending, and their scores.

    Ties go to the first; a place that is no member, or scores less than the threshold, gets -inf, any other more.
    """
    lowest = torch.finfo(scores.dtype).min
    ranked = _pad_places(scores, plan.chunk).nan_to_num(nan=math.inf, posinf=math.inf, neginf=lowest)
    if plan.threshold:
        member = member & (ranked >= plan.threshold)
    ranked = ranked.masked_fill(~member, NEG_INF).unflatten(2, (-1, plan.chunk))
    best = ranked.argsort(dim=3, descending=True, stable=True)[..., : plan.keep].sort(3).values
    first = torch.arange(0, member.shape[2], plan.chunk, device=scores.device)
    return best + first[:, None], ranked.gather(3, best)


def _merged(best: tuple[torch.Tensor, torch.Tensor], keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``keep`` best of each two neighbours: the best of a segment are among those of its halves."""
    halves = best[0].shape[2] // 2
    place, score = (tensor[:, :, : 2 * halves].unflatten(2, (halves, 2)).flatten(3) for tensor in best)
    kept = score.argsort(dim=3, descending=True, stable=True)[..., :keep].sort(3).values
    return place.gather(3, kept), score.gather(3, kept)


def _residual(key: torch.Tensor, value: torch.Tensor, rest: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Centroid of each unselected key, by k-means on [key, value rescaled to the key's spread]."""
    count, width = rest.shape[2:]
    keys = _segments(key.float(), count, width).flatten(0, 2)
    values = _segments(value.float(), count, width).flatten(0, 2)
    live = rest.flatten(0, 2)
    keys = keys.where(live.unsqueeze(2), 0)
    values = values.where(live.unsqueeze(2), 0)
    ratio = (_variance(keys, live) / _variance(values, live).clamp(min=1e-20)).sqrt()
    points = torch.cat([keys, values * ratio], 2)
    _, owner = lloyd(points, live, strided(points, live, plan.centroids), RESIDUAL_ITERATIONS)
    return owner.where(live, -1).view(rest.shape)


def _variance(points: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Total variance of the masked points (zeroed elsewhere): ``[M, 1, 1]``."""
    count = mask.sum(1).clamp(min=1).view(-1, 1, 1)
    mean = points.sum(1, keepdim=True) / count
    return ((points * points).sum((1, 2), keepdim=True) / count - (mean * mean).sum(2, keepdim=True)).clamp(min=0)


def _of_size(places: torch.Tensor, size: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First place and contents of every segment of ``size`` chunks: ``[S]``, ``[.., S, size * chunk]``.

    A segment of ``size`` chunks begins at an even multiple of ``size`` (see ``layout.segments``).
    """
    width = size * chunk
    count = (places.shape[2] // width + 1) // 2
    return torch.arange(count, device=places.device) * 2 * width, _segments(places.unsqueeze(3), count, width).squeeze(
        4
    )


def _segments(tensor: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """``[B, H, N, D]`` -> ``[B, H, count, width, D]``: every second run of ``width``, zero-padded at the end."""
    places = 2 * count * width
    padded = pad(tensor, (0, 0, 0, max(0, places - tensor.shape[2])))[:, :, :places]
    return padded.unflatten(2, (count, 2 * width))[:, :, :, :width]


def _place_back(owner: torch.Tensor, places: int) -> torch.Tensor:
    """The transpose of ``_segments``, -1 between them: ``[B, H, S, width]`` -> ``[B, H, places]``."""
    width = owner.shape[3]
    full = pad(owner, (0, width), value=-1).flatten(2)
    return pad(full, (0, max(0, places - full.shape[2])), value=-1)[:, :, :places]


def _chunks(tensor: torch.Tensor, chunk: int) -> torch.Tensor:
    """``[B, H, N, D]`` -> ``[B, H, C, chunk, D]``, zero-padded at the end."""
    length = tensor.shape[2]
    count = chunk_count(length, chunk)
    return pad(tensor, (0, 0, 0, count * chunk - length)).unflatten(2, (count, chunk))


def _pad_places(tensor: torch.Tensor, chunk: int) -> torch.Tensor:
    return pad(tensor, (0, chunk_count(tensor.shape[2], chunk) * chunk - tensor.shape[2]))


def _chunk_mask(key: torch.Tensor, valid: torch.Tensor | None, chunk: int) -> torch.Tensor:
    """Which places hold a valid key: ``[B, Hkv, C, chunk]`` bool."""
    batch, heads, length, _ = key.shape
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.bool, device=key.device)
    mask = _pad_places(valid.unsqueeze(1), chunk)
    return mask.view(batch, 1, chunk_count(length, chunk), chunk).expand(-1, heads, -1, -1)


def _without(mask: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``mask`` with the places in ``index`` (last axis; -1: none) set to False."""
    spare = mask.shape[-1]
    wide = pad(mask, (0, 1))
    return wide.scatter(-1, index.where(index >= 0, spare), False)[..., :spare]


def _take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``tensor[b, h, index[b, h, r]]`` with zeros where the index is -1: ``[B, Hkv, R, D]``."""
    if not tensor.shape[2]:
        return tensor.new_zeros(*index.shape, tensor.shape[3])
    place = index.long().clamp(min=0).unsqueeze(3).expand(-1, -1, -1, tensor.shape[3])
    return tensor.gather(2, place).masked_fill((index < 0).unsqueeze(3), 0)


def _add_members(tensor: torch.Tensor, owner: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` ``[B, Hkv, Nk, D]`` over the members of each centroid row: ``[B, Hkv, R, D]``."""
    rows = index.shape[2]
    total = tensor.new_zeros(*index.shape[:2], rows + 1, tensor.shape[3])
    for level in _levels_used(owner, index):
        total = _add_at(total, level.long().where(level >= 0, rows), tensor)
    return total[:, :, :rows]


def _add_at(total: torch.Tensor, place: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``total[b, h, place[b, h, n]] += tensor[b, h, n]``, in the same order of summation each time."""
    if total.device.type == "cpu":
        return total.scatter_add(2, place.unsqueeze(3).expand_as(tensor), tensor)
    # A scatter adds with atomics on a GPU; an accumulating index_put sorts its places first.
    batch, heads = (
        torch.arange(size, device=total.device).view(-1, *[1] * (2 - at)) for at, size in enumerate(place.shape[:2])
    )
    return total.index_put((batch, heads, place), tensor, accumulate=True)
