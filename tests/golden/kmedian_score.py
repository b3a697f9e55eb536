# score: written by prescore_compile.kernels.triton; do not edit.
# plan: method=kmedian chunk=128 window=128 sinks=16 keep=16 threshold=0.0 centroids=0 cluster=16
#   clustering=pca_tree routes=0 spread=1.0 share=0.0 group_routes=False residual=False coarse=0
#   seed=0
# stage: score, kmedian of a chunk's keys

import triton
import triton.language as tl


@triton.jit
def product(narrow, wide):
    # A factor of 16 bits times float32: three products of 8 bits each, of which none rounds.
    out = tl.zeros([narrow.shape[0], wide.shape[1]], tl.float32)
    for part in range(0, 3):
        high = wide.to(tl.bfloat16)
        out = tl.dot(narrow.to(tl.bfloat16), high, out)
        wide -= high.to(tl.float32)
    return out


@triton.jit
def score(
    key, member, scores, key_b, key_h, key_n, kv_heads, k_len, chunks,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    kv_heads = tl.cast(kv_heads, tl.int32)
    k_len = tl.cast(k_len, tl.int32)
    chunks = tl.cast(chunks, tl.int32)
    DIM: tl.constexpr = 64
    CHUNK: tl.constexpr = 128
    program = tl.program_id(0)
    pair = (program // chunks).to(tl.int64)  # of batch and KV head
    chunk = program % chunks
    key_head = key + pair // kv_heads * key_b + pair % kv_heads * key_h
    feature = tl.arange(0, 64)
    place = tl.arange(0, CHUNK)
    at = chunk * CHUNK + place
    keys = tl.load(
        key_head + at.to(tl.int64)[:, None] * key_n + feature[None, :],
        mask=(at < k_len)[:, None] & (feature < DIM)[None, :],
        other=0.0,
    )
    finite = tl.sum(keys.to(tl.float32) * 0.0, 1) == 0.0  # 0 * x is NaN for what is not finite
    here = finite & (tl.load(member + pair // kv_heads * k_len + at, mask=at < k_len, other=0) != 0)
    keys = tl.where(here[:, None], keys, 0.0).to(key.dtype.element_ty)

    # Evenly spaced keys, by rank among the valid ones, are the first centres.
    centre = tl.arange(0, 16)
    used = centre < 8
    rank = tl.cumsum(here.to(tl.int32), 0) - 1
    wanted = centre * tl.maximum(tl.sum(here.to(tl.int32), 0), 1) // 8
    start = here[:, None] & (rank[:, None] == wanted[None, :])
    first = chunk * CHUNK + tl.sum(tl.where(start, place[:, None], 0), 0)
    centres = tl.load(
        key_head + first.to(tl.int64)[None, :] * key_n + feature[:, None],
        mask=used[None, :] & (feature < DIM)[:, None],
        other=0.0,
    ).to(tl.float32)
    for step in range(0, 3):
        square = tl.sum(centres * centres, 0)
        apart = tl.where(used[None, :], square[None, :] - 2.0 * product(keys, centres), float("inf"))
        owner = tl.argmin(apart, 1)
        own = owner[:, None] == centre[None, :]
        inside = own & here[:, None]
        for weiszfeld in range(0, 3):
            # The mean of the cluster's keys; then each weighted by 1 / its distance from the median so far.
            off = keys.to(tl.float32) - product(own.to(tl.float32), tl.trans(centres))
            distance = tl.sqrt(tl.sum(off * off, 1))
            near = 1.0 / tl.maximum(distance, 1e-6)
            weight = tl.where(inside, tl.where(weiszfeld > 0, near, 1.0)[:, None], 0.0)
            total = tl.sum(weight, 0)
            moved = product(tl.trans(keys), weight) / tl.maximum(total, 1e-30)[None, :]
            centres = tl.where((total > 0)[None, :], moved, centres)
    square = tl.sum(centres * centres, 0)
    apart = tl.where(used[None, :], square[None, :] - 2.0 * product(keys, centres), float("inf"))
    owner = tl.argmin(apart, 1)
    own = owner[:, None] == centre[None, :]
    inside = own & here[:, None]
    off = keys.to(tl.float32) - product(own.to(tl.float32), tl.trans(centres))
    distance = tl.sqrt(tl.sum(off * off, 1))
    result = distance

    # A key that is not finite must be met, not hidden; what is no number is taken for the same.
    result = tl.where(here & (result == result), result, tl.where(here, float("inf"), 0.0))
    tl.store(scores + pair * k_len + at, tl.where(finite, result, float("inf")), mask=at < k_len)
