# score: written by prescore_compile.kernels.triton; do not edit.
# plan: method=peak chunk=128 window=128 sinks=16 keep=16 threshold=0.1 centroids=0 cluster=16
#   clustering=pca_tree routes=0 spread=1.0 share=0.0 group_routes=False residual=False coarse=0
#   seed=0
# stage: score, peak of a chunk's keys

import triton
import triton.language as tl


@triton.jit
def product(left, right):
    # Two float32 factors: what TF32 rounds off either of them takes part in two more products.
    out = tl.zeros([left.shape[0], right.shape[1]], tl.float32)
    for small in range(0, 3):
        first = (left.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        second = (right.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        first = tl.where(small == 0, left - first, first)
        second = tl.where(small == 1, right - second, second)
        out = tl.dot(first, second, out, input_precision="tf32")
    return out


@triton.jit
def score(
    query, key, scores, query_b, query_h, query_n, key_b, key_h, key_n, kv_heads, k_len, chunks,
    scale,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    kv_heads = tl.cast(kv_heads, tl.int32)
    k_len = tl.cast(k_len, tl.int32)
    chunks = tl.cast(chunks, tl.int32)
    DIM: tl.constexpr = 80
    CHUNK: tl.constexpr = 128
    program = tl.program_id(0)
    pair = (program // chunks).to(tl.int64)  # of batch and KV head
    chunk = program % chunks
    key_head = key + pair // kv_heads * key_b + pair % kv_heads * key_h
    feature = tl.arange(0, 128)
    place = tl.arange(0, CHUNK)
    at = chunk * CHUNK + place
    keys = tl.load(
        key_head + at.to(tl.int64)[:, None] * key_n + feature[None, :],
        mask=(at < k_len)[:, None] & (feature < DIM)[None, :],
        other=0.0,
    )
    finite = tl.sum(keys.to(tl.float32) * 0.0, 1) == 0.0  # 0 * x is NaN for what is not finite
    here = (at < k_len) & finite
    keys = tl.where(here[:, None], keys, 0.0).to(key.dtype.element_ty)

    result = tl.zeros([CHUNK], tl.float32)
    for head in range(0, 3):
        query_head = query + pair // kv_heads * query_b + (pair % kv_heads * 3 + head) * query_h
        for begin in range(0, CHUNK, 128):
            row = begin + tl.arange(0, 128)
            query_at = chunk * CHUNK + row
            queries = tl.load(
                query_head + query_at.to(tl.int64)[:, None] * query_n + feature[None, :],
                mask=(query_at < k_len)[:, None] & (feature < DIM)[None, :],
                other=0.0,
            )
            logits = product(queries, tl.trans(keys))
            logits *= scale * 1.4426950408889634
            allowed = tl.broadcast_to(here[None, :], [128, CHUNK])
            allowed &= place[None, :] <= row[:, None]
            logits = tl.where(allowed, logits, float("-inf"))
            weight = tl.exp2(logits - tl.max(logits, 1)[:, None])
            weight = weight / tl.sum(weight, 1)[:, None]
            weight = tl.where(weight == weight, weight, float("inf"))
            # A query that is itself padding says nothing about its keys.
            asked = here
            counts = allowed & asked[:, None]
            counts &= row[:, None] - place[None, :] >= 8
            weight = tl.where(counts, weight, 0.0)
            result = tl.maximum(result, tl.max(weight, 0))

    # A key that is not finite must be met, not hidden; what is no number is taken for the same.
    result = tl.where(here & (result == result), result, tl.where(here, float("inf"), 0.0))
    tl.store(scores + pair * k_len + at, tl.where(finite, result, float("inf")), mask=at < k_len)
