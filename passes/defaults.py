"""The plan of a site that nobody gave one, by what was measured; docs/quality.md has the tables."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..kernels.plan import Plan
from .compat import at_least

CAUSAL = Plan(chunk=256, window=0, routes=64, share=0.0012)
"""Some 21 % of the pairs at 8192 tokens of text. Clusters cut from 256 keys are better than from 128, routes find more
than a window does, and a share gives them to the queries and heads that need them, at any length."""

CAUSAL_ON_A_GPU = replace(CAUSAL, group_routes=True, share=0.0014)
"""The same, where the query heads of a KV head route together: a tile of queries walks over a fifth fewer clusters, at
the same quality; some 22 % of the pairs. On a CPU, where nothing is walked over that is not attended, each head's own
routes are better."""

LONG_ON_A_GPU = replace(CAUSAL_ON_A_GPU, coarse=32)
"""That on two levels: past some 60,000 tokens the routing of one level would take most of the time. Up to there what
fewer chunks lose is more than the time that they save; on a CPU two levels gain nothing up to 32,768 tokens."""

TWO_LEVELS_FROM = 65536
"""Keys."""

TWO_SIDED = Plan(chunk=512, window=0, sinks=1, cluster=32, routes=12, residual=True)
"""On a CPU: 25 % of the pairs at 2048 tokens. Attention is diffuse where it looks both ways, so what is not routed
to must stand in as centroids; no key is special by its nearness."""


TWO_SIDED_ON_A_GPU = replace(TWO_SIDED, chunk=256)
"""The same, cut from chunks that a kernel clusters."""


WIDEST_BAND_ON_A_GPU = 2048
"""Keys. Wider causal ones run with the plans of other sites there; where a site looks both ways, or on a CPU, no routes
are chosen within a mask."""


def default_plan(causal: bool, device: str, length: int | torch.SymInt, pairs: bool = False) -> Plan:
    """The plan of a site of ``length`` keys; ``pairs``: a mask, bias or softcap rules centroids out.

    On a GPU a dynamic ``length`` is compared with ``TWO_LEVELS_FROM``, which becomes a guard.
    """
    if device == "cpu":
        return CAUSAL if causal or pairs else TWO_SIDED
    if causal or pairs:
        return LONG_ON_A_GPU if at_least(length, TWO_LEVELS_FROM) else CAUSAL_ON_A_GPU
    return TWO_SIDED_ON_A_GPU
