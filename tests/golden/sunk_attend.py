# attend: written by prescore_compile.kernels.triton; do not edit.
# stage: attend
# plan: method=peak chunk=128 window=None sinks=0 keep=0 threshold=0.0 centroids=0 cluster=16
#   clustering=pca_tree routes=0 spread=1.0 share=0.0 group_routes=False residual=False coarse=0
#   seed=0
# site: head_dim 64, value_dim 64, 8 query heads a KV head, bfloat16, cuda
# mask: causal, (k > q - 128), a learned sink

import triton
import triton.language as tl


@triton.jit
def attend(
    out, log_sums, out_b, out_h, out_n, sink_logit, sink_logit_b, sink_logit_h, sink_logit_n, query,
    key, value, query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, kv_heads,
    q_len, k_len, tiles, scale,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    kv_heads = tl.cast(kv_heads, tl.int32)
    q_len = tl.cast(q_len, tl.int32)
    k_len = tl.cast(k_len, tl.int32)
    tiles = tl.cast(tiles, tl.int32)
    # What is fixed in this source. A tile holds QUERIES queries times the GROUP heads of one KV head.
    DIM: tl.constexpr = 64
    VALUE_DIM: tl.constexpr = 64
    DIM_TILE: tl.constexpr = 64
    VALUE_TILE: tl.constexpr = 64
    GROUP: tl.constexpr = 8
    QUERIES: tl.constexpr = 16
    ROWS: tl.constexpr = 128
    KEYS: tl.constexpr = 64
    LOG2E: tl.constexpr = 1.4426950408889634

    program = tl.program_id(0)
    pair = (program // tiles).to(tl.int64)  # of batch and KV head
    batch = pair // kv_heads
    kv_head = pair % kv_heads
    tile = tiles - 1 - program % tiles

    member = tl.arange(0, ROWS)
    first_query = tile * QUERIES
    first_position = first_query + k_len - q_len
    wanted = QUERIES
    query_at = first_query + member // GROUP
    head = kv_head * GROUP + member % GROUP
    live = (member < wanted * GROUP) & (query_at >= 0) & (query_at < q_len)
    position = query_at + (k_len - q_len)

    feature = tl.arange(0, DIM_TILE)
    value_feature = tl.arange(0, VALUE_TILE)
    key_head = key + batch * key_b + kv_head * key_h
    value_head = value + batch * value_b + kv_head * value_h
    b = batch
    h = head[:, None]
    q = query_at[:, None]
    query_tile = tl.load(
        query + batch * query_b + (head * query_h + query_at.to(tl.int64) * query_n)[:, None] + feature[None, :],
        mask=live[:, None],
        other=0.0,
    )
    # A learned sink: a logit that belongs to no key.
    sink_at = sink_logit + batch * sink_logit_b + head * sink_logit_h
    sink_at += query_at.to(tl.int64) * sink_logit_n
    own = tl.load(sink_at, mask=live, other=float("-inf")).to(tl.float32)
    total = tl.where(tl.abs(own) < float("inf"), 1.0, float("nan"))
    total = tl.where(own == float("-inf"), 0.0, total)
    # The largest numbers are not in range as powers of two.
    top = tl.minimum(tl.maximum(own, -2.3e38), 2.3e38) * LOG2E
    summed = tl.zeros([ROWS, VALUE_TILE], tl.float32)

    # The band: what queries attend lies from start to stop, and all of them attend what lies from inside to whole.
    last_query = tl.minimum(first_query + wanted, q_len) - 1
    stop = k_len
    whole = k_len
    stop = tl.minimum(stop, first_position + wanted)
    whole = tl.minimum(whole, first_position + 1)
    start = tl.maximum(first_query - 127, 0) // KEYS * KEYS
    inside = tl.maximum(tl.cdiv(tl.maximum(last_query - 127, 0), KEYS) * KEYS, start)
    whole = tl.maximum(whole // KEYS * KEYS, inside)
    for begin in range(inside, whole, 64):
        at = begin + tl.arange(0, KEYS)
        key_at = key_head + at.to(tl.int64)[None, :] * key_n + feature[:, None]
        value_at = value_head + at.to(tl.int64)[:, None] * value_n + value_feature[None, :]
        key_tile = tl.load(key_at)
        value_tile = tl.load(value_at)
        logits = tl.dot(query_tile, key_tile) * (scale * LOG2E)
        k = at[None, :]
        highest = tl.maximum(top, tl.max(logits, 1))
        # While a query has met no key, any finite number will do.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        summed = tl.dot(weight.to(value_tile.dtype), value_tile, summed * shrink[:, None])
        top = highest
    before = (inside - start) // KEYS
    for number in range(0, before + tl.cdiv(tl.maximum(stop - whole, 0), KEYS), 1):
        begin = start + number * KEYS
        begin += tl.where(number < before, 0, whole - inside)
        at = begin + tl.arange(0, KEYS)
        seen = at < stop
        key_at = key_head + at.to(tl.int64)[None, :] * key_n + feature[:, None]
        value_at = value_head + at.to(tl.int64)[:, None] * value_n + value_feature[None, :]
        key_tile = tl.load(key_at, mask=seen[None, :], other=0.0)
        value_tile = tl.load(value_at, mask=seen[:, None], other=0.0)
        logits = tl.dot(query_tile, key_tile) * (scale * LOG2E)
        k = at[None, :]
        wide_value = value_tile.to(tl.float32)
        finite = tl.abs(wide_value) < float("inf")
        logits = tl.where((tl.min(finite.to(tl.int32), 1) == 0)[None, :], float("nan"), logits)
        value_tile = tl.where(finite, wide_value, 0.0).to(value_tile.dtype)
        logits = tl.where(at[None, :] <= position[:, None], logits, float("-inf"))
        logits = tl.where((k > q - 128), logits, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        # While a query has met no key, any finite number will do.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        summed = tl.dot(weight.to(value_tile.dtype), value_tile, summed * shrink[:, None])
        top = highest

    # A query without any key gives 0.
    none = total == 0.0
    summed = summed / tl.where(none, 1.0, total)[:, None]
    log_sum = (tl.where(top == float("-inf"), 0.0, top) + tl.log2(tl.where(none, 1.0, total))) / LOG2E
    log_sum = tl.where(none, float("inf"), log_sum)
    out_at = out + batch * out_b
    out_at = out_at + (head * out_h + query_at.to(tl.int64) * out_n)[:, None]
    tl.store(out_at + value_feature[None, :], summed.to(out.dtype.element_ty), mask=live[:, None])
    sum_at = log_sums + (batch * kv_heads * GROUP + head) * q_len + query_at
    tl.store(sum_at, log_sum, mask=live)
