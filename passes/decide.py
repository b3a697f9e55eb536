"""Decide: rewrite a site or keep it exact, with one coded reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from ..kernels import banded, cpu, few, library
from ..kernels.band import K, Q
from ..kernels.logits import NOTHING, Logits, parse
from ..kernels.plan import WHOLE, OptionError, Plan
from ..kernels.triton import device
from ..kernels.triton.spec import MOST_FEATURES
from . import cost
from .compat import at_least, forward_mode, gradient_wanted, guard_equal, hint, known_equal, symbolic, value_of
from .config import Config
from .defaults import WIDEST_BAND_ON_A_GPU
from .masks import Lifted, Mask, attends_itself, band_of, lift
from .plans import SHAPE_FIELDS, SiteKey
from .read import as_it_comes
from .site import Attention, Site


@dataclass(frozen=True)
class Decision:
    """``plan`` is what a rewritten site runs with; ``reason`` why it is none, or none of those that approximate.

    ``band``: keys that a query may attend on average, where they are a band that is attended whole; 0.0: they are not.
    ``exact``: why every key is attended that the mask allows, a key of ``report.EXACT``; "": they are not.
    ``recognized``: of a mask that only the run time knows, the plans by what it may turn out to be, keys of
    ``report.RECOGNIZED``; it is attended whole, by ``plan``, where it is something else.
    """

    site: Site
    mask: Mask
    reason: str
    plan: Plan | None
    band: float = 0.0
    exact: str = ""
    recognized: Mapping[str, Plan] = field(default_factory=dict)

    @property
    def rewrite(self) -> bool:
        return self.plan is not None


def decide(site: Site, config: Config, key: str = "", known: Lifted | None = None) -> Decision:
    """Check, in this order: the user's wish, what is computed, the mask, the plan file, the length, the gain; then,
    where nothing is to be approximated, whether one kernel that attends all is faster than what is there, and where the
    mask is not taken, whether it can be read as it comes, and which plans go with what it may turn out to be.

    ``key``: the site's name in a plan file.

    With dynamic lengths the comparison with ``min_seq_len`` and the break-even length becomes a guard (``at_least``):
    two compiled graphs, one on each side, never one a length; three where one kernel attends all from some length on.
    ``known``: as for ``lift``.
    """
    reason = _unsupported(site)
    plan: Plan | None = None
    mask = Mask("?") if reason else lift(site, known)  # of one that is left out, too: its table says what it computes
    reason = (reason or mask.reason) if config.covers(site.module) else "excluded"
    band, exact = 0.0, ""
    if not reason and site.attention is not None:
        band = _band(site.attention, mask)
        reason = _pairs(site.attention, mask, WHOLE)  # what no plan takes
        if not reason:
            plan, reason = (WHOLE, "") if band else _planned(site.attention, mask, config, key)
        if plan is not None:
            reason = _pairs(site.attention, mask, plan) or _lengths(site.attention, mask, config, plan, band)
        exact = "band" if band and not reason else ""
        if _without_gain(reason) and _alone(site.attention, mask, band):
            return Decision(site, mask, reason, WHOLE, band, "alone")
    continued = _few(site, mask, reason)
    if continued is not None:
        return Decision(site, continued, reason if _without_gain(reason) else "", WHOLE, exact="few")
    read = _read(site, mask, config, reason)
    if read is not None:
        plans = _recognized(site.attention, read, config)
        return Decision(site, read, "", WHOLE, exact="" if plans else "mask", recognized=plans)
    return Decision(site, mask, reason, None if reason else plan, band, exact)


def _without_gain(reason: str) -> bool:
    """Whether a reason says no more than that nothing is to be approximated."""
    return reason.partition(":")[0] in ("too_short", "not_faster", "cross_attention", "plan_exact", "not_in_plan")


def _alone(attention: Attention, mask: Mask, band: float) -> bool:
    """Whether attending every key in one kernel is faster than what computes the site now: no call of SDPA takes a
    learned sink or a softcap, so that logits are in memory, and are gone over again and again."""
    if (attention.sink_logit is None and not attention.softcap) or _pairs(attention, mask, WHOLE):
        return False
    q_len, k_len = attention.size(attention.q), attention.size(attention.k)
    same = known_equal(q_len, k_len)
    least = cost.alone_from(shape_of(attention, mask.causal, band), attention.trained)
    return least is not None and at_least(k_len, least) and (same or at_least(q_len, cpu.TILE))


def _few(site: Site, mask: Mask, reason: str) -> Mask | None:
    """The mask as it comes, where so few queries, which nothing is approximated for, attend so many keys that reading
    those is what takes the time: ``kernels.few`` reads them once."""
    a = site.attention
    if a is None or not reason or not (_without_gain(reason) or reason in (mask.reason, mask.needs)):
        return None
    q_len, k_len = a.size(a.q), a.size(a.k)
    inputs = [*(factor.operand for factor in a.factors), *([a.sink_logit] if a.sink_logit else [])]
    trained = a.trained or any(gradient_wanted(operand.node) for operand in inputs)
    if trained or a.is_causal or a.device.type != "cpu" or known_equal(q_len, k_len):
        return None
    repeated = a.key.node not in site.output.all_input_nodes

    def gains(queries: int) -> bool:
        least = cost.few_from(shape_of(a, False), queries, bool(a.terms), site.kind != "sdpa", repeated)
        return queries <= few.MOST and least is not None and at_least(k_len, least)

    if not gains(hint(q_len)):
        return None
    # Of a number that is a symbol, one graph for each of a few ranges, where the most of its queries gain, too.
    ranges = () if isinstance(q_len, int) else (4, 16, 64, few.MOST)
    if ranges and not gains(next(most for most in ranges if not at_least(q_len, most + 1))):
        return None
    return as_it_comes(site, mask, few=True) if a.terms else Mask(mask.text)


def _read(site: Site, mask: Mask, config: Config, reason: str) -> Mask | None:
    """The mask as it comes, where nothing else is made of it: ``kernels.masked`` is not slower than what is there."""
    attention = site.attention
    if attention is None or not reason or reason not in (mask.reason, mask.needs):
        return None
    found = None if _generated(attention.device) or attention.trained else as_it_comes(site, mask)
    q_len, k_len = attention.size(attention.q), attention.size(attention.k)
    long = found is not None and at_least(k_len, config.min_seq_len)
    return found if long and (known_equal(q_len, k_len) or at_least(q_len, cpu.TILE)) else None


def _recognized(attention: Attention | None, mask: Mask, config: Config) -> dict[str, Plan]:
    """``Decision.recognized``: the plans that such sites have where their mask is known."""
    if attention is None or config.site_plans is not None:  # a plan file was measured for sites whose mask was known
        return {}
    same = guard_equal(attention.size(attention.q), attention.size(attention.k))
    if not same:  # a cache, which may not be full: how many keys are in it only the run time knows
        if attention.k is None or hint(attention.size(attention.k)) < hint(attention.size(attention.q)):
            return {}
        attention = replace(attention, sizes={**attention.sizes, attention.k: attention.size(attention.q)})
    found: dict[str, Plan] = {}
    for name in ("causal", "every key") if same else ("causal",):
        known = Mask(mask.text, causal=name == "causal")
        try:
            plan, reason = _planned(attention, known, config, "")
        except OptionError:  # settings that leave such sites nothing: this one may be none of them
            continue
        if plan is not None and plan.window is not None and (same or not (plan.keep and plan.reads_queries)):
            reason = _pairs(attention, known, plan) or _lengths(attention, known, config, plan, 0.0)
            if not reason:
                found[name] = plan
    return found


def _band(attention: Attention, mask: Mask) -> float:
    """``Decision.band``: the mask leaves each query one short run of keys, which a kernel need not look beyond."""
    logits, on_a_gpu = logits_of(attention, mask), _generated(attention.device)
    if not on_a_gpu and not logits.uncapped.only_band:
        return 0.0
    average, most = banded.keys_a_query(band_of(mask, attention))
    routed = on_a_gpu and mask.causal and most > WIDEST_BAND_ON_A_GPU
    return 0.0 if routed else average


def _planned(attention: Attention, mask: Mask, config: Config, key: str) -> tuple[Plan | None, str]:
    """The site's plan, or why there is none."""
    plans = config.site_plans
    if plans is None:
        pairs = logits_of(attention, mask) != NOTHING
        return config.plan_for(mask.causal, attention.device.type, attention.size(attention.k), pairs), ""
    shape = shape_of(attention, mask.causal)
    sizes = {name: getattr(shape, name) for name in SHAPE_FIELDS}
    return plans.find(SiteKey(key, **sizes))


def logits_of(attention: Attention, mask: Mask) -> Logits:
    """What the site does to its logits besides scale, causality and valid keys."""
    return replace(mask.logits, softcap=abs(float(attention.softcap or 0.0)))


def _pairs(attention: Attention, mask: Mask, plan: Plan) -> str:
    """Why what is said of pairs is not taken; "" if it is."""
    logits = logits_of(attention, mask)
    if logits == NOTHING:
        return ""
    if not _generated(attention.device):
        if plan.window is None and logits.uncapped.only_band:
            return ""
        if logits.uncapped != NOTHING:
            return mask.needs
    if plan.centroids or plan.residual:
        return f"{mask.needs or 'softcap: ' + format(logits.softcap, 'g')}; a centroid stands for several keys"
    if not mask.needs:
        return ""
    wanted = [node.name for node in mask.loads if gradient_wanted(node)]
    if wanted:
        return f"unsupported_mask: a gradient in {', '.join(wanted)} is asked for"
    taken = _told(logits) and _safe(attention, mask, plan)
    here = value_of(attention.query.node).device
    return "" if taken and all(value_of(node).device == here for node in mask.loads) else mask.needs


def _generated(device: torch.device) -> bool:
    """Whether generated kernels run there: compiled ones take no mask of pairs but a band, and no bias."""
    return device.type == "cuda"


def _told(logits: Logits) -> bool:
    """Whether the operators and the kernels can say it."""
    try:
        return parse(logits.text).text == logits.text and bool(logits.lifted) and bool(logits.reach)
    except Exception:  # an expression that no printer knows costs the speed, never the model
        return False


def _safe(attention: Attention, mask: Mask, plan: Plan) -> bool:
    """Whether a query never loses what it may attend, nor sees what it may not through its choices."""
    logits = mask.logits
    floats = {name for name, node in zip(logits.tensors, mask.loads, strict=True) if _is_float(node)}
    read = sympy.sympify(logits.bias).atoms(AppliedUndef)
    if any(atom.func.__name__ in floats and (atom.has(K) or atom.has(Q)) for atom in read):
        return False  # may forbid keys, with numbers that only the run time knows
    if logits.allowed == sympy.true or plan.window is None:
        return True
    # Which keys are after a query must not show in which clusters it gets; it must always have a key in its window.
    shift = symbolic(attention.size(attention.k)) - symbolic(attention.size(attention.q))
    return mask.causal and attends_itself(logits.allowed, shift)


def _is_float(node: fx.Node) -> bool:
    return bool(value_of(node).dtype.is_floating_point)


def _unsupported(site: Site) -> str:
    attention = site.attention
    if site.reason or attention is None:
        return site.reason
    if attention.dropout != 0:
        return f"dropout: {attention.dropout}"
    if site.transformed or forward_mode():  # the operators have no forward-mode derivative
        return "function_transform"
    tensors = [value_of(o.node) for o in (attention.query, attention.key, attention.value)]
    of_sink = [value_of(attention.sink_logit.node)] if attention.sink_logit else []
    if any(base.__name__ == "DTensor" for t in (*tensors, *of_sink) for base in type(t).__mro__):
        return "sharded"
    dtypes = [t.dtype for t in tensors]
    one = len(set(dtypes)) == 1 or site.kind == "sdpa"  # which takes several under autocast alone, and makes them one
    if not one or any(t not in cpu.DTYPES for t in (*dtypes, value_of(site.output).dtype)):
        return f"unsupported_dtype: {', '.join(str(t) for t in dtypes)} to {value_of(site.output).dtype}"
    if any(isinstance(size, int) and size == 0 for t in tensors for size in t.shape):
        return "empty"
    on_cpu = attention.device.type == "cpu"
    if not on_cpu and not attention.asked and device.why_not(attention.device):
        return f"unsupported_device: {device.why_not(attention.device)}"
    # Heads and head dims are a model's structure: where Dynamo made them dynamic, a guard fixes them.
    heads, kv_heads = int(attention.size(*attention.heads)), int(attention.size(*attention.kv_heads))
    dims = int(attention.size(attention.d)), int(attention.size(attention.e))
    if max(dims) > MOST_FEATURES:
        return f"unsupported_head_dim: {dims[0]}, {dims[1]}"
    if heads % kv_heads:
        return f"unsupported_heads: {heads}, {kv_heads}"
    return "no_compiler" if on_cpu and not library.available() else ""


def _lengths(attention: Attention, mask: Mask, config: Config, plan: Plan, band: float) -> str:
    q_len, length = attention.size(attention.q), attention.size(attention.k)
    same = known_equal(q_len, length)
    if not same and not mask.causal and plan.window is not None:
        return "cross_attention"
    if not same and plan.keep and plan.reads_queries:
        return f"cross_attention: method {plan.method} scores keys by the queries at their own positions"
    shape = shape_of(attention, mask.causal, band)
    if not same and config.only_if_faster:
        if not at_least(length, config.min_seq_len):
            return "too_short"
        # Of few queries, the last ones, their number decides, whatever that of the keys.
        least = cost.queries_needed(shape, plan, hint(length))
        if least is not None and at_least(q_len, least):
            return ""
        return f"not_faster: breaks even at {least} queries" if least else "not_faster: for no number of queries"
    even = cost.break_even(shape, plan) if config.only_if_faster else 0
    # One comparison, so that a dynamic length has one guard.
    if even is not None and at_least(length, max(config.min_seq_len, even)):
        return ""
    if hint(length) < config.min_seq_len:
        return "too_short"
    return f"not_faster: breaks even at {even} keys" if even else "not_faster: at no length"


def shape_of(attention: Attention, causal: bool, band: float = 0.0) -> cost.Shape:
    """The site to the cost model; ``band``: ``Decision.band``."""
    # The batch scales both sides alike, so the hint of a dynamic one will do; for few queries there is a guard.
    q_len, k_len = hint(attention.size(attention.q)), hint(attention.size(attention.k))
    dtype = attention.dtype or value_of(attention.query.node).dtype
    return cost.Shape(
        batch=hint(attention.size(*attention.batch)),
        heads=hint(attention.size(*attention.heads)),
        kv_heads=hint(attention.size(*attention.kv_heads)),
        head_dim=hint(attention.size(attention.d)),
        value_dim=hint(attention.size(attention.e)),
        causal=causal,
        device=cost.kind(attention.device.type, dtype),
        band=band,
        queries=q_len if q_len < k_len else 0,
        narrow=dtype.itemsize == 2,
        unit=cost.has_unit(attention.device.type, dtype),
    )
