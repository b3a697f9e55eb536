# route: written by prescore_compile.kernels.triton; do not edit.
# plan: method=peak chunk=256 window=0 sinks=16 keep=0 threshold=0.0 centroids=0 cluster=16
#   clustering=pca_tree routes=64 spread=1.0 share=0.0012 group_routes=False residual=False coarse=0
#   seed=0
# stage: route, all of a level

import triton
import triton.language as tl


@triton.jit
def exchange(values, axis: tl.constexpr, turn: tl.constexpr, up: tl.constexpr):
    # The larger first; the smaller first where `up`, or at the second places along `turn`.
    axes: tl.constexpr = len(values.shape)
    second = tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (axes - 1 - axis))
    if turn > 0:
        second = second ^ tl.reshape(tl.arange(0, 2), [1] * turn + [2] + [1] * (axes - 1 - turn))
    other = tl.xor_sum(values, axis, keep_dims=True) ^ values
    return tl.where(second == up, tl.maximum(values, other), tl.minimum(values, other))

@triton.jit
def turned(values, axis: tl.constexpr):
    # In reversed order at the second places along an axis: the bits of an integer, inverted.
    axes: tl.constexpr = len(values.shape)
    second = tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (axes - 1 - axis))
    return values ^ -second

@triton.jit
def route(
    query, mean, spread, bias, mass, routes, query_b, query_h, query_n, kv_heads, q_len, k_len,
    first_block, clusters, route_count, tiles, scale,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    kv_heads = tl.cast(kv_heads, tl.int32)
    q_len = tl.cast(q_len, tl.int32)
    k_len = tl.cast(k_len, tl.int32)
    first_block = tl.cast(first_block, tl.int32)
    clusters = tl.cast(clusters, tl.int32)
    route_count = tl.cast(route_count, tl.int32)
    tiles = tl.cast(tiles, tl.int32)
    DIM: tl.constexpr = 64
    DIM_TILE: tl.constexpr = 64
    GROUP: tl.constexpr = 1
    QUERIES: tl.constexpr = 64
    ROWS: tl.constexpr = 64
    COLUMNS: tl.constexpr = 64
    CHUNK: tl.constexpr = 256
    WINDOW: tl.constexpr = 0
    PER_CHUNK: tl.constexpr = 16
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
    feature = tl.arange(0, DIM_TILE)
    first = query + batch * query_b + (head * query_h + query_at.to(tl.int64) * query_n)[:, None]
    query_tile = tl.load(
        first + feature[None, :],
        mask=live[:, None] & (feature < DIM)[None, :],
        other=0.0,
    )
    square_tile = (query_tile.to(tl.float32) * query_tile.to(tl.float32)).to(tl.bfloat16)
    own_mean = mean + pair * clusters * DIM
    own_spread = spread + pair * clusters * DIM
    own_bias = bias + pair * clusters
    row = (batch * kv_heads * GROUP + head) * q_len + query_at
    near = tl.load(mass + row, mask=live, other=float("-inf"))
    stop = tl.maximum(block, 0) * PER_CHUNK

    # The exponentials of the scores, and of what the query attends anyway: their sum, over that of the largest.
    most = near
    total = tl.where(near > float("-inf"), 1.0, 0.0)
    # The best of each row so far, the largest first: words of a score, as an integer of the same order, above a cluster's
    # number in the walk, of which the first is the largest.
    below = stop - 1
    for by in tl.static_range(5):
        below |= below >> (1 << by)
    best = tl.full([ROWS] + [2] * 6, -2147483648, tl.int32)
    for begin in range(0, stop, COLUMNS):
        number = begin + tl.arange(0, COLUMNS)
        there = number < stop
        at = number
        where = at.to(tl.int64)[:, None] * DIM + feature[None, :]
        inside = there[:, None] & (feature < DIM)[None, :]
        mean_tile = tl.load(own_mean + where, mask=inside, other=0.0).to(tl.bfloat16)
        spread_tile = tl.load(own_spread + where, mask=inside, other=0.0).to(tl.bfloat16)
        own = tl.load(own_bias + at, mask=there, other=float("-inf"))
        score = tl.sqrt(tl.dot(square_tile, tl.trans(spread_tile)))
        score = tl.dot(query_tile, tl.trans(mean_tile), score) * scale
        score += own[None, :]
        score = tl.where(score != score, float("inf"), score)
        eligible = (own > float("-inf")) | (own != own)
        score = tl.where(eligible[None, :], score, float("-inf"))
        larger = tl.maximum(most, tl.max(score, 1))
        level = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(most - level) + tl.sum(tl.exp(score - level[:, None]), 1)
        most = larger
        bits = score.to(tl.int32, bitcast=True)
        bits = (bits & 2147483647) ^ (bits >> 31)
        word = (bits & ~below) | (~number & below)[None, :]
        rise = tl.reshape(word, [ROWS] + [2] * 6)
        rise = exchange(rise, 6, 3, 0)
        rise = exchange(rise, 3, 2, 0)
        rise = exchange(rise, 6, 2, 0)
        rise = exchange(rise, 2, 1, 0)
        rise = exchange(rise, 3, 1, 0)
        rise = exchange(rise, 6, 1, 0)
        rise = turned(rise, 5)
        rise = exchange(rise, 1, 0, 0)
        rise = exchange(rise, 2, 0, 0)
        rise = exchange(rise, 3, 0, 0)
        rise = exchange(rise, 6, 0, 0)
        rise = turned(rise, 5)
        rise = turned(rise, 4)
        rise = exchange(rise, 5, 0, 0)
        rise = exchange(rise, 1, 0, 0)
        rise = exchange(rise, 2, 0, 0)
        rise = exchange(rise, 3, 0, 0)
        rise = exchange(rise, 6, 0, 0)
        rise = turned(rise, 4)
        rise = exchange(rise, 4, 0, 1)
        rise = exchange(rise, 5, 0, 1)
        rise = exchange(rise, 1, 0, 1)
        rise = exchange(rise, 2, 0, 1)
        rise = exchange(rise, 3, 0, 1)
        rise = exchange(rise, 6, 0, 1)
        best = tl.maximum(best, rise)
        best = exchange(best, 4, 0, 0)
        best = exchange(best, 5, 0, 0)
        best = exchange(best, 1, 0, 0)
        best = exchange(best, 2, 0, 0)
        best = exchange(best, 3, 0, 0)
        best = exchange(best, 6, 0, 0)
    best = tl.reshape(best, [ROWS, COLUMNS])
    place = tl.arange(0, COLUMNS)
    rank = ((((place) >> 0) & 1) << 0 | (((place) >> 3) & 1) << 1 | (((place) >> 4) & 1) << 2 | (((place) >> 5) & 1) << 3 | (((place) >> 1) & 1) << 4 | (((place) >> 2) & 1) << 5)[None, :]
    number = ~best & below
    taken = (rank < route_count) & (best > (below | -2139095041))  # that of -inf
    # The least score of a cluster that is expected to have 0.0012 of the softmax; NaN hides nothing.
    none = (near != near) | (total == 0.0)
    bar = tl.where(most == float("inf"), most, most + tl.log(tl.where(none, 1.0, total)) + -6.725433722188183)
    bar = tl.where(none, float("-inf"), bar)
    bits = bar.to(tl.int32, bitcast=True)
    bits = (bits & 2147483647) ^ (bits >> 31)
    taken &= best >= (bits & ~below)[:, None]
    # Ascending; what is not taken comes last.
    rise = tl.reshape(tl.where(taken, number, 2147483647), [ROWS] + [2] * 6)
    rise = exchange(rise, 6, 3, 0)
    rise = exchange(rise, 3, 2, 0)
    rise = exchange(rise, 6, 2, 0)
    rise = exchange(rise, 2, 1, 0)
    rise = exchange(rise, 3, 1, 0)
    rise = exchange(rise, 6, 1, 0)
    rise = turned(rise, 5)
    rise = exchange(rise, 1, 0, 0)
    rise = exchange(rise, 2, 0, 0)
    rise = exchange(rise, 3, 0, 0)
    rise = exchange(rise, 6, 0, 0)
    rise = turned(rise, 5)
    rise = turned(rise, 4)
    rise = exchange(rise, 5, 0, 0)
    rise = exchange(rise, 1, 0, 0)
    rise = exchange(rise, 2, 0, 0)
    rise = exchange(rise, 3, 0, 0)
    rise = exchange(rise, 6, 0, 0)
    rise = turned(rise, 4)
    rise = exchange(rise, 4, 0, 1)
    rise = exchange(rise, 5, 0, 1)
    rise = exchange(rise, 1, 0, 1)
    rise = exchange(rise, 2, 0, 1)
    rise = exchange(rise, 3, 0, 1)
    rise = exchange(rise, 6, 0, 1)
    cluster = tl.reshape(rise, [ROWS, COLUMNS])
    cluster = tl.where(cluster == 2147483647, -1, cluster)
    own_routes = routes + row * route_count
    tl.store(own_routes[:, None] + rank, cluster, mask=(rank < route_count) & live[:, None])
