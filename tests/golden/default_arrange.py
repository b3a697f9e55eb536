# arrange: written by prescore_compile.kernels.triton; do not edit.
# plan: method=peak chunk=256 window=0 sinks=16 keep=0 threshold=0.0 centroids=0 cluster=16
#   clustering=pca_tree routes=64 spread=1.0 share=0.0012 group_routes=False residual=False coarse=0
#   seed=0
# stage: attend, the clusters of a tile by the first row that attends them

import triton
import triton.language as tl


@triton.jit
def arrange(
    found, found_rows, listed, listed_rows, listed_count, list_size,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    list_size = tl.cast(list_size, tl.int32)
    BLOCK: tl.constexpr = 32
    list_at = tl.program_id(0).to(tl.int64) * list_size
    count = tl.load(listed_count + tl.program_id(0))
    row = tl.arange(0, 64)
    bit = 1 << (row % 32)
    # How many clusters each row is the first to choose; before it, those of all rows before it.
    first = tl.zeros([64], tl.int32)
    for begin in range(0, count, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        there = slot < count
        word_0 = tl.load(found_rows + (list_at + slot) * 2 + 0, mask=there, other=0)
        before = tl.load(found_rows + (list_at + slot - 1) * 2 + 0, mask=there & (slot > 0), other=0)
        word_0 = tl.sub(word_0, before, sanitize_overflow=False)
        word_1 = tl.load(found_rows + (list_at + slot) * 2 + 1, mask=there, other=0)
        before = tl.load(found_rows + (list_at + slot - 1) * 2 + 1, mask=there & (slot > 0), other=0)
        word_1 = tl.sub(word_1, before, sanitize_overflow=False)
        word = tl.where((row < 32)[None, :], word_0[:, None], word_1[:, None])
        lower = tl.sub(bit, 1, sanitize_overflow=False)
        own = there[:, None] & ((word & bit[None, :]) != 0) & ((word & lower[None, :]) == 0)
        own &= (row < 32)[None, :] | (word_0 == 0)[:, None]
        first += tl.sum(own.to(tl.int32), 0)
    first = tl.cumsum(first, 0) - first
    for begin in range(0, count, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        there = slot < count
        word_0 = tl.load(found_rows + (list_at + slot) * 2 + 0, mask=there, other=0)
        before = tl.load(found_rows + (list_at + slot - 1) * 2 + 0, mask=there & (slot > 0), other=0)
        word_0 = tl.sub(word_0, before, sanitize_overflow=False)
        word_1 = tl.load(found_rows + (list_at + slot) * 2 + 1, mask=there, other=0)
        before = tl.load(found_rows + (list_at + slot - 1) * 2 + 1, mask=there & (slot > 0), other=0)
        word_1 = tl.sub(word_1, before, sanitize_overflow=False)
        word = tl.where((row < 32)[None, :], word_0[:, None], word_1[:, None])
        lower = tl.sub(bit, 1, sanitize_overflow=False)
        own = there[:, None] & ((word & bit[None, :]) != 0) & ((word & lower[None, :]) == 0)
        own &= (row < 32)[None, :] | (word_0 == 0)[:, None]
        place = first[None, :] + tl.cumsum(own.to(tl.int32), 0) - 1
        to = list_at + tl.sum(tl.where(own, place, 0), 1)
        tl.store(listed + to, tl.load(found + list_at + slot, mask=there, other=0), mask=there)
        tl.store(listed_rows + to * 2 + 0, word_0, mask=there)
        tl.store(listed_rows + to * 2 + 1, word_1, mask=there)
        first += tl.sum(own.to(tl.int32), 0)
