"""Calls the compiled kernels of ``attend.cpp``."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch

from . import library
from .coarse import coarse
from .layout import chunk_count
from .plan import WHOLE, Plan
from .reference import Operands
from .summary import Summary

TILE = 128
"""Queries a tile; docs/cpu.md has the measurement."""

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
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("format", ctypes.c_int64),
    ]


class _Allowed(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "query"))]


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
        geometry = _geometry(plan, key.shape, key.shape, value.shape[3], k_len, True, 0, 1.0)
        views, alive = zip(*(_view(t) for t in (key, value)), strict=True)
        inside = member.contiguous()
        library.needed().prescore_cluster(
            ctypes.byref(geometry),
            *(ctypes.byref(view) for view in views),
            *(_pointer(t) for t in (inside, order, mean, spread, bias)),
        )
        del alive
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
    batch, heads, q_len, dim = query.shape
    count = min(plan.routes, summary.mean.shape[2])
    routes = torch.empty(batch, heads, q_len, count, dtype=torch.int32)
    if not routes.numel():
        return routes
    geometry = _geometry(plan, query.shape, summary.mean.shape, dim, k_len, causal, count, scale)
    geometry.narrow = _narrow(query)
    view, keep_alive = _view(query)
    levels, more_alive = _levels(summary, plan)
    mass = None if mass is None else mass.contiguous()  # named, as a pointer does not keep what it points to
    near = None if mass is None else _pointer(mass)
    library.needed().prescore_route(ctypes.byref(geometry), ctypes.byref(view), *levels, near, _pointer(routes))
    del keep_alive, more_alive
    return routes


def mass(site: Operands, summary: Summary, plan: Plan, softcap: float = 0.0) -> torch.Tensor:
    """Compiled ``reference.mass``; ``softcap``: of the logits, 0.0: none."""
    batch, heads, q_len, _ = site.query.shape
    k_len = site.key.shape[2]
    found = torch.full((batch, heads, q_len), -math.inf, dtype=torch.float32)
    if not found.numel() or k_len == 0:
        return found
    geometry = _geometry(
        plan.near, site.query.shape, site.key.shape, 0, k_len, site.causal, 0, site.scale, TILE, softcap
    )
    geometry.narrow = _narrow(site.query, site.key, summary.row_key)
    sinks = slice(plan.sinks)
    index, bias = (t[:, :, sinks].contiguous() for t in (summary.row_index, summary.row_bias))
    views, alive = zip(*(_view(t) for t in (site.query, site.key, summary.row_key[:, :, sinks])), strict=True)
    query, key, row_key = (ctypes.byref(view) for view in views)
    valid = None if site.valid is None else site.valid.contiguous()  # named: a pointer does not keep it
    pad = None if valid is None else _pointer(valid)
    sink, sink_alive = _sink(site)
    library.needed().prescore_mass(
        ctypes.byref(geometry), query, key, pad, _pointer(index), row_key, _pointer(bias), sink, _pointer(found)
    )
    del alive, sink_alive
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


def attend_few(
    site: Operands, allowed: torch.Tensor | None, added: torch.Tensor | None, softcap: float = 0.0
) -> torch.Tensor:
    """Compiled ``few.reference``, laid out as ``attend``'s result: keys and values are read where they lie, once."""
    (batch, heads, q_len, _), value_dim, k_len = site.query.shape, site.value.shape[3], site.key.shape[2]
    out = _result(site)
    if out.numel():
        sizes = (site.query.shape, site.key.shape, value_dim, k_len)
        geometry = _geometry(WHOLE, *sizes, False, 0, site.scale, softcap=softcap)
        views, alive = zip(*(_view(t) for t in (site.query, site.key, site.value, out)), strict=True)
        sink, sink_alive = _sink(site)
        mask, mask_alive = _allowed(allowed, (batch, heads, q_len, k_len))
        numbers, numbers_alive = None, None
        if added is not None:
            view, numbers_alive = _view(added.expand(batch, heads, q_len, k_len))
            numbers = ctypes.byref(view)
        run = library.needed().prescore_few
        run(ctypes.byref(geometry), *(ctypes.byref(view) for view in views), mask, numbers, sink)
        del alive, sink_alive, mask_alive, numbers_alive
    return out.to(site.query.dtype)


def as_allowed(mask: torch.Tensor, lowest: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What a mask of numbers ``[B or 1, H or 1, Nq or 1, Nk]`` allows, and which queries have no key, as bools.

    None: it holds other numbers than 0.0 and those up to ``lowest``.
    """
    found, none = torch.empty(mask.shape, dtype=torch.bool), torch.empty(mask.shape[:3], dtype=torch.bool)
    view, owner = _view(mask)
    sizes, hides = (ctypes.c_int64 * 4)(*mask.shape), ctypes.c_int64()
    threads = ctypes.c_int64(torch.get_num_threads())
    library.needed().prescore_as_bytes(
        ctypes.byref(view),
        sizes,
        ctypes.c_double(lowest),
        threads,
        _pointer(found),
        _pointer(none),
        ctypes.byref(hides),
    )
    del owner
    return (found, none) if hides.value else None


def share(allowed: torch.Tensor, query: torch.Size, key: torch.Size, tile: int = TILE) -> float:
    """The part of a mask's blocks (a tile of queries, some keys) in which it allows any key, from 0.0 to 1.0.

    ``allowed``: as for ``attend``, of a ``[B, H, Nq, D]`` query and a ``[B, Hkv, Nk, D]`` key.
    """
    geometry = _geometry(WHOLE, query, key, 0, key[2], False, 0, 1.0, tile)
    mask, alive = _allowed(allowed, (*query[:3], key[2]))
    found = ctypes.c_double()
    library.needed().prescore_share(ctypes.byref(geometry), mask, ctypes.byref(found))
    del alive
    return found.value


def recognized(allowed: torch.Tensor, causal: bool, query: torch.Size, key: torch.Size, used: int) -> bool:
    """Whether a mask lets each query attend what its batch's last query may, ``causal``: of the keys up to its own, of
    which the last query's is the last of ``used`` keys, which are at least as many as queries.

    ``allowed``: as for ``attend``, of a ``[B, H, Nq, D]`` query and a ``[B, Hkv, Nk, D]`` key.
    """
    geometry = _geometry(WHOLE, query, key, 0, key[2], causal, 0, 1.0)
    mask, alive = _allowed(allowed, (*query[:3], key[2]))
    same = ctypes.c_int64()
    library.needed().prescore_recognize(ctypes.byref(geometry), mask, ctypes.c_int64(used), ctypes.byref(same))
    del alive
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
    batch, heads, q_len, dim = site.query.shape
    value_dim, k_len = site.value.shape[3], site.key.shape[2]
    out = _result(site)
    if not out.numel():
        return out.to(site.query.dtype)
    if k_len == 0:
        return out.zero_().to(site.query.dtype)
    count = min(plan.routes, summary.mean.shape[2]) if routes is None else routes.shape[3]
    sizes = (site.query.shape, site.key.shape, value_dim, k_len)
    geometry = _geometry(plan, *sizes, site.causal, count, site.scale, tile, softcap)
    geometry.narrow = _narrow(*site[:3], summary.row_key, summary.row_value)
    views, alive = zip(*(_view(t) for t in (site.query, site.key, site.value, out)), strict=True)
    row_views, rows_alive = zip(*(_view(t) for t in (summary.row_key, summary.row_value)), strict=True)
    valid = None if site.valid is None else site.valid.contiguous()
    masks: list[Any] = []
    sink, sink_alive = _sink(site)
    order, index, bias = (t.contiguous() for t in (summary.order, summary.row_index, summary.row_bias))
    if routes is None:
        run = library.needed().prescore_route_attend
        chosen, chosen_alive = _levels(summary, plan)
    else:
        run = library.needed().prescore_attend
        mask, mask_alive = _allowed(allowed, (batch, heads, q_len, k_len))
        chosen_alive = [routes.contiguous(), *mask_alive]
        chosen = [_pointer(chosen_alive[0])]
        masks = [None if band is None else _pointer(band), mask]
    run(
        ctypes.byref(geometry),
        *(ctypes.byref(view) for view in views),
        None if valid is None else _pointer(valid),
        _pointer(order),
        *chosen,
        _pointer(index),
        *(ctypes.byref(view) for view in row_views),
        _pointer(bias),
        sink,
        *masks,
    )
    del alive, rows_alive, chosen_alive, sink_alive
    return out.to(site.query.dtype)


def _result(site: Operands) -> torch.Tensor:
    """Room for ``[B, H, Nq, Dv]``, laid out ``[B, Nq, H, Dv]``, in a dtype that the kernels write."""
    batch, heads, q_len, _ = site.query.shape
    dtype = site.query.dtype if site.query.dtype in DTYPES else torch.float32
    return torch.empty(batch, q_len, heads, site.value.shape[3], dtype=dtype).transpose(1, 2)


def _geometry(
    plan: Plan,
    query: torch.Size,
    kv: torch.Size,
    value_dim: int,
    k_len: int,
    causal: bool,
    routes: int,
    scale: float,
    tile: int = TILE,
    softcap: float = 0.0,
) -> _Geometry:
    window = -1 if plan.window is None else min(plan.window, 2 * chunk_count(k_len, plan.chunk) * plan.chunk)
    return _Geometry(
        batch=query[0],
        heads=query[1],
        kv_heads=kv[1],
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
        scale=scale,
        log_share=math.log(plan.share) if plan.share else -math.inf,
        spread_factor=plan.spread_factor,
        softcap=softcap,
    )


def _narrow(*tensors: torch.Tensor) -> int:
    return int(library.tiles() and all(tensor.dtype == torch.bfloat16 for tensor in tensors))


def _view(tensor: torch.Tensor) -> tuple[_View, torch.Tensor]:
    """A view of the tensor, or of a float32 copy, and the tensor that owns its memory."""
    owner = tensor if tensor.dtype in DTYPES else tensor.float()
    if owner.stride(3) != 1 and owner.shape[3] > 1:
        owner = owner.contiguous()
    return _View(owner.data_ptr(), *owner.stride()[:3], DTYPES.index(owner.dtype)), owner


def _sink(site: Operands) -> tuple[Any, torch.Tensor | None]:
    """A learned sink's logits by reference, None without one, and the tensor that owns them."""
    if site.sink_logit is None:
        return None, None
    view, owner = _view(site.sink_logit.unsqueeze(3))
    return ctypes.byref(view), owner


def _allowed(mask: torch.Tensor | None, shape: tuple[int, ...]) -> tuple[Any, list[torch.Tensor]]:
    """A mask in memory by reference, None without one, and the tensors that own it."""
    if mask is None:
        return None, []
    owner = mask if mask.stride(3) == 1 and mask.shape[3] == shape[3] else mask.expand(*mask.shape[:3], shape[3])
    owner = owner if owner.stride(3) == 1 else owner.contiguous()
    return ctypes.byref(_Allowed(owner.data_ptr(), *owner.expand(shape).stride()[:3])), [owner]


def _levels(summary: Summary, plan: Plan) -> tuple[list[ctypes.c_void_p | None], list[torch.Tensor]]:
    """Mean, spread and bias of clusters, then of chunks (None on one level), and the tensors that own them."""
    levels = [summary, coarse(summary, plan)] if plan.coarse else [summary]
    owners = [t.contiguous() for level in levels for t in (level.mean, level.spread, level.bias)]
    return [*(_pointer(t) for t in owners), *[None] * (6 - len(owners))], owners


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
