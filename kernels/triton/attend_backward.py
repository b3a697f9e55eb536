"""The backward of attend: every sum has one owner, so that no atomics are needed and bits repeat.

``d_query`` is summed by the program that owns a tile of queries (``d_query.py``), the gradients of keys and values by
the programs that own those (``key_major.py``): each over the queries that attend them, of routes by an inverse index,
from each cluster to the queries that chose it, by a stable sort.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..layout import chunk_count
from ..plan import Plan
from ..reference import Operands
from ..summary import Summary
from . import key_major, loops, options, residual
from .attend import operands, spec_of, stages_of
from .cache import features_last, launch, load, strides
from .d_query import d_query_source
from .spec import NOTHING, Lifted, Spec, cdiv


def attend_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    site: Operands,
    summary: Summary,
    routes: torch.Tensor,
    plan: Plan,
    lifted: Lifted = NOTHING,
    **more: Any,
) -> tuple[torch.Tensor, ...]:
    """``reference.attend_backward`` by generated kernels.

    Args:
        grad: of ``out`` ``[B, H, Nq, Dv]``; ``out`` and ``log_sums`` as the forward returned them.
        site, summary, routes, plan, lifted, more: as the forward was given them.

    Returns:
        Gradients of query (its dtype), and of key, value, row_key, row_value and, where there is one, sink_logit
        (float32).
    """
    query, key, value = site[:3]
    batch, heads, q_len, _ = query.shape
    kv_heads, k_len = key.shape[1], key.shape[2]
    d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    d_key = _float32(key, *key.shape)
    d_value = _float32(value, *value.shape)
    d_row_key, d_row_value = _zeros(summary.row_key), _zeros(summary.row_value)
    sink = site.sink_logit
    if 0 in (batch, heads, q_len, k_len, value.shape[3]):
        of_sink = [] if sink is None else [_zeros(sink)]
        return d_query.zero_(), d_key.zero_(), d_value.zero_(), d_row_key, d_row_value, *of_sink
    spec = backward_spec(spec_of(site, plan, lifted, float(more.pop("softcap", 0.0))))
    grad = features_last(grad)
    values, programs = operands(spec, site, summary, routes, more)
    inners = (grad.float() * out.float()).sum(3)
    values |= dict(grad=grad, log_sums=log_sums, inners=inners, pairs=batch * kv_heads)
    values |= strides("grad", grad) | strides("d_query", d_query)
    tile = spec.tile
    stages = stages_of(spec, query.device)

    def run(text: str, name: str, grid: tuple[Any, ...], **own: Any) -> None:
        launch(load(text, name), grid, values | own, warps=tile.warps, stages=stages)

    run(d_query_source(spec), "d_query", (programs,), d_query=d_query)
    own = dict(d_key=d_key, d_value=d_value)
    if loops.has_window(spec):
        blocks = cdiv(k_len, tile.keys)
        run(key_major.window_source(spec), "d_window", (batch * kv_heads * blocks,), blocks=blocks, **own)
    else:
        d_key.zero_()
        d_value.zero_()
    if loops.residual(spec):
        own |= _residual(spec, run, summary)
    if spec.routes:
        places = summary.order.shape[2]
        index = inverse(routes, kv_heads, places // plan.cluster)
        grid = (batch * kv_heads * (places // key_major.keys_of_a_cluster(spec)),)
        run(key_major.routes_source(spec), "d_routes", grid, **own, **index)
    if loops.has_rows(spec):
        d_row_key, d_row_value = _rows(spec, run, summary, k_len)
    # Its value is 0, and so dP of it.
    of_sink = [] if sink is None else [-torch.exp(sink.float() - log_sums) * inners]
    return d_query, d_key, d_value, d_row_key, d_row_value, *of_sink


def backward_spec(forward: Spec) -> Spec:
    """The spec of the backward kernels of a forward kernel; a learned sink is in the softmax's sums."""
    tile = options.backward(forward.target, forward.dtype, forward.dim, forward.value_dim)
    return replace(forward, splits=1, sink_logit=False, tile=tile)


def _residual(spec: Spec, run: Any, summary: Summary) -> dict[str, torch.Tensor]:
    """Gradients of the centroids, for ``d_routes``: by parts, which are added in order."""
    batch, kv_heads, places = summary.order.shape
    clusters = places // spec.settings.cluster
    size = (key_major.REST_SPLITS, batch, kv_heads, clusters)
    d_key, d_value = (_float32(summary.row_key, *size, features) for features in (spec.dim, spec.value_dim))
    grid = (batch * kv_heads * cdiv(clusters, residual.narrow(spec).tile.keys), key_major.REST_SPLITS)
    run(key_major.residual_source(spec), "d_residual", grid, d_key=d_key, d_value=d_value)
    return dict(d_rest_key=d_key.sum(0), d_rest_value=d_value.sum(0))


def _rows(spec: Spec, run: Any, summary: Summary, k_len: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the rows: the sinks' by parts, then one segment after the other."""
    plan = spec.settings
    batch, kv_heads, total, _ = summary.row_key.shape
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    if plan.sinks:
        size = (key_major.SINK_SPLITS, batch, kv_heads, plan.sinks)
        found = tuple(_float32(rows, *size, rows.shape[3]) for rows in (summary.row_key, summary.row_value))
        grid = (batch * kv_heads * cdiv(plan.sinks, loops.row_keys(spec, plan.sinks)), key_major.SINK_SPLITS)
        run(key_major.rows_source(spec, True), "d_sinks", grid, d_key=found[0], d_value=found[1], row_total=plan.sinks)
        parts.append((found[0].sum(0), found[1].sum(0)))
    if plan.rows_per_segment:
        count = total - plan.sinks
        found = tuple(
            _float32(rows, batch, kv_heads, count, rows.shape[3]) for rows in (summary.row_key, summary.row_value)
        )
        blocks = cdiv(plan.rows_per_segment, loops.row_keys(spec, plan.rows_per_segment))
        segments = chunk_count(k_len, plan.chunk)
        programs = segments * blocks
        more = dict(row_total=count, programs=programs)
        run(
            key_major.rows_source(spec, False),
            "d_segments",
            (batch * kv_heads * programs,),
            d_key=found[0],
            d_value=found[1],
            **more,
        )
        parts.append((found[0], found[1]))
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2)


def inverse(routes: torch.Tensor, kv_heads: Any, clusters: Any) -> dict[str, Any]:
    """Who chose each cluster.

    Returns:
        ``chosen_by`` ``[B, Hkv, G * Nq * R]`` int32, (head of the group, query) as ``head * Nq + query``, one
        cluster after the other; ``chosen_from`` ``[B, Hkv, clusters + 1]`` int32, where each begins;
        ``chosen_total``, the length of the first.
    """
    batch, heads, q_len, count = routes.shape
    named = routes.reshape(batch, kv_heads, heads // kv_heads * q_len * count)
    named, by = named.where(named >= 0, clusters).sort(dim=2, stable=True)
    edges = named.new_zeros(batch, kv_heads, 1) + torch.arange(clusters + 1, dtype=torch.int32, device=routes.device)
    begins = torch.searchsorted(named, edges, out_int32=True)
    chosen = (by // torch.sym_max(count, 1)).to(torch.int32)
    return dict(chosen_by=chosen, chosen_from=begins, chosen_total=named.shape[2])


def _float32(like: torch.Tensor, *shape: Any) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _zeros(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like, dtype=torch.float32)
