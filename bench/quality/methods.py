"""What is compared: the project's plans at a given density, and the rivals of ``rivals.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from prescore_compile.kernels import cpu, reference
from prescore_compile.kernels import summary as summaries
from prescore_compile.kernels.layout import segments, spans
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary
from prescore_compile.passes.defaults import CAUSAL, CAUSAL_ON_A_GPU

from . import rivals
from .rivals import Attend


@dataclass(frozen=True)
class Method:
    """One line of the table: how it attends and which share of the pairs that costs, routing counted in.

    ``drawn``: it draws at random, from the seed that ``methods`` was given.
    """

    name: str
    attend: Attend
    density: float
    drawn: bool = False


class Planned:
    """The project's own attention, by its compiled CPU kernels; counts the clusters that queries route to."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.queries = self.routed = 0

    def __call__(self, site: Operands, first: int) -> torch.Tensor:
        query, key, value, valid, causal, scale = site[:6]
        plan = self.plan
        scores = summaries.score(query, key, valid, plan, causal, scale) if plan.keep else None
        summary = summaries.summarize(key, value, valid, scores, plan, cpu.clusters)
        asked = query[:, :, first:]
        part = site._replace(query=asked)
        mass = cpu.mass(part, summary, plan) if plan.needs_mass else None
        routes = cpu.route(asked, summary, plan, causal, key.shape[2], scale, mass) if plan.routes else _none(asked)
        self.count(part, summary, routes, mass)
        return cpu.attend(part, summary, routes, plan)

    def count(self, site: Operands, summary: Summary, routes: torch.Tensor, mass: torch.Tensor | None) -> None:
        """What is kept of a call's routes."""
        self.queries += routes[..., :1].numel()
        self.routed += int((routes >= 0).sum())

    def density(self, length: int) -> float:
        """What was spent, where every query of that many tokens was asked."""
        return density(self.plan, length, routed=self.routed / max(self.queries, 1))


def pairs(plan: Plan, length: int, causal: bool, routed: float | None = None) -> float:
    """(query, key or row) pairs of a head, counted; a mean and a spread of a cluster count as one pair.

    ``routed``: clusters that a query routes to, on average; None: as many as it may. A share is of a sum over window
    and sinks, whose logits, without values, count as half a pair each.
    """
    near = 1.5 if plan.needs_mass else 1.0
    total = 0.0 if routed is None else routed * plan.cluster * length
    for span in spans(plan, causal, length, length, 1024):
        rows = plan.sinks * (span.finished > 0)
        rows += len(segments(span.finished)) * plan.rows_per_segment
        seen = min(span.finished * plan.chunk, length) if causal else length - (span.high - span.low)
        eligible = seen // plan.cluster if plan.routes else 0
        per_query = min(rows, seen) + eligible + (near - 1) * plan.sinks * (span.finished > 0)
        per_query += min(plan.routes, eligible) * plan.cluster if routed is None else 0
        per_query += max(eligible - plan.routes, 0) if plan.residual else 0
        total += per_query * (span.end - span.begin)
        if causal:
            total += near * sum(i + 1 - span.low for i in range(span.begin, span.end))
        else:
            total += near * (span.high - span.low) * (span.end - span.begin)
    return total


def density(plan: Plan, length: int, causal: bool = True, routed: float | None = None) -> float:
    """``pairs`` over those of exact attention."""
    return pairs(plan, length, causal, routed) / (length * (length + 1) / 2 if causal else length * length)


def fit(make: Callable[[int], Plan], target: float, length: int, causal: bool = True, high: int = 4096) -> Plan:
    """The plan of the largest setting whose density is at most ``target``.

    Raises:
        ValueError: none is.
    """
    low = -1
    while low < high:
        middle = (low + high + 1) // 2
        try:
            within = density(make(middle), length, causal) <= target
        except ValueError:  # the setting is out of the plan's range
            within = False
        low, high = (middle, high) if within else (low, middle - 1)
    if low < 0:
        raise ValueError(f"no setting reaches a density of {target} at {length} tokens")
    return make(low)


FIXED = Plan(chunk=256, window=0, routes=0, spread=1.4)
"""Routed plans without a share add routes to this."""

SHARED = {
    0.22: CAUSAL,
    0.10: Plan(window=0, cluster=32, routes=64, share=0.0135),
    0.35: Plan(chunk=256, window=0, routes=128, share=0.00015),
}
"""Routed plans with a share: no more than these densities on the texts that choices are made on, at 8192 tokens."""


def own(length: int, target: float) -> Iterator[tuple[str, Plan]]:
    """The project's plans at this density, by name."""
    small = target < 0.15
    base = Plan(window=0, cluster=32, routes=0) if small else Plan(routes=0)

    def routed(settings: Plan) -> Plan:
        return fit(lambda n: replace(settings, routes=n), target, length)

    def kept(method: str, residual: bool = False) -> Plan:
        settings = Plan(method=method, routes=0, chunk=256)
        settings = fit(lambda n: replace(settings, window=n), 0.45 * target, length)

        def make(n: int) -> Plan:
            part = n // 4 if residual else 0
            return replace(settings, keep=n - part, centroids=part)

        return fit(make, target, length)

    shared = SHARED.get(target, SHARED[0.22])
    yield "routes with a share", shared
    yield "routes with a share, by group", CAUSAL_ON_A_GPU if shared == CAUSAL else replace(shared, group_routes=True)
    yield "fixed routes", routed(base if small else FIXED)
    if not small:
        yield "fixed routes, chunk 128, window 128", routed(Plan(routes=0, spread=1.4))
    yield "StreamingLLM", fit(lambda n: replace(base, window=n), target, length)
    for method in ("kmeans", "kmedian", "leverage"):
        yield f"{method} + routes", routed(replace(base, method=method, keep=4 if small else 8))
    for method in ("peak", "kmeans", "kmedian", "leverage", "random", "norm"):
        yield f"{method}, no routes", kept(method)
    yield "kmeans + residual, no routes", kept("kmeans", residual=True)
    yield "SnapKV-like (query)", kept("query")


DRAWN = ("kmeans", "kmedian", "random")


def methods(length: int, target: float, seed: int = 0) -> Iterator[Method]:
    """Every method at this density: the ones that matter most first."""
    plans = {name: replace(plan, seed=seed) for name, plan in own(length, target)}
    for name, plan in plans.items():
        # What a share leaves is counted as it runs.
        spent = target if plan.share else density(plan, length)
        yield Method(name, Planned(plan), spent, drawn=plan.keep > 0 and plan.method in DRAWN)
    routed = plans["fixed routes"]
    for name, attend in (
        ("MoBA-like (mean of runs)", rivals.moba(routed)),
        ("Quest-like (bounds of runs)", rivals.quest(routed)),
    ):
        yield Method(name, attend, density(routed, length))
    spent = pairs(routed, length, True) / length
    free = replace(routed, routes=0)
    keys = int(spent - pairs(free, length, True) / length)
    yield Method("oracle (best keys)", rivals.oracle(free, keys), density(routed, length))
    for name, scoring in (
        ("HyperAttention", None),
        ("HyperAttention + kmeans", "drop"),
        ("HyperAttention, zeroed", "zero"),
    ):
        hyper = replace(rivals.Hyper.at(target, scoring), seed=seed)
        yield Method(name, hyper, hyper.density(length), drawn=True)


def exact(site: Operands, first: int) -> torch.Tensor:
    """Exact attention of the last queries, by SDPA."""
    group = site.query.shape[1] // site.key.shape[1]
    k, v = site.key.repeat_interleave(group, 1), site.value.repeat_interleave(group, 1)
    if first == 0:
        return torch.nn.functional.scaled_dot_product_attention(site.query, k, v, is_causal=True, scale=site.scale)
    return reference.exact(site._replace(query=site.query[:, :, first:]))


def _none(query: torch.Tensor) -> torch.Tensor:
    return torch.empty(*query.shape[:3], 0, dtype=torch.int32)
