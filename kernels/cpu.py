"""Calls the compiled kernels of ``attend.cpp``."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch

from . import library
from .centroids import centroids, members_gradient
from .coarse import coarse
from .layout import chunk_count
from .plan import WHOLE, Plan
from .reference import Operands
from .summary import Summary

TILE = 128
"""Queries a tile; docs/cpu.md has the measurement."""

ROWS = 256
"""Of the backward, queries times the query heads of a KV head: a tile's gradients have to stay in cache, too."""

PAIRS = 1 << 23
"""Of the backward, at most, rows of a tile times the keys of a plan without a limit: 8 bytes each are kept."""

TASKS, PARTS = 16, 1 << 28
"""Of the backward, at least, each with sums of its own for the gradients of keys and values; their most bytes."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In the order of ``prescore::Format``, native/site.h."""


class _Geometry(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "batch heads kv_heads q_len k_len dim value_dim "
                "chunk cluster window causal sinks keep centroids routes coarse group_routes residual tile threads "
                "narrow"
            ).split()
        ),
        ("scale", ctypes.c_double),
        ("log_share", ctypes.c_double),
        ("spread_factor", ctypes.c_double),
        ("softcap", ctypes.c_double),
    ]


class _View(ctypes.Structure):
    owner: torch.Tensor  # of the memory: alive as long as the view is
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("format", ctypes.c_int64),
    ]


class _Allowed(ctypes.Structure):
    owner: torch.Tensor
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "query"))]


class _Pointer(ctypes.c_void_p):
    owner: torch.Tensor


def clusters(
    key: torch.Tensor, value: torch.Tensor, member: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compiled ``summary.clusters``."""
    batch, heads, k_len, dim = key.shape
    count = chunk_count(k_len, plan.chunk) * (plan.chunk // plan.cluster)
    order = torch.empty(batch, heads, count * plan.cluster, dtype=torch.int32)
    # Whatever the default dtype is: the kernel writes float32.
    mean, spread = (torch.empty(batch, heads, count, dim, dtype=torch.float32) for _ in range(2))
    bias = torch.empty(batch, heads, count, dtype=torch.float32)
    if order.numel():
        geometry = _geometry(plan, key.shape, heads, k_len, value_dim=value.shape[3], causal=True)
        found = (_pointer(t) for t in (member, order, mean, spread, bias))
        library.needed().prescore_cluster(geometry, _view(key), _view(value), *found)
    return order, mean, spread, bias


def route(
    query: torch.Tensor,
    summary: Summary,
    plan: Plan,
    causal: bool,
    k_len: int,
    scale: float,
    mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compiled ``routing.route``, on two levels ``coarse.route``; query ``[B, H, Nq, D]`` of any of ``DTYPES``."""
    batch, heads, q_len, _ = query.shape
    count = min(plan.routes, summary.mean.shape[2])
    routes = torch.empty(batch, heads, q_len, count, dtype=torch.int32)
    if not routes.numel():
        return routes
    geometry = _geometry(
        plan, query.shape, summary.mean.shape[1], k_len, causal=causal, routes=count, scale=scale, narrow=_narrow(query)
    )
    near, levels = _pointer(mass), _levels(summary, plan)
    library.needed().prescore_route(geometry, _view(query), *levels, near, _pointer(routes))
    return routes


def mass(site: Operands, summary: Summary, plan: Plan, softcap: float = 0.0) -> torch.Tensor:
    """Compiled ``reference.mass``; ``softcap``: of the logits, 0.0: none."""
    batch, heads, q_len, _ = site.query.shape
    k_len = site.key.shape[2]
    found = torch.full((batch, heads, q_len), -math.inf, dtype=torch.float32)
    if not found.numel() or k_len == 0:
        return found
    geometry = _geometry(
        plan.near, site.query.shape, site.key.shape[1], k_len, causal=site.causal, scale=site.scale, softcap=softcap,
        narrow=_narrow(site.query, site.key, summary.row_key),
    )  # fmt: skip
    index, row_key, bias = (t[:, :, : plan.sinks] for t in (summary.row_index, summary.row_key, summary.row_bias))
    near = (_view(site.query), _view(site.key), _pointer(site.valid))
    sinks = (_pointer(index), _view(row_key), _pointer(bias), _sink(site))
    library.needed().prescore_mass(geometry, *near, *sinks, _pointer(found))
    return found


def attend(
    site: Operands,
    summary: Summary,
    routes: torch.Tensor,
    plan: Plan,
    tile: int = TILE,
    band: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Compiled ``reference.attend``; accumulates in float32, returns the query's dtype.

    ``softcap``: of the logits, 0.0: none. Of a plan without a limit, ``band``: the first and the last key that each
    query may attend, ``[2, Nq]`` int64, which never fall from one query to the next; ``allowed``: which keys it may
    attend, a bool tensor that broadcasts to ``[B, H, Nq, Nk]``.

    The result is laid out as ``[B, Nq, H, Dv]`` in memory, as SDPA's CPU kernel does, so that the
    transpose that follows it in every model is free.
    """
    return _attended(site, summary, routes, plan, tile, softcap, band, allowed)


def attend_backward(
    grad: torch.Tensor,
    site: Operands,
    summary: Summary,
    routes: torch.Tensor,
    plan: Plan,
    softcap: float = 0.0,
    band: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Compiled ``reference.attend_backward``, in float32. All that is read must be finite.

    ``softcap`` and ``band`` as for ``attend``.
    """
    (batch, heads, q_len, dim), (kv_heads, k_len) = site.query.shape, site.key.shape[1:3]
    value_dim, rows = site.value.shape[3], summary.row_index.shape[2]
    # Tiles and parts by the shape alone, as they say in which order numbers are added.
    tile_rows = ROWS if plan.window is not None or band is not None else min(ROWS, max(PAIRS // max(k_len, 1), 32))
    tile = max(tile_rows * kv_heads // max(heads, 1), 4)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32)

    d_query = zeros(batch, heads, q_len, dim)
    rest = centroids(site.key.float(), site.value.float(), summary.order, plan.cluster) if plan.residual else None
    counts = (k_len, rows) if rest is None else (k_len, rows, rest.bias.shape[2])
    sizes = [(count, size) for count in counts for size in (dim, value_dim)]
    room = PARTS // max(4 * batch * kv_heads * sum(count * size for count, size in sizes), 1)
    splits = max(min(-(-TASKS // max(batch * kv_heads, 1)), -(-q_len // tile), room), 1)
    parts = [zeros(splits, batch, kv_heads, *size) for size in sizes]
    d_sink = [] if site.sink_logit is None else [zeros(batch, heads, q_len)]
    if d_query.numel() and k_len:
        geometry = _geometry(
            plan, site.query.shape, kv_heads, k_len, value_dim=value_dim, causal=site.causal, routes=routes.shape[3],
            scale=site.scale, tile=tile, softcap=softcap,
        )  # fmt: skip
        views = [_view(t) for t in (site.query, site.key, site.value, grad)]
        keys = [_pointer(t) for t in (site.valid, summary.order, routes, summary.row_index)]
        of_rows = [_view(summary.row_key), _view(summary.row_value), _pointer(summary.row_bias)]
        limits = [_sink(site), _pointer(band)]
        of_rest = [None] * 3 if rest is None else [_view(rest.key), _view(rest.value), _pointer(rest.bias)]
        found = [_pointer(t) for t in (d_query, *parts)] + [None] * (6 - len(parts))
        outs = [ctypes.c_int64(splits), *found, _pointer(d_sink[0] if d_sink else None)]
        library.needed().prescore_backward(geometry, *views, *keys, *of_rows, *limits, *of_rest, *outs)
    d_key, d_value, d_row_key, d_row_value, *d_rest = map(_added, parts)
    if rest is not None:
        d_key += members_gradient(d_rest[0], summary.order, plan.cluster, k_len)
        d_value += members_gradient(d_rest[1], summary.order, plan.cluster, k_len)
    return d_query, d_key, d_value, d_row_key, d_row_value, *d_sink


def attend_few(
    site: Operands, allowed: torch.Tensor | None, added: torch.Tensor | None, softcap: float = 0.0
) -> torch.Tensor:
    """Compiled ``few.reference``, laid out as ``attend``'s result: keys and values are read where they lie, once."""
    (kv_heads, k_len), out = site.key.shape[1:3], _result(site)
    if out.numel():
        pairs = (*site.query.shape[:3], k_len)
        geometry = _geometry(
            WHOLE, site.query.shape, kv_heads, k_len, value_dim=site.value.shape[3], scale=site.scale, softcap=softcap
        )
        views = (_view(t) for t in (site.query, site.key, site.value, out))
        numbers = None if added is None else _view(added.expand(pairs))
        library.needed().prescore_few(geometry, *views, _allowed(allowed, pairs), numbers, _sink(site))
    return out.to(site.query.dtype)


def as_allowed(mask: torch.Tensor, lowest: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What a mask of numbers ``[B or 1, H or 1, Nq or 1, Nk]`` allows, and which queries have no key, as bools.

    None: it holds other numbers than 0.0 and those up to ``lowest``.
    """
    found, none = torch.empty(mask.shape, dtype=torch.bool), torch.empty(mask.shape[:3], dtype=torch.bool)
    sizes, hides = (ctypes.c_int64 * 4)(*mask.shape), ctypes.c_int64()
    threads = ctypes.c_int64(torch.get_num_threads())
    outs = (_pointer(found), _pointer(none), ctypes.byref(hides))
    library.needed().prescore_as_bytes(_view(mask), sizes, ctypes.c_double(lowest), threads, *outs)
    return (found, none) if hides.value else None


def share(allowed: torch.Tensor, query: torch.Size, key: torch.Size, tile: int = TILE) -> float:
    """The part of a mask's blocks (a tile of queries, some keys) in which it allows any key, from 0.0 to 1.0.

    ``allowed``: as for ``attend``, of a ``[B, H, Nq, D]`` query and a ``[B, Hkv, Nk, D]`` key.
    """
    geometry = _geometry(WHOLE, query, key[1], key[2], tile=tile)
    found = ctypes.c_double()
    library.needed().prescore_share(geometry, _allowed(allowed, (*query[:3], key[2])), ctypes.byref(found))
    return found.value


def recognized(allowed: torch.Tensor, causal: bool, query: torch.Size, key: torch.Size, used: int) -> bool:
    """Whether a mask lets each query attend what its batch's last query may, ``causal``: of the keys up to its own, of
    which the last query's is the last of ``used`` keys, which are at least as many as queries.

    ``allowed``: as for ``attend``, of a ``[B, H, Nq, D]`` query and a ``[B, Hkv, Nk, D]`` key.
    """
    geometry, mask = _geometry(WHOLE, query, key[1], key[2], causal=causal), _allowed(allowed, (*query[:3], key[2]))
    same = ctypes.c_int64()
    library.needed().prescore_recognize(geometry, mask, ctypes.c_int64(used), ctypes.byref(same))
    return bool(same.value)


def route_attend(site: Operands, summary: Summary, plan: Plan, tile: int = TILE, softcap: float = 0.0) -> torch.Tensor:
    """``mass``, ``route`` and ``attend`` in one walk over the queries: no routes are in memory, and no sums.

    A tile's rows attend their window and sinks, whose sums a share is of, are routed, and attend the rest.
    """
    return _attended(site, summary, None, plan, tile, softcap)


def _attended(
    site: Operands,
    summary: Summary,
    routes: torch.Tensor | None,
    plan: Plan,
    tile: int,
    softcap: float,
    band: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    (kv_heads, k_len), out = site.key.shape[1:3], _result(site)
    if not out.numel():
        return out.to(site.query.dtype)
    if k_len == 0:
        return out.zero_().to(site.query.dtype)
    geometry = _geometry(
        plan, site.query.shape, kv_heads, k_len, value_dim=site.value.shape[3], causal=site.causal,
        routes=min(plan.routes, summary.mean.shape[2]) if routes is None else routes.shape[3],
        scale=site.scale, tile=tile, softcap=softcap, narrow=_narrow(*site[:3], summary.row_key, summary.row_value),
    )  # fmt: skip
    views = [_view(t) for t in (site.query, site.key, site.value, out)]
    keys = [_pointer(site.valid), _pointer(summary.order)]
    rows = [_pointer(summary.row_index), _view(summary.row_key), _view(summary.row_value), _pointer(summary.row_bias)]
    if routes is None:
        library.needed().prescore_route_attend(geometry, *views, *keys, *_levels(summary, plan), *rows, _sink(site))
    else:
        masks = (_pointer(band), _allowed(allowed, (*site.query.shape[:3], k_len)))
        library.needed().prescore_attend(geometry, *views, *keys, _pointer(routes), *rows, _sink(site), *masks)
    return out.to(site.query.dtype)


def _added(parts: torch.Tensor) -> torch.Tensor:
    """The sum, one after the other: in which order ``sum`` adds depends on the machine, and its threads."""
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def _result(site: Operands) -> torch.Tensor:
    """Room for ``[B, H, Nq, Dv]``, laid out ``[B, Nq, H, Dv]``, in a dtype that the kernels write."""
    batch, heads, q_len, _ = site.query.shape
    dtype = site.query.dtype if site.query.dtype in DTYPES else torch.float32
    return torch.empty(batch, q_len, heads, site.value.shape[3], dtype=dtype).transpose(1, 2)


def _geometry(
    plan: Plan,
    query: torch.Size,
    kv_heads: int,
    k_len: int,
    *,
    value_dim: int = 0,
    causal: bool = False,
    routes: int = 0,
    scale: float = 1.0,
    tile: int = TILE,
    softcap: float = 0.0,
    narrow: bool = False,
) -> Any:
    window = -1 if plan.window is None else min(plan.window, 2 * chunk_count(k_len, plan.chunk) * plan.chunk)
    return ctypes.byref(
        _Geometry(
            batch=query[0],
            heads=query[1],
            kv_heads=kv_heads,
            q_len=query[2],
            k_len=k_len,
            dim=query[3],
            value_dim=value_dim,
            chunk=plan.chunk,
            cluster=plan.cluster,
            window=window,
            causal=int(causal),
            sinks=plan.sinks,
            keep=plan.keep,
            centroids=plan.centroids,
            routes=routes,
            coarse=min(plan.coarse, chunk_count(k_len, plan.chunk)),
            group_routes=int(plan.group_routes),
            residual=int(plan.residual),
            tile=tile,
            threads=torch.get_num_threads(),
            narrow=int(narrow),
            scale=scale,
            log_share=math.log(plan.share) if plan.share else -math.inf,
            spread_factor=plan.spread_factor,
            softcap=softcap,
        )
    )


def _narrow(*tensors: torch.Tensor) -> bool:
    return library.tiles() and all(tensor.dtype == torch.bfloat16 for tensor in tensors)


def _view(tensor: torch.Tensor) -> Any:
    """A view of the tensor, or of a copy that the kernels read, by reference."""
    owner = tensor if tensor.dtype in DTYPES else tensor.float()
    if owner.stride(3) != 1 and owner.shape[3] > 1:
        owner = owner.contiguous()
    found = _View(owner.data_ptr(), *owner.stride()[:3], DTYPES.index(owner.dtype))
    found.owner = owner
    return ctypes.byref(found)


def _sink(site: Operands) -> Any:
    """A learned sink's logits by reference, None without one."""
    return None if site.sink_logit is None else _view(site.sink_logit.unsqueeze(3))


def _allowed(mask: torch.Tensor | None, shape: tuple[int, ...]) -> Any:
    """A mask in memory by reference, None without one."""
    if mask is None:
        return None
    owner = mask if mask.stride(3) == 1 and mask.shape[3] == shape[3] else mask.expand(*mask.shape[:3], shape[3])
    owner = owner if owner.stride(3) == 1 else owner.contiguous()
    found = _Allowed(owner.data_ptr(), *owner.expand(shape).stride()[:3])
    found.owner = owner
    return ctypes.byref(found)


def _levels(summary: Summary, plan: Plan) -> list[_Pointer | None]:
    """Mean, spread and bias of clusters, then of chunks (None on one level)."""
    levels = [summary, coarse(summary, plan)] if plan.coarse else [summary]
    found = [_pointer(t) for level in levels for t in (level.mean, level.spread, level.bias)]
    return [*found, *[None] * (6 - len(found))]


def _pointer(tensor: torch.Tensor | None) -> _Pointer | None:
    """To the tensor's numbers, one after the other: of a copy, where they lie otherwise."""
    if tensor is None:
        return None
    owner = tensor.contiguous()
    found = _Pointer(owner.data_ptr())
    found.owner = owner
    return found
