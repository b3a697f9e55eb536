"""``attend``: one softmax over window, rows and routes, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import banded, cpu, masked, reference
from ..layout import by_query
from ..logits import NOTHING, Logits, named, parse
from ..plan import Plan
from ..reads import reads_of
from ..reference import Operands
from ..summary import Summary
from . import dispatch


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    order: Tensor,
    routes: Tensor | None,
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
    """One softmax over window, rows and routes; see ``kernels.reference``.

    Laid out ``[B, Nq, H, Dv]`` in memory. Differentiable in query, key, value, the rows and ``sink_logit`` (as for
    ``mass``). It is ``attend_forward`` without the sums, which compilers see in its place.
    """
    rows = (row_index, row_owner, row_key, row_value, row_bias)
    more = (plan, causal, scale, logits, tensors, sink_logit)
    return attend_forward(query, key, value, valid, order, routes, *rows, *more)[0]


torch.library.define("prescore::attend", torch.library.infer_schema(attend, mutates_args=()))
torch.library.impl("prescore::attend", "CompositeImplicitAutograd", attend)
attend = torch.ops.prescore.attend.default


@torch.library.triton_op("prescore::attend_forward", mutates_args=())
def attend_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    order: Tensor,
    routes: Tensor | None,
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
    sink_logit: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``attend``, and the logarithms of its softmax's sums that the backward needs.

    All arguments are asked for: a backward must return one gradient for each that was passed, and torch leaves out what
    equals a default.

    The sums are ``[B, H, Nq]`` float32, +inf for a query without keys; where no generated kernel runs, ``[0]``.
    """
    rows = (row_index, row_owner, row_key, row_value, row_bias)
    if not dispatch.generated(query, value):
        more = (plan, causal, scale, logits, tensors, sink_logit)
        out = attend_eager(query, key, value, valid, order, routes, *rows, *more)
        return out, query.new_empty(0, dtype=torch.float32)
    from ..triton import attend as generated

    site = Operands(query, key, value, valid, causal, scale, sink_logit)
    given = parse(logits)
    known = dict(named(given, tensors), softcap=given.softcap)
    summary, routed = Summary.of_rows(order, *rows), or_no_routes(routes, query)
    return generated.attend(site, summary, routed, Plan.parse(plan), given.lifted, **known)


@attend_forward.register_fake
def _(query, key, value, valid, order, routes, index, owner, row_key, row_value, row_bias, plan, *rest):  # type: ignore[no-untyped-def]
    batch, heads, length, _ = query.shape
    sums = (batch, heads, length) if dispatch.generated(query, value) else (0,)
    return like_output(query, key, value), query.new_empty(sums, dtype=torch.float32)


@torch.library.custom_op("prescore::attend_eager", mutates_args=())
def attend_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    order: Tensor,
    routes: Tensor | None,
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
    """``attend`` by the compiled CPU kernel or the reference."""
    site = Operands(query, key, value, valid, causal, scale, sink_logit)
    summary = Summary.of_rows(order, row_index, row_owner, row_key, row_value, row_bias)
    settings, given = Plan.parse(plan), parse(logits)
    routes = _left_to_route(settings, routes, query)
    if dispatch.compiled(query) and given.uncapped == NOTHING:
        return cpu.attend(site, summary, routes, settings, softcap=given.softcap)
    if dispatch.compiled(query) and _only_banded(settings, given):
        near, ends = banded.within(site, banded.ends(given.band(), query.shape[2], key.shape[2], causal))
        return cpu.attend(near, summary, routes, settings, band=ends, softcap=given.softcap)
    if dispatch.compiled(query) and settings.window is None and (read := reads_of(given.uncapped)):
        seen = masked.see(read, named(given, tensors), query.dtype)
        with dispatch.as_they_are(query):
            return masked.attend(site, summary, routes, settings, seen, given.softcap)
    with dispatch.as_they_are(query):
        out = reference.attend(site, summary, routes, settings, given, named(given, tensors))
    return by_query(out)


@attend_eager.register_fake
def like_output(query, key, value, *args):  # type: ignore[no-untyped-def]
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.plan, ctx.causal, ctx.scale, ctx.logits, tensors, sink_logit = inputs
    if any(t.requires_grad for t in tensors):  # a graph that was rewritten where no gradients were asked for
        raise NotImplementedError(
            "prescore::attend: got a gradient that is asked for in what is read as a mask or bias; allowed: none"
        )
    operands.append(sink_logit)
    ctx.has, ctx.tensors = [t is not None for t in operands], len(tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *(t for t in operands if t is not None), *tensors)


def _attend_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    out, sums, *found = ctx.saved_tensors
    saved = iter(found)
    *operands, sink_logit = [next(saved) if has else None for has in ctx.has]
    more = (ctx.plan, ctx.causal, ctx.scale, ctx.logits, list(saved), sink_logit)
    d_query, d_key, d_value, d_row_key, d_row_value, d_sink = attend_backward(grad, out, sums, *operands, *more)
    rest = (*[None] * 5, [None] * ctx.tensors, None if sink_logit is None else d_sink)
    return d_query, d_key, d_value, None, None, None, None, None, d_row_key, d_row_value, *rest


attend_forward.register_autograd(_attend_backward, setup_context=_attend_setup)


@torch.library.triton_op("prescore::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    out: Tensor,
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    order: Tensor,
    routes: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in query, key, value, row_key, row_value and sink_logit (``[0]`` without one), in its tensor's dtype.

    ``out`` and ``sums`` are what ``attend_forward`` returned.
    """
    rows = (row_index, row_owner, row_key, row_value, row_bias)
    if not dispatch.generated(query, value):
        more = (plan, causal, scale, logits, tensors, sink_logit)
        return attend_backward_eager(grad, query, key, value, valid, order, routes, *rows, *more)
    from ..triton import attend_backward as generated

    site = Operands(query, key, value, valid, causal, scale, sink_logit)
    routed = or_no_routes(routes, query)
    summary = Summary.of_rows(order, *rows)
    given = parse(logits)
    known = dict(named(given, tensors), softcap=given.softcap)
    grads = generated.attend_backward(grad, out, sums, site, summary, routed, Plan.parse(plan), given.lifted, **known)
    return _gradients(grads, (query, key, value, row_key, row_value), sink_logit)


def _gradients(
    found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], sink_logit: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``found`` in the dtypes of ``wanted`` and ``sink_logit``; without one, there is one gradient less."""
    if sink_logit is None:
        sink_logit = wanted[0].new_empty(0)
        found = (*found, sink_logit.clone())
    pairs = zip(found, (*wanted, sink_logit), strict=True)
    return tuple(grad.to(t.dtype).contiguous() for grad, t in pairs)  # type: ignore[return-value]


@attend_backward.register_fake
def _(grad, out, sums, query, key, value, *rest):  # type: ignore[no-untyped-def]
    return _like_gradients(grad, query, key, value, *rest)


def _like_gradients(  # type: ignore[no-untyped-def]
    grad,
    query,
    key,
    value,
    valid,
    order,
    routes,
    row_index,
    row_owner,
    row_key,
    row_value,
    row_bias,
    plan,
    causal,
    scale,
    logits,
    tensors,
    sink_logit=None,
):
    of_sink = query.new_empty(0) if sink_logit is None else sink_logit
    return tuple(t.new_empty(t.shape) for t in (query, key, value, row_key, row_value, of_sink))


@torch.library.custom_op("prescore::attend_backward_eager", mutates_args=())
def attend_backward_eager(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    order: Tensor,
    routes: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``attend_backward`` by the compiled CPU kernel or the reference."""
    site = Operands(query, key, value, valid, causal, scale, sink_logit)
    summary = Summary.of_rows(order, row_index, row_owner, row_key, row_value, row_bias)
    given, settings = parse(logits), Plan.parse(plan)
    routed = _left_to_route(settings, routes, query)
    limited = _only_banded(settings, given)
    if dispatch.compiled(query) and (limited or given.uncapped == NOTHING) and _finite(grad, site):
        ends = banded.ends(given.band(), query.shape[2], key.shape[2], causal) if limited else None
        grads = cpu.attend_backward(grad, site, summary, routed, settings, given.softcap, ends)
    else:
        with dispatch.as_they_are(query):
            grads = reference.attend_backward(grad, site, summary, routed, settings, given, named(given, tensors))
    return _gradients(grads, (query, key, value, row_key, row_value), sink_logit)


attend_backward_eager.register_fake(_like_gradients)
attend_backward.register_autograd(dispatch.no_second_derivative, setup_context=dispatch.no_setup)


def or_no_routes(routes: Tensor | None, query: Tensor) -> Tensor:
    return query.new_empty((*query.shape[:3], 0), dtype=torch.int32) if routes is None else routes


def _left_to_route(plan: Plan, routes: Tensor | None, query: Tensor) -> Tensor:
    """The routes; without a limit none: every key is in the window."""
    return or_no_routes(None if plan.window is None else routes, query)


def _finite(grad: Tensor, site: Operands) -> bool:
    """Whether all that is read is: the kernel multiplies blocks, in which what is not would reach others."""
    sink = site.sink_logit is None or bool((site.sink_logit < float("inf")).all())
    return sink and all(bool(tensor.isfinite().all()) for tensor in (grad, *site[:3]))


def _only_banded(plan: Plan, logits: Logits) -> bool:
    """Whether the band of a mask, and causality, are all that limits what is attended."""
    return plan.window is None and logits.uncapped.only_band
