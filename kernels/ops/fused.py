"""``route_attend``: mass, route and attend as one, on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cpu
from ..logits import Logits
from ..plan import Plan
from ..reference import Operands
from ..summary import Summary
from . import dispatch
from .attending import attend, attend_backward, attend_forward, like_output
from .routing import routes_of


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
    if dispatch.compiled(query):
        return cpu.route_attend(site, summary, Plan.parse(plan), softcap=softcap)
    logits = Logits(softcap=softcap).text
    routes = routes_of(site, summary, plan, logits)
    return attend(*site[:4], order, routes, *summary[4:], plan, causal, scale, logits, [], sink_logit)


route_attend.register_fake(like_output)


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
    routes = routes_of(site, summary, plan, logits)
    operands: tuple[Any, ...] = (*site[:4], summary.order, routes, *summary[4:], *ctx.settings, logits, [], sink_logit)
    out, sums = query.new_empty(0), query.new_empty(0, dtype=torch.float32)
    if dispatch.generated(query, value):  # a graph that was lowered for a CPU and moved
        out, sums = attend_forward(*operands)
    d_query, d_key, d_value, d_row_key, d_row_value, d_sink = attend_backward(grad, out, sums, *operands)
    more = (*[None] * 4, d_sink if ctx.sunk else None, None)
    return d_query, d_key, d_value, *[None] * 7, d_row_key, d_row_value, *more


route_attend.register_autograd(_route_attend_backward, setup_context=_route_attend_setup)
