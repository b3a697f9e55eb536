"""Attend's backward by queries: the program that owns a tile of them sums ``d_query``, by the forward's loops.

With P the weights, dP = dO V^T and dS = P * (dP - rowsum(dO * O)), as in ``reference.attend_backward``.
"""

from __future__ import annotations

import functools

from . import loops, residual
from .attend import about
from .render import fill, source
from .spec import Spec

D_QUERY = """
def d_query(
    $parameters
):
    $constants

    $tile
    $borders

    $operands
    $grad_tile
    summed = tl.zeros([ROWS, DIM_TILE], tl.float32)

    $window

    $rows

    $routes

    $residual

    to = d_query + batch * d_query_b + (head * d_query_h + query_at.to(tl.int64) * d_query_n)[:, None]
    tl.store(to + feature[None, :], (summed * scale).to(d_query.dtype.element_ty), mask=$query_mask)
"""

GRAD_TILE = """
grad_tile = tl.load(
    grad + batch * grad_b + (head * grad_h + query_at.to(tl.int64) * grad_n)[:, None] + value_feature[None, :],
    mask=$grad_mask,
    other=0.0,
)
sum_at = (batch * kv_heads * GROUP + head) * q_len + query_at
# A row that is no query has no weights.
log_sum = tl.load(log_sums + sum_at, mask=live, other=float("inf")) * LOG2E
inner = tl.load(inners + sum_at, mask=live, other=0.0)
"""

D_LOGITS = """
weight = tl.exp2(logits - log_sum[:, None])
d_weight = tl.dot(grad_tile, tl.trans(value_tile)$precision)
d_logits = tl.where(weight == 0.0, 0.0, weight * (d_weight - inner[:, None]))
d_logits *= 1.0 - capped * capped  #? softcap
"""

TO_QUERY = """
$d_logits
summed = tl.dot(d_logits.to(key_tile.dtype), tl.trans(key_tile), summed$precision)
"""


@functools.cache
def d_query_source(spec: Spec) -> str:
    """Source of ``d_query``."""
    update = fill(TO_QUERY, loops.names(spec) | {"d_logits": d_logits(spec)})
    parts = loops.names(spec) | dict(
        parameters=loops.parameters(
            spec, "d_query", "grad", "log_sums", "inners", *loops.axes("d_query"), *loops.axes("grad")
        ),
        constants=loops.constants(spec),
        tile=loops.tile(spec),
        borders=loops.borders(spec),
        operands=loops.operands(spec),
        grad_tile=grad_tile(spec),
        window=loops.window(spec, update, taint=False),
        rows=loops.rows(spec, update, taint=False),
        routes=loops.routes(spec, update, taint=False),
        residual=residual.loop(spec, update),
        query_mask=loops.within(spec, "live[:, None]", "dim"),
    )
    return source("d_query", about(spec, "attend backward, gradient of the query"), fill(D_QUERY, parts))


def grad_tile(spec: Spec) -> str:
    return fill(GRAD_TILE, {"grad_mask": loops.within(spec, "live[:, None]", "value_dim", "value_feature")})


def d_logits(spec: Spec) -> str:
    return fill(D_LOGITS, loops.names(spec))
