# d_window: written by prescore_compile.kernels.triton; do not edit.
# stage: attend backward, gradients of the window's keys and values
# plan: method=peak chunk=128 window=None sinks=0 keep=0 threshold=0.0 centroids=0 cluster=16
#   clustering=pca_tree routes=0 spread=1.0 share=0.0 group_routes=False residual=False coarse=0
#   seed=0
# site: head_dim 64, value_dim 64, 1 query heads a KV head, bfloat16, cuda
# mask: bidirectional, (tl.abs(k - q) <= 64)

import triton
import triton.language as tl


@triton.jit
def d_window(
    d_key, d_value, grad, log_sums, inners, blocks, grad_b, grad_h, grad_n, query, key, value,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, kv_heads, q_len,
    k_len, scale,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    blocks = tl.cast(blocks, tl.int32)
    kv_heads = tl.cast(kv_heads, tl.int32)
    q_len = tl.cast(q_len, tl.int32)
    k_len = tl.cast(k_len, tl.int32)
    # What is fixed in this source. A tile holds QUERIES queries times the GROUP heads of one KV head.
    DIM: tl.constexpr = 64
    VALUE_DIM: tl.constexpr = 64
    DIM_TILE: tl.constexpr = 64
    VALUE_TILE: tl.constexpr = 64
    GROUP: tl.constexpr = 1
    QUERIES: tl.constexpr = 64
    ROWS: tl.constexpr = 64
    KEYS: tl.constexpr = 32
    LOG2E: tl.constexpr = 1.4426950408889634
    pair = (tl.program_id(0) // blocks).to(tl.int64)  # of batch and KV head
    at = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    seen = at < k_len
    batch = pair // kv_heads
    kv_head = pair % kv_heads
    feature = tl.arange(0, DIM_TILE)
    value_feature = tl.arange(0, VALUE_TILE)
    inside = at < k_len
    seen = inside
    key_head = key + batch * key_b + kv_head * key_h
    value_head = value + batch * value_b + kv_head * value_h
    key_tile = tl.load(key_head + at.to(tl.int64)[None, :] * key_n + feature[:, None], mask=seen[None, :], other=0.0)
    value_tile = tl.load(
        value_head + at.to(tl.int64)[:, None] * value_n + value_feature[None, :], mask=seen[:, None], other=0.0
    )
    # The queries that have any of these keys in their window.
    begin_key = tl.program_id(0) % blocks * KEYS
    end_key = tl.minimum(begin_key + KEYS, k_len)
    stop = q_len
    first = 0
    first = tl.maximum(first, begin_key - 64)
    last_key = end_key - 1
    stop = tl.minimum(stop, last_key + 64 + 1)
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
        b = batch
        h = head[:, None]
        q = query_at[:, None]
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
        k = at[None, :]
        logits = tl.where(seen[None, :], logits, float("-inf"))
        logits = tl.where((tl.abs(k - q) <= 64), logits, float("-inf"))
        weight = tl.exp2(logits - log_sum[:, None])
        d_weight = tl.dot(grad_tile, tl.trans(value_tile))
        d_logits = tl.where(weight == 0.0, 0.0, weight * (d_weight - inner[:, None]))
        d_value_tile = tl.dot(tl.trans(weight.to(grad_tile.dtype)), grad_tile, d_value_tile)
        d_key_tile = tl.dot(tl.trans(d_logits.to(query_tile.dtype)), query_tile, d_key_tile)
    d_key_tile *= scale
    key_to = d_key + (pair * k_len + at)[:, None] * DIM + feature[None, :]
    value_to = d_value + (pair * k_len + at)[:, None] * VALUE_DIM + value_feature[None, :]
    tl.store(key_to, d_key_tile, mask=inside[:, None])
    tl.store(value_to, d_value_tile, mask=inside[:, None])
