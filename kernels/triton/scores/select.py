"""Select on a GPU: each chunk's and each segment's best keys, of scores of any method.

``select`` is ``summary._best_of_chunks``, one program a chunk. A key's rank is the number of keys that come before
it, counted in one tile of all pairs: 65,536 comparisons at the most, in which no lane waits for another as the
steps of a sorting network do. The ``keep`` keys of the lowest ranks are written in the order of their places.

``select_segments`` finds the best of a segment among the best of its chunks, which lie next to each other in memory:
one program a segment reads ``WIDTH`` of them at a time beside the best so far, and ranks them in the same
way. One launch for all levels: a segment of C chunks takes C * keep / ``WIDTH`` steps, C / 2 * log2(C)
chunks are read in all. ``summary._merged``, level by level, is some 170 torch operations at n = 32,768.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...layout import chunk_count
from ...plan import Plan
from ..cache import launch, load
from ..clusters import CHUNK, members
from ..render import arguments, fill, source
from ..spec import power_of_two

WIDTH = 128
"""Keys that a segment's program reads at a time."""
MOST_OF_A_SEGMENT = 64
"""The most keys of a segment that fit beside them."""

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

SEGMENTS = """
def select_segments(
    $arguments
):
    KEEP: tl.constexpr = $keep
    SLOTS: tl.constexpr = $slots
    WIDTH: tl.constexpr = $width
    program = tl.program_id(0)
    pair = (program // chunks).to(tl.int64)  # of batch and KV head
    last = program % chunks  # a segment is named by its last chunk, and has as many as the lowest bit says
    size = (last + 1) & -(last + 1)
    first = (pair * chunks + last + 1 - size) * KEEP
    slot = tl.arange(0, SLOTS)
    place = tl.arange(0, WIDTH)
    kept = tl.full([SLOTS], -1, tl.int64)  # the best so far, in the order of their places
    kept_score = tl.full([SLOTS], float("-inf"), tl.float32)
    filled = 0
    for begin in range(0, size * KEEP, WIDTH):
        inside = begin + place < size * KEEP
        new = tl.load(best + first + begin + place, mask=inside, other=-1)
        score = tl.load(best_score + first + begin + place, mask=inside, other=float("-inf"))
        # Before a new one come those of a higher score and, of its equals, all older ones and the earlier new ones.
        above = score[:, None] > score[None, :]
        above |= (score[:, None] == score[None, :]) & (place[:, None] < place[None, :])
        rank = tl.sum(above.to(tl.int32), 0)
        rank += tl.sum(((kept_score[:, None] >= score[None, :]) & (slot < filled)[:, None]).to(tl.int32), 0)
        above = kept_score[:, None] > kept_score[None, :]
        above |= (kept_score[:, None] == kept_score[None, :]) & (slot[:, None] < slot[None, :])
        kept_rank = tl.sum((above & (slot < filled)[:, None]).to(tl.int32), 0)
        kept_rank += tl.sum((score[:, None] > kept_score[None, :]).to(tl.int32), 0)
        stays = (kept_rank < KEEP) & (slot < filled)
        comes = (rank < KEEP) & inside
        # The place of each among the best that there are now.
        stays_to = tl.cumsum(stays.to(tl.int32), 0) - 1
        comes_to = tl.sum(stays.to(tl.int32), 0) + tl.cumsum(comes.to(tl.int32), 0) - 1
        stays_here = stays[:, None] & (stays_to[:, None] == slot[None, :])
        comes_here = comes[:, None] & (comes_to[:, None] == slot[None, :])
        kept = tl.sum(tl.where(stays_here, kept[:, None], 0), 0) + tl.sum(tl.where(comes_here, new[:, None], 0), 0)
        stays_score = tl.sum(tl.where(stays_here, kept_score[:, None], 0.0), 0)
        kept_score = stays_score + tl.sum(tl.where(comes_here, score[:, None], 0.0), 0)
        filled = tl.minimum(filled + WIDTH, KEEP)
    to = chosen + (pair * chunks + last) * KEEP + slot
    tl.store(to, tl.where(kept_score > float("-inf"), kept, -1).to(tl.int32), mask=slot < KEEP)
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
    return plan.keep > 0 and plan.chunk <= CHUNK


def segments_fit(plan: Plan) -> bool:
    """Whether the keys of segments are selected on chip."""
    return fits(plan) and plan.keep <= MOST_OF_A_SEGMENT


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


def segments_source(plan: Plan) -> str:
    """Source of ``select_segments``."""
    parts = dict(
        arguments=arguments(["best", "best_score", "chosen", "chunks"]),
        keep=plan.keep,
        slots=max(16, power_of_two(plan.keep)),
        width=WIDTH,
    )
    about = {"plan": plan.text, "stage": "summarize, the selected keys of a segment"}
    return source("select_segments", about, fill(SEGMENTS, parts))


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
    launch(kernel, (batch * heads * chunks,), values, warps=4 if plan.chunk <= 128 else 8, stages=1)
    return best, best_score


def select_segments(best: torch.Tensor, best_score: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Selected keys of every segment, of what ``select`` gives: ``[B, Hkv, C, keep]`` int32, ascending, -1: none."""
    batch, heads, chunks, keep = best.shape
    chosen = best.new_empty(best.shape, dtype=torch.int32)
    values = dict(best=best, best_score=best_score, chosen=chosen, chunks=chunks)
    kernel = load(segments_source(plan), "select_segments")
    launch(kernel, (batch * heads * chunks,), values, warps=4 if keep <= 32 else 8, stages=1)
    return chosen
