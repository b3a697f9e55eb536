"""The plans that are tried at a site where the user names none: a ladder of densities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..kernels.plan import Plan
from ..passes import cost
from ..passes.defaults import TWO_SIDED

DENSITIES = (0.05, 0.1, 0.2, 0.35)
WINDOW = 128
"""Keys of a window where routes are the rest: with fewer, quality collapses."""
CENTROIDS = 0.25
"""Of the rows of a segment."""


def ladder(length: int, causal: bool, base: Plan) -> list[Plan]:
    """Plans of about these densities at ``length`` keys, by what else they do as in ``base``.

    Causal: routed clusters beside a window, and a window alone (StreamingLLM). Bidirectional: routed clusters with
    centroids for the others, routed clusters beside a window, and selected keys with centroids for the others.
    """
    near = replace(base.near, window=0)
    found = [plan for share in DENSITIES for plan in _plans(share, length, causal, near, base.coarse)]
    densities = {plan: cost.at(cost.density(plan, causal), length) for plan in dict.fromkeys(found)}
    return [plan for plan, density in sorted(densities.items(), key=lambda item: item[1]) if density < 0.75]


def _plans(share: float, length: int, causal: bool, base: Plan, coarse: int) -> Iterator[Plan]:
    """The plans of one density that there are: few keys leave no room for a window and routes.

    ``coarse``: of those with routes, where it is enough for them.
    """
    sides = 1 if causal else 2
    keys = share * (length / 2 if causal else length) - base.sinks
    routing = length / (2 if causal else 1) / base.cluster
    routes = int((keys - routing - sides * (WINDOW + base.chunk / 2)) / base.cluster)
    if routes > 0:
        enough = routes <= coarse * (base.chunk // base.cluster)
        yield replace(base, window=WINDOW, routes=routes, coarse=coarse if enough else 0)
    if causal:
        window = round(keys - base.chunk / 2)
        if window >= WINDOW / 2:
            yield replace(base, window=window)
        return
    wide = TWO_SIDED
    if (routes := int((share * length - wide.sinks - 2 * length / wide.cluster) / wide.cluster)) > 0:
        yield replace(wide, routes=routes, seed=base.seed)
    rows = round(share * base.chunk)
    if rows >= 4:
        centroids = round(CENTROIDS * rows)
        yield replace(base, method="leverage", sinks=1, keep=rows - centroids, centroids=centroids)
