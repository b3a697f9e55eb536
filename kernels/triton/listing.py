"""The sources that a plan runs with, as text: for reading, printing and tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..plan import Plan
from . import loops, options, residual, route, rows, segments
from .attend import attend_source, merge_source
from .attend_backward import backward_spec
from .clusters import ClusterSpec, cluster_source, fits
from .d_query import d_query_source
from .key_major import residual_source, routes_source, rows_source, window_source
from .mass import FEATURES
from .rows_backward import rows_backward_source
from .scores import kernel as scores
from .scores import select
from .spec import NOTHING, Lifted, Spec, SummarySpec
from .union import arrange_source, mark_source, on_chip, union_source


def spec(
    plan: Plan,
    *,
    dim: int,
    value_dim: int = 0,
    group: int = 1,
    dtype: str = "bfloat16",
    target: str = "cuda",
    causal: bool = True,
    valid: bool = False,
    lifted: Lifted = NOTHING,
    softcap: float = 0.0,
    sink_logit: bool = False,
    splits: int = 1,
) -> Spec:
    """The spec of a forward kernel; see ``Spec``. ``value_dim`` 0: as ``dim``."""
    value_dim = value_dim or dim
    return Spec(
        plan=plan.text,
        dtype=dtype,
        target=target,
        dim=dim,
        value_dim=value_dim,
        group=group,
        causal=causal,
        valid=valid,
        routes=bool(plan.routes),
        lifted=lifted,
        softcap=softcap,
        sink_logit=sink_logit,
        splits=splits,
        tile=options.forward(target, dtype, dim, value_dim, bool(plan.routes)),
    )


def forward_sources(forward: Spec) -> dict[str, str]:
    """Sources of attend's forward by the name of the kernel, in the order of their launches."""
    found: dict[str, str] = {}
    if forward.routes:
        found |= union_sources(forward)
    if loops.residual(forward):
        found["centroids"] = residual.centroids_source(forward)
    found["attend"] = attend_source(forward)
    if forward.splits > 1:
        found["merge"] = merge_source(forward)
    return found


def backward_sources(backward: Spec) -> dict[str, str]:
    """Sources of attend's backward by the name of the kernel, but for the lists of clusters."""
    plan = backward.settings
    found = {"d_query": d_query_source(backward)}
    if loops.has_window(backward):
        found["d_window"] = window_source(backward)
    if loops.residual(backward):
        found["d_residual"] = residual_source(backward)
    if backward.routes:
        found["d_routes"] = routes_source(backward)
    if loops.has_rows(backward) and plan.sinks:
        found["d_sinks"] = rows_source(backward, True)
    if loops.has_rows(backward) and plan.rows_per_segment:
        found["d_segments"] = rows_source(backward, False)
    if loops.has_rows(backward):
        found["rows_backward"] = rows_backward_source(plan, backward.dim)
    return found


def all_sources(forward: Spec, site: str, reach: Lifted | None = None) -> dict[str, str]:
    """Every source of a site: score, summarize, route, attend and its backward; ``site`` is named in their heads.

    ``reach``: what of its mask routing looks at, see ``sources``.
    """
    plan = forward.settings
    found: dict[str, str] = {}
    if plan.keep and scores.fits(plan, forward.dim, forward.dtype):
        found["score"] = scores.score_source(scores.spec_of(plan, valid=forward.valid, **_shape(forward)))
    if plan.routes and fits(plan, forward.dim, forward.value_dim):
        clusters = ClusterSpec(
            dim=forward.dim, value_dim=forward.value_dim, plan=forward.plan, valid=forward.valid,
            dtype=forward.dtype, target=forward.target,
        )  # fmt: skip
        found["cluster"] = cluster_source(clusters)
    if select.fits(plan):
        found["select"] = select.select_source(select.SelectSpec(plan=forward.plan, valid=forward.valid))
        if select.segments_fit(plan):
            found["select_segments"] = select.segments_source(plan)
    if rows.fits(plan, forward.dim, forward.value_dim):
        copied = SummarySpec(dim=forward.dim, value_dim=forward.value_dim, plan=forward.plan, valid=forward.valid)
        if plan.sinks or plan.keep:
            found["rows"] = rows.rows_source(copied)
        if plan.centroids:
            found |= segments.segments_sources(segments.spec_of(copied, forward.dtype, forward.target))
    if plan.needs_mass:
        found["mass"] = attend_source(mass_spec(forward))
    if plan.routes and plan.window is not None:
        found |= route_sources(forward, reach or NOTHING)
    found |= forward_sources(forward) | backward_sources(backward_spec(forward))
    if site:
        found = {name: text.replace("\n", f"\n# module: {site}\n", 1) for name, text in found.items()}
    return found


def route_sources(forward: Spec, reach: Lifted) -> dict[str, str]:
    """Sources of route, in the order of their launches; on two levels, chunks come first."""
    plan, per_chunk = forward.settings, forward.settings.chunk // forward.settings.cluster
    clusters = replace(route.spec_of(plan, **_shape(forward)), lifted=reach)
    if not plan.coarse:
        return {"route": route.route_source(clusters, per_chunk, False)}
    chunks = replace(route.spec_of(plan.first_level, **_shape(forward)), lifted=reach)
    return {
        "route_chunks": route.route_source(chunks, 1, False, bool(chunks.together)),
        **{f"{name}_chunks": text for name, text in union_sources(route.tiled(chunks)).items()},
        "route": route.route_source(clusters, per_chunk, True),
    }


def union_sources(spec: Spec) -> dict[str, str]:
    """Sources of the lists of all tiles, in the order of their launches."""
    return {"mark": mark_source(spec, on_chip(spec)), "union": union_source(spec), "arrange": arrange_source(spec)}


def mass_spec(forward: Spec) -> Spec:
    """The spec of the attend kernel that gives the sum over window and sinks; see ``mass``."""
    features = min(FEATURES, forward.dim)
    tile = options.forward(forward.target, forward.dtype, forward.dim, features, False)
    near = forward.settings.near.text
    return replace(forward, plan=near, value_dim=features, routes=False, splits=1, tile=tile)


def _shape(forward: Spec) -> dict[str, Any]:
    """What a site's other kernels share with attend's."""
    return {name: getattr(forward, name) for name in ("dim", "group", "dtype", "causal", "target")}
