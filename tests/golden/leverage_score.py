# score: written by prescore_compile.kernels.triton; do not edit.
# plan: method=leverage chunk=128 window=128 sinks=16 keep=16 threshold=0.0 centroids=0 cluster=16
#   clustering=pca_tree routes=0 spread=1.0 share=0.0 group_routes=False residual=False coarse=0
#   seed=0
# stage: score, leverage of a chunk's keys

import triton
import triton.language as tl


@triton.jit
def added(total, left, right):
    # Three TF32 passes into one sum, the small factors' first; a loop, so that one copy of a factor is alive.
    for small in range(0, 3):
        first = ((left.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        second = ((right.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        first = tl.where(small == 0, left - first, first)
        second = tl.where(small == 1, right - second, second)
        total = tl.dot(first, second, total, input_precision="tf32")
    return total


@triton.jit
def score(
    key, scores, whites, lefts, part, key_b, key_h, key_n, kv_heads, k_len, chunks,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    kv_heads = tl.cast(kv_heads, tl.int32)
    k_len = tl.cast(k_len, tl.int32)
    chunks = tl.cast(chunks, tl.int32)
    DIM: tl.constexpr = 128
    DIM_TILE: tl.constexpr = 128
    PARTS: tl.constexpr = 2
    PART: tl.constexpr = 64
    CHUNK: tl.constexpr = 128
    STEP: tl.constexpr = 16
    BLOCK: tl.constexpr = 16
    BLOCKS: tl.constexpr = 4
    program = tl.program_id(0)
    pair = (program // chunks).to(tl.int64)  # of batch and KV head
    chunk = program % chunks
    key_head = key + pair // kv_heads * key_b + pair % kv_heads * key_h
    whites += (pair * chunks + chunk) * CHUNK * DIM_TILE
    lefts += (pair * chunks + chunk) * (DIM_TILE - PART) * PART
    feature = tl.arange(0, DIM_TILE)
    own = tl.arange(0, PART)
    block = tl.arange(0, BLOCKS)
    row = tl.arange(0, BLOCK)
    identity = (row[:, None] == row[None, :]).to(tl.float32)

    # The mean key.
    total = tl.zeros([DIM_TILE], tl.float32)
    count = 0.0
    for begin in range(0, CHUNK, STEP):
        at = chunk * CHUNK + begin + tl.arange(0, STEP)
        points = tl.load(
            key_head + at.to(tl.int64)[:, None] * key_n + feature[None, :],
            mask=(at < k_len)[:, None] & (feature < DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
        finite = tl.sum(points * 0.0, 1) == 0.0  # 0 * x is NaN for what is not finite
        here = (at < k_len) & finite
        points = tl.where(here[:, None], points, 0.0)
        total += tl.sum(points, 0)
        count += tl.sum(here.to(tl.float32), 0)
    mean = total / tl.maximum(count, 1.0)
    squares = tl.zeros([DIM_TILE], tl.float32)
    for begin in range(0, CHUNK, STEP):
        at = chunk * CHUNK + begin + tl.arange(0, STEP)
        points = tl.load(
            key_head + at.to(tl.int64)[:, None] * key_n + feature[None, :],
            mask=(at < k_len)[:, None] & (feature < DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
        finite = tl.sum(points * 0.0, 1) == 0.0  # 0 * x is NaN for what is not finite
        here = (at < k_len) & finite
        points = tl.where(here[:, None], points - mean[None, :], 0.0)
        squares += tl.sum(points * points, 0)
    trace = tl.sum(squares, 0)
    # The mean of this part's features.
    own_feature = part * PART + own
    own_mean = tl.gather(mean, own_feature, 0)

    # The factor's rows of this part, transposed, in the columns of each part before it.
    for earlier in range(0, part):
        left = tl.zeros([PART, PART], tl.float32)
        for begin in range(0, CHUNK, STEP):
            at = chunk * CHUNK + begin + tl.arange(0, STEP)
            points = tl.load(
                key_head + at.to(tl.int64)[:, None] * key_n + feature[None, :],
                mask=(at < k_len)[:, None] & (feature < DIM)[None, :],
                other=0.0,
            ).to(tl.float32)
            finite = tl.sum(points * 0.0, 1) == 0.0  # 0 * x is NaN for what is not finite
            here = (at < k_len) & finite
            points = tl.load(
                key_head + at.to(tl.int64)[:, None] * key_n + own_feature[None, :],
                mask=here[:, None] & (own_feature < DIM)[None, :],
                other=0.0,
            ).to(tl.float32)
            points = tl.where(here[:, None], points - own_mean[None, :], 0.0)
            white = tl.load(whites + (begin + tl.arange(0, STEP))[:, None] * DIM_TILE + own[None, :] + earlier * PART)
            left = tl.dot(tl.trans(white), points, left, input_precision="tf32x3")
        tl.store(lefts + own[:, None] * PART + own[None, :] + earlier * PART * PART, left)
    tl.debug_barrier()  # other lanes read it

    # The Gram matrix of the keys less their mean, less what parts before this one explain.
    gram = tl.zeros([PART, PART], tl.float32)
    for begin in range(0, CHUNK, STEP):
        at = chunk * CHUNK + begin + tl.arange(0, STEP)
        points = tl.load(
            key_head + at.to(tl.int64)[:, None] * key_n + feature[None, :],
            mask=(at < k_len)[:, None] & (feature < DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
        finite = tl.sum(points * 0.0, 1) == 0.0  # 0 * x is NaN for what is not finite
        here = (at < k_len) & finite
        points = tl.load(
            key_head + at.to(tl.int64)[:, None] * key_n + own_feature[None, :],
            mask=here[:, None] & (own_feature < DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
        points = tl.where(here[:, None], points - own_mean[None, :], 0.0)
        gram = tl.dot(tl.trans(points), points, gram, input_precision="tf32x3")
    diagonal = own[:, None] == own[None, :]
    gram += tl.where(diagonal, tl.maximum(trace * 7.8125e-06, 1.504632769052528e-36), 0.0)
    for earlier in range(0, part):
        left = tl.load(lefts + own[:, None] * PART + own[None, :] + earlier * PART * PART)
        gram = added(gram, tl.trans(-left), left)

    # The inverse of its Cholesky factor, in its place.
    for step in range(0, BLOCKS):
        mine = block == step
        tile = tl.reshape(gram, [BLOCKS, BLOCK, PART])
        rows = tl.sum(tl.where(mine[:, None, None], tile, 0.0), 0)
        pivot = tl.sum(tl.where(mine[None, :, None], tl.reshape(rows, [BLOCK, BLOCKS, BLOCK]), 0.0), 1)
        # The inverse of the pivot block's factor: eliminate below the diagonal, in the block and in ones beside it.
        both = tl.join(pivot, identity)
        is_pivot = tl.arange(0, 2)[None, None, :] == 0
        for pivot_row in tl.static_range(0, BLOCK):
            line = tl.sum(tl.where((row == pivot_row)[:, None, None], both, 0.0), 0)
            column = tl.where(is_pivot & (row == pivot_row)[None, :, None], both, 0.0)
            column = tl.sum(tl.sum(column, 2), 1)
            head = tl.sum(tl.where(row == pivot_row, column, 0.0), 0)
            factor = tl.where(row > pivot_row, column / head, 0.0)
            both -= factor[:, None, None] * line[None, :, :]
        upper = tl.sum(tl.where(is_pivot, both, 0.0), 2)
        inverse = tl.sum(tl.where(is_pivot, 0.0, both), 2)
        inverse /= tl.sqrt(tl.sum(upper * identity, 1))[:, None]
        rows = tl.dot(inverse, rows, input_precision="tf32x3")
        done = own < (step + 1) * BLOCK
        less = tl.trans(tl.where(done[None, :], 0.0, -rows))
        rows = tl.reshape(rows, [BLOCK, BLOCKS, BLOCK])
        rows = tl.reshape(tl.where(mine[None, :, None], inverse[:, None, :], rows), [BLOCK, PART])
        gram = tl.where((own // BLOCK == step)[None, :], 0.0, gram)
        tile = tl.reshape(gram, [BLOCKS, BLOCK, PART])
        kept = tl.where(done[None, :], rows, 0.0)[None, :, :]
        gram = tl.reshape(tl.where(mine[:, None, None], kept, tile), [PART, PART])
        gram = added(gram, less, rows)

    for begin in range(0, CHUNK, STEP):
        at = chunk * CHUNK + begin + tl.arange(0, STEP)
        points = tl.load(
            key_head + at.to(tl.int64)[:, None] * key_n + feature[None, :],
            mask=(at < k_len)[:, None] & (feature < DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
        finite = tl.sum(points * 0.0, 1) == 0.0  # 0 * x is NaN for what is not finite
        here = (at < k_len) & finite
        points = tl.load(
            key_head + at.to(tl.int64)[:, None] * key_n + own_feature[None, :],
            mask=here[:, None] & (own_feature < DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
        points = tl.where(here[:, None], points - own_mean[None, :], 0.0)
        result = tl.zeros([STEP], tl.float32)
        for earlier in range(0, part):
            white = tl.load(whites + (begin + tl.arange(0, STEP))[:, None] * DIM_TILE + own[None, :] + earlier * PART)
            left = tl.load(lefts + own[:, None] * PART + own[None, :] + earlier * PART * PART)
            result += tl.sum(white * white, 1)
            points = added(points, -white, left)
        white = tl.dot(points, tl.trans(gram), input_precision="tf32x3")
        tl.store(whites + (begin + tl.arange(0, STEP))[:, None] * DIM_TILE + own[None, :] + part * PART, white)
        result += tl.sum(white * white, 1)
        # A key that is not finite must be met, not hidden; what is no number is taken for the same.
        result = tl.where(here & (result == result), result, tl.where(here, float("inf"), 0.0))
        tl.store(scores + pair * k_len + at, tl.where(finite, result, float("inf")), mask=at < k_len)
