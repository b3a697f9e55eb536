"""The clusters that a tile of queries attends: each once, with the rows that chose it.

A tile of 64 rows with 27 routes each names 1728 clusters, many of them the same. ``mark`` writes
each (cluster, row) as one number and sorts a tile's numbers on chip; ``union`` walks over them and
keeps the last of each cluster; ``arrange`` puts those first that an earlier row chose. Nothing here is
larger than the routes are: 4 bytes a route to sort, and at most 4 more for a list and 4 for each 32 rows
(see docs/triton.md). Where the heads of a group route together, a row is a query (``Spec.choosers``).

The rows of a cluster are bits of 32-bit words. ``union`` stores running sums of the bits instead, in
arithmetic modulo 2^32: as no row names a cluster twice, the words are the sums' differences.

Why arranged: what a row sums depends, to the last bit, on how its clusters are cut into steps. All that a row chose
lies in the part of the list that it and the rows before it wrote, so that no later query moves it to another step.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from ..layout import smaller
from .cache import launch, load
from .loops import names, tile
from .network import exchange, in_loop
from .render import arguments, fill, source
from .spec import Spec, cdiv, power_of_two

SORTED_ON_CHIP = 4096
"""Numbers of a tile that ``mark`` sorts; more are sorted by ``torch.sort``."""
A_WARP = 2048
"""Numbers that one warp sorts: what crosses warps goes through shared memory, and waits."""
AT_ONCE = 2048
"""Numbers of a tile that ``mark`` writes at once where it does not sort them."""
BLOCK = 256
ARRANGED = 2048
"""Pairs of a cluster and a row that ``arrange`` looks at at once."""
NONE = 2**31 - 1

MARK = """
def mark(
    $arguments
):
    GROUP: tl.constexpr = $group
    QUERIES: tl.constexpr = $queries
    ROWS: tl.constexpr = $rows
    CHUNK: tl.constexpr = $chunk  #? windowed
    WINDOW: tl.constexpr = $window  #? windowed
    $tile
    pair_routes = routes + (batch * kv_heads * GROUP + head) * q_len * route_count
    which = tl.arange(0, $which)
    # A row's routes rise; every second row, the first too, is read from its end, as the network merges.  #? merges
    which = which[None, :] ^ ((member & 1) * ($which - 1) ^ ($which - 1))[:, None]  #? merges
    which = which[None, :]  #? not merges
    here = live[:, None] & (which < route_count)
    cluster = tl.load(
        pair_routes[:, None] + query_at.to(tl.int64)[:, None] * route_count + which, mask=here, other=-1
    )
    # What names no cluster comes last.
    number = tl.where(cluster >= 0, cluster * ROWS + member[:, None], $none)
    at = tl.arange(0, ROWS * $which)  #? on_chip
    place = tl.reshape(at, [1] + [2] * $log)  #? merges
    rise = tl.reshape(number, [1] + [2] * $log)  #? on_chip
    $rising
    number = tl.reshape(rise, [ROWS * $which])  #? on_chip
    to = numbers + (pair * tiles + tile) * size  #? on_chip
    tl.store(to + at, number, mask=at < size)  #? on_chip
    to = numbers + (pair * tiles + tile) * size + member * route_count  #? not on_chip
    $in_blocks
"""

IN_BLOCKS = """
inside = (member < QUERIES * $heads)[:, None]
tl.store(to[:, None] + which, number, mask=inside & (which < route_count))
for begin in range($which, route_count, $which):
    which = begin + tl.arange(0, $which)[None, :]
    here = live[:, None] & (which < route_count)
    cluster = tl.load(
        pair_routes[:, None] + query_at.to(tl.int64)[:, None] * route_count + which, mask=here, other=-1
    )
    number = tl.where(cluster >= 0, cluster * ROWS + member[:, None], $none)
    tl.store(to[:, None] + which, number, mask=inside & (which < route_count))
"""

UNION = """
def union(
    $arguments
):
    ROWS: tl.constexpr = $rows
    BLOCK: tl.constexpr = $block
    tile = tl.program_id(0).to(tl.int64)
    found = 0
    $sums
    begin = 0
    while tl.load(numbers + tile * size + begin, mask=begin < size, other=$none) != $none:
        at = begin + tl.arange(0, BLOCK)
        number = tl.load(numbers + tile * size + at, mask=at < size, other=$none)
        following = tl.load(numbers + tile * size + at + 1, mask=at + 1 < size, other=$none)
        previous = tl.load(numbers + tile * size + at - 1, mask=(at > 0) & (at < size), other=$none)
        real = number != $none
        cluster = number // ROWS
        last = real & (following // ROWS != cluster)
        place = found + tl.cumsum(last.to(tl.int32), 0) - 1
        to = tile * list_size + place
        fits = last & (place < list_size)  # always, but for routes that do not ascend
        tl.store(listed + to, cluster, mask=fits)
        row = number % ROWS
        bit = tl.where(real & (number != previous), 1 << (row % 32), 0)
        $words
        found += tl.sum(last.to(tl.int32), 0)
        begin += BLOCK
    tl.store(listed_count + tile, tl.minimum(found, list_size))
"""

WORD = """
in_$word = tl.where(row // 32 == $word, bit, 0)
running = tl.add(sum_$word, tl.cumsum(in_$word, 0), sanitize_overflow=False)
tl.store(listed_rows + to * $words + $word, running, mask=fits)
sum_$word = tl.add(sum_$word, tl.sum(in_$word, 0), sanitize_overflow=False)
"""


ARRANGE = """
def arrange(
    $arguments
):
    BLOCK: tl.constexpr = $block
    list_at = tl.program_id(0).to(tl.int64) * list_size
    count = tl.load(listed_count + tl.program_id(0))
    row = tl.arange(0, $rows)
    bit = 1 << (row % 32)
    # How many clusters each row is the first to choose; before it, those of all rows before it.
    first = tl.zeros([$rows], tl.int32)
    for begin in range(0, count, BLOCK):
        $read
        first += tl.sum(own.to(tl.int32), 0)
    first = tl.cumsum(first, 0) - first
    for begin in range(0, count, BLOCK):
        $read
        place = first[None, :] + tl.cumsum(own.to(tl.int32), 0) - 1
        to = list_at + tl.sum(tl.where(own, place, 0), 1)
        tl.store(listed + to, tl.load(found + list_at + slot, mask=there, other=0), mask=there)
        $store
        first += tl.sum(own.to(tl.int32), 0)
"""

# ``own``: the lowest bit of the cluster's words is the row's.
READ = """
slot = begin + tl.arange(0, BLOCK)
there = slot < count
$words
word = $word
lower = tl.sub(bit, 1, sanitize_overflow=False)
own = there[:, None] & ((word & bit[None, :]) != 0) & ((word & lower[None, :]) == 0)
$none_before
"""

READ_WORD = """
word_$word = tl.load(found_rows + (list_at + slot) * $words + $word, mask=there, other=0)
before = tl.load(found_rows + (list_at + slot - 1) * $words + $word, mask=there & (slot > 0), other=0)
word_$word = tl.sub(word_$word, before, sanitize_overflow=False)
"""


def numbers_of(spec: Spec) -> int:
    """Numbers of a tile, rows and routes padded to powers of two."""
    return power_of_two(spec.choosers) * power_of_two(spec.settings.routes)


def on_chip(spec: Spec) -> bool:
    return numbers_of(spec) <= SORTED_ON_CHIP


@functools.cache
def mark_source(spec: Spec, sorts: bool) -> str:
    """Source of ``mark``, which ``sorts`` what it writes where that is few enough (``on_chip``)."""
    log = numbers_of(spec).bit_length() - 1
    which = power_of_two(spec.settings.routes) if sorts else AT_ONCE // power_of_two(spec.choosers)
    own = ["routes", "numbers", "kv_heads", "q_len", "k_len", *["first_block"] * spec.aligned]
    rows, heads = power_of_two(spec.choosers), 1 if spec.together else names(spec)["heads"]
    merges = sorts and rows > 1
    parts = names(spec) | dict(
        arguments=arguments([*own, "route_count", "size", "tiles"]),
        tile=tile(replace(spec, splits=1), rows=rows, heads=heads),
        rows=rows,
        heads=heads,
        which=which,
        log=log,
        rising=in_loop("rise", "place", log, which.bit_length() - 1) if merges else "",
        none=NONE,
        on_chip=sorts,
        merges=merges,
    )
    parts["in_blocks"] = "" if sorts else fill(IN_BLOCKS, parts)
    about = {"plan": spec.plan, "stage": "attend, the numbers (cluster, row) of a tile"}
    return source("mark", about, (exchange() if merges else "") + fill(MARK, parts))


@functools.cache
def union_source(spec: Spec) -> str:
    """Source of ``union``."""
    parts = dict(
        arguments=arguments(["numbers", "listed", "listed_rows", "listed_count", "size", "list_size"]),
        rows=power_of_two(spec.choosers),
        block=BLOCK,
        none=NONE,
        sums="\n".join(f"sum_{word} = 0" for word in range(spec.words)),
        words="\n".join(fill(WORD, {"word": word, "words": spec.words}) for word in range(spec.words)),
    )
    about = {"plan": spec.plan, "stage": "attend, the clusters of a tile and who attends them"}
    return source("union", about, fill(UNION, parts))


@functools.cache
def arrange_source(spec: Spec) -> str:
    """Source of ``arrange``."""
    rows, words = power_of_two(spec.choosers), range(spec.words)
    word = "word_0[:, None]"
    none_before = []
    for at in words[1:]:
        word = f"tl.where((row < {32 * at})[None, :], {word}, word_{at}[:, None])"
        none_before.append(f"own &= (row < {32 * at})[None, :] | (word_{at - 1} == 0)[:, None]")
    read = dict(
        words="\n".join(fill(READ_WORD, {"word": at, "words": spec.words}) for at in words),
        word=word,
        none_before="\n".join(none_before),
    )
    parts = dict(
        arguments=arguments(["found", "found_rows", "listed", "listed_rows", "listed_count", "list_size"]),
        rows=rows,
        block=ARRANGED // rows,
        read=fill(READ, read),
        store="\n".join(f"tl.store(listed_rows + to * {spec.words} + {at}, word_{at}, mask=there)" for at in words),
    )
    about = {"plan": spec.plan, "stage": "attend, the clusters of a tile by the first row that attends them"}
    return source("arrange", about, fill(ARRANGE, parts))


def union(spec: Spec, routes: torch.Tensor, q_len: Any, k_len: Any, kv_heads: Any, clusters: Any) -> dict[str, Any]:
    """The lists of all tiles, as the values that ``loops.parameters`` names.

    Args:
        routes: ``[B, H, Nq, R]`` int32, ascending, then -1: none. Heads that route together have the same.

    Returns:
        ``listed`` ``[tiles, list_size]`` int32 clusters, by the first row that chose them, then ascending;
        ``listed_rows`` ``[tiles, list_size, words]`` int32, their bits; ``listed_count`` ``[tiles]``; ``list_size``.
    """
    tiles = spec.tiles(q_len, k_len)
    count = routes.shape[3]
    total = routes.shape[0] * kv_heads * tiles
    size = spec.choosers * count
    list_size = smaller(size, clusters)
    numbers = routes.new_empty(total, size)
    values = dict(
        routes=routes.contiguous(), numbers=numbers, kv_heads=kv_heads, q_len=q_len, k_len=k_len, tiles=tiles,
        first_block=spec.first_block(q_len, k_len) if spec.aligned else 0, route_count=count, size=size,
    )  # fmt: skip
    sorts = on_chip(spec)
    launch(
        load(mark_source(spec, sorts), "mark"),
        (total,),
        values,
        warps=cdiv(numbers_of(spec), A_WARP) if sorts else 4,
        stages=1,
    )
    if not sorts:
        numbers = numbers.sort(1).values
    found, found_rows = routes.new_empty(total, list_size), routes.new_empty(total, list_size, spec.words)
    lists = dict(listed_count=routes.new_empty(total), list_size=list_size)
    values = lists | dict(listed=found, listed_rows=found_rows, numbers=numbers, size=size)
    launch(load(union_source(spec), "union"), (total,), values, warps=1, stages=1)
    del numbers, values  # whose memory the next list may have
    lists |= dict(listed=torch.empty_like(found), listed_rows=torch.empty_like(found_rows))
    values = lists | dict(found=found, found_rows=found_rows)
    launch(load(arrange_source(spec), "arrange"), (total,), values, warps=1, stages=1)
    return lists
