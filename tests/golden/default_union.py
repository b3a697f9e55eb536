# union: written by prescore_compile.kernels.triton; do not edit.
# plan: method=peak chunk=256 window=0 sinks=16 keep=0 threshold=0.0 centroids=0 cluster=16
#   clustering=pca_tree routes=64 spread=1.0 share=0.0012 group_routes=False residual=False coarse=0
#   seed=0
# stage: attend, the clusters of a tile and who attends them

import triton
import triton.language as tl


@triton.jit
def union(
    numbers, listed, listed_rows, listed_count, size, list_size,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    size = tl.cast(size, tl.int32)
    list_size = tl.cast(list_size, tl.int32)
    ROWS: tl.constexpr = 64
    BLOCK: tl.constexpr = 256
    tile = tl.program_id(0).to(tl.int64)
    found = 0
    sum_0 = 0
    sum_1 = 0
    begin = 0
    while tl.load(numbers + tile * size + begin, mask=begin < size, other=2147483647) != 2147483647:
        at = begin + tl.arange(0, BLOCK)
        number = tl.load(numbers + tile * size + at, mask=at < size, other=2147483647)
        following = tl.load(numbers + tile * size + at + 1, mask=at + 1 < size, other=2147483647)
        previous = tl.load(numbers + tile * size + at - 1, mask=(at > 0) & (at < size), other=2147483647)
        real = number != 2147483647
        cluster = number // ROWS
        last = real & (following // ROWS != cluster)
        place = found + tl.cumsum(last.to(tl.int32), 0) - 1
        to = tile * list_size + place
        fits = last & (place < list_size)  # always, but for routes that do not ascend
        tl.store(listed + to, cluster, mask=fits)
        row = number % ROWS
        bit = tl.where(real & (number != previous), 1 << (row % 32), 0)
        in_0 = tl.where(row // 32 == 0, bit, 0)
        running = tl.add(sum_0, tl.cumsum(in_0, 0), sanitize_overflow=False)
        tl.store(listed_rows + to * 2 + 0, running, mask=fits)
        sum_0 = tl.add(sum_0, tl.sum(in_0, 0), sanitize_overflow=False)
        in_1 = tl.where(row // 32 == 1, bit, 0)
        running = tl.add(sum_1, tl.cumsum(in_1, 0), sanitize_overflow=False)
        tl.store(listed_rows + to * 2 + 1, running, mask=fits)
        sum_1 = tl.add(sum_1, tl.sum(in_1, 0), sanitize_overflow=False)
        found += tl.sum(last.to(tl.int32), 0)
        begin += BLOCK
    tl.store(listed_count + tile, tl.minimum(found, list_size))
