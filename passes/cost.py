"""The cost model: multiply-adds of exact and of prescored attention, as sympy expressions of n."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy

from ..kernels.plan import Plan

N = sympy.Symbol("n", integer=True, positive=True)

# Time of one multiply-add of a stage, in those of exact attention (SDPA's CPU kernel, float32,
# D = 64). Measured by `python -m bench.attention`; see docs/cpu.md.
ATTEND_PRICE = 1.2
ROUTE_PRICE = 1.7
# Fixed work a key and KV head, in the same unit: clustering it and copying it, and scoring it.
SUMMARY_PER_KEY = 40_000
SCORE_PER_KEY = {
    "kmeans": 35_000, "kmeans_relative": 38_000, "kernel_kmeans": 55_000, "kmedian": 100_000,
    "leverage": 45_000, "peak": 220_000, "window_peak": 290_000, "random": 10_000, "norm": 11_000,
    "inverse_norm": 10_000, "query": 73_000,
}  # fmt: skip
USER_SCORE_PER_KEY = 100_000  # nobody knows: as kmedian, the dearest that reads keys alone
LONGEST = 2**24


@dataclass(frozen=True)
class Shape:
    """One site's fixed sizes."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool


def exact_pairs(causal: bool) -> sympy.Expr:
    """(query, key) pairs of exact attention, a head."""
    return N * (N + 1) / 2 if causal else N**2


def attended_pairs(plan: Plan, causal: bool) -> sympy.Expr:
    """(query, key or row) pairs that the plan attends, a head; at most the exact ones."""
    if plan.window is None:
        return exact_pairs(causal)
    sides = 1 if causal else 2
    window = (plan.window * sides + plan.chunk / 2 * sides) if causal or plan.window else 0
    # A query has about half the bits of its number of finished chunks as segments.
    segments = sympy.log(sympy.Max(N / plan.chunk, 1), 2) / 2 if causal else 1
    rows = plan.sinks + segments * plan.rows_per_segment
    total = N * (window + rows + plan.routes * plan.cluster)
    return sympy.Min(total, exact_pairs(causal))


def routing_pairs(plan: Plan, causal: bool) -> sympy.Expr:
    """(query, representative vector) pairs: a mean and a spread for each cluster, a head.

    Two vectors of D a cluster cost as much as one attended key (its key and its value).
    """
    if not plan.routes:
        return sympy.Integer(0)
    every = exact_pairs(causal) / plan.cluster
    if not plan.coarse:
        return every
    return exact_pairs(causal) / plan.chunk + sympy.Min(N * plan.coarse * plan.chunk / plan.cluster, every)


def exact_cost(shape: Shape) -> sympy.Expr:
    """Multiply-adds of exact attention."""
    return _per_pair(shape) * exact_pairs(shape.causal)


def prescored_cost(shape: Shape, plan: Plan) -> sympy.Expr:
    """Multiply-adds of attending and routing; not the summary, which is linear in n."""
    return _per_pair(shape) * (attended_pairs(plan, shape.causal) + routing_pairs(plan, shape.causal))


def density(plan: Plan, causal: bool) -> sympy.Expr:
    """Attended pairs, routing counted in, over exact pairs."""
    return (attended_pairs(plan, causal) + routing_pairs(plan, causal)) / exact_pairs(causal)


def prescored_time(shape: Shape, plan: Plan) -> sympy.Expr:
    """Expected time in units of one exact multiply-add, everything included."""
    keys = shape.batch * shape.kv_heads * N
    summary = SUMMARY_PER_KEY * keys if plan.routes else 0
    scoring = SCORE_PER_KEY.get(plan.method, USER_SCORE_PER_KEY) * keys if plan.keep else 0
    pairs = ATTEND_PRICE * attended_pairs(plan, shape.causal) + ROUTE_PRICE * routing_pairs(plan, shape.causal)
    return _per_pair(shape) * pairs + summary + scoring


@functools.cache
def break_even(shape: Shape, plan: Plan) -> int | None:
    """The shortest length at which the plan is expected to be faster than exact; None: never."""
    faster = sympy.lambdify(N, prescored_time(shape, plan) - exact_cost(shape), "math")
    if faster(LONGEST) >= 0:
        return None
    low, high = 1, LONGEST  # the gain grows with n: bisect
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) < 0 else (middle + 1, high)
    return low


def at(expr: sympy.Expr, length: int) -> float:
    """The expression's value at a length."""
    return float(sympy.sympify(expr).subs(N, length))


def _per_pair(shape: Shape) -> int:
    return shape.batch * shape.heads * (shape.head_dim + shape.value_dim)
