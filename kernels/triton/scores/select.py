"""Select on a GPU: each chunk's best keys, of scores of any method.

``summary._best_of_chunks``, one program a chunk. A key's rank is the number of keys that come before it, counted in
one tile of all pairs: 65,536 comparisons at the most, in which no lane waits for another as the steps of a
sorting network do. The ``keep`` keys of the lowest ranks are written in the order of their places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...layout import chunk_count
from ...plan import Plan
from ..cache import launch, load
from ..clusters import CHUNK, members
from ..render import arguments, fill, source

WARPS = 4

KERNEL = """
def select(
    $arguments
):
    CHUNK: tl.constexpr = $chunk
    KEEP: tl.constexpr = $keep
    program = tl.program_id(0)
    pair = (program // chunks).to(tl.int64)  # of batch and KV head
    chunk = program % chunks
    place = tl.arange(0, CHUNK)
    at = chunk * CHUNK + place
    score = tl.load(scores + pair * k_len + at, mask=at < k_len, other=0.0)
    score = tl.where(score == score, score, float("inf"))
    score = tl.maximum(score, $lowest)
    here = (at < k_len) & (at >= $sinks)  #? not valid
    here = tl.load(member + pair // kv_heads * k_len + at, mask=at < k_len, other=0) != 0  #? valid
    here &= score >= $threshold  #? threshold
    score = tl.where(here, score, float("-inf"))
    higher = score[:, None] > score[None, :]
    earlier = (score[:, None] == score[None, :]) & (place[:, None] < place[None, :])
    rank = tl.sum((higher | earlier).to(tl.int32), 0)
    kept = rank < KEEP
    to = (pair * chunks + chunk) * KEEP + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(best + to, at.to(tl.int64), mask=kept)
    tl.store(best_score + to, score, mask=kept)
"""


@dataclass(frozen=True, kw_only=True)
class SelectSpec:
    """What the source depends on: the plan, and whether some keys are padding."""

    plan: str
    valid: bool

    @property
    def settings(self) -> Plan:
        return Plan.parse(self.plan)


def fits(plan: Plan) -> bool:
    """Whether the keys of a chunk are selected on chip."""
    return 0 < plan.keep and plan.chunk <= CHUNK


def select_source(spec: SelectSpec) -> str:
    """Source of ``select``."""
    plan = spec.settings
    names = ["scores", *["member"] * spec.valid, "best", "best_score", "kv_heads", "k_len", "chunks"]
    parts = dict(
        arguments=arguments(names),
        chunk=plan.chunk,
        keep=plan.keep,
        sinks=plan.sinks,
        valid=spec.valid,
        threshold=plan.threshold,
        lowest=repr(torch.finfo(torch.float32).min),
    )
    about = {"plan": spec.plan, "stage": "summarize, the selected keys of a chunk"}
    return source("select", about, fill(KERNEL, parts))


def select(scores: torch.Tensor, valid: torch.Tensor | None, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Places ``[B, Hkv, C, keep]`` int64 of each chunk's best keys, ascending, and their scores, -inf of what is none.

    ``scores`` ``[B, Hkv, Nk]`` float32, ``valid`` ``[B, Nk]`` bool. Sinks are not selected.
    """
    batch, heads, k_len = scores.shape
    chunks = chunk_count(k_len, plan.chunk)
    best = scores.new_empty((batch, heads, chunks, plan.keep), dtype=torch.int64)
    best_score = scores.new_empty(best.shape)
    member = None if valid is None else members(valid, plan.sinks)
    values = dict(
        scores=scores.contiguous(), member=member, best=best, best_score=best_score,
        kv_heads=heads, k_len=k_len, chunks=chunks,
    )  # fmt: skip
    kernel = load(select_source(SelectSpec(plan=plan.text, valid=valid is not None)), "select")
    launch(kernel, (batch * heads * chunks,), values, warps=WARPS, stages=1)
    return best, best_score
