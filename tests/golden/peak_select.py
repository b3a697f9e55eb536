# select: written by prescore_compile.kernels.triton; do not edit.
# plan: method=peak chunk=128 window=128 sinks=16 keep=16 threshold=0.1 centroids=0 cluster=16
#   clustering=pca_tree routes=0 spread=1.0 share=0.0 group_routes=False residual=False coarse=0
#   seed=0
# stage: summarize, the selected keys of a chunk

import triton
import triton.language as tl


@triton.jit
def select(
    scores, best, best_score, k_len, chunks,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    k_len = tl.cast(k_len, tl.int32)
    chunks = tl.cast(chunks, tl.int32)
    CHUNK: tl.constexpr = 128
    KEEP: tl.constexpr = 16
    program = tl.program_id(0)
    pair = (program // chunks).to(tl.int64)  # of batch and KV head
    chunk = program % chunks
    place = tl.arange(0, CHUNK)
    at = chunk * CHUNK + place
    score = tl.load(scores + pair * k_len + at, mask=at < k_len, other=0.0)
    score = tl.where(score == score, score, float("inf"))
    score = tl.maximum(score, -3.4028234663852886e+38)
    here = (at < k_len) & (at >= 16)
    here &= score >= 0.1
    score = tl.where(here, score, float("-inf"))
    higher = score[:, None] > score[None, :]
    earlier = (score[:, None] == score[None, :]) & (place[:, None] < place[None, :])
    rank = tl.sum((higher | earlier).to(tl.int32), 0)
    kept = rank < KEEP
    to = (pair * chunks + chunk) * KEEP + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(best + to, at.to(tl.int64), mask=kept)
    tl.store(best_score + to, score, mask=kept)
