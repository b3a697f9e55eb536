"""The plan of a site that nobody gave one, by what was measured; docs/quality.md has the tables."""

from __future__ import annotations

from ..kernels.plan import Plan

CAUSAL = Plan(chunk=256, window=0, routes=64, share=0.001)
"""On a CPU: 22 % of the pairs at 8192 tokens. Clusters cut from 256 keys are better than from 128, and routes
find more than a window does."""

TWO_SIDED = Plan(chunk=512, window=0, sinks=1, cluster=32, routes=12, residual=True)
"""On a CPU: 25 % of the pairs at 2048 tokens. Attention is diffuse where it looks both ways, so what is not routed
to must stand in as centroids; no key is special by its nearness."""


def default_plan(causal: bool, device: str) -> Plan:
    """The plan of a site on a kind of device.

    On a GPU it is ``Plan()``: chunks of 256 keys spill registers there, and no kernel reads a residual yet.
    """
    if device != "cpu":
        return Plan()
    return CAUSAL if causal else TWO_SIDED
