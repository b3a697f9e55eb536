"""The parts that the attention kernels share: a tile of queries, and the loops over what it reads.

Inside every template the same names hold. A tile has ``ROWS`` rows, each one query of one head of
the group: ``member``, ``query_at``, ``position`` (among the keys), ``head``, ``live`` are vectors
over rows. A step reads some keys: ``at`` (their places), ``seen`` (which of them are read) are
vectors over keys; ``key_tile`` ``[DIM_TILE, keys]`` and ``value_tile`` ``[keys, VALUE_TILE]`` are
what they hold, and ``logits`` ``[ROWS, keys]`` counts in powers of two, so that the weight of a
pair is ``exp2`` of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from .render import arguments, fill
from .spec import Spec, parameter, power_of_two


def names(spec: Spec) -> dict[str, Any]:
    """What templates may ask of a spec: numbers, and what is true of it."""
    plan = spec.settings
    return dict(
        dim=spec.dim,
        value_dim=spec.value_dim,
        dim_tile=max(16, power_of_two(spec.dim)),
        value_tile=max(16, power_of_two(spec.value_dim)),
        group=spec.group,
        queries=spec.queries,
        head_parts=spec.head_parts,
        in_head_parts=spec.head_parts > 1,
        heads=spec.heads if spec.head_parts > 1 else "GROUP",
        of_queries=f"(tile // {spec.head_parts})" if spec.head_parts > 1 else "tile",
        rows=spec.rows,
        keys=spec.tile.keys,
        step=spec.tile.keys * spec.splits,
        splits=spec.splits,
        tiles_a_chunk=spec.tiles_a_chunk,
        chunk=plan.chunk,
        window=plan.window,
        cluster=plan.cluster,
        sinks=plan.sinks,
        keep=plan.keep,
        segment_rows=plan.rows_per_segment,
        words=spec.words,
        causal=spec.causal,
        aligned=spec.aligned,
        windowed=spec.windowed,
        two_sided=two_sided(spec),
        has_window=has_window(spec),
        has_rows=has_rows(spec),
        routes=spec.routes,
        per_chunk=plan.chunk // plan.cluster,
        copies=copies(spec),
        centroids=plan.centroids,
        valid=spec.valid,
        split=spec.splits > 1,
        lifted=bool(spec.lifted.allowed or spec.lifted.bias),
        bounded=bool(spec.lifted.loads or spec.lifted.bias),  # what is read, or added, must be there
        allowed=spec.lifted.allowed,
        query_low="" if spec.windowed else spec.lifted.query_low,
        query_high="" if spec.windowed else spec.lifted.query_high,
        bias=spec.lifted.bias,
        softcap=spec.softcap,
        sink_logit=spec.sink_logit,
        precision=precision(spec),
    )


def two_sided(spec: Spec) -> bool:
    """The window begins and ends at places that differ from query to query."""
    return spec.windowed and not spec.causal and has_window(spec)


def has_window(spec: Spec) -> bool:
    return spec.causal or spec.settings.window != 0


def has_rows(spec: Spec) -> bool:
    return spec.windowed and bool(spec.settings.sinks or spec.settings.rows_per_segment)


def copies(spec: Spec) -> bool:
    """A routed key may also stand in a row."""
    return spec.routes and has_rows(spec) and bool(spec.settings.keep)


def residual(spec: Spec) -> bool:
    """The clusters that a query does not route to stand in as centroids."""
    return spec.routes and spec.windowed and spec.settings.residual


def precision(spec: Spec) -> str:
    """How float32 products are made: in three TF32 passes where there are tensor cores for that."""
    return wide_precision(spec.target) if spec.dtype == "float32" else ""


def wide_precision(target: str) -> str:
    """What ``tl.dot`` is told of two float32 factors."""
    return ', input_precision="tf32x3"' if target == "cuda" else ""


def parameters(spec: Spec, *own: str) -> str:
    """The kernel's parameters: those that its plan and mask need, after its own."""
    found = [*own, "query", "key", "value"]
    found += ["valid"] * (spec.valid and has_window(spec))
    if has_rows(spec):
        found += ["row_key", "row_value", "row_index", *["row_bias"] * bool(spec.settings.centroids)]
    if spec.routes:
        found += ["order", "listed", "listed_rows", "listed_count", *["copies"] * copies(spec)]
    found += ["routes", "rest_key", "rest_value", "rest_bias"] * residual(spec)
    loads, strides = mask_parameters(spec)
    found += loads
    found += [f"{name}_{axis}" for name in ("query", "key", "value") for axis in ("b", "h", "n")]
    found += ["valid_b", "valid_n"] * (spec.valid and has_window(spec))
    found += strides
    found += ["kv_heads", "q_len", "k_len", *["first_block"] * spec.aligned]
    found += ["row_count"] * has_rows(spec) + ["places", "list_size"] * spec.routes
    found += ["route_count"] * residual(spec)
    return arguments([*found, "tiles", "scale"])


def mask_parameters(spec: Spec) -> tuple[list[str], list[str]]:
    """Of the tensors that a lifted mask reads, and of their strides."""
    strides = [f"{parameter(name)}_{axis}" for name, axes in spec.lifted.loads for axis in range(axes)]
    return [parameter(name) for name, _ in spec.lifted.loads], strides


def mask_values(spec: Spec, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The values of ``mask_parameters``.

    Raises:
        ValueError: a tensor that the mask reads is not there, or has other axes.
    """
    values: dict[str, Any] = {}
    for name, axes in spec.lifted.loads:
        if name not in tensors or tensors[name].dim() != axes:
            got = f"{tensors[name].dim()} axes" if name in tensors else "nothing"
            raise ValueError(f"{name}: got {got}; allowed: a tensor of {axes} axes, which the mask reads")
        values[parameter(name)] = tensors[name]
        values |= {f"{parameter(name)}_{axis}": tensors[name].stride(axis) for axis in range(axes)}
    return values


CONSTANTS = """
# What is fixed in this source. A tile holds QUERIES queries times the GROUP heads of one KV head.  #? not in_head_parts
# What is fixed in this source. A tile holds QUERIES queries times $heads of a KV head's GROUP heads.  #? in_head_parts
DIM: tl.constexpr = $dim
VALUE_DIM: tl.constexpr = $value_dim
DIM_TILE: tl.constexpr = $dim_tile
VALUE_TILE: tl.constexpr = $value_tile
GROUP: tl.constexpr = $group
QUERIES: tl.constexpr = $queries
ROWS: tl.constexpr = $rows
KEYS: tl.constexpr = $keys
CHUNK: tl.constexpr = $chunk  #? windowed
WINDOW: tl.constexpr = $window  #? windowed
LOG2E: tl.constexpr = 1.4426950408889634
"""

TILE = """
program = tl.program_id(0)
pair = (program // tiles).to(tl.int64)  # of batch and KV head
batch = pair // kv_heads
kv_head = pair % kv_heads
tile = program % tiles  #? not causal
tile = tiles - 1 - program % tiles  #? causal
split = tl.program_id(1)  #? split

member = tl.arange(0, ROWS)
# Between two borders at which the window moves, all queries see the same finished chunks.  #? aligned
block = first_block + $of_queries // $tiles_a_chunk  #? aligned
part = $of_queries % $tiles_a_chunk  #? aligned
first_position = WINDOW + block * CHUNK + part * QUERIES  #? aligned
first_query = first_position - (k_len - q_len)  #? aligned
wanted = tl.minimum(QUERIES, CHUNK - part * QUERIES)  #? aligned
first_query = $of_queries * QUERIES  #? not aligned
first_position = first_query + k_len - q_len  #? causal and not aligned
wanted = QUERIES  #? not aligned
query_at = first_query + member // $heads
head = kv_head * GROUP + member % $heads  #? not in_head_parts
of_group = tile % $head_parts * $heads + member % $heads  #? in_head_parts
head = kv_head * GROUP + of_group  #? in_head_parts
live = (member < wanted * $heads) & (query_at >= 0) & (query_at < q_len)
live = live & (of_group < GROUP)  #? in_head_parts
"""

BORDERS = """
# The window's first key, and how many chunks are finished before it.  #? aligned
finished = tl.maximum(block, 0)  #? aligned
low = finished * CHUNK  #? aligned
position = query_at + (k_len - q_len)  #? causal
low = tl.maximum(query_at - WINDOW, 0) // CHUNK * CHUNK  #? two_sided
high = tl.minimum(((query_at + WINDOW) // CHUNK + 1) * CHUNK, k_len)  #? two_sided
finished = tl.cdiv(k_len, CHUNK)  #? windowed and not causal
"""

OPERANDS = """
feature = tl.arange(0, DIM_TILE)
value_feature = tl.arange(0, VALUE_TILE)
key_head = key + batch * key_b + kv_head * key_h
value_head = value + batch * value_b + kv_head * value_h
$query
"""

QUERY = """
b = batch  #? lifted
h = head[:, None]  #? lifted
q = query_at[:, None]  #? lifted and not bounded
q = tl.minimum(tl.maximum(query_at, 0), q_len - 1)[:, None]  #? bounded
query_tile = tl.load(
    query + batch * query_b + (head * query_h + query_at.to(tl.int64) * query_n)[:, None] + feature[None, :],
    mask=$query_mask,
    other=0.0,
)
"""

SCORE = """
logits = tl.dot(query_tile, key_tile$precision) * (scale * LOG2E)  #? not softcap
$cap  #? softcap
k = $index[None, :]  #? lifted and not bounded
k = tl.minimum(tl.maximum($index, 0), k_len - 1)[None, :]  #? bounded
logits += tl.cast($bias, tl.float32) * LOG2E  #? bias
"""

# tanh of a logit's share of the softcap, from Cephes' tanhf: near 0 by a polynomial, where the other form would
# be a difference of two numbers near 1 and lose the logit.
CAP = """
ratio = tl.dot(query_tile, key_tile$precision) * (scale / $softcap)
square = ratio * ratio
near = -5.37397155531e-2 + square * (2.06390887954e-2 - square * 5.70498872745e-3)
near = -3.33332819422e-1 + square * (1.33314422036e-1 + square * near)
far = 1.0 - 2.0 / (tl.exp2(ratio * (2.0 * LOG2E)) + 1.0)
capped = tl.where(square < 0.390625, ratio + ratio * square * near, far)
logits = capped * ($softcap * LOG2E)
"""

MASK = """
$choose
logits = tl.where($pairs, logits, float("-inf"))  #? pairs
logits = tl.where($allowed, logits, float("-inf"))  #? allowed
"""

# A value that is not finite must not reach the queries that do not attend it, and 0 * NaN is NaN:
# it becomes a logit that is NaN, which is masked as any other.
TAINT = """
wide_value = value_tile.to(tl.float32)
finite = tl.abs(wide_value) < float("inf")
logits = tl.where((tl.min(finite.to(tl.int32), 1) == 0)[None, :], float("nan"), logits)
value_tile = tl.where(finite, wide_value, 0.0).to(value_tile.dtype)
"""

BIAS = "\nlogits += (row_logit * LOG2E)[None, :]"

STEP = """
key_at = $key_at + feature[:, None]
value_at = $value_at + value_feature[None, :]
key_tile = tl.load(key_at$key_mask)
value_tile = tl.load(value_at$value_mask)
$score
$taint
$mask
$update
"""

TWO_SIDED_ENDS = """
start = tl.maximum(first_query - WINDOW, 0) // CHUNK * CHUNK
stop = tl.minimum(((first_query + QUERIES - 1 + WINDOW) // CHUNK + 1) * CHUNK, k_len)
"""

CAUSAL_ENDS = """
start = low  #? aligned
start = 0  #? not aligned
stop = tl.minimum(first_position + wanted, k_len)
# A tile past the sequence's end begins after its last key.
whole = start + tl.maximum(tl.minimum(first_position + 1, stop) - start, 0) // KEYS * KEYS
"""

EVERY_KEY = """
start = 0
whole = k_len // KEYS * KEYS
stop = k_len
"""

WHOLE_WINDOW = """
# Window: the keys that all queries of the tile see.
for begin in range($first, whole, $step):
    at = begin + tl.arange(0, KEYS)
    seen = tl.load(valid + batch * valid_b + at.to(tl.int64) * valid_n) != 0  #? valid
    $body
"""

OWN_WINDOW = """
# Window: the keys that each query sees for itself.
for begin in range($first, stop, $step):
    at = begin + tl.arange(0, KEYS)
    seen = at < stop
    seen = seen & (tl.load(valid + batch * valid_b + at.to(tl.int64) * valid_n, mask=seen, other=0) != 0)  #? valid
    $body
"""

BAND = """
# The band: what queries attend lies from start to stop, and all of them attend what lies from inside to whole.
last_query = tl.minimum(first_query + wanted, q_len) - 1
stop = k_len
whole = k_len
stop = tl.minimum(stop, first_position + wanted)  #? causal
whole = tl.minimum(whole, first_position + 1)  #? causal
start = 0  #? not low
inside = 0  #? not low
start = tl.maximum($first_low, 0) // KEYS * KEYS  #? low
inside = tl.maximum(tl.cdiv(tl.maximum($last_low, 0), KEYS) * KEYS, start)  #? low
stop = tl.minimum(stop, $last_high + 1)  #? high
whole = tl.minimum(whole, $first_high + 1)  #? high
whole = tl.maximum(whole // KEYS * KEYS, inside)
for begin in range(inside$whole_first, whole, $step):
    at = begin + tl.arange(0, KEYS)
    seen = tl.load(valid + batch * valid_b + at.to(tl.int64) * valid_n) != 0  #? valid
    $whole_body
before = (inside - start) // KEYS
for number in range($split, before + tl.cdiv(tl.maximum(stop - whole, 0), KEYS), $splits):
    begin = start + number * KEYS
    begin += tl.where(number < before, 0, whole - inside)
    at = begin + tl.arange(0, KEYS)
    seen = at < stop
    seen = seen & (tl.load(valid + batch * valid_b + at.to(tl.int64) * valid_n, mask=seen, other=0) != 0)  #? valid
    $own_body
"""

ROWS = """
at = begin + tl.arange(0, $size)
seen = at < $end
row_at = at.to(tl.int64) + pair * row_count
index = tl.load(row_index + row_at, mask=seen, other=-1)
row_logit = tl.load(row_bias + row_at, mask=seen, other=float("-inf"))  #? centroids
seen = row_logit > float("-inf")  #? centroids
seen = index >= 0  #? not centroids
seen = seen & (index < low)  #? aligned
$body
"""

ALL_ROWS = """
# Rows: the first keys of the sequence, where a chunk is finished.  #? sinks
sinks_read = tl.where(finished > 0, $sinks, 0)  #? sinks
for begin in range($sinks_first, sinks_read, $sinks_step):  #? sinks
    $sinks_body

# Rows: selected keys and centroids of the segments that the finished chunks split into.  #? segment_rows
left = finished  #? segment_rows
while left > 0:  #? segment_rows
    start = $sinks + (left - 1) * $segment_rows  #? segment_rows
    for begin in range(start$rows_first, start + $segment_rows, $rows_step):  #? segment_rows
        $rows_body
    left = left & (left - 1)  #? segment_rows
"""

ROUTES = """
# Routes: the clusters that any query of the tile attends; each query attends its own.
list_at = (pair * tiles + tile) * list_size
count = tl.load(listed_count + pair * tiles + tile)
count *= $parts  #? in_parts
for begin in range($first, count, $routes_step):
    slot = begin + tl.arange(0, KEYS) // $cluster  #? not in_parts
    there = slot < count  #? not in_parts
    slot = begin // $parts + tl.zeros([KEYS], tl.int32)  #? in_parts
    there = slot >= 0  #? in_parts
    cluster = tl.load(listed + list_at + slot, mask=there, other=0)
    place = tl.arange(0, KEYS) % $cluster  #? not in_parts
    place = begin % $parts * KEYS + tl.arange(0, KEYS)  #? in_parts
    at = tl.load(order + pair * places + cluster * $cluster + place, mask=there, other=-1)
    seen = at >= 0
    # A key that was selected in the segment that covers it stands in a row.  #? copies
    level = (tl.maximum(at, 0) // CHUNK) ^ finished  #? copies
    $highest
    stands = tl.load(copies + pair * (k_len + 1) + at, mask=seen, other=0)  #? copies
    seen = seen & ((stands & level) == 0)  #? copies
    $words
    $body
"""

CHOSEN = """
# Each row has one bit in a word of its cluster.  #? not together
# The rows of a query have one bit in a word of their cluster.  #? together
word = $word
chosen = ((word >> ($chooser % 32)[:, None]) & 1) != 0
"""


def constants(spec: Spec) -> str:
    return fill(CONSTANTS, names(spec))


def tile(spec: Spec, **changed: Any) -> str:
    """``changed``: names that are otherwise than ``names`` says."""
    return fill(TILE, names(spec) | changed)


def borders(spec: Spec) -> str:
    return fill(BORDERS, names(spec))


def operands(spec: Spec) -> str:
    return fill(OPERANDS, {"query": query(spec)} | names(spec))


def query(spec: Spec) -> str:
    """The tile of queries, and where they are in a mask."""
    return fill(QUERY, names(spec) | {"query_mask": within(spec, "live[:, None]", "dim")})


def score(spec: Spec, index: str) -> str:
    """``logits`` of a step; ``index`` names the vector of the keys' positions."""
    known = names(spec) | {"index": index}
    return fill(SCORE, known | {"cap": fill(CAP, known) if spec.softcap else ""})


def mask(spec: Spec, pairs: str, choose: str = "", allowed: bool = True) -> str:
    told = {} if allowed else {"allowed": ""}
    return fill(MASK, names(spec) | {"pairs": pairs, "choose": choose} | told)


def highest_bit(name: str) -> str:
    """Only the highest bit of a number is left."""
    return "\n".join([*(f"{name} = {name} | ({name} >> {by})" for by in (1, 2, 4, 8, 16)), f"{name} -= {name} >> 1"])


def step(
    spec: Spec,
    update: str,
    *,
    source: str,
    index: str,
    seen: str,
    pairs: str,
    choose: str = "",
    taint: bool = False,
    allowed: bool = True,
) -> str:
    """Load the keys at ``at``, score them, mask them, and ``update`` what is summed.

    Args:
        source: "key", "row" or "rest" (a centroid of a cluster). index: the vector of their positions in the sequence.
        seen: the vector of those that exist, "" for all. pairs: which pairs count, "" for all.
        choose: lines that compute what ``pairs`` needs.
        taint: a value that is not finite must reach only the pairs that count.
        allowed: the lifted mask may not allow all of them.
    """
    if source in ("row", "rest"):
        key_at, value_at = f"{source}_key + row_at[None, :] * DIM", f"{source}_value + row_at[:, None] * VALUE_DIM"
        bias = BIAS if spec.settings.centroids or source == "rest" else ""
    else:
        key_at = "key_head + at.to(tl.int64)[None, :] * key_n"
        value_at = "value_head + at.to(tl.int64)[:, None] * value_n"
        bias = ""
    parts = dict(
        key_at=key_at,
        value_at=value_at,
        key_mask=_load_mask(seen and f"{seen}[None, :]", inside(spec.dim, "feature < DIM", "[:, None]")),
        value_mask=_load_mask(
            seen and f"{seen}[:, None]", inside(spec.value_dim, "value_feature < VALUE_DIM", "[None, :]")
        ),
        score=score(spec, index) + bias,
        taint=TAINT if taint else "",
        mask=mask(spec, pairs, choose, allowed),
        update=update,
    )
    return fill(STEP, parts)


def window(spec: Spec, update: str, taint: bool) -> str:
    """The loops over the window's keys: those that all of the tile's queries see, then those that some do."""
    if not has_window(spec):
        return ""
    first = "split * KEYS" if spec.splits > 1 else ""
    ends, pairs = _window_ends(spec)
    if two_sided(spec):
        own = step(spec, update, source="key", index="at", seen="seen", pairs=pairs, taint=taint)
        return fill(ends, {}) + "\n" + _loop(OWN_WINDOW, spec, _from("start", first), own)
    seen, of_pairs = "seen" if spec.valid else "", bool(spec.lifted.allowed)
    banded = not spec.windowed and bool(spec.lifted.low or spec.lifted.high)
    cut = of_pairs and not (banded and spec.lifted.only)  # inside of the band, too
    whole = step(
        spec, update, source="key", index="at", seen=seen, pairs=seen and "seen[None, :]", taint=taint and cut,
        allowed=cut,
    )  # fmt: skip
    tainted = taint and (spec.causal or of_pairs)
    own = step(spec, update, source="key", index="at", seen="seen", pairs=pairs, taint=tainted)
    if banded:
        return fill(BAND, names(spec) | _band(spec, first) | {"whole_body": whole, "own_body": own})
    loops = (
        _loop(WHOLE_WINDOW, spec, _from("start", first), whole),
        _loop(OWN_WINDOW, spec, _from("whole", first), own),
    )
    return "\n".join((fill(ends, names(spec)), *loops))


def _window_ends(spec: Spec) -> tuple[str, str]:
    """Where the loops begin and end, and which pairs count in the last of them."""
    if two_sided(spec):
        return TWO_SIDED_ENDS, "seen[None, :] & (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])"
    if spec.causal:
        before = "at[None, :] <= position[:, None]"
        return CAUSAL_ENDS, f"seen[None, :] & ({before})" if spec.valid else before
    return EVERY_KEY, "seen[None, :]"


def _band(spec: Spec, first: str) -> dict[str, Any]:
    """What ``BAND`` needs beside its bodies."""
    ends = {"low": spec.lifted.low, "high": spec.lifted.high}
    of_both = {
        f"{query}_{name}": re.sub(r"\bqueried\b", f"{query}_query", text)
        for name, text in ends.items()
        for query in ("first", "last")
    }
    return ends | of_both | {"whole_first": f" + {first}" if first else "", "split": "split" if first else "0"}


def rows(spec: Spec, update: str, taint: bool) -> str:
    """The loops over sinks, selected keys and centroids."""
    if not has_rows(spec):
        return ""
    plan = spec.settings
    pairs = "seen[None, :]"
    if two_sided(spec):
        pairs += " & ((index[None, :] < low[:, None]) | (index[None, :] >= high[:, None]))"
    # All queries of a tile attend the same rows, and whoever may attend a routed key that is not finite does.
    taint = taint and bool(spec.lifted.allowed)
    body = step(spec, update, source="row", index="index", seen="seen", pairs=pairs, taint=taint)
    sinks, size = row_keys(spec, plan.sinks), row_keys(spec, plan.rows_per_segment)
    split = spec.splits > 1
    parts = names(spec) | {
        "sinks_first": f"split * {sinks}" if split else "0",
        "sinks_step": sinks * spec.splits,
        "sinks_body": fill(ROWS, names(spec) | {"size": sinks, "end": "sinks_read", "body": body})
        if plan.sinks
        else "",
        "rows_first": f" + split * {size}" if split else "",
        "rows_step": size * spec.splits,
        "rows_body": "",
    }
    if plan.rows_per_segment:
        end = f"start + {plan.rows_per_segment}"
        parts["rows_body"] = fill(ROWS, names(spec) | {"size": size, "end": end, "body": body})
    return fill(ALL_ROWS, parts)


def row_keys(spec: Spec, count: int) -> int:
    """Rows of one step, where ``count`` lie together."""
    return min(spec.tile.keys, max(16, power_of_two(count)))


def routes(spec: Spec, update: str, taint: bool) -> str:
    """The loop over the tile's clusters."""
    if not spec.routes:
        return ""
    lines, word = words(spec)
    choose = fill(CHOSEN, {"word": word, "chooser": chooser(spec), "together": spec.together})
    pairs = "chosen & seen[None, :]"
    taint = taint and bool(spec.lifted.allowed)
    body = step(spec, update, source="key", index="at", seen="seen", pairs=pairs, choose=choose, taint=taint)
    # A step has several clusters, or a part of one.
    pack, in_parts = max(spec.tile.keys // spec.settings.cluster, 1), spec.settings.cluster // spec.tile.keys
    parts = names(spec) | {
        "first": f"split * {pack}" if spec.splits > 1 else "0",
        "routes_step": pack * spec.splits,
        "parts": in_parts,
        "in_parts": in_parts > 1,
        "highest": highest_bit("level") if copies(spec) else "",
        "words": lines,
        "body": body,
    }
    return fill(ROUTES, parts)


def words(spec: Spec) -> tuple[str, str]:
    """Lines that load the words of each listed cluster, and ``[ROWS, KEYS]``: the word that holds a row's bit."""
    at = f"listed_rows + (list_at + slot) * {spec.words}"
    lines = [f"word_{word} = tl.load({at} + {word}, mask=there, other=0)" for word in range(spec.words)]
    text = f"word_{spec.words - 1}[None, :]"
    for word in reversed(range(spec.words - 1)):
        text = f"tl.where(({chooser(spec)} < {32 * (word + 1)})[:, None], word_{word}[None, :], {text})"
    return "\n".join(lines), text


def chooser(spec: Spec) -> str:
    """The number of the chooser (``Spec.choosers``) that a row is, or belongs to."""
    heads = names(spec)["heads"]
    return f"(member // {heads})" if spec.together else "member"


def _loop(template: str, spec: Spec, first: str, body: str) -> str:
    return fill(template, names(spec) | {"first": first, "body": body})


def _from(start: str, offset: str) -> str:
    return f"{start} + {offset}" if offset else start


def inside(size: int, text: str, axes: str) -> str:
    """The mask of features, where a tile is wider than they are."""
    return "" if size == max(16, power_of_two(size)) else f"({text}){axes}"


def within(spec: Spec, first: str, size: str, feature: str = "feature", axes: str = "[None, :]") -> str:
    """The mask ``first``, and of the features those that there are: ``size``, a field of the spec, of them."""
    return all_of(first, inside(getattr(spec, size), f"{feature} < {size.upper()}", axes))


def axes(name: str) -> list[str]:
    """The parameters that ``cache.strides`` gives."""
    return [f"{name}_{axis}" for axis in "bhn"]


def all_of(*masks: str) -> str:
    return " & ".join(mask for mask in masks if mask)


def _load_mask(*masks: str) -> str:
    found = all_of(*masks)
    return f", mask={found}, other=0.0" if found else ""
