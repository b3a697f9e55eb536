# attend: written by prescore_compile.kernels.triton; do not edit.
# stage: attend
# plan: method=peak chunk=256 window=0 sinks=16 keep=0 threshold=0.0 centroids=0 cluster=16
#   clustering=pca_tree routes=64 spread=1.0 share=0.0012 group_routes=False residual=False coarse=0
#   seed=0
# site: head_dim 64, value_dim 64, 1 query heads a KV head, bfloat16, cuda
# mask: causal

import triton
import triton.language as tl


@triton.jit
def attend(
    out, log_sums, out_b, out_h, out_n, query, key, value, row_key, row_value, row_index, order,
    listed, listed_rows, listed_count, query_b, query_h, query_n, key_b, key_h, key_n, value_b,
    value_h, value_n, kv_heads, q_len, k_len, first_block, row_count, places, list_size, tiles,
    scale,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    kv_heads = tl.cast(kv_heads, tl.int32)
    q_len = tl.cast(q_len, tl.int32)
    k_len = tl.cast(k_len, tl.int32)
    first_block = tl.cast(first_block, tl.int32)
    row_count = tl.cast(row_count, tl.int32)
    places = tl.cast(places, tl.int32)
    list_size = tl.cast(list_size, tl.int32)
    tiles = tl.cast(tiles, tl.int32)
    # What is fixed in this source. A tile holds QUERIES queries times the GROUP heads of one KV head.
    DIM: tl.constexpr = 64
    VALUE_DIM: tl.constexpr = 64
    DIM_TILE: tl.constexpr = 64
    VALUE_TILE: tl.constexpr = 64
    GROUP: tl.constexpr = 1
    QUERIES: tl.constexpr = 64
    ROWS: tl.constexpr = 64
    KEYS: tl.constexpr = 64
    CHUNK: tl.constexpr = 256
    WINDOW: tl.constexpr = 0
    LOG2E: tl.constexpr = 1.4426950408889634

    program = tl.program_id(0)
    pair = (program // tiles).to(tl.int64)  # of batch and KV head
    batch = pair // kv_heads
    kv_head = pair % kv_heads
    tile = tiles - 1 - program % tiles

    member = tl.arange(0, ROWS)
    # Between two borders at which the window moves, all queries see the same finished chunks.
    block = first_block + tile // 4
    part = tile % 4
    first_position = WINDOW + block * CHUNK + part * QUERIES
    first_query = first_position - (k_len - q_len)
    wanted = tl.minimum(QUERIES, CHUNK - part * QUERIES)
    query_at = first_query + member // GROUP
    head = kv_head * GROUP + member % GROUP
    live = (member < wanted * GROUP) & (query_at >= 0) & (query_at < q_len)
    # The window's first key, and how many chunks are finished before it.
    finished = tl.maximum(block, 0)
    low = finished * CHUNK
    position = query_at + (k_len - q_len)

    feature = tl.arange(0, DIM_TILE)
    value_feature = tl.arange(0, VALUE_TILE)
    key_head = key + batch * key_b + kv_head * key_h
    value_head = value + batch * value_b + kv_head * value_h
    query_tile = tl.load(
        query + batch * query_b + (head * query_h + query_at.to(tl.int64) * query_n)[:, None] + feature[None, :],
        mask=live[:, None],
        other=0.0,
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, VALUE_TILE], tl.float32)

    start = low
    stop = tl.minimum(first_position + wanted, k_len)
    # A tile past the sequence's end begins after its last key.
    whole = start + tl.maximum(tl.minimum(first_position + 1, stop) - start, 0) // KEYS * KEYS
    # Window: the keys that all queries of the tile see.
    for begin in range(start, whole, 64):
        at = begin + tl.arange(0, KEYS)
        key_at = key_head + at.to(tl.int64)[None, :] * key_n + feature[:, None]
        value_at = value_head + at.to(tl.int64)[:, None] * value_n + value_feature[None, :]
        key_tile = tl.load(key_at)
        value_tile = tl.load(value_at)
        logits = tl.dot(query_tile, key_tile) * (scale * LOG2E)
        highest = tl.maximum(top, tl.max(logits, 1))
        # While a query has met no key, any finite number will do.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        summed = tl.dot(weight.to(value_tile.dtype), value_tile, summed * shrink[:, None])
        top = highest
    # Window: the keys that each query sees for itself.
    for begin in range(whole, stop, 64):
        at = begin + tl.arange(0, KEYS)
        seen = at < stop
        key_at = key_head + at.to(tl.int64)[None, :] * key_n + feature[:, None]
        value_at = value_head + at.to(tl.int64)[:, None] * value_n + value_feature[None, :]
        key_tile = tl.load(key_at, mask=seen[None, :], other=0.0)
        value_tile = tl.load(value_at, mask=seen[:, None], other=0.0)
        logits = tl.dot(query_tile, key_tile) * (scale * LOG2E)
        wide_value = value_tile.to(tl.float32)
        finite = tl.abs(wide_value) < float("inf")
        logits = tl.where((tl.min(finite.to(tl.int32), 1) == 0)[None, :], float("nan"), logits)
        value_tile = tl.where(finite, wide_value, 0.0).to(value_tile.dtype)
        logits = tl.where(at[None, :] <= position[:, None], logits, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        # While a query has met no key, any finite number will do.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        summed = tl.dot(weight.to(value_tile.dtype), value_tile, summed * shrink[:, None])
        top = highest

    # Rows: the first keys of the sequence, where a chunk is finished.
    sinks_read = tl.where(finished > 0, 16, 0)
    for begin in range(0, sinks_read, 16):
        at = begin + tl.arange(0, 16)
        seen = at < sinks_read
        row_at = at.to(tl.int64) + pair * row_count
        index = tl.load(row_index + row_at, mask=seen, other=-1)
        seen = index >= 0
        seen = seen & (index < low)
        key_at = row_key + row_at[None, :] * DIM + feature[:, None]
        value_at = row_value + row_at[:, None] * VALUE_DIM + value_feature[None, :]
        key_tile = tl.load(key_at, mask=seen[None, :], other=0.0)
        value_tile = tl.load(value_at, mask=seen[:, None], other=0.0)
        logits = tl.dot(query_tile, key_tile) * (scale * LOG2E)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        # While a query has met no key, any finite number will do.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        summed = tl.dot(weight.to(value_tile.dtype), value_tile, summed * shrink[:, None])
        top = highest

    # Routes: the clusters that any query of the tile attends; each query attends its own.
    list_at = (pair * tiles + tile) * list_size
    count = tl.load(listed_count + pair * tiles + tile)
    for begin in range(0, count, 4):
        slot = begin + tl.arange(0, KEYS) // 16
        there = slot < count
        cluster = tl.load(listed + list_at + slot, mask=there, other=0)
        place = tl.arange(0, KEYS) % 16
        at = tl.load(order + pair * places + cluster * 16 + place, mask=there, other=-1)
        seen = at >= 0
        word_0 = tl.load(listed_rows + (list_at + slot) * 2 + 0, mask=there, other=0)
        word_1 = tl.load(listed_rows + (list_at + slot) * 2 + 1, mask=there, other=0)
        key_at = key_head + at.to(tl.int64)[None, :] * key_n + feature[:, None]
        value_at = value_head + at.to(tl.int64)[:, None] * value_n + value_feature[None, :]
        key_tile = tl.load(key_at, mask=seen[None, :], other=0.0)
        value_tile = tl.load(value_at, mask=seen[:, None], other=0.0)
        logits = tl.dot(query_tile, key_tile) * (scale * LOG2E)
        # Each row has one bit in a word of its cluster.
        word = tl.where((member < 32)[:, None], word_0[None, :], word_1[None, :])
        chosen = ((word >> (member % 32)[:, None]) & 1) != 0
        logits = tl.where(chosen & seen[None, :], logits, float("-inf"))
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
