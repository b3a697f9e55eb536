# attend: written by prescore_compile.kernels.triton; do not edit.
# stage: attend
# plan: method=peak chunk=128 window=None sinks=0 keep=0 threshold=0.0 centroids=0 cluster=16
#   clustering=pca_tree routes=0 spread=1.0 share=0.0 group_routes=False residual=False coarse=0
#   seed=0
# site: head_dim 128, value_dim 128, 1 query heads a KV head, float16, cuda
# mask: bidirectional, valid keys, (tl.load(mask_document + tl.cast(q, tl.int64) *
#   mask_document_0) == tl.load(mask_document + tl.cast(k, tl.int64) * mask_document_0))

import triton
import triton.language as tl


@triton.jit
def attend(
    out, log_sums, out_b, out_h, out_n, query, key, value, valid, mask_document, query_b, query_h,
    query_n, key_b, key_h, key_n, value_b, value_h, value_n, valid_b, valid_n, mask_document_0,
    kv_heads, q_len, k_len, tiles, scale,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    kv_heads = tl.cast(kv_heads, tl.int32)
    q_len = tl.cast(q_len, tl.int32)
    k_len = tl.cast(k_len, tl.int32)
    tiles = tl.cast(tiles, tl.int32)
    # What is fixed in this source. A tile holds QUERIES queries times the GROUP heads of one KV head.
    DIM: tl.constexpr = 128
    VALUE_DIM: tl.constexpr = 128
    DIM_TILE: tl.constexpr = 128
    VALUE_TILE: tl.constexpr = 128
    GROUP: tl.constexpr = 1
    QUERIES: tl.constexpr = 64
    ROWS: tl.constexpr = 64
    KEYS: tl.constexpr = 64
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

    feature = tl.arange(0, DIM_TILE)
    value_feature = tl.arange(0, VALUE_TILE)
    key_head = key + batch * key_b + kv_head * key_h
    value_head = value + batch * value_b + kv_head * value_h
    b = batch
    h = head[:, None]
    q = tl.minimum(tl.maximum(query_at, 0), q_len - 1)[:, None]
    query_tile = tl.load(
        query + batch * query_b + (head * query_h + query_at.to(tl.int64) * query_n)[:, None] + feature[None, :],
        mask=live[:, None],
        other=0.0,
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, VALUE_TILE], tl.float32)

    start = 0
    whole = k_len // KEYS * KEYS
    stop = k_len
    # Window: the keys that all queries of the tile see.
    for begin in range(start, whole, 64):
        at = begin + tl.arange(0, KEYS)
        seen = tl.load(valid + batch * valid_b + at.to(tl.int64) * valid_n) != 0
        key_at = key_head + at.to(tl.int64)[None, :] * key_n + feature[:, None]
        value_at = value_head + at.to(tl.int64)[:, None] * value_n + value_feature[None, :]
        key_tile = tl.load(key_at, mask=seen[None, :], other=0.0)
        value_tile = tl.load(value_at, mask=seen[:, None], other=0.0)
        ratio = tl.dot(query_tile, key_tile) * (scale / 30.0)
        square = ratio * ratio
        near = -5.37397155531e-2 + square * (2.06390887954e-2 - square * 5.70498872745e-3)
        near = -3.33332819422e-1 + square * (1.33314422036e-1 + square * near)
        far = 1.0 - 2.0 / (tl.exp2(ratio * (2.0 * LOG2E)) + 1.0)
        capped = tl.where(square < 0.390625, ratio + ratio * square * near, far)
        logits = capped * (30.0 * LOG2E)
        k = tl.minimum(tl.maximum(at, 0), k_len - 1)[None, :]
        logits += tl.cast(-tl.abs(k - q)/8, tl.float32) * LOG2E
        wide_value = value_tile.to(tl.float32)
        finite = tl.abs(wide_value) < float("inf")
        logits = tl.where((tl.min(finite.to(tl.int32), 1) == 0)[None, :], float("nan"), logits)
        value_tile = tl.where(finite, wide_value, 0.0).to(value_tile.dtype)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        logits = tl.where((tl.load(mask_document + tl.cast(q, tl.int64) * mask_document_0) == tl.load(mask_document + tl.cast(k, tl.int64) * mask_document_0)), logits, float("-inf"))
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
        seen = seen & (tl.load(valid + batch * valid_b + at.to(tl.int64) * valid_n, mask=seen, other=0) != 0)
        key_at = key_head + at.to(tl.int64)[None, :] * key_n + feature[:, None]
        value_at = value_head + at.to(tl.int64)[:, None] * value_n + value_feature[None, :]
        key_tile = tl.load(key_at, mask=seen[None, :], other=0.0)
        value_tile = tl.load(value_at, mask=seen[:, None], other=0.0)
        ratio = tl.dot(query_tile, key_tile) * (scale / 30.0)
        square = ratio * ratio
        near = -5.37397155531e-2 + square * (2.06390887954e-2 - square * 5.70498872745e-3)
        near = -3.33332819422e-1 + square * (1.33314422036e-1 + square * near)
        far = 1.0 - 2.0 / (tl.exp2(ratio * (2.0 * LOG2E)) + 1.0)
        capped = tl.where(square < 0.390625, ratio + ratio * square * near, far)
        logits = capped * (30.0 * LOG2E)
        k = tl.minimum(tl.maximum(at, 0), k_len - 1)[None, :]
        logits += tl.cast(-tl.abs(k - q)/8, tl.float32) * LOG2E
        wide_value = value_tile.to(tl.float32)
        finite = tl.abs(wide_value) < float("inf")
        logits = tl.where((tl.min(finite.to(tl.int32), 1) == 0)[None, :], float("nan"), logits)
        value_tile = tl.where(finite, wide_value, 0.0).to(value_tile.dtype)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        logits = tl.where((tl.load(mask_document + tl.cast(q, tl.int64) * mask_document_0) == tl.load(mask_document + tl.cast(k, tl.int64) * mask_document_0)), logits, float("-inf"))
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
