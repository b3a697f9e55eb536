"""A decision as data, for reports."""

from __future__ import annotations

import functools
from typing import Any

from ..kernels.plan import Plan
from . import cost
from .compat import hint, value_of
from .decide import Decision, logits_of, shape_of
from .masks import Mask
from .report import SiteReport
from .rules import failed_at, rule_of
from .site import Attention


@functools.cache
def _costs(shape: cost.Shape, plan: Plan | None, length: int) -> dict[str, Any]:
    """Those fields of a ``SiteReport``: the same for all layers of a model."""
    exact = cost.at(cost.exact_cost(shape), length)
    if plan is None:
        return dict(exact_cost=round(exact))
    return dict(
        exact_cost=round(exact),
        prescored_cost=round(cost.at(cost.prescored_cost(shape, plan), length)),
        density=cost.at(cost.prescored_cost(shape, plan), length) / exact,
        gain=exact / cost.at(cost.prescored_time(shape, plan), length),
    )


def describe(decision: Decision, kind: str, key: str = "") -> SiteReport:
    """The decision as data, with its costs at the sizes compiled for; ``key``: the site's name in a plan file."""
    site, plan, attention = decision.site, decision.plan, decision.site.attention
    costs: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    kernel: dict[str, Any] = {}
    where = ""
    if attention is not None:
        a = attention
        where = a.asked or a.device.type
        kernel = _kernel(decision, a) if plan else {}
        named = {"batch": a.batch, "heads": a.heads, "kv_heads": a.kv_heads, "q_len": (a.q,), "k_len": (a.k,)}
        named["head_dim"] = (a.d,)
        sizes = {name: str(a.size(*coordinates)) for name, coordinates in named.items()}
        shape, length = shape_of(a, decision.mask.causal, decision.band), hint(a.size(a.k))
        costs = dict(_costs(shape, plan if length else None, length))
        if decision.exact in ("alone", "few"):
            costs["gain"] = None  # of what is not in the cost model
        if decision.exact == "mask" or decision.recognized:
            costs |= dict(prescored_cost=None, density=None, gain=None)  # only the run time knows what it hides
    return SiteReport(
        module=site.module,
        source=site.source,
        code=site.code,
        kind=kind,
        decision="rewrite" if decision.rewrite else "keep",
        reason=decision.reason,
        plan=plan,
        mask=_mask_text(decision.mask, attention),
        shape=sizes,
        **costs,
        rule=rule_of(site, kind),
        failed="" if decision.rewrite else failed_at(site, decision.reason),
        key=key,
        value_dim=None if attention is None else hint(attention.size(attention.e)),
        causal=decision.mask.causal,
        exact=decision.exact,
        recognized=dict(decision.recognized),
        device=where,
        kernel=kernel,
    )


def _mask_text(mask: Mask, a: Attention | None) -> str:
    """The mask, and what else is done to the logits that SDPA does not take."""
    softcap = [f"softcap {a.softcap:g}"] if a is not None and a.softcap else []
    return "; ".join([mask.text, *softcap, *["learned sink"] * (a is not None and a.sink_logit is not None)])


def _kernel(decision: Decision, a: Attention) -> dict[str, Any]:
    """What the kernels of a rewritten site are specialised with, beside its plan."""
    return {
        "dim": int(a.size(a.d)),
        "value_dim": int(a.size(a.e)),
        "group": int(a.size(*a.heads)) // int(a.size(*a.kv_heads)),
        "dtype": str(value_of(decision.site.output).dtype).removeprefix("torch."),
        "causal": decision.mask.causal,
        "valid": decision.mask.keys is not None,
        "logits": logits_of(a, decision.mask).text,
        "sink_logit": a.sink_logit is not None,
    }
