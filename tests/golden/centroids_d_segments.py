# d_segments: written by prescore_compile.kernels.triton; do not edit.
# stage: attend backward, gradients of the rows: selected keys and centroids
# plan: method=peak chunk=32 window=8 sinks=2 keep=4 threshold=0.0 centroids=3 cluster=16
#   clustering=pca_tree routes=0 spread=1.0 share=0.0 group_routes=False residual=False coarse=0
#   seed=0
# site: head_dim 64, value_dim 64, 1 query heads a KV head, bfloat16, hip
# mask: causal

import triton
import triton.language as tl


@triton.jit
def d_segments(
    d_key, d_value, grad, log_sums, inners, row_total, programs, grad_b, grad_h, grad_n, query,
    row_key, row_value, row_index, row_bias, query_b, query_h, query_n, kv_heads, q_len, k_len,
    row_count, scale,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    kv_heads = tl.cast(kv_heads, tl.int32)
    q_len = tl.cast(q_len, tl.int32)
    k_len = tl.cast(k_len, tl.int32)
    row_count = tl.cast(row_count, tl.int32)
    # What is fixed in this source. A tile holds QUERIES queries times the GROUP heads of one KV head.
    DIM: tl.constexpr = 64
    VALUE_DIM: tl.constexpr = 64
    DIM_TILE: tl.constexpr = 64
    VALUE_TILE: tl.constexpr = 64
    GROUP: tl.constexpr = 1
    QUERIES: tl.constexpr = 32
    ROWS: tl.constexpr = 64
    KEYS: tl.constexpr = 16
    CHUNK: tl.constexpr = 32
    WINDOW: tl.constexpr = 8
    LOG2E: tl.constexpr = 1.4426950408889634
    program = tl.program_id(0)
    pair = (program // programs).to(tl.int64)  # of batch and KV head
    segment = program % programs // 1
    begin_row = 2 + segment * 7 + program % 1 * KEYS
    end_row = 2 + (segment + 1) * 7
    at = begin_row + tl.arange(0, KEYS)
    batch = pair // kv_heads
    kv_head = pair % kv_heads
    feature = tl.arange(0, DIM_TILE)
    value_feature = tl.arange(0, VALUE_TILE)
    inside = at < end_row
    row_at = pair * row_count + at
    index = tl.load(row_index + row_at, mask=inside, other=-1)
    row_logit = tl.load(row_bias + row_at, mask=inside, other=float("-inf"))
    seen = row_logit > float("-inf")
    key_tile = tl.load(row_key + row_at[None, :] * DIM + feature[:, None], mask=seen[None, :], other=0.0)
    value_tile = tl.load(row_value + row_at[:, None] * VALUE_DIM + value_feature[None, :], mask=seen[:, None], other=0.0)
    # The queries whose finished chunks split into segments of which this is one.
    end_chunk = segment + 1
    size = end_chunk & -end_chunk
    first = WINDOW + end_chunk * CHUNK - (k_len - q_len)
    stop = first + size * CHUNK
    d_key_tile = tl.zeros([KEYS, DIM_TILE], tl.float32)
    d_value_tile = tl.zeros([KEYS, VALUE_TILE], tl.float32)
    first = tl.maximum(first, 0)
    stop = tl.minimum(stop, q_len)
    for begin in range(first * GROUP, stop * GROUP, 64):
        member = begin + tl.arange(0, ROWS)
        query_at = member // GROUP
        of_group = member % GROUP
        live = query_at < stop
        head = kv_head * GROUP + of_group
        position = query_at + (k_len - q_len)
        query_tile = tl.load(
            query + batch * query_b + (head * query_h + query_at.to(tl.int64) * query_n)[:, None] + feature[None, :],
            mask=live[:, None],
            other=0.0,
        )
        grad_tile = tl.load(
            grad + batch * grad_b + (head * grad_h + query_at.to(tl.int64) * grad_n)[:, None] + value_feature[None, :],
            mask=live[:, None],
            other=0.0,
        )
        sum_at = (batch * kv_heads * GROUP + head) * q_len + query_at
        # A row that is no query has no weights.
        log_sum = tl.load(log_sums + sum_at, mask=live, other=float("inf")) * LOG2E
        inner = tl.load(inners + sum_at, mask=live, other=0.0)
        logits = tl.dot(query_tile, key_tile) * (scale * LOG2E)
        logits += (row_logit * LOG2E)[None, :]
        low = tl.maximum(position - WINDOW, 0) // CHUNK * CHUNK
        logits = tl.where(seen[None, :] & (index[None, :] < low[:, None]), logits, float("-inf"))
        weight = tl.exp2(logits - log_sum[:, None])
        d_weight = tl.dot(grad_tile, tl.trans(value_tile))
        d_logits = tl.where(weight == 0.0, 0.0, weight * (d_weight - inner[:, None]))
        d_value_tile = tl.dot(tl.trans(weight.to(grad_tile.dtype)), grad_tile, d_value_tile)
        d_key_tile = tl.dot(tl.trans(d_logits.to(query_tile.dtype)), query_tile, d_key_tile)
    d_key_tile *= scale
    to = pair * row_total + at - 2
    tl.store(d_key + to[:, None] * DIM + feature[None, :], d_key_tile, mask=inside[:, None])
    tl.store(d_value + to[:, None] * VALUE_DIM + value_feature[None, :], d_value_tile, mask=inside[:, None])
