"""Kernels for GPUs: Triton source written for one plan, and what launches it. See docs/triton.md.

| module | holds |
| --- | --- |
| ``spec``, ``options`` | what the source of a kernel depends on, and how it is cut |
| ``render``, ``maths`` | templates filled to source text; lifted masks as Triton expressions |
| ``cache`` | source text to a kernel that can be launched |
| ``scores`` | score, and the selection of a chunk's keys |
| ``clusters``, ``projection``, ``rows``, ``segments``, ``rows_backward`` | summarize |
| ``mass``, ``route``, ``route_scores``, ``network`` | mass and route |
| ``loops``, ``union``, ``residual``, ``attend`` | attend |
| ``attend_backward``, ``d_query``, ``key_major`` | its gradients |
| ``device`` | where they run |
| ``listing`` | the sources as text |

What needs Triton imports it when it is called: a machine without it can import all but run none.
"""

from __future__ import annotations

from typing import Any


def sources(plan: Any, *, site: str = "", reach: Any = None, **shape: Any) -> dict[str, str]:
    """The Triton sources that a site runs with, by the name of the kernel, in the order of their launches.

    Args:
        plan: a ``Plan``. site: the module path, named in the sources' heads.
        shape: ``dim``, and where they are not as said there what ``listing.spec`` takes: ``value_dim``, ``group``,
            ``dtype`` ("bfloat16"), ``target`` ("cuda" or "hip"), ``causal``, ``valid``, ``lifted``, ``softcap``,
            ``sink_logit``, ``splits``.
        reach: of the mask that ``lifted`` is, what routing looks at (``kernels.logits.Logits``).

    Raises:
        ValueError: a dtype, target or size that no kernel is written for.
    """
    from . import listing

    return listing.all_sources(listing.spec(plan, **shape), site, reach)
