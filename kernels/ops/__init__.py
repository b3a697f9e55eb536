"""The operators that the graph pass inserts: score, summarize, mass, route, attend.

Registered with ``torch.library`` under ``prescore::``, with fake implementations (shapes only) and
gradients, so that Inductor, AOTAutograd and ``torch.export`` see them. A plan travels as
its text. On a CPU the last three are lowered to one, route_attend. On a GPU the generated Triton kernels
run: an operator made of them is a ``triton_op``, which a compiler takes apart into their launches, so that
Inductor and CUDA graphs have them. On a CPU the compiled kernels run where they can; anything else runs the
reference.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..logits import NOTHING, Logits
from ..plan import Plan
from ..reference import Operands
from ..summary import Summary
from .attending import attend, attend_backward, attend_backward_eager, attend_eager, attend_forward
from .fused import route_attend
from .routing import mass, mass_eager, route, route_eager, routes_of
from .scoring import score, score_eager
from .summarizing import rows, rows_backward, rows_backward_eager, summarize, summarize_eager

__all__ = [
    "attend",
    "attend_backward",
    "attend_backward_eager",
    "attend_eager",
    "attend_forward",
    "mass",
    "mass_eager",
    "prescored",
    "route",
    "route_attend",
    "route_eager",
    "routes_of",
    "rows",
    "rows_backward",
    "rows_backward_eager",
    "score",
    "score_eager",
    "summarize",
    "summarize_eager",
]


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
    routes = routes_of(site, summary, settings, *more) if plan.routes else None
    return attend(*site[:4], summary.order, routes, *summary[4:], settings, causal, scale, *more, sink_logit)
