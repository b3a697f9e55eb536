# attend: written by prescore_compile.kernels.triton; do not edit.
# stage: attend
# plan: method=peak chunk=128 window=0 sinks=1 keep=0 threshold=0.0 centroids=0 cluster=32
#   clustering=pca_tree routes=12 spread=1.0 share=0.0 group_routes=False residual=True coarse=0
#   seed=0
# site: head_dim 64, value_dim 64, 2 query heads a KV head, bfloat16, cuda
# mask: bidirectional

import triton
import triton.language as tl


@triton.jit
def attend(
    out, log_sums, out_b, out_h, out_n, query, key, value, row_key, row_value, row_index, order,
    listed, listed_rows, listed_count, routes, rest_key, rest_value, rest_bias, query_b, query_h,
    query_n, key_b, key_h, key_n, value_b, value_h, value_n, kv_heads, q_len, k_len, row_count,
    places, list_size, route_count, tiles, scale,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    kv_heads = tl.cast(kv_heads, tl.int32)
    q_len = tl.cast(q_len, tl.int32)
    k_len = tl.cast(k_len, tl.int32)
    row_count = tl.cast(row_count, tl.int32)
    places = tl.cast(places, tl.int32)
    list_size = tl.cast(list_size, tl.int32)
    route_count = tl.cast(route_count, tl.int32)
    tiles = tl.cast(tiles, tl.int32)
    # What is fixed in this source. A tile holds QUERIES queries times the GROUP heads of one KV head.
    DIM: tl.constexpr = 64
    VALUE_DIM: tl.constexpr = 64
    DIM_TILE: tl.constexpr = 64
    VALUE_TILE: tl.constexpr = 64
    GROUP: tl.constexpr = 2
    QUERIES: tl.constexpr = 32
    ROWS: tl.constexpr = 64
    KEYS: tl.constexpr = 64
    CHUNK: tl.constexpr = 128
    WINDOW: tl.constexpr = 0
    LOG2E: tl.constexpr = 1.4426950408889634

    program = tl.program_id(0)
    pair = (program // tiles).to(tl.int64)  # of batch and KV head
    batch = pair // kv_heads
    kv_head = pair % kv_heads
    tile = program % tiles

    member = tl.arange(0, ROWS)
    first_query = tile * QUERIES
    wanted = QUERIES
    query_at = first_query + member // GROUP
    head = kv_head * GROUP + member % GROUP
    live = (member < wanted * GROUP) & (query_at >= 0) & (query_at < q_len)
    finished = tl.cdiv(k_len, CHUNK)

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

    # Rows: the first keys of the sequence, where a chunk is finished.
    sinks_read = tl.where(finished > 0, 1, 0)
    for begin in range(0, sinks_read, 16):
        at = begin + tl.arange(0, 16)
        seen = at < sinks_read
        row_at = at.to(tl.int64) + pair * row_count
        index = tl.load(row_index + row_at, mask=seen, other=-1)
        seen = index >= 0
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
    for begin in range(0, count, 2):
        slot = begin + tl.arange(0, KEYS) // 32
        there = slot < count
        cluster = tl.load(listed + list_at + slot, mask=there, other=0)
        place = tl.arange(0, KEYS) % 32
        at = tl.load(order + pair * places + cluster * 32 + place, mask=there, other=-1)
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

    # Residual: the centroids of the clusters that a query may see and does not route to.
    clusters = places // 32
    centroids_read = clusters
    own_routes = routes + ((batch * kv_heads * GROUP + head) * q_len + query_at) * route_count
    which = tl.arange(0, 16)
    own_route = tl.load(
        own_routes[:, None] + which[None, :], mask=live[:, None] & (which < route_count)[None, :], other=-1
    )
    for begin in range(0, centroids_read, 64):
        at = begin + tl.arange(0, 64)
        seen = at < centroids_read
        row_at = at.to(tl.int64) + pair * clusters
        row_logit = tl.load(rest_bias + row_at, mask=seen, other=float("-inf"))
        seen = row_logit != float("-inf")
        # A row's routes among these clusters are bits of words.
        near = own_route - begin
        bit = 1 << (near & 31)
        routed_0 = tl.sum(tl.where((near >> 5) == 0, bit, 0), 1)
        routed_1 = tl.sum(tl.where((near >> 5) == 1, bit, 0), 1)
        key_at = rest_key + row_at[None, :] * DIM + feature[:, None]
        value_at = rest_value + row_at[:, None] * VALUE_DIM + value_feature[None, :]
        key_tile = tl.load(key_at, mask=seen[None, :], other=0.0)
        value_tile = tl.load(value_at, mask=seen[:, None], other=0.0)
        logits = tl.dot(query_tile, key_tile) * (scale * LOG2E)
        logits += (row_logit * LOG2E)[None, :]
        column = tl.arange(0, 64)
        routed = tl.where((column < 32)[None, :], routed_0[:, None], routed_1[:, None])
        unread = ((routed >> (column % 32)[None, :]) & 1) == 0
        logits = tl.where(seen[None, :] & unread, logits, float("-inf"))
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
