"""The plan of a site that nobody gave one, by what was measured; docs/quality.md has the tables."""

from __future__ import annotations

from dataclasses import replace

from ..kernels.plan import Plan

CAUSAL = Plan(chunk=256, window=0, routes=33)
"""On a CPU: 22 % of the pairs at 8192 tokens. Clusters cut from 256 keys are better than from 128, and routes
find more than a window does."""

TWO_SIDED = Plan(chunk=512, window=0, sinks=1, cluster=32, routes=12, residual=True)
"""On a CPU: 25 % of the pairs at 2048 tokens. Attention is diffuse where it looks both ways, so what is not routed
to must stand in as centroids; no key is special by its nearness."""


TWO_SIDED_ON_A_GPU = replace(TWO_SIDED, chunk=256)
"""The same, cut from chunks that a kernel clusters."""


def default_plan(causal: bool, device: str, pairs: bool = False) -> Plan:
    """The plan of a site on a kind of device; ``pairs``: a mask, bias or softcap rules centroids out.

    On a GPU a causal site has ``Plan()``: with ``CAUSAL`` a tile reads more routed keys, and routing to 33
    clusters takes a wider network (docs/triton.md).
    """
    if device == "cpu":
        return CAUSAL if causal else TWO_SIDED
    return Plan() if causal or pairs else TWO_SIDED_ON_A_GPU
