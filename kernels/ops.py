"""The operators that the graph pass inserts: score, summarize, mass, route, attend.

Registered with ``torch.library`` under ``prescore::``, with fake implementations (shapes only) and
gradients, so that Inductor, AOTAutograd and ``torch.export`` see them. A plan travels as
its text. On a CPU the last three are lowered to one, route_attend. On a GPU the generated Triton kernels
run: an operator made of them is a ``triton_op``, which a compiler takes apart into their launches, so that
Inductor and CUDA graphs have them. On a CPU the compiled kernels run where they can; anything else runs the
reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from . import banded, coarse, cpu, masked, reference
from . import summary as summaries
from .logits import NOTHING, Logits, by_chunk, named, parse
from .plan import Plan
from .reference import Operands
from .summary import Summary
from .triton import device

MAY_WAIT = (torch.Tag.cudagraph_unsafe,)
"""Of operators that wait for the device with some plans, as a user's scorer may: Inductor leaves them out of graphs."""


def prescored(
    site: Operands, plan: Plan, logits: Logits = NOTHING, tensors: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Score, summarize, route and attend one site: ``[B, H, Nq, Dv]`` in the query's dtype."""
    more = (logits.text, [tensors[name] for name in logits.tensors] if tensors else [])
    q, k, v, valid, causal, scale, sink_logit = site
    settings = plan.text
    scores = score(q, k, valid, settings, causal, scale) if plan.keep else None
    summary = Summary(*summarize(k, v, valid, scores, settings))
    if plan.routes and q.device.type == "cpu" and logits.uncapped == NOTHING:
        return route_attend(*site[:4], *summary, settings, causal, scale, sink_logit, logits.softcap)
    routes = _routes(site, summary, settings, *more) if plan.routes else None
    return attend(*site[:4], summary.order, routes, *summary[4:], settings, causal, scale, *more, sink_logit)


@torch.library.triton_op("prescore::score", mutates_args=())
def score(query: Tensor, key: Tensor, valid: Tensor | None, plan: str, causal: bool, scale: float) -> Tensor:
    """Scores ``[B, Hkv, Nk]`` float32; see ``kernels.summary.score``. Not differentiable."""
    settings = Plan.parse(plan)
    if not _generated(key):
        return score_eager(query, key, valid, plan, causal, scale)
    from .triton.scores import kernel as generated

    dtype = str(key.dtype).removeprefix("torch.")
    if not generated.fits(settings, key.shape[3], dtype, device.is_small(key.device)):
        return score_eager(query, key, valid, plan, causal, scale)
    return generated.scores(query, key, valid, settings, causal, scale)


@torch.library.custom_op("prescore::score_eager", mutates_args=(), tags=MAY_WAIT)
def score_eager(query: Tensor, key: Tensor, valid: Tensor | None, plan: str, causal: bool, scale: float) -> Tensor:
    """``score`` in torch operations."""
    with _as_they_are(key):
        return summaries.score(query, key, valid, Plan.parse(plan), causal, scale)


@score.register_fake
@score_eager.register_fake
def _(query, key, valid, plan, causal, scale):  # type: ignore[no-untyped-def]
    return key.new_empty(key.shape[:3], dtype=torch.float32)


def _as_they_are(tensor: Tensor) -> AbstractContextManager[Any]:
    """Scores and clusters are float32 under autocast too: it is a module's, not theirs."""
    return torch.autocast(tensor.device.type, enabled=False)


def _constant_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)
    ctx.nothing = tuple([None] * len(given) if isinstance(given, (list, tuple)) else None for given in inputs)


def _constant_backward(ctx: Any, grad: Tensor | None) -> Any:
    """What is chosen is a constant: no gradient flows through a score or a route."""
    return ctx.nothing


score.register_autograd(_constant_backward, setup_context=_constant_setup)


@torch.library.triton_op("prescore::summarize", mutates_args=())
def summarize(
    key: Tensor, value: Tensor, valid: Tensor | None, scores: Tensor | None, plan: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``kernels.summary.Summary``; row_key and row_value are differentiable."""
    settings = Plan.parse(plan)
    if settings.only_window:
        return _empty_summary(key, value, plan)  # type: ignore[return-value]
    if not _generated(key):
        return summarize_eager(key, value, valid, scores, plan)
    from .triton import clusters as generated
    from .triton import rows as copied
    from .triton.scores import select

    sizes = (key.shape[3], value.shape[3])
    if settings.routes and not generated.fits(settings, *sizes):
        return summarize_eager(key, value, valid, scores, plan)
    if settings.routes:
        member = None if valid is None else generated.members(valid, settings.sinks)
        order, mean, spread, bias = generated.clusters(key, value, member, settings)
    else:
        order, mean, spread, bias = _empty_summary(key, value, plan)[:4]
    best = select.select(scores, valid, settings) if scores is not None and select.fits(settings) else None
    if not copied.fits(settings, *sizes):
        place, of_place = (None, scores) if best is None else best
        return (order, mean, spread, bias, *rows(key, value, valid, place, of_place, plan))
    chosen = None if best is None else select.select_segments(*best, settings)
    return (order, mean, spread, bias, *copied.rows(key, value, valid, chosen, settings))


@torch.library.custom_op("prescore::summarize_eager", mutates_args=(), tags=MAY_WAIT)
def summarize_eager(
    key: Tensor, value: Tensor, valid: Tensor | None, scores: Tensor | None, plan: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``summarize`` by the compiled CPU kernel or the reference."""
    settings = Plan.parse(plan)
    cluster = cpu.clusters if settings.clustering == "pca_tree" and _compiled(key) else summaries.clusters
    with _as_they_are(key):
        return tuple(summaries.summarize(key, value, valid, scores, settings, cluster))  # type: ignore[return-value]


@torch.library.custom_op("prescore::rows", mutates_args=())
def rows(
    key: Tensor, value: Tensor, valid: Tensor | None, place: Tensor | None, scores: Tensor | None, plan: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The last five fields of ``summarize``: rows without clusters, in torch operations linear in n.

    ``place``: the best keys of each chunk, whose scores are then ``scores``; None: those are of all keys.
    """
    settings = Plan.parse(plan)
    settings = Plan(**settings.settings() | {"routes": 0})
    best = None if place is None or scores is None else (place, scores)
    with _as_they_are(key):
        return tuple(summaries.summarize(key, value, valid, scores, settings, best=best)[4:])  # type: ignore[return-value]


@rows.register_fake
def _(key, value, valid, place, scores, plan):  # type: ignore[no-untyped-def]
    return _empty_summary(key, value, plan)[4:]


@summarize.register_fake
@summarize_eager.register_fake
def _(key, value, valid, scores, plan):  # type: ignore[no-untyped-def]
    return _empty_summary(key, value, plan)


def _empty_summary(key: Tensor, value: Tensor, plan: str) -> tuple[Tensor, ...]:
    settings = Plan.parse(plan)
    batch, heads, length, dim = key.shape
    chunks = (length + settings.chunk - 1) // settings.chunk
    places = chunks * settings.chunk if settings.routes else 0
    clusters = chunks * (settings.chunk // settings.cluster) if settings.routes else 0
    rows = settings.sinks + chunks * settings.rows_per_segment
    levels = summaries.LEVELS if settings.centroids else 0

    def empty(*shape, dtype=torch.float32):  # type: ignore[no-untyped-def]
        return key.new_empty(shape, dtype=dtype)

    return (
        empty(batch, heads, places, dtype=torch.int32),
        empty(batch, heads, clusters, dim),
        empty(batch, heads, clusters, dim),
        empty(batch, heads, clusters),
        empty(batch, heads, rows, dtype=torch.int32),
        empty(levels, batch, heads, length, dtype=torch.int32),
        empty(batch, heads, rows, dim, dtype=key.dtype),
        empty(batch, heads, rows, value.shape[3], dtype=value.dtype),
        empty(batch, heads, rows),
    )


def _summarize_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[4], output[5], output[8])
    ctx.length, ctx.plan = inputs[0].shape[2], inputs[4]
    ctx.mark_non_differentiable(*output[:6], output[8])


def _summarize_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under a checkpoint it is computed again for it, and may be asked for no more
    found = [None if g is None else rows_backward(g, *saved, ctx.length, ctx.plan) for g in grads[6:8]]
    return found[0], found[1], None, None, None


summarize.register_autograd(_summarize_backward, setup_context=_summarize_setup)


@torch.library.triton_op("prescore::rows_backward", mutates_args=())
def rows_backward(grad: Tensor, index: Tensor, owner: Tensor, bias: Tensor, length: int, plan: str) -> Tensor:
    """Gradient of the rows in the keys or values they stand for: ``[B, Hkv, length, D]`` of the rows' dtype.

    ``index``, ``owner`` and ``bias`` are the row_index, row_owner and row_bias of ``summarize``.
    """
    if not _generated(grad):
        return rows_backward_eager(grad, index, owner, length)
    from .triton import rows_backward as generated

    return generated.rows_backward(grad, index, owner, bias, length, Plan.parse(plan))


@torch.library.custom_op("prescore::rows_backward_eager", mutates_args=())
def rows_backward_eager(grad: Tensor, index: Tensor, owner: Tensor, length: int) -> Tensor:
    """``rows_backward`` by the reference."""
    return summaries.scatter_rows(grad, index, owner, length).to(grad.dtype)


@rows_backward.register_fake
def _(grad, index, owner, bias, length, plan):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:2], length, grad.shape[3]))


@rows_backward_eager.register_fake
def _(grad, index, owner, length):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:2], length, grad.shape[3]))


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
    if not _generated(query):
        return mass_eager(query, key, valid, *rows, plan, causal, scale, logits, tensors, sink_logit)
    from .triton import mass as generated

    given = parse(logits)
    more = dict(named(given, tensors), softcap=given.softcap)
    summary = _rows_and_order(row_index, *rows)
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
    none = query.new_empty(0)
    summary = Summary(none, none, none, none, row_index, row_owner, row_key, row_value, row_bias)
    given = parse(logits)
    if _compiled(query) and given.uncapped == NOTHING:
        return cpu.mass(site, summary, Plan.parse(plan), given.softcap)
    return reference.mass(site, summary, Plan.parse(plan), given, named(given, tensors))


@mass.register_fake
@mass_eager.register_fake
def _(query, *rest):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[:3], dtype=torch.float32)


mass.register_autograd(_constant_backward, setup_context=_constant_setup)


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
    """Routes ``[B, H, Nq, min(routes, clusters)]`` int32; see ``kernels.reference.route`` and ``kernels.coarse``.

    Raises:
        ValueError: no ``mass``, and the plan has a share or routes heads together.
    """
    if mass is None and Plan.parse(plan).needs_mass:
        raise ValueError("mass: got None; allowed: what prescore::mass gives, where a plan has a share or group_routes")
    if not _generated(query):
        return route_eager(query, order, mean, spread, bias, plan, causal, k_len, scale, logits, tensors, mass)
    from .triton import route as generated

    settings, given = Plan.parse(plan), parse(logits)
    known = by_chunk(given, named(given, tensors), settings.chunk)
    clusters = _clusters(order, mean, spread, bias)
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
    clusters = _clusters(order, mean, spread, bias)
    if _compiled(query) and given.uncapped == NOTHING:  # a softcap keeps the order
        return cpu.route(query, clusters, settings, causal, k_len, scale, mass)
    return coarse.route(query, clusters, settings, causal, k_len, scale, given, named(given, tensors), mass)


def _clusters(order: Tensor, mean: Tensor, spread: Tensor, bias: Tensor) -> Summary:
    none = mean.new_empty(0)
    return Summary(order, mean, spread, bias, none, none, none, none, none)


@route.register_fake
@route_eager.register_fake
def _(query, order, mean, spread, bias, plan, *rest):  # type: ignore[no-untyped-def]
    count = torch.sym_min(Plan.parse(plan).routes, mean.shape[2])
    return query.new_empty((*query.shape[:3], count), dtype=torch.int32)


route.register_autograd(_constant_backward, setup_context=_constant_setup)


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
    if not _generated(query):
        more = (plan, causal, scale, logits, tensors, sink_logit)
        out = attend_eager(query, key, value, valid, order, routes, *rows, *more)
        return out, query.new_empty(0, dtype=torch.float32)
    from .triton import attend as generated

    site = Operands(query, key, value, valid, causal, scale, sink_logit)
    given = parse(logits)
    known = dict(named(given, tensors), softcap=given.softcap)
    summary, routed = _rows_and_order(order, *rows), _or_no_routes(routes, query)
    return generated.attend(site, summary, routed, Plan.parse(plan), given.lifted, **known)


@attend_forward.register_fake
def _(query, key, value, valid, order, routes, index, owner, row_key, row_value, row_bias, plan, *rest):  # type: ignore[no-untyped-def]
    batch, heads, length, _ = query.shape
    sums = (batch, heads, length) if _generated(query) else (0,)
    return _attended(query, key, value), query.new_empty(sums, dtype=torch.float32)


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
    summary = _rows_and_order(order, row_index, row_owner, row_key, row_value, row_bias)
    settings, given = Plan.parse(plan), parse(logits)
    # Without a limit every key is in the window: none is left to route to.
    routes = _or_no_routes(None if settings.window is None else routes, query)
    if _compiled(query) and given.uncapped == NOTHING:
        return cpu.attend(site, summary, routes, settings, softcap=given.softcap)
    if _compiled(query) and _banded(settings, given):
        near, ends = banded.within(site, banded.ends(given.band(), query.shape[2], key.shape[2], causal))
        return cpu.attend(near, summary, routes, settings, band=ends, softcap=given.softcap)
    if _compiled(query) and settings.window is None and (read := given.uncapped.read):
        return masked.attend(site, summary, routes, settings, read, tensors[0], given.softcap)
    out = reference.attend(site, summary, routes, settings, given, named(given, tensors))
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@attend_eager.register_fake
def _attended(query, key, value, *args):  # type: ignore[no-untyped-def]
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, ctx.plan, ctx.causal, ctx.scale, ctx.logits, tensors, sink_logit = inputs
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
    if not _generated(query):
        more = (plan, causal, scale, logits, tensors, sink_logit)
        return attend_backward_eager(grad, query, key, value, valid, order, routes, *rows, *more)
    from .triton import attend_backward as generated

    site = Operands(query, key, value, valid, causal, scale, sink_logit)
    routed = _or_no_routes(routes, query)
    summary = _rows_and_order(order, *rows)
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
    """``attend_backward`` by the reference, of a band tile by tile."""
    site = Operands(query, key, value, valid, causal, scale, sink_logit)
    summary = _rows_and_order(order, row_index, row_owner, row_key, row_value, row_bias)
    given, routed, settings = parse(logits), _or_no_routes(routes, query), Plan.parse(plan)
    grads: tuple[Tensor, ...]
    if query.device.type == "cpu" and _banded(settings, given):
        ends = banded.ends(given.band(), query.shape[2], key.shape[2], causal)
        d_query, d_key, d_value, *d_sink = banded.backward(grad, site, ends, given.softcap)
        grads = (d_query, d_key, d_value, torch.zeros_like(row_key), torch.zeros_like(row_value), *d_sink)
    else:
        known = named(given, tensors)
        grads = reference.attend_backward(grad, site, summary, routed, settings, given, known)
    return _gradients(grads, (query, key, value, row_key, row_value), sink_logit)


attend_backward_eager.register_fake(_like_gradients)


@torch.library.custom_op("prescore::route_attend", mutates_args=())
def route_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    order: Tensor,
    mean: Tensor,
    spread: Tensor,
    bias: Tensor,
    row_index: Tensor,
    row_owner: Tensor,
    row_key: Tensor,
    row_value: Tensor,
    row_bias: Tensor,
    plan: str,
    causal: bool,
    scale: float,
    sink_logit: Tensor | None,
    softcap: float,
) -> Tensor:
    """``mass``, ``route`` and ``attend`` as one, whose routes are never in memory as a whole; for CPUs.

    ``softcap``: all that is said of logits, 0.0: nothing. The result of the three, and as differentiable: the backward
    routes once more.
    """
    site = Operands(query, key, value, valid, causal, scale, sink_logit)
    summary = Summary(order, mean, spread, bias, row_index, row_owner, row_key, row_value, row_bias)
    if _compiled(query):
        return cpu.route_attend(site, summary, Plan.parse(plan), softcap=softcap)
    logits = Logits(softcap=softcap).text
    routes = _routes(site, summary, plan, logits)
    return attend(*site[:4], order, routes, *summary[4:], plan, causal, scale, logits, [], sink_logit)


route_attend.register_fake(_attended)


def _routes(site: Operands, summary: Summary, plan: str, logits: str = "", tensors: Sequence[Tensor] = ()) -> Tensor:
    query, key, _, valid, causal, scale, sink_logit = site
    near = None
    if Plan.parse(plan).needs_mass:
        near = mass(query, key, valid, *summary[4:], plan, causal, scale, logits, tensors, sink_logit)
    return route(query, *summary[:4], plan, causal, key.shape[2], scale, logits, tensors, near)


def _route_attend_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, plan, causal, scale, sink_logit, ctx.softcap = inputs
    ctx.settings, ctx.padded, ctx.sunk = (plan, causal, scale), tensors[3] is not None, sink_logit is not None
    ctx.save_for_backward(*(t for t in (*tensors, sink_logit) if t is not None))


def _route_attend_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, value, *rest = ctx.saved_tensors
    valid = rest.pop(0) if ctx.padded else None
    sink_logit = rest.pop() if ctx.sunk else None
    summary, (plan, causal, scale) = Summary(*rest), ctx.settings
    site = Operands(query, key, value, valid, causal, scale, sink_logit)
    logits = Logits(softcap=ctx.softcap).text
    routes = _routes(site, summary, plan, logits)
    operands: tuple[Any, ...] = (*site[:4], summary.order, routes, *summary[4:], *ctx.settings, logits, [], sink_logit)
    out, sums = query.new_empty(0), query.new_empty(0, dtype=torch.float32)
    if _generated(query):  # a graph that was lowered for a CPU and moved
        out, sums = attend_forward(*operands)
    d_query, d_key, d_value, d_row_key, d_row_value, d_sink = attend_backward(grad, out, sums, *operands)
    more = (*[None] * 4, d_sink if ctx.sunk else None, None)
    return d_query, d_key, d_value, *[None] * 7, d_row_key, d_row_value, *more


route_attend.register_autograd(_route_attend_backward, setup_context=_route_attend_setup)


def _rows_and_order(
    order: Tensor, row_index: Tensor, row_owner: Tensor, row_key: Tensor, row_value: Tensor, row_bias: Tensor
) -> Summary:
    none = order.new_empty(0)
    return Summary(order, none, none, none, row_index, row_owner, row_key, row_value, row_bias)


def _or_no_routes(routes: Tensor | None, query: Tensor) -> Tensor:
    return query.new_empty((*query.shape[:3], 0), dtype=torch.int32) if routes is None else routes


def _banded(plan: Plan, logits: Logits) -> bool:
    """Whether the band of a mask, and causality, are all that limits what is attended."""
    return plan.window is None and (logits.uncapped.only_band or logits.uncapped == NOTHING)


def _compiled(query: Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype in cpu.DTYPES and cpu.available()


def _generated(query: Tensor) -> bool:
    """Whether the generated kernels run: on a GPU that they are written for."""
    return query.dtype in cpu.DTYPES and not device.why_not(query.device)
