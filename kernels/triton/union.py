"""The clusters that a tile of queries attends: each once, with the rows that chose it.

A tile of 64 rows with 27 routes each names 1728 clusters, many of them the same. ``mark`` writes
each (cluster, row) as one number and sorts a tile's numbers on chip; ``union`` walks over them and
keeps the last of each cluster. Nothing here is larger than the routes are: 4 bytes a route to
sort, and at most 4 more for the list and 4 for each 32 rows (see docs/triton.md).

The rows of a cluster are bits of 32-bit words. ``union`` stores running sums of the bits instead, in
arithmetic modulo 2^32: as no row names a cluster twice, the words are the sums' differences.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from .cache import launch, load
from .loops import names, tile
from .render import arguments, fill, source
from .spec import Spec, power_of_two

SORTED_ON_CHIP = 4096
"""Numbers of a tile that ``mark`` sorts; more are sorted by ``torch.sort``."""
AT_ONCE = 2048
"""Numbers of a tile that ``mark`` writes at once where it does not sort them."""
BLOCK = 1024
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
    here = live[:, None] & (which < route_count)[None, :]
    cluster = tl.load(
        pair_routes[:, None] + query_at.to(tl.int64)[:, None] * route_count + which[None, :], mask=here, other=-1
    )
    # What names no cluster comes last.
    number = tl.where(cluster >= 0, cluster * ROWS + member[:, None], $none)
    number = tl.sort(tl.reshape(number, [ROWS * $which]))  #? on_chip
    at = tl.arange(0, ROWS * $which)  #? on_chip
    to = numbers + (pair * tiles + tile) * size  #? on_chip
    tl.store(to + at, number, mask=at < size)  #? on_chip
    to = numbers + (pair * tiles + tile) * size + member * route_count  #? not on_chip
    $in_blocks
"""

IN_BLOCKS = """
inside = (member < QUERIES * $heads)[:, None]
tl.store(to[:, None] + which[None, :], number, mask=inside & (which < route_count)[None, :])
for begin in range($which, route_count, $which):
    which = begin + tl.arange(0, $which)
    here = live[:, None] & (which < route_count)[None, :]
    cluster = tl.load(
        pair_routes[:, None] + query_at.to(tl.int64)[:, None] * route_count + which[None, :], mask=here, other=-1
    )
    number = tl.where(cluster >= 0, cluster * ROWS + member[:, None], $none)
    tl.store(to[:, None] + which[None, :], number, mask=inside & (which < route_count)[None, :])
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
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        number = tl.load(numbers + tile * size + at, mask=at < size, other=$none)
        following = tl.load(numbers + tile * size + at + 1, mask=at + 1 < size, other=$none)
        previous = tl.load(numbers + tile * size + at - 1, mask=(at > 0) & (at < size), other=$none)
        real = number != $none
        cluster = number // ROWS
        last = real & (following // ROWS != cluster)
        place = found + tl.cumsum(last.to(tl.int32), 0) - 1
        to = tile * list_size + place
        tl.store(listed + to, cluster, mask=last)
        row = number % ROWS
        bit = tl.where(real & (number != previous), 1 << (row % 32), 0)
        $words
        found += tl.sum(last.to(tl.int32), 0)
    tl.store(listed_count + tile, found)
"""

WORD = """
in_$word = tl.where(row // 32 == $word, bit, 0)
running = tl.add(sum_$word, tl.cumsum(in_$word, 0), sanitize_overflow=False)
tl.store(listed_rows + to * $words + $word, running, mask=last)
sum_$word = tl.add(sum_$word, tl.sum(in_$word, 0), sanitize_overflow=False)
"""


def on_chip(spec: Spec) -> bool:
    return spec.rows * power_of_two(spec.settings.routes) <= SORTED_ON_CHIP


@functools.cache
def mark_source(spec: Spec) -> str:
    """Source of ``mark``."""
    which = power_of_two(spec.settings.routes) if on_chip(spec) else AT_ONCE // spec.rows
    own = ["routes", "numbers", "kv_heads", "q_len", "k_len", *["first_block"] * spec.aligned]
    parts = names(spec) | dict(
        arguments=arguments([*own, "route_count", "size", "tiles"]),
        tile=tile(replace(spec, splits=1)),
        which=which,
        none=NONE,
        on_chip=on_chip(spec),
    )
    parts["in_blocks"] = "" if on_chip(spec) else fill(IN_BLOCKS, parts)
    about = {"plan": spec.plan, "stage": "attend, the numbers (cluster, row) of a tile"}
    return source("mark", about, fill(MARK, parts))


@functools.cache
def union_source(spec: Spec) -> str:
    """Source of ``union``."""
    parts = dict(
        arguments=arguments(["numbers", "listed", "listed_rows", "listed_count", "size", "list_size"]),
        rows=spec.rows,
        block=BLOCK,
        none=NONE,
        sums="\n".join(f"sum_{word} = 0" for word in range(spec.words)),
        words="\n".join(fill(WORD, {"word": word, "words": spec.words}) for word in range(spec.words)),
    )
    about = {"plan": spec.plan, "stage": "attend, the clusters of a tile and who attends them"}
    return source("union", about, fill(UNION, parts))


def union(spec: Spec, routes: torch.Tensor, q_len: Any, k_len: Any, kv_heads: Any, clusters: Any) -> dict[str, Any]:
    """The lists of all tiles, as the values that ``loops.parameters`` names.

    Args:
        routes: ``[B, H, Nq, R]`` int32, -1: none.

    Returns:
        ``listed`` ``[tiles, list_size]`` int32 clusters, ascending; ``listed_rows`` ``[tiles, list_size,
        words]`` int32 running sums of the rows' bits; ``listed_count`` ``[tiles]``; ``list_size``.
    """
    tiles = spec.tiles(q_len, k_len)
    count = routes.shape[3]
    total = routes.shape[0] * kv_heads * tiles
    size = spec.queries * spec.heads * count
    list_size = torch.sym_min(size, clusters)
    numbers = routes.new_empty(total, size)
    values = dict(
        routes=routes.contiguous(), numbers=numbers, kv_heads=kv_heads, q_len=q_len, k_len=k_len, tiles=tiles,
        first_block=spec.first_block(q_len, k_len) if spec.aligned else 0, route_count=count, size=size,
    )  # fmt: skip
    launch(load(mark_source(spec), "mark"), (total,), values, warps=8 if on_chip(spec) else 4, stages=1)
    if not on_chip(spec):
        numbers = numbers.sort(1).values
    lists = dict(
        listed=routes.new_empty(total, list_size),
        listed_rows=routes.new_empty(total, list_size, spec.words),
        listed_count=routes.new_empty(total),
        list_size=list_size,
    )
    launch(load(union_source(spec), "union"), (total,), lists | dict(numbers=numbers, size=size), warps=4, stages=1)
    return lists
