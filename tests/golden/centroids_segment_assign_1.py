# segment_assign_1: written by prescore_compile.kernels.triton; do not edit.
# plan: method=peak chunk=32 window=8 sinks=2 keep=4 threshold=0.0 centroids=3 cluster=16
#   clustering=pca_tree routes=0 spread=1.0 share=0.0 group_routes=False residual=False coarse=0
#   seed=0
# stage: summarize, the centroids of segments

import triton
import triton.language as tl


@triton.jit
def product(narrow, wide):
    # A factor of 16 bits times float32: three products of 8 bits each, of which none rounds.
    out = tl.zeros([narrow.shape[0], wide.shape[1]], tl.float32)
    for part in range(0, 3):
        high = wide.to(tl.bfloat16)
        out = tl.dot(narrow.to(tl.bfloat16), high, out)
        wide -= high.to(tl.float32)
    return out


@triton.jit
def segment_assign_1(
    key, value, chosen, moments, part_number, part_key_sum, part_value_sum, number_out, key_sum_out,
    value_sum_out, row_owner, key_b, key_h, key_n, value_b, value_h, value_n, pairs, kv_heads,
    k_len, chunks, parts,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    kv_heads = tl.cast(kv_heads, tl.int32)
    k_len = tl.cast(k_len, tl.int32)
    chunks = tl.cast(chunks, tl.int32)
    parts = tl.cast(parts, tl.int32)
    DIM: tl.constexpr = 64
    VALUE_DIM: tl.constexpr = 64
    CHUNK: tl.constexpr = 32
    STEP: tl.constexpr = 32
    TILE: tl.constexpr = 16
    # A part of a segment of 2^level chunks, which is named by its last one. The first programs have one of the segments
    # that are shorter than a part each; then come those of blocks as long as a part, one for each longer level.
    program = tl.program_id(0)
    pair = (program % pairs).to(tl.int64)  # of batch and KV head
    part = program // pairs
    is_short = part < chunks
    block = tl.maximum(part - chunks, 0) // 14
    level = 6 + tl.maximum(part - chunks, 0) % 14
    run = block >> (level - 6)  # of the blocks of a segment of this level, or of what is between two
    last = tl.where(is_short, part, (run + 1) * (1 << level) - 1)
    size = tl.where(is_short, (last + 1) & -(last + 1), 1 << level)
    there = tl.where(is_short, size < 64, (run % 2 == 0) & (last < chunks))
    if not there:
        return
    begin = (last + 1 - size) * CHUNK
    first_part = tl.where(is_short, part, chunks + (begin // 2048) * 14 + level - 6)
    stop = tl.minimum((last + 1) * CHUNK, k_len)
    own_begin = tl.where(is_short, begin, block * 2048)
    own_stop = tl.minimum(own_begin + tl.minimum(size * CHUNK, 2048), k_len)
    part_at = pair * parts + part
    key_head = key + pair // kv_heads * key_b + pair % kv_heads * key_h
    value_head = value + pair // kv_heads * value_b + pair % kv_heads * value_h
    feature = tl.arange(0, 64)
    value_feature = tl.arange(0, 64)
    slot = tl.arange(0, 16)
    kept = tl.load(chosen + (pair * chunks + last) * 4 + slot, mask=slot < 4, other=-1)
    centre = tl.arange(0, TILE)
    used = centre < 3
    part_count = tl.maximum(size // 64, 1)

    # Evenly spaced keys, by rank among those that are there and not kept, are the first centres.
    from_member = tl.maximum(begin - 2, 0)
    count = tl.maximum(stop - 2, 0) - from_member
    is_kept = kept >= 0
    others = tl.maximum(kept - 2, 0)
    others -= from_member + tl.cumsum(is_kept.to(tl.int32), 0) - 1  # before a kept key
    count -= tl.sum(is_kept.to(tl.int32), 0)
    rank = (centre.to(tl.int64) * tl.maximum(count, 1) // 3).to(tl.int32)
    rank += tl.sum((is_kept[None, :] & (others[None, :] <= rank[:, None])).to(tl.int32), 1)
    rank += from_member
    start = rank + 2
    begins = used & (start < stop) & (count > 0)
    start_at = start.to(tl.int64)[None, :]
    inside = begins[None, :] & (feature < DIM)[:, None]
    key_centres = tl.load(key_head + start_at * key_n + feature[:, None], mask=inside, other=0.0).to(tl.float32)
    inside = begins[None, :] & (value_feature < VALUE_DIM)[:, None]
    value_centres = tl.load(value_head + start_at * value_n + value_feature[:, None], mask=inside, other=0.0)
    value_centres = value_centres.to(tl.float32)
    number = tl.zeros([TILE], tl.float32)
    key_sum = tl.zeros([64, TILE], tl.float32)
    value_sum = tl.zeros([64, TILE], tl.float32)
    for other in range(0, part_count):
        of = (pair * parts + first_part + other * 14) * 3 + centre
        number += tl.load(part_number + of, mask=used, other=0.0)
        wanted = used[None, :] & (feature < DIM)[:, None]
        key_sum += tl.load(part_key_sum + of[None, :] * DIM + feature[:, None], mask=wanted, other=0.0)
        wanted = used[None, :] & (value_feature < VALUE_DIM)[:, None]
        value_sum += tl.load(part_value_sum + of[None, :] * VALUE_DIM + value_feature[:, None], mask=wanted, other=0.0)
    share = 1.0 / tl.maximum(number, 1.0)
    key_centres = tl.where((number > 0.0)[None, :], key_sum * share[None, :], key_centres)
    value_centres = tl.where((number > 0.0)[None, :], value_sum * share[None, :], value_centres)

    # By this the squares of values are multiplied.
    key_mean = tl.zeros([64], tl.float32)
    value_mean = tl.zeros([64], tl.float32)
    key_variance = 0.0
    value_variance = 0.0
    each = 1.0 / tl.maximum(count, 1).to(tl.float32)
    for other in range(0, part_count):
        of = moments + (pair * parts + first_part + other * 14) * (DIM + VALUE_DIM + 2)
        key_mean += tl.load(of + feature, mask=feature < DIM, other=0.0) * each
        value_mean += tl.load(of + DIM + value_feature, mask=value_feature < VALUE_DIM, other=0.0) * each
        key_variance += tl.load(of + DIM + VALUE_DIM) * each
        value_variance += tl.load(of + DIM + VALUE_DIM + 1) * each
    key_variance -= tl.sum(key_mean * key_mean, 0)
    value_variance -= tl.sum(value_mean * value_mean, 0)
    key_variance = tl.where(key_variance < 0.0, 0.0, key_variance)
    ratio = key_variance / tl.where(value_variance < 1e-20, 1e-20, value_variance)

    square = tl.sum(key_centres * key_centres, 0) + ratio * tl.sum(value_centres * value_centres, 0)
    row = 2 + last * 7 + 4
    level = tl.sum(((size >> tl.arange(0, 32)) > 1).to(tl.int32), 0)
    owners = row_owner + (level.to(tl.int64) * pairs + pair) * k_len
    numbers = tl.zeros([STEP, TILE], tl.float32)
    key_sum = tl.zeros([64, TILE], tl.float32)
    value_sum = tl.zeros([64, TILE], tl.float32)
    for first in range(own_begin, own_stop, STEP):
        at = first + tl.arange(0, STEP)
        here = at < own_stop
        here &= at >= 2
        here &= tl.sum((at[:, None] == kept[None, :]).to(tl.int32), 1) == 0
        place = at.to(tl.int64)[:, None]
        wanted = here[:, None] & (feature < DIM)[None, :]
        keys = tl.load(key_head + place * key_n + feature[None, :], mask=wanted, other=0.0)
        wanted = here[:, None] & (value_feature < VALUE_DIM)[None, :]
        values = tl.load(value_head + place * value_n + value_feature[None, :], mask=wanted, other=0.0)
        near = product(keys, key_centres) + ratio * product(values, value_centres)
        apart = square[None, :] - 2.0 * near
        # Where a key or value is not finite, no distance is a number: all belong to the first.
        apart = tl.where(used[None, :] & (apart == apart), apart, float("inf"))
        owner = tl.argmin(apart, 1)
        own = ((owner[:, None] == centre[None, :]) & here[:, None]).to(tl.float32)
        numbers += own
        key_sum = tl.dot(tl.trans(keys), own.to(keys.dtype), key_sum)
        value_sum = tl.dot(tl.trans(values), own.to(values.dtype), value_sum)
        tl.store(owners + at, row + owner, mask=here)
    to = part_at * 3 + centre
    tl.store(number_out + to, tl.sum(numbers, 0), mask=used)
    inside = used[None, :] & (feature < DIM)[:, None]
    tl.store(key_sum_out + to[None, :] * DIM + feature[:, None], key_sum, mask=inside)
    inside = used[None, :] & (value_feature < VALUE_DIM)[:, None]
    tl.store(value_sum_out + to[None, :] * VALUE_DIM + value_feature[:, None], value_sum, mask=inside)
