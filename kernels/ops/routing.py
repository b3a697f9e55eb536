"""``mass`` and ``route``: which clusters each query attends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import coarse, cpu, reference
from ..layout import smaller
from ..logits import NOTHING, by_chunk, named, parse
from ..plan import Plan
from ..reference import Operands
from ..summary import Summary
from . import dispatch


@torch.library.triton_op("prescore::mass", mutates_args=())
def mass(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    row_index: Tensor,
    row_owner: Tensor,
    row_key: Tensor,
    row_value: Tensor,
    row_bias: Tensor,
    plan: str,
    causal: bool,
    scale: float,
    logits: str,
    tensors: Sequence[Tensor],
    sink_logit: Tensor | None = None,
) -> Tensor:
    """Logarithm of the softmax's sum over window and sinks ``[B, H, Nq]`` float32; see ``kernels.reference.mass``.

    ``sink_logit``: ``[B, H, Nq]`` or None, see ``kernels.reference.Operands``.
    """
    rows = (row_index, row_owner, row_key, row_value, row_bias)
    if not dispatch.generated(query):
        return mass_eager(query, key, valid, *rows, plan, causal, scale, logits, tensors, sink_logit)
    from ..triton import mass as generated

    given = parse(logits)
    more = dict(named(given, tensors), softcap=given.softcap)
    summary = Summary.of_rows(row_index, *rows)
    return generated.mass(
        Operands(query, key, key, valid, causal, scale, sink_logit), summary, Plan.parse(plan), given.lifted, **more
    )


@torch.library.custom_op("prescore::mass_eager", mutates_args=())
def mass_eager(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    row_index: Tensor,
    row_owner: Tensor,
    row_key: Tensor,
    row_value: Tensor,
    row_bias: Tensor,
    plan: str,
    causal: bool,
    scale: float,
    logits: str,
    tensors: Sequence[Tensor],
    sink_logit: Tensor | None = None,
) -> Tensor:
    """``mass`` by the compiled CPU kernel or the reference."""
    site = Operands(query, key, key, valid, causal, scale, sink_logit)
    summary = Summary.of_rows(row_index, row_index, row_owner, row_key, row_value, row_bias)
    given = parse(logits)
    if dispatch.compiled(query) and given.uncapped == NOTHING:
        return cpu.mass(site, summary, Plan.parse(plan), given.softcap)
    with dispatch.as_they_are(query):
        return reference.mass(site, summary, Plan.parse(plan), given, named(given, tensors))


@mass.register_fake
@mass_eager.register_fake
def _(query, *rest):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[:3], dtype=torch.float32)


mass.register_autograd(dispatch.constant_backward, setup_context=dispatch.constant_setup)


@torch.library.triton_op("prescore::route", mutates_args=())
def route(
    query: Tensor,
    order: Tensor,
    mean: Tensor,
    spread: Tensor,
    bias: Tensor,
    plan: str,
    causal: bool,
    k_len: int,
    scale: float,
    logits: str,
    tensors: Sequence[Tensor],
    mass: Tensor | None = None,
) -> Tensor:
    """Routes ``[B, H, Nq, min(routes, clusters)]`` int32; see ``kernels.routing.route`` and ``kernels.coarse``.

    Raises:
        ValueError: no ``mass``, and the plan has a share or routes heads together.
    """
    if mass is None and Plan.parse(plan).needs_mass:
        raise ValueError("mass: got None; allowed: what prescore::mass gives, where a plan has a share or group_routes")
    if not dispatch.generated(query):
        return route_eager(query, order, mean, spread, bias, plan, causal, k_len, scale, logits, tensors, mass)
    from ..triton import route as generated

    settings, given = Plan.parse(plan), parse(logits)
    known = by_chunk(given, named(given, tensors), settings.chunk)
    clusters = Summary.of_clusters(order, mean, spread, bias)
    return generated.route(query, clusters, settings, causal, k_len, scale, given.reach, known, mass)


@torch.library.custom_op("prescore::route_eager", mutates_args=())
def route_eager(
    query: Tensor,
    order: Tensor,
    mean: Tensor,
    spread: Tensor,
    bias: Tensor,
    plan: str,
    causal: bool,
    k_len: int,
    scale: float,
    logits: str,
    tensors: Sequence[Tensor],
    mass: Tensor | None,
) -> Tensor:
    """``route`` by the compiled CPU kernel or the reference."""
    settings, given = Plan.parse(plan), parse(logits)
    clusters = Summary.of_clusters(order, mean, spread, bias)
    if dispatch.compiled(query) and given.uncapped == NOTHING:  # a softcap keeps the order
        return cpu.route(query, clusters, settings, causal, k_len, scale, mass)
    with dispatch.as_they_are(query):
        return coarse.route(query, clusters, settings, causal, k_len, scale, given, named(given, tensors), mass)


@route.register_fake
@route_eager.register_fake
def _(query, order, mean, spread, bias, plan, *rest):  # type: ignore[no-untyped-def]
    count = smaller(Plan.parse(plan).routes, mean.shape[2])
    return query.new_empty((*query.shape[:3], count), dtype=torch.int32)


route.register_autograd(dispatch.constant_backward, setup_context=dispatch.constant_setup)


def routes_of(site: Operands, summary: Summary, plan: str, logits: str = "", tensors: Sequence[Tensor] = ()) -> Tensor:
    """``route``, and ``mass`` before it where the plan needs it."""
    query, key, _, valid, causal, scale, sink_logit = site
    near = None
    if Plan.parse(plan).needs_mass:
        near = mass(query, key, valid, *summary[4:], plan, causal, scale, logits, tensors, sink_logit)
    return route(query, *summary[:4], plan, causal, key.shape[2], scale, logits, tensors, near)
