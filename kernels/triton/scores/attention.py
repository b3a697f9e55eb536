"""Peak and query on chip: attention of the chunk's queries to its own keys, a tile of queries at a time.

The formulas are those of ``kernels.scorers.peak`` and ``kernels.scorers.query``. A tile sees every key of
the chunk, so that its softmax needs no second look. Where a query is not finite, its weights are NaN in
the reference and +inf here; ``summary`` takes both for the same.
"""

from __future__ import annotations

from typing import Any

from ...scorers.peak import GAP
from ...scorers.query import LAST
from ..render import fill

PAIRS = 16384
"""Weights of a tile: 64 registers a lane of eight warps."""

ATTENTION = """
result = tl.zeros([CHUNK], tl.float32)
for head in range(0, $group):
    query_head = query + pair // kv_heads * query_b + (pair % kv_heads * $group + head) * query_h
    for begin in range($first, CHUNK, $rows):
        row = begin + tl.arange(0, $rows)
        query_at = chunk * CHUNK + row
        queries = tl.load(
            query_head + query_at.to(tl.int64)[:, None] * query_n + feature[None, :],
            mask=(query_at < k_len)[:, None] & (feature < DIM)[None, :],
            other=0.0,
        )
        logits = tl.dot(queries$wide_type, tl.trans(keys)$wide_type)  #? not wide
        logits = product(queries, tl.trans(keys))  #? wide
        logits *= scale * 1.4426950408889634
        allowed = tl.broadcast_to(here[None, :], [$rows, CHUNK])
        allowed &= place[None, :] <= row[:, None]  #? causal
        logits = tl.where(allowed, logits, float("-inf"))
        weight = tl.exp2(logits - tl.max(logits, 1)[:, None])
        weight = weight / tl.sum(weight, 1)[:, None]
        weight = tl.where(weight == weight, weight, float("inf"))
        # A query that is itself padding says nothing about its keys.
        asked = here  #? whole
        same = place[None, :] == row[:, None]  #? not whole
        asked = tl.max((same & here[None, :]).to(tl.int32), 1) > 0  #? not whole
        counts = allowed & asked[:, None]
        counts &= row[:, None] - place[None, :] >= $gap  #? peak and causal
        counts &= tl.abs(row[:, None] - place[None, :]) >= $gap  #? peak and not causal
        weight = tl.where(counts, weight, 0.0)
        result = tl.maximum(result, tl.max(weight, 0))  #? peak
        result += tl.sum(weight, 0) / $share  #? not peak
"""


def body(method: str, parts: dict[str, Any]) -> str:
    """Lines that make ``result`` ``[CHUNK]`` of ``keys`` ``[CHUNK, DIM_TILE]`` and the queries of a group."""
    chunk, peak = parts["chunk"], method == "peak"
    rows = min(chunk, PAIRS // chunk) if peak else min(chunk, LAST)
    own = dict(
        peak=peak,
        rows=rows,
        whole=rows == chunk,
        first=0 if peak else chunk - rows,
        gap=GAP,
        share=f"{float(parts['group'] * rows)}",
    )
    return fill(ATTENTION, parts | own)
