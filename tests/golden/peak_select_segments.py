# select_segments: written by prescore_compile.kernels.triton; do not edit.
# plan: method=peak chunk=128 window=128 sinks=16 keep=16 threshold=0.1 centroids=0 cluster=16
#   clustering=pca_tree routes=0 spread=1.0 share=0.0 group_routes=False residual=False coarse=0
#   seed=0
# stage: summarize, the selected keys of a segment

import triton
import triton.language as tl


@triton.jit
def select_segments(
    best, best_score, chosen, chunks,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    chunks = tl.cast(chunks, tl.int32)
    KEEP: tl.constexpr = 16
    SLOTS: tl.constexpr = 16
    WIDTH: tl.constexpr = 128
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
