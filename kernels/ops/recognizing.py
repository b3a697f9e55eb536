"""``attend_recognized``: a mask that is in memory, and the plan that goes with what it turns out to be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import masked
from ..logits import Logits, named, parse
from ..plan import WHOLE, Plan
from ..reads import reads_of
from ..reference import Operands
from ..summary import Summary
from . import dispatch
from .attending import like_output, or_no_routes
from .composed import prescored
from .summarizing import empty


@torch.library.custom_op("prescore::attend_recognized", mutates_args=())
def attend_recognized(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    logits: str,
    tensors: Sequence[Tensor],
    sink_logit: Tensor | None,
    causal_plan: str,
    two_sided_plan: str,
) -> Tensor:
    """Attention of at most as many queries as keys under a mask that only the run time knows; on a CPU, without
    gradients.

    Where it says no more than causality and which keys are valid, ``causal_plan``; where it says only the latter, of as
    many queries as keys, ``two_sided_plan``; where it says something else, and where that plan is "", every key that it
    allows. Keys beyond the last query's own, as in a cache that is not full, are left out.

    Args:
        tensors: read as ``logits`` says, in the order of their names. sink_logit: as for ``mass``.

    Returns:
        ``[B, H, Nq, Dv]``, laid out ``[B, Nq, H, Dv]`` in memory.
    """
    given = parse(logits)
    site = Operands(query, key, value, None, False, scale, sink_logit)
    reads, known = reads_of(given.uncapped), named(given, tensors)
    if reads is None or not dispatch.compiled(query):  # a graph that was lowered for a CPU and moved, say
        return prescored(site, WHOLE, given, known)
    seen = masked.see(reads, known, query.dtype)
    found = masked.recognized(site, seen)
    plan = "" if found is None else causal_plan if found.causal else two_sided_plan
    if found is not None and plan:
        out = prescored(found, Plan.parse(plan), Logits(softcap=given.softcap))
        return masked.or_mean(out, site, seen)
    summary, no_routes = Summary(*empty(key, value, WHOLE.text)), or_no_routes(None, query)
    with dispatch.as_they_are(query):
        return masked.attend(site, summary, no_routes, WHOLE, seen, given.softcap)


attend_recognized.register_fake(like_output)
attend_recognized.register_autograd(dispatch.no_gradient("attend_recognized"), setup_context=dispatch.no_setup)
