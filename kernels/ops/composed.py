"""The operators one after the other, outside of a graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..logits import NOTHING, Logits
from ..plan import Plan
from ..reference import Operands
from ..summary import Summary
from .attending import attend
from .fused import route_attend
from .routing import routes_of
from .scoring import score
from .summarizing import summarize


def prescored(
    site: Operands, plan: Plan, logits: Logits = NOTHING, tensors: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Score, summarize, route and attend one site: ``[B, H, Nq, Dv]`` in the query's dtype."""
    more = (logits.text, [tensors[name] for name in logits.tensors] if tensors else [])
    q, k, v, valid, causal, scale, sink_logit = site
    settings = plan.text
    scores = score(q, k, valid, settings, causal, scale) if plan.keep else None
    summary = Summary(*summarize(k, v, valid, scores, settings))
    plain = logits == NOTHING or logits.uncapped == NOTHING  # Dynamo of torch 2.11 traces the first alone
    if plan.routes and q.device.type == "cpu" and plain:
        return route_attend(*site[:4], *summary, settings, causal, scale, sink_logit, logits.softcap)
    routes = routes_of(site, summary, settings, *more) if plan.routes else None
    return attend(*site[:4], summary.order, routes, *summary[4:], settings, causal, scale, *more, sink_logit)
