"""Attend's backward by keys: the programs that own them sum their gradients, each over the queries that attend them.

Of a window and of rows those are runs of positions (closed forms of ``layout``), of routes what an index says.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from . import loops, residual
from .attend import about
from .d_query import d_logits, grad_tile
from .render import fill, source
from .spec import Spec, cdiv

SINK_SPLITS = 16
"""Programs that share the queries of the sinks, which all queries attend."""
REST_SPLITS = 8
"""Programs that share the queries of a block of centroids, which nearly all queries attend."""

TO_KEYS = """
$d_logits
d_value_tile = tl.dot(tl.trans(weight.to(grad_tile.dtype)), grad_tile, d_value_tile$precision)
d_key_tile = tl.dot(tl.trans(d_logits.to(query_tile.dtype)), query_tile, d_key_tile$precision)
"""

KEY_MAJOR = """
def $name(
    $parameters
):
    $constants
    $owner
    batch = pair // kv_heads
    kv_head = pair % kv_heads
    feature = tl.arange(0, DIM_TILE)
    value_feature = tl.arange(0, VALUE_TILE)
    $load_keys
    d_key_tile = tl.zeros([KEYS, DIM_TILE], tl.float32)
    d_value_tile = tl.zeros([KEYS, VALUE_TILE], tl.float32)
    $over_queries
        head = kv_head * GROUP + of_group
        position = query_at + (k_len - q_len)  #? causal
        $query
        $grad_tile
        $score
        $mask
        $update
    d_key_tile *= scale
    $store
"""

# Queries of positions [first, stop), the heads of the group side by side.
RUN = """
first = tl.maximum(first, 0)
stop = tl.minimum(stop, q_len)
for begin in range(first * GROUP$split_first, stop * GROUP, $run_step):
    member = begin + tl.arange(0, ROWS)
    query_at = member // GROUP
    of_group = member % GROUP
    live = query_at < stop
"""

WINDOW_OWNER = """
pair = (tl.program_id(0) // blocks).to(tl.int64)  # of batch and KV head
at = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
seen = at < k_len
"""

WINDOW_KEYS = """
inside = at < k_len
seen = inside
seen = seen & (tl.load(valid + batch * valid_b + at.to(tl.int64) * valid_n, mask=seen, other=0) != 0)  #? valid
key_head = key + batch * key_b + kv_head * key_h
value_head = value + batch * value_b + kv_head * value_h
key_tile = tl.load(key_head + at.to(tl.int64)[None, :] * key_n + feature[:, None], mask=$key_mask, other=0.0)
value_tile = tl.load(
    value_head + at.to(tl.int64)[:, None] * value_n + value_feature[None, :], mask=$value_mask, other=0.0
)
# The queries that have any of these keys in their window.
begin_key = tl.program_id(0) % blocks * KEYS
end_key = tl.minimum(begin_key + KEYS, k_len)
first = begin_key - (k_len - q_len)  #? causal
stop = q_len  #? not windowed
first = 0  #? not windowed and not causal
first = tl.maximum(first, $query_low)  #? query_low
last_key = end_key - 1  #? query_high
stop = tl.minimum(stop, $query_high + 1)  #? query_high
stop = ((end_key - 1) // CHUNK + 1) * CHUNK + WINDOW - (k_len - q_len)  #? aligned
first = begin_key // CHUNK * CHUNK - WINDOW  #? two_sided
stop = ((end_key - 1) // CHUNK + 1) * CHUNK + WINDOW  #? two_sided
"""

STORE_WINDOW = """
key_to = d_key + (pair * k_len + at)[:, None] * DIM + feature[None, :]
value_to = d_value + (pair * k_len + at)[:, None] * VALUE_DIM + value_feature[None, :]
tl.store(key_to, d_key_tile, mask=$d_key_mask)
tl.store(value_to, d_value_tile, mask=$d_value_mask)
"""

ROWS_OWNER = """
program = tl.program_id(0)
pair = (program // $programs).to(tl.int64)  # of batch and KV head
split = tl.program_id(1)  #? of_sinks
begin_row = program % $programs * KEYS  #? of_sinks
end_row = $sinks  #? of_sinks
segment = program % $programs // $blocks  #? not of_sinks
begin_row = $sinks + segment * $segment_rows + program % $blocks * KEYS  #? not of_sinks
end_row = $sinks + (segment + 1) * $segment_rows  #? not of_sinks
at = begin_row + tl.arange(0, KEYS)
"""

ROWS_KEYS = """
inside = at < end_row
row_at = pair * row_count + at
index = tl.load(row_index + row_at, mask=inside, other=-1)
row_logit = tl.load(row_bias + row_at, mask=inside, other=float("-inf"))  #? centroids
seen = row_logit > float("-inf")  #? centroids
seen = index >= 0  #? not centroids
key_tile = tl.load(row_key + row_at[None, :] * DIM + feature[:, None], mask=$key_mask, other=0.0)
value_tile = tl.load(row_value + row_at[:, None] * VALUE_DIM + value_feature[None, :], mask=$value_mask, other=0.0)
# The queries before whose window a chunk is finished.  #? of_sinks and causal
first = WINDOW + CHUNK - (k_len - q_len)  #? of_sinks and causal
stop = q_len  #? of_sinks
first = 0  #? of_sinks and not causal
# The queries whose finished chunks split into segments of which this is one.  #? not of_sinks
end_chunk = segment + 1  #? not of_sinks
size = end_chunk & -end_chunk  #? not of_sinks
first = WINDOW + end_chunk * CHUNK - (k_len - q_len)  #? not of_sinks and causal
stop = first + size * CHUNK  #? not of_sinks and causal
chunks = tl.cdiv(k_len, CHUNK)  #? not of_sinks and not causal
first = 0  #? not of_sinks and not causal
stop = tl.where((chunks >= end_chunk) & (chunks < end_chunk + size), q_len, 0)  #? not of_sinks and not causal
"""

STORE_ROWS = """
to = (split.to(tl.int64) * pairs + pair) * row_total + at  #? of_sinks
to = pair * row_total + at - $sinks  #? not of_sinks
tl.store(d_key + to[:, None] * DIM + feature[None, :], d_key_tile, mask=$d_key_mask)
tl.store(d_value + to[:, None] * VALUE_DIM + value_feature[None, :], d_value_tile, mask=$d_value_mask)
"""

ROUTES_OWNER = """
clusters = places // $cluster
blocks = places // KEYS
pair = (tl.program_id(0) // blocks).to(tl.int64)  # of batch and KV head
cluster = tl.program_id(0) % blocks * KEYS // $cluster
at = tl.load(order + pair * places + tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS))
"""

ROUTES_KEYS = """
seen = at >= 0
inside = seen
key_head = key + batch * key_b + kv_head * key_h
value_head = value + batch * value_b + kv_head * value_h
key_tile = tl.load(key_head + at.to(tl.int64)[None, :] * key_n + feature[:, None], mask=$key_mask, other=0.0)
value_tile = tl.load(
    value_head + at.to(tl.int64)[:, None] * value_n + value_feature[None, :], mask=$value_mask, other=0.0
)
stands = tl.load(copies + pair * (k_len + 1) + at, mask=seen, other=0)  #? copies
first = tl.load(chosen_from + pair * (clusters + 1) + cluster)
stop = tl.load(chosen_from + pair * (clusters + 1) + cluster + 1)
"""

ROUTES_QUERIES = """
for begin in range(first, stop, ROWS):
    place = begin + tl.arange(0, ROWS)
    live = place < stop
    member = tl.load(chosen_by + pair * chosen_total + place, mask=live, other=0)
    query_at = member % q_len
    of_group = member // q_len
"""

# A key that was selected in the segment that covers it stands in a row.
ROUTES_CHOOSE = """
finished = tl.maximum(position - WINDOW, 0) // CHUNK  #? causal
finished = tl.cdiv(k_len, CHUNK)  #? not causal
level = (tl.maximum(at, 0) // CHUNK)[None, :] ^ $finished
$highest
"""

ADD_ROUTES = """
$to_members
key_to = d_key + (pair * k_len + at)[:, None] * DIM + feature[None, :]
value_to = d_value + (pair * k_len + at)[:, None] * VALUE_DIM + value_feature[None, :]
d_key_tile += tl.load(key_to, mask=$d_key_mask, other=0.0)
d_value_tile += tl.load(value_to, mask=$d_value_mask, other=0.0)
tl.store(key_to, d_key_tile, mask=$d_key_mask)
tl.store(value_to, d_value_tile, mask=$d_value_mask)
"""

BORDERS = """
low = tl.maximum(position - WINDOW, 0) // CHUNK * CHUNK  #? causal
low = tl.maximum(query_at - WINDOW, 0) // CHUNK * CHUNK  #? two_sided
high = tl.minimum(((query_at + WINDOW) // CHUNK + 1) * CHUNK, k_len)  #? two_sided
"""


@functools.cache
def window_source(spec: Spec) -> str:
    """Source of ``d_window``: the keys of all windows; it writes every key."""
    pairs = ["seen[None, :]"]
    if spec.causal:
        pairs.append("(at[None, :] <= position[:, None])")
    if spec.aligned:
        pairs.append("(position[:, None] < ((at // CHUNK + 1) * CHUNK + WINDOW)[None, :])")
    if loops.two_sided(spec):
        pairs.append("(query_at[:, None] >= (at // CHUNK * CHUNK - WINDOW)[None, :])")
        pairs.append("(query_at[:, None] < ((at // CHUNK + 1) * CHUNK + WINDOW)[None, :])")
    return _key_major(
        spec,
        "d_window",
        "attend backward, gradients of the window's keys and values",
        own=["blocks"],
        owner=WINDOW_OWNER,
        load_keys=WINDOW_KEYS,
        over_queries=RUN,
        score=loops.score(spec, "at"),
        mask=loops.mask(spec, " & ".join(pairs)),
        store=STORE_WINDOW,
    )


@functools.cache
def rows_source(spec: Spec, of_sinks: bool) -> str:
    """Source of ``d_sinks`` or ``d_segments``: rows, of which each is one program's."""
    plan = spec.settings
    count = plan.sinks if of_sinks else plan.rows_per_segment
    keys = loops.row_keys(spec, count)
    spec = replace(spec, tile=replace(spec.tile, keys=keys))
    pairs = "seen[None, :]"
    if spec.causal:
        pairs += " & (index[None, :] < low[:, None])"
    elif loops.two_sided(spec):
        pairs += " & ((index[None, :] < low[:, None]) | (index[None, :] >= high[:, None]))"
    borders = fill(BORDERS, loops.names(spec))
    bias = loops.BIAS if plan.centroids else ""
    blocks = cdiv(count, keys)
    name = "d_sinks" if of_sinks else "d_segments"
    what = "the first keys" if of_sinks else "selected keys and centroids"
    return _key_major(
        spec,
        name,
        f"attend backward, gradients of the rows: {what}",
        own=["row_total", "pairs"] if of_sinks else ["row_total", "programs"],
        owner=ROWS_OWNER,
        load_keys=ROWS_KEYS,
        over_queries=RUN,
        score=loops.score(spec, "index") + bias,
        mask="\n".join(part for part in (borders, loops.mask(spec, pairs)) if part),
        store=STORE_ROWS,
        of_sinks=of_sinks,
        programs=blocks if of_sinks else "programs",
        blocks=blocks,
        split_first=" + split * ROWS" if of_sinks else "",
        run_step=spec.tile.rows * (SINK_SPLITS if of_sinks else 1),
    )


@functools.cache
def residual_source(spec: Spec) -> str:
    """Source of ``d_residual``: centroids of clusters, of which each is a few programs'."""
    spec = residual.narrow(spec)
    borders = fill(BORDERS, loops.names(spec))
    lines = (borders, residual.own_routes(spec), residual.words(spec, "begin_cluster"), residual.unread(spec))
    choose = "\n".join(part for part in lines if part)
    return _key_major(
        spec,
        "d_residual",
        "attend backward, gradients of the centroids of clusters",
        own=["pairs"],
        owner=residual.OWNER,
        load_keys=residual.OWNED,
        over_queries=RUN,
        score=loops.score(spec, "at") + loops.BIAS,
        mask=loops.mask(spec, residual.pairs(spec, True), choose),
        store=residual.STORE_OWNED,
        split_first=" + split * ROWS",
        run_step=spec.tile.rows * REST_SPLITS,
    )


@functools.cache
def routes_source(spec: Spec) -> str:
    """Source of ``d_routes``: adds what each cluster's own queries give its keys, or as many of them as a tile has."""
    keys = keys_of_a_cluster(spec)
    in_parts = keys < spec.settings.cluster
    spec = replace(spec, tile=replace(spec.tile, keys=keys))
    pairs, choose = "seen[None, :]", ""
    if loops.copies(spec):
        finished = "finished[:, None]" if spec.causal else "finished"
        parts = loops.names(spec) | {"highest": loops.highest_bit("level"), "finished": finished}
        choose = fill(ROUTES_CHOOSE, parts)
        pairs = "seen[None, :] & ((stands[None, :] & level) == 0)"
    return _key_major(
        spec,
        "d_routes",
        "attend backward, gradients of the routed keys and values",
        own=["chosen_by", "chosen_from", "chosen_total", *["d_rest_key", "d_rest_value"] * loops.residual(spec)],
        owner=ROUTES_OWNER,
        load_keys=ROUTES_KEYS,
        over_queries=ROUTES_QUERIES,
        score=loops.score(spec, "at"),
        mask=loops.mask(spec, pairs, choose),
        store=ADD_ROUTES,
        to_members=fill(residual.TO_MEMBERS, loops.names(spec) | {"in_parts": in_parts})
        if loops.residual(spec)
        else "",
    )


def _key_major(spec: Spec, name: str, stage: str, own: list[str], **blocks: Any) -> str:
    values = loops.names(spec) | dict(
        rows=spec.tile.rows,
        split_first="",
        run_step=spec.tile.rows,
        of_sinks=False,
        programs=0,
        blocks=0,
        name=name,
        parameters=loops.parameters(spec, "d_key", "d_value", "grad", "log_sums", "inners", *own, *loops.axes("grad")),
        key_mask=loops.within(spec, "seen[None, :]", "dim", "feature", "[:, None]"),
        value_mask=loops.within(spec, "seen[:, None]", "value_dim", "value_feature"),
        d_key_mask=loops.within(spec, "inside[:, None]", "dim"),
        d_value_mask=loops.within(spec, "inside[:, None]", "value_dim", "value_feature"),
        query=loops.query(spec),
        grad_tile=grad_tile(spec),
        update=fill(TO_KEYS, loops.names(spec) | {"d_logits": d_logits(spec)}),
    )
    values |= blocks
    values["constants"] = fill(loops.CONSTANTS, values)
    for part in ("owner", "load_keys", "over_queries", "store"):
        values[part] = fill(blocks[part], values)
    return source(name, about(spec, stage), fill(KEY_MAJOR, values))


def keys_of_a_cluster(spec: Spec) -> int:
    """Keys of a program of ``d_routes``."""
    return min(spec.tile.keys, spec.settings.cluster)
