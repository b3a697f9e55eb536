# d_residual: written by prescore_compile.kernels.triton; do not edit.
# stage: attend backward, gradients of the centroids of clusters
# plan: method=peak chunk=128 window=0 sinks=1 keep=0 threshold=0.0 centroids=0 cluster=32
#   clustering=pca_tree routes=12 spread=1.0 share=0.0 group_routes=False residual=True coarse=0
#   seed=0
# site: head_dim 64, value_dim 64, 2 query heads a KV head, bfloat16, cuda
# mask: bidirectional

import triton
import triton.language as tl


@triton.jit
def d_residual(
    d_key, d_value, grad, log_sums, inners, pairs, grad_b, grad_h, grad_n, query, routes, rest_key,
    rest_value, rest_bias, query_b, query_h, query_n, kv_heads, q_len, places, route_count, scale,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    kv_heads = tl.cast(kv_heads, tl.int32)
    q_len = tl.cast(q_len, tl.int32)
    places = tl.cast(places, tl.int32)
    route_count = tl.cast(route_count, tl.int32)
    # What is fixed in this source. A tile holds QUERIES queries times the GROUP heads of one KV head.
    DIM: tl.constexpr = 64
    VALUE_DIM: tl.constexpr = 64
    DIM_TILE: tl.constexpr = 64
    VALUE_TILE: tl.constexpr = 64
    GROUP: tl.constexpr = 2
    QUERIES: tl.constexpr = 32
    ROWS: tl.constexpr = 64
    KEYS: tl.constexpr = 32
    CHUNK: tl.constexpr = 128
    WINDOW: tl.constexpr = 0
    LOG2E: tl.constexpr = 1.4426950408889634
    clusters = places // 32
    blocks = tl.cdiv(clusters, KEYS)
    pair = (tl.program_id(0) // blocks).to(tl.int64)  # of batch and KV head
    split = tl.program_id(1)
    begin_cluster = tl.program_id(0) % blocks * KEYS
    at = begin_cluster + tl.arange(0, KEYS)
    batch = pair // kv_heads
    kv_head = pair % kv_heads
    feature = tl.arange(0, DIM_TILE)
    value_feature = tl.arange(0, VALUE_TILE)
    inside = at < clusters
    row_at = pair * clusters + at
    row_logit = tl.load(rest_bias + row_at, mask=inside, other=float("-inf"))
    seen = row_logit != float("-inf")
    key_tile = tl.load(rest_key + row_at[None, :] * DIM + feature[:, None], mask=seen[None, :], other=0.0)
    value_at = rest_value + row_at[:, None] * VALUE_DIM + value_feature[None, :]
    value_tile = tl.load(value_at, mask=seen[:, None], other=0.0)
    first = 0
    stop = q_len
    d_key_tile = tl.zeros([KEYS, DIM_TILE], tl.float32)
    d_value_tile = tl.zeros([KEYS, VALUE_TILE], tl.float32)
    first = tl.maximum(first, 0)
    stop = tl.minimum(stop, q_len)
    for begin in range(first * GROUP + split * ROWS, stop * GROUP, 512):
        member = begin + tl.arange(0, ROWS)
        query_at = member // GROUP
        of_group = member % GROUP
        live = query_at < stop
        head = kv_head * GROUP + of_group
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
        own_routes = routes + ((batch * kv_heads * GROUP + head) * q_len + query_at) * route_count
        which = tl.arange(0, 16)
        own_route = tl.load(
            own_routes[:, None] + which[None, :], mask=live[:, None] & (which < route_count)[None, :], other=-1
        )
        # A row's routes among these clusters are bits of words.
        near = own_route - begin_cluster
        bit = 1 << (near & 31)
        routed_0 = tl.sum(tl.where((near >> 5) == 0, bit, 0), 1)
        column = tl.arange(0, 32)
        routed = routed_0[:, None]
        unread = ((routed >> (column % 32)[None, :]) & 1) == 0
        logits = tl.where(seen[None, :] & unread, logits, float("-inf"))
        weight = tl.exp2(logits - log_sum[:, None])
        d_weight = tl.dot(grad_tile, tl.trans(value_tile))
        d_logits = tl.where(weight == 0.0, 0.0, weight * (d_weight - inner[:, None]))
        d_value_tile = tl.dot(tl.trans(weight.to(grad_tile.dtype)), grad_tile, d_value_tile)
        d_key_tile = tl.dot(tl.trans(d_logits.to(query_tile.dtype)), query_tile, d_key_tile)
    d_key_tile *= scale
    to = (split.to(tl.int64) * pairs + pair) * clusters + at
    tl.store(d_key + to[:, None] * DIM + feature[None, :], d_key_tile, mask=inside[:, None])
    tl.store(d_value + to[:, None] * VALUE_DIM + value_feature[None, :], d_value_tile, mask=inside[:, None])
