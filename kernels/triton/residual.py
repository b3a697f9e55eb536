"""The residual: what stands in for the clusters that a query may see and does not route to.

``centroids`` writes one row a cluster, its mean key, its mean value and log(count), as
``kernels.centroids`` defines them. The loop over them is one more loop of ``attend`` and ``d_query``;
``d_residual`` owns them in the backward, and ``d_routes`` hands their gradients to the members.

A tile of queries reads blocks of consecutive clusters, and each row leaves out those it routed to. Which these
are, a row says itself: its routes, less the block's first cluster, are bits of a word or two. Nothing is kept
for that but the routes; see docs/triton.md.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from ..reference import Operands
from ..summary import Summary
from . import loops
from .cache import launch, load, strides
from .render import arguments, fill, source
from .spec import Spec, cdiv, power_of_two

MEMBERS = 64
"""Keys that one program of ``centroids`` reads."""
HELD = 64
"""The most routes of a row that a tile holds in registers; more are read again for each block of clusters."""

NARROW = 32
"""Clusters that a program of ``d_residual`` owns, with more than 64 features."""

CENTROIDS = """
def centroids(
    $arguments
):
    DIM: tl.constexpr = $dim
    VALUE_DIM: tl.constexpr = $value_dim
    CLUSTER: tl.constexpr = $cluster
    CLUSTERS: tl.constexpr = $clusters
    program = tl.program_id(0)
    clusters = places // CLUSTER
    blocks = tl.cdiv(clusters, CLUSTERS)
    pair = (program // blocks).to(tl.int64)  # of batch and KV head
    own = program % blocks * CLUSTERS + tl.arange(0, CLUSTERS)
    inside = own < clusters
    place = own[:, None] * CLUSTER + tl.arange(0, CLUSTER)[None, :]
    at = tl.load(order + pair * places + place, mask=inside[:, None], other=-1)
    here = at >= 0
    count = tl.sum(here.to(tl.float32), 1)
    share = 1.0 / tl.maximum(count, 1.0)
    to = pair * clusters + own
    $means
    # A mean that is not finite reaches those that attend it by its bias: no other row reads it.
    finite = finite_key & finite_value
    row_logit = tl.where(finite, tl.log(tl.maximum(count, 1.0)), float("nan"))
    tl.store(rest_bias + to, tl.where(count > 0.0, row_logit, float("-inf")), mask=inside)
"""

MEAN = """
feature = tl.arange(0, $tile)
members = tl.load(
    $of + pair // kv_heads * $strides_b + pair % kv_heads * $strides_h
    + at.to(tl.int64)[:, :, None] * $strides_n + feature[None, None, :],
    mask=here[:, :, None] & (feature < $size)[None, None, :],
    other=0.0,
)
mean = tl.sum(members.to(tl.float32), 1) * share[:, None]
finite = tl.abs(mean) < float("inf")
$all_finite = tl.min(finite.to(tl.int32), 1) != 0
mean = tl.where(finite, mean, 0.0).to($to.dtype.element_ty)
wanted = inside[:, None] & (feature < $size)[None, :]
tl.store($to + to[:, None] * $size + feature[None, :], mean, mask=wanted)
"""

OWN_ROUTES = """
own_routes = routes + ((batch * kv_heads * GROUP + head) * q_len + query_at) * route_count
which = tl.arange(0, $which)  #? held
own_route = tl.load(  #? held
    own_routes[:, None] + which[None, :], mask=live[:, None] & (which < route_count)[None, :], other=-1  #? held
)  #? held
"""

# A row's routes among the block's clusters, as bits.
WORDS = """
near = own_route - $block
bit = 1 << (near & 31)
"""

MORE_WORDS = """
$zeros
for from_route in range(0, route_count, $which):
    which = from_route + tl.arange(0, $which)
    own_route = tl.load(
        own_routes[:, None] + which[None, :], mask=live[:, None] & (which < route_count)[None, :], other=-1
    )
    near = own_route - $block
    bit = 1 << (near & 31)
    $sums
"""

LOOP = """
# Residual: the centroids of the clusters that a query may see and does not route to.
clusters = places // $cluster
centroids_read = finished * $per_chunk  #? causal
centroids_read = clusters  #? not causal
$own_routes
for begin in range($first, centroids_read, $step):
    at = begin + tl.arange(0, $keys)
    seen = at < centroids_read
    row_at = at.to(tl.int64) + pair * clusters
    row_logit = tl.load(rest_bias + row_at, mask=seen, other=float("-inf"))
    seen = row_logit != float("-inf")
    first_key = at // $per_chunk * CHUNK  #? two_sided
    $words
    $body
"""

OWNER = """
clusters = places // $cluster
blocks = tl.cdiv(clusters, KEYS)
pair = (tl.program_id(0) // blocks).to(tl.int64)  # of batch and KV head
split = tl.program_id(1)
begin_cluster = tl.program_id(0) % blocks * KEYS
at = begin_cluster + tl.arange(0, KEYS)
"""

OWNED = """
inside = at < clusters
row_at = pair * clusters + at
row_logit = tl.load(rest_bias + row_at, mask=inside, other=float("-inf"))
seen = row_logit != float("-inf")
key_tile = tl.load(rest_key + row_at[None, :] * DIM + feature[:, None], mask=$key_mask, other=0.0)
value_at = rest_value + row_at[:, None] * VALUE_DIM + value_feature[None, :]
value_tile = tl.load(value_at, mask=$value_mask, other=0.0)
first_key = at // $per_chunk * CHUNK  #? causal
first_key = at // $per_chunk * CHUNK  #? two_sided
# The queries before whose window the first of these clusters is finished.  #? causal
first = (begin_cluster // $per_chunk + 1) * CHUNK + WINDOW - (k_len - q_len)  #? causal
first = 0  #? not causal
stop = q_len
"""

STORE_OWNED = """
to = (split.to(tl.int64) * pairs + pair) * clusters + at
tl.store(d_key + to[:, None] * DIM + feature[None, :], d_key_tile, mask=$d_key_mask)
tl.store(d_value + to[:, None] * VALUE_DIM + value_feature[None, :], d_value_tile, mask=$d_value_mask)
"""

TO_MEMBERS = """
# What the cluster's centroid is given goes to its members in equal parts.
members = seen  #? not in_parts
members = tl.load(order + pair * places + cluster * $cluster + tl.arange(0, $cluster)) >= 0  #? in_parts
share = 1.0 / tl.maximum(tl.sum(members.to(tl.float32), 0), 1.0)
row_at = pair * clusters + cluster
own_key = tl.load(d_rest_key + row_at * DIM + feature, mask=feature < DIM, other=0.0)
own_value = tl.load(d_rest_value + row_at * VALUE_DIM + value_feature, mask=value_feature < VALUE_DIM, other=0.0)
d_key_tile += (own_key * share)[None, :]
d_value_tile += (own_value * share)[None, :]
"""


def narrow(spec: Spec) -> Spec:
    """The same with the clusters that one program of ``d_residual`` owns: 64 of 128 features spill registers."""
    keys = min(spec.tile.keys, NARROW) if max(spec.dim, spec.value_dim) > 64 else spec.tile.keys
    return replace(spec, tile=replace(spec.tile, keys=keys))


def loop(spec: Spec, update: str) -> str:
    """The loop over the centroids that a tile's queries may see."""
    if not loops.residual(spec):
        return ""
    body = loops.step(
        spec, update, source="rest", index="at", seen="seen", pairs=pairs(spec, False), choose=unread(spec)
    )
    parts = loops.names(spec) | {
        "own_routes": own_routes(spec),
        "words": words(spec, "begin"),
        "first": f"split * {spec.tile.keys}" if spec.splits > 1 else "0",
        "body": body,
    }
    return fill(LOOP, parts)


def pairs(spec: Spec, owned: bool) -> str:
    """Which pairs of row and centroid count. Queries of a causal tile see the same clusters."""
    found = "seen[None, :] & unread"
    if spec.causal and owned:
        found += " & (first_key[None, :] < low[:, None])"
    if loops.two_sided(spec):
        found += " & ((first_key[None, :] < low[:, None]) | (first_key[None, :] >= high[:, None]))"
    return found


def words(spec: Spec, block: str) -> str:
    """Lines that find which of a block's clusters each row routed to; ``block`` is the first of them."""
    names = range(cdiv(spec.tile.keys, 32))
    sums = [f"tl.sum(tl.where((near >> 5) == {word}, bit, 0), 1)" for word in names]
    said = "# A row's routes among these clusters are bits of words."
    if held(spec):
        found = "\n".join(f"routed_{word} = {text}" for word, text in enumerate(sums))
        return f"{said}\n{fill(WORDS, {'block': block})}\n{found}"
    parts = {
        "zeros": "\n".join(f"routed_{word} = tl.zeros([ROWS], tl.int32)" for word in names),
        "sums": "\n".join(f"routed_{word} += {text}" for word, text in enumerate(sums)),
        "which": HELD,
        "block": block,
    }
    return f"{said}\n{fill(MORE_WORDS, parts)}"


def unread(spec: Spec) -> str:
    """Lines that find ``unread`` ``[ROWS, KEYS]``: the clusters that a row did not route to."""
    count = cdiv(spec.tile.keys, 32)
    text = f"routed_{count - 1}[:, None]"
    for word in reversed(range(count - 1)):
        text = f"tl.where((column < {32 * (word + 1)})[None, :], routed_{word}[:, None], {text})"
    column = f"column = tl.arange(0, {spec.tile.keys})"
    return f"{column}\nrouted = {text}\nunread = ((routed >> (column % 32)[None, :]) & 1) == 0"


def own_routes(spec: Spec) -> str:
    """Lines that find the routes of each row."""
    return fill(OWN_ROUTES, {"which": held(spec), "held": held(spec)})


def held(spec: Spec) -> int:
    """Routes of a row that are held in registers, a power of two; 0: they are too many."""
    wide = power_of_two(spec.settings.routes)
    return wide if wide <= HELD else 0


@functools.cache
def centroids_source(spec: Spec) -> str:
    """Source of ``centroids``."""
    given = ["key", "value", "order", "rest_key", "rest_value", "rest_bias"]
    given += ["key_b", "key_h", "key_n", "value_b", "value_h", "value_n", "kv_heads", "places"]
    names = loops.names(spec)
    parts = names | dict(arguments=arguments(given), clusters=_clusters(spec))
    means = [("key", names["dim_tile"], "DIM"), ("value", names["value_tile"], "VALUE_DIM")]
    parts["means"] = "\n".join(fill(MEAN, _mean(what, tile, size)) for what, tile, size in means)
    about = {"plan": spec.plan, "stage": "attend, the centroids of clusters"}
    return source("centroids", about, fill(CENTROIDS, parts))


def centroids(spec: Spec, site: Operands, summary: Summary) -> dict[str, Any]:
    """The centroids as the values that ``loops.parameters`` names; ``site`` has its features last in memory."""
    key, value = site.key, site.value
    order = summary.order.contiguous()
    clusters = order.shape[2] // spec.settings.cluster
    size = (key.shape[0], key.shape[1], clusters)
    rest = dict(
        rest_key=key.new_empty((*size, key.shape[3])),
        rest_value=value.new_empty((*size, value.shape[3])),
        rest_bias=key.new_empty(size, dtype=torch.float32),
    )
    values = strides("key", key) | strides("value", value) | dict(
        key=key, value=value, order=order,
        kv_heads=key.shape[1], places=order.shape[2],
    )  # fmt: skip
    grid = (size[0] * size[1] * cdiv(clusters, _clusters(spec)),)
    warps = 4 if max(spec.dim, spec.value_dim) <= 128 else 8
    launch(load(centroids_source(spec), "centroids"), grid, values | rest, warps=warps, stages=1)
    return rest


def _clusters(spec: Spec) -> int:
    """Clusters of one program of ``centroids``."""
    return max(1, MEMBERS // spec.settings.cluster)


def _mean(what: str, tile: int, size: str) -> dict[str, Any]:
    named = {f"strides_{axis}": f"{what}_{axis}" for axis in "bhn"}
    return named | {"of": what, "to": f"rest_{what}", "all_finite": f"finite_{what}", "tile": tile, "size": size}
