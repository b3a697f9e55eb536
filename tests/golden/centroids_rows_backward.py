# rows_backward: written by prescore_compile.kernels.triton; do not edit.
# plan: method=peak chunk=32 window=8 sinks=2 keep=4 threshold=0.0 centroids=3 cluster=16
#   clustering=pca_tree routes=0 spread=1.0 share=0.0 group_routes=False residual=False coarse=0
#   seed=0
# stage: backward of summarize, the rows

import triton
import triton.language as tl


@triton.jit
def rows_backward(
    grad_row, row_index, row_owner, row_bias, grad, pairs, k_len, chunks, row_count, blocks,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    k_len = tl.cast(k_len, tl.int32)
    chunks = tl.cast(chunks, tl.int32)
    row_count = tl.cast(row_count, tl.int32)
    blocks = tl.cast(blocks, tl.int32)
    DIM: tl.constexpr = 64
    KEYS: tl.constexpr = 32
    program = tl.program_id(0)
    pair = (program // blocks).to(tl.int64)  # of batch and KV head
    at = program % blocks * KEYS + tl.arange(0, KEYS)
    feature = tl.arange(0, 64)
    own_rows = pair * row_count
    total = tl.zeros([KEYS, 64], tl.float32)
    begin = own_rows
    for first in range(0, 2, 16):
        slot = first + tl.arange(0, 16)
        copied = tl.load(row_index + begin + slot, mask=slot < 2, other=-1)
        same = at[:, None] == copied[None, :]
        is_copied = tl.sum(same.to(tl.int32), 1) > 0
        row = begin + tl.sum(tl.where(same, slot[None, :], 0), 1)
        wanted = is_copied[:, None] & (feature < DIM)[None, :]
        total += tl.load(grad_row + row[:, None] * DIM + feature[None, :], mask=wanted, other=0.0).to(tl.float32)
    chunk = program % blocks * KEYS // 32
    level = 0
    while (1 << level) <= chunks:
        run = chunk >> level
        last = (run + 1) * (1 << level) - 1
        inside = (run % 2 == 0) & (last < chunks)
        if inside:
            begin = own_rows + 2 + last * 7
            for first in range(0, 4, 16):
                slot = first + tl.arange(0, 16)
                copied = tl.load(row_index + begin + slot, mask=slot < 4, other=-1)
                same = at[:, None] == copied[None, :]
                is_copied = tl.sum(same.to(tl.int32), 1) > 0
                row = begin + tl.sum(tl.where(same, slot[None, :], 0), 1)
                wanted = is_copied[:, None] & (feature < DIM)[None, :]
                total += tl.load(grad_row + row[:, None] * DIM + feature[None, :], mask=wanted, other=0.0).to(tl.float32)
            owner = tl.load(row_owner + (level * pairs + pair) * k_len + at, mask=at < k_len, other=-1)
            owned = owner >= 0
            share = tl.exp(-tl.load(row_bias + own_rows + owner, mask=owned, other=0.0))  # 1 / members
            wanted = owned[:, None] & (feature < DIM)[None, :]
            given = tl.load(grad_row + (own_rows + owner)[:, None] * DIM + feature[None, :], mask=wanted, other=0.0)
            total += given.to(tl.float32) * share[:, None]
        level += 1
    written = (at < k_len)[:, None] & (feature < DIM)[None, :]
    to = (pair * k_len + at)[:, None] * DIM + feature[None, :]
    tl.store(grad + to, total.to(grad.dtype.element_ty), mask=written)
