"""Decide: rewrite a site or keep it exact, with one coded reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import cpu
from ..kernels.plan import Plan
from . import cost
from .compat import hint, known_equal, value_of
from .config import Config
from .find import Site
from .masks import Mask, lift
from .report import SiteReport

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Decision:
    """``reason`` is "" for a rewrite; ``plan`` is then what the site runs with."""

    site: Site
    mask: Mask
    reason: str
    plan: Plan | None

    @property
    def rewrite(self) -> bool:
        return not self.reason


def decide(site: Site, config: Config) -> Decision:
    """Check, in this order: the user's wish, what is computed, the mask, the length, the gain.

    With dynamic lengths the comparison with ``min_seq_len`` (or the break-even length) becomes a
    guard: two compiled graphs, one on each side, never one a length.
    """
    reason = "" if config.covers(site.module) else "excluded"
    reason = reason or _unsupported(site)
    mask = Mask("?") if reason else lift(site)
    reason = reason or mask.reason or _lengths(site, mask, config)
    return Decision(site, mask, reason, None if reason else config.plan)


def _unsupported(site: Site) -> str:
    query, key, value = (value_of(n) for n in (site.query, site.key, site.value))
    if isinstance(site.dropout, (int, float)) and site.dropout == 0:
        pass
    else:
        return f"dropout: {site.dropout}"
    if any("_functorch" in str(getattr(n.target, "__module__", "")) for n in site.output.graph.nodes):
        return "function_transform"
    if any(t.dim() != 4 for t in (query, key, value)):
        return f"unsupported_rank: {query.dim()}, {key.dim()}, {value.dim()}"
    if query.dtype not in cpu.DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"unsupported_dtype: {query.dtype}, {key.dtype}, {value.dtype}"
    if value_of(site.output).dtype != query.dtype:
        return f"autocast: {query.dtype} to {value_of(site.output).dtype}"
    if any(isinstance(size, int) and size == 0 for t in (query, key, value) for size in t.shape):
        return "empty"
    if query.device.type != "cpu":
        return f"unsupported_device: {query.device.type}"
    if not (known_equal(query.shape[0], key.shape[0]) and known_equal(key.shape[0], value.shape[0])):
        return "broadcast_batch"
    # Heads and head dims are a model's structure: where Dynamo made them dynamic, a guard fixes them.
    heads, kv_heads, value_heads = int(query.shape[1]), int(key.shape[1]), int(value.shape[1])
    if kv_heads != value_heads or heads % kv_heads:
        return f"unsupported_heads: {heads}, {kv_heads}, {value_heads}"
    if max(int(query.shape[3]), int(value.shape[3])) > MAX_HEAD_DIM:
        return f"unsupported_head_dim: {query.shape[3]}, {value.shape[3]}"
    return "" if cpu.available() else "no_compiler"


def _lengths(site: Site, mask: Mask, config: Config) -> str:
    query, key, value = (value_of(n) for n in (site.query, site.key, site.value))
    length = key.shape[2]
    same = known_equal(query.shape[2], length)
    if not same and not mask.causal and config.window is not None:
        return "cross_attention"
    if not same and config.keep and config.method == "peak":
        return "cross_attention: method peak scores keys by the queries at their own positions"
    if not bool(length >= config.min_seq_len):
        return "too_short"
    if not config.only_if_faster:
        return ""
    shape = _shape(query, key, value, mask.causal)
    even = cost.break_even(shape, config.plan)
    if even is None or not bool(length >= even):
        return f"not_faster: breaks even at {even} keys" if even else "not_faster: at no length"
    return ""


def _shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> cost.Shape:
    # The batch scales both sides alike, so the hint of a dynamic one will do.
    return cost.Shape(
        batch=hint(query.shape[0]),
        heads=hint(query.shape[1]),
        kv_heads=hint(key.shape[1]),
        head_dim=hint(query.shape[3]),
        value_dim=hint(value.shape[3]),
        causal=causal,
    )


def describe(decision: Decision) -> SiteReport:
    """The decision as data, with its costs at the sizes compiled for."""
    site, plan = decision.site, decision.plan
    query, key, value = (value_of(n) for n in (site.query, site.key, site.value))
    exact: int | None = None
    prescored: int | None = None
    share: float | None = None
    sizes: dict[str, Any] = {}
    if query.dim() == key.dim() == value.dim() == 4:
        names = ("batch", "heads", "kv_heads", "q_len", "k_len", "head_dim")
        found = (*query.shape[:2], key.shape[1], query.shape[2], key.shape[2], query.shape[3])
        sizes = {name: str(size) for name, size in zip(names, found, strict=True)}
        shape, length = _shape(query, key, value, decision.mask.causal), hint(key.shape[2])
        exact = round(cost.at(cost.exact_cost(shape), length))
        if plan is not None and length:
            prescored = round(cost.at(cost.prescored_cost(shape, plan), length))
            share = cost.at(cost.density(plan, shape.causal), length)
    return SiteReport(
        module=site.module,
        source=site.source,
        code=site.code,
        decision="rewrite" if decision.rewrite else "keep",
        reason=decision.reason,
        plan=plan,
        mask=decision.mask.text,
        shape=sizes,
        exact_cost=exact,
        prescored_cost=prescored,
        density=share,
    )
