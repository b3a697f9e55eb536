"""``summarize``: clusters and rows of the keys, and the gradients of the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cpu
from .. import summary as summaries
from ..layout import chunk_count
from ..plan import Plan
from . import dispatch


@torch.library.triton_op("prescore::summarize", mutates_args=())
def summarize(
    key: Tensor, value: Tensor, valid: Tensor | None, scores: Tensor | None, plan: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``kernels.summary.Summary``; row_key and row_value are differentiable."""
    settings = Plan.parse(plan)
    if settings.only_window:
        return empty(key, value, plan)  # type: ignore[return-value]
    if not dispatch.generated(key):
        return summarize_eager(key, value, valid, scores, plan)
    from ..triton import clusters as generated
    from ..triton import rows as copied
    from ..triton.scores import select

    sizes = (key.shape[3], value.shape[3])
    if settings.routes and not generated.fits(settings, *sizes):
        return summarize_eager(key, value, valid, scores, plan)
    if settings.routes:
        order, mean, spread, bias = generated.clusters(key, value, valid, settings)
    else:
        order, mean, spread, bias = empty(key, value, plan)[:4]
    best = select.select(scores, valid, settings) if scores is not None and select.fits(settings) else None
    if not copied.fits(settings, *sizes):
        place, of_place = (None, scores) if best is None else best
        return (order, mean, spread, bias, *rows(key, value, valid, place, of_place, plan))
    chosen = None if best is None else select.select_segments(*best, settings)
    return (order, mean, spread, bias, *copied.rows(key, value, valid, chosen, settings))


@torch.library.custom_op("prescore::summarize_eager", mutates_args=(), tags=dispatch.MAY_WAIT)
def summarize_eager(
    key: Tensor, value: Tensor, valid: Tensor | None, scores: Tensor | None, plan: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``summarize`` by the compiled CPU kernel or the reference."""
    settings = Plan.parse(plan)
    cluster = cpu.clusters if settings.clustering == "pca_tree" and dispatch.compiled(key) else summaries.clusters
    with dispatch.as_they_are(key):
        return tuple(summaries.summarize(key, value, valid, scores, settings, cluster))  # type: ignore[return-value]


@torch.library.custom_op("prescore::rows", mutates_args=())
def rows(
    key: Tensor, value: Tensor, valid: Tensor | None, place: Tensor | None, scores: Tensor | None, plan: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The last five fields of ``summarize``: rows without clusters, in torch operations linear in n.

    ``place``: the best keys of each chunk, whose scores are then ``scores``; None: those are of all keys.
    """
    settings = Plan.parse(plan).without_routes
    best = None if place is None or scores is None else (place, scores)
    with dispatch.as_they_are(key):
        return tuple(summaries.summarize(key, value, valid, scores, settings, best=best)[4:])  # type: ignore[return-value]


@rows.register_fake
def _(key, value, valid, place, scores, plan):  # type: ignore[no-untyped-def]
    return empty(key, value, plan)[4:]


@summarize.register_fake
@summarize_eager.register_fake
def _(key, value, valid, scores, plan):  # type: ignore[no-untyped-def]
    return empty(key, value, plan)


def empty(key: Tensor, value: Tensor, plan: str) -> tuple[Tensor, ...]:
    settings = Plan.parse(plan)
    batch, heads, length, dim = key.shape
    chunks = chunk_count(length, settings.chunk)
    places = chunks * settings.chunk if settings.routes else 0
    clusters = chunks * (settings.chunk // settings.cluster) if settings.routes else 0
    rows = settings.sinks + chunks * settings.rows_per_segment
    levels = summaries.LEVELS if settings.centroids else 0

    def new(*shape, dtype=torch.float32):  # type: ignore[no-untyped-def]
        return key.new_empty(shape, dtype=dtype)

    return (
        new(batch, heads, places, dtype=torch.int32),
        new(batch, heads, clusters, dim),
        new(batch, heads, clusters, dim),
        new(batch, heads, clusters),
        new(batch, heads, rows, dtype=torch.int32),
        new(levels, batch, heads, length, dtype=torch.int32),
        new(batch, heads, rows, dim, dtype=key.dtype),
        new(batch, heads, rows, value.shape[3], dtype=value.dtype),
        new(batch, heads, rows),
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
    if not dispatch.generated(grad):
        return rows_backward_eager(grad, index, owner, length)
    from ..triton import rows_backward as generated

    return generated.rows_backward(grad, index, owner, bias, length, Plan.parse(plan))


rows_backward.register_autograd(dispatch.no_second_derivative, setup_context=dispatch.no_setup)


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
