"""Cluster on a GPU: one program a chunk cuts it into balanced clusters and describes each of them.

The tree of ``kernels.clusterings.pca_tree``, level by level. No copy of a chunk is held: a level works on
``AT_ONCE`` numbers, a few of its parts at once or a part in blocks of its keys, which are loaded again for
each step of the power iteration. So the chunk comes from memory once, and from the caches after that, widened from
16 bits and centred on the way. A part's covariance is never made: a step of the power iteration is the two
products ``centred^T (centred direction)`` of a matrix and a vector, 4 L D flops a level where the
covariance alone would be 2 L D^2. A part is ordered by a sorting
network on numbers of 64 bits: the coordinate, then the place (so that equal keys keep their order), then the key.

On NVIDIA's GPUs, a chunk of 16-bit keys that fits in shared memory is projected on tensor cores: see ``projection``.

A chunk of more than ``CHUNK`` keys takes ``summary.clusters``, whose torch operations are linear in n as well.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ..clusterings.pca_tree import POWER_ITERATIONS
from ..layout import chunk_count
from ..plan import Plan
from . import device, projection
from .cache import features_last, launch, load, strides
from .network import exchange, in_loop
from .render import arguments, fill, source
from .spec import DTYPES, MOST_FEATURES, SummarySpec, power_of_two

CHUNK = 256
"""Keys of the largest chunk."""
WARPS = 8
AT_ONCE = 4096
"""Numbers that are held at once for a step of the power iteration, 16 registers a lane for each copy. Twice as many
spill."""
HELD = 64
"""Numbers that a lane holds where clusters are described."""

KERNEL = """
def cluster(
    $arguments
):
    DIM: tl.constexpr = $dim
    VALUE_DIM: tl.constexpr = $value_dim
    CHUNK: tl.constexpr = $chunk
    CLUSTER: tl.constexpr = $cluster
    CLUSTERS: tl.constexpr = $clusters
    program = tl.program_id(0)
    pair = (program // chunks).to(tl.int64)  # of batch and KV head
    chunk = program % chunks
    key_head = key + pair // kv_heads * key_b + pair % kv_heads * key_h
    value_head = value + pair // kv_heads * value_b + pair % kv_heads * value_h
    piece = pieces + pair * k_len * DIM  #? more
    members = member + pair // kv_heads * k_len  #? valid
    order = chunk * CHUNK + tl.arange(0, CHUNK)
    $levels

    # Each cluster: its keys, their mean and spread, and whether all of it is finite; some features at a time, and the
    # keys of a cluster along the first axis, so that one lane has most of what it sums.
    at = tl.trans(tl.reshape(order, [CLUSTERS, CLUSTER]))
    $here
    count = tl.sum(here.to(tl.float32), 0)
    factor = $spread_factor * tl.log(tl.maximum(count, 1.0)) / tl.maximum(count, 1.0)
    own = chunk * CLUSTERS + tl.arange(0, CLUSTERS)
    place = own[None, :] * CLUSTER + tl.arange(0, CLUSTER)[:, None]
    tl.store(order_out + pair * chunks * CHUNK + place, tl.where(here, at, -1))
    own += pair * chunks * CLUSTERS
    taint = tl.zeros([CLUSTER, CLUSTERS], tl.float32)  # 0 * x is NaN for what is not finite
    for begin in range(0, $dim_tile, $features):
        feature = begin + tl.arange(0, $features)
        $points
        taint += tl.sum(points * 0.0, 2)
        mean_tile = tl.sum(points, 0) / tl.maximum(count, 1.0)[:, None]
        off = tl.where(here[:, :, None], points - mean_tile[None, :, :], 0.0)
        to = own[:, None] * DIM + feature[None, :]
        inside = tl.broadcast_to((feature < DIM)[None, :], [CLUSTERS, $features])
        tl.store(mean + to, mean_tile, mask=inside)
        tl.store(spread + to, tl.sum(off * off, 0) * factor[:, None], mask=inside)
    for begin in range(0, $value_tile, $value_features):
        feature = begin + tl.arange(0, $value_features)
        values = tl.load(
            value_head + at.to(tl.int64)[:, :, None] * value_n + feature[None, None, :],
            mask=here[:, :, None] & (feature < VALUE_DIM)[None, None, :],
            other=0.0,
        ).to(tl.float32)
        taint += tl.sum(values * 0.0, 2)
    tl.store(bias + own, tl.where(count > 0, tl.sum(taint, 0), float("-inf")))
"""

POINTS = """
$here
points = tl.load(
    key_head + at.to(tl.int64)[:, :, None] * key_n + feature[None, None, :],
    mask=here[:, :, None] & (feature < DIM)[None, None, :],
    other=0.0,
).to(tl.float32)
"""

HERE = """
here = (at < k_len) & (at >= $sinks)  #? not valid
here = tl.load(members + at, mask=at < k_len, other=0) != 0  #? valid
"""

# Of the key that is farthest from the centre; ``at_most`` is one more than its place, 0: the part has no key.
DIRECTION = """
direction = tl.load(
    key_head + (at_most - 1).to(tl.int64)[:, None] * key_n + feature[None, :],
    mask=(at_most > 0)[:, None] & (feature < DIM)[None, :],
    other=0.0,
).to(tl.float32)
direction = tl.where((at_most > 0)[:, None], direction - centre, 0.0)
"""

# A function of its own, so that its names are its own at every level.
COORDINATES = """def coordinates($given, PART: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    # Where each key lies along the direction in which its part of PART keys is widest: PARTS parts at a time, or
    # one, BLOCK of its keys at a time.
    DIM: tl.constexpr = $dim
    CHUNK: tl.constexpr = $chunk
    BLOCKS: tl.constexpr = PART // BLOCK
    TILES: tl.constexpr = CHUNK // (PARTS * BLOCK)
    feature = tl.arange(0, $dim_tile)
    all_at = tl.reshape(order, [TILES, PARTS, BLOCK])
    which = tl.arange(0, TILES)[:, None, None]
    place = tl.arange(0, BLOCK)
    all_along = tl.zeros([TILES, PARTS, BLOCK], tl.float32)
    for first in range(0, TILES, BLOCKS):
        if BLOCKS == 1:
            at = tl.sum(tl.where(which == first, all_at, 0), 0)
            $points
            count = tl.maximum(tl.sum(here.to(tl.float32), 1), 1.0)
            centre = tl.sum(points, 1) / count[:, None]
            points = tl.where(here[:, :, None], points - centre[:, None, :], 0.0)
            farthest = tl.argmax(tl.sum(points * points, 2), 1)
            at_most = tl.sum(tl.where(here & (place[None, :] == farthest[:, None]), at + 1, 0), 1)
            $direction
            along = tl.zeros([PARTS, BLOCK], tl.float32)
            for step in range(0, $steps + 1):
                direction /= tl.maximum(tl.sqrt(tl.sum(direction * direction, 1)), 1e-12)[:, None]
                along = tl.sum(points * direction[:, None, :], 2)
                direction = tl.sum(points * along[:, :, None], 1)
            all_along = tl.where(which == first, along[None, :, :], all_along)
        else:
            count = tl.zeros([PARTS], tl.float32)
            centre = tl.zeros([PARTS, $dim_tile], tl.float32)
            for block in range(first, first + BLOCKS):
                at = tl.sum(tl.where(which == block, all_at, 0), 0)
                $points
                count += tl.sum(here.to(tl.float32), 1)
                centre += tl.sum(points, 1)
            centre /= tl.maximum(count, 1.0)[:, None]
            most = tl.full([PARTS], -1.0, tl.float32)
            at_most = tl.zeros([PARTS], tl.int32)
            for block in range(first, first + BLOCKS):
                at = tl.sum(tl.where(which == block, all_at, 0), 0)
                $points
                points = tl.where(here[:, :, None], points - centre[:, None, :], 0.0)
                far = tl.sum(points * points, 2)
                farthest = tl.argmax(far, 1)
                its = tl.sum(tl.where(here & (place[None, :] == farthest[:, None]), at + 1, 0), 1)
                at_most = tl.where(tl.max(far, 1) > most, its, at_most)
                most = tl.maximum(most, tl.max(far, 1))
            $direction
            for step in range(0, $steps + 1):
                direction /= tl.maximum(tl.sqrt(tl.sum(direction * direction, 1)), 1e-12)[:, None]
                following = tl.zeros([PARTS, $dim_tile], tl.float32)
                for block in range(first, first + BLOCKS):
                    at = tl.sum(tl.where(which == block, all_at, 0), 0)
                    $points
                    points = tl.where(here[:, :, None], points - centre[:, None, :], 0.0)
                    along = tl.sum(points * direction[:, None, :], 2)
                    following += tl.sum(points * along[:, :, None], 1)
                    all_along = tl.where(which == block, along[None, :, :], all_along)
                direction = following
    return tl.reshape(all_along, [CHUNK])


@triton.jit
"""

ORDERED = """def ordered(order, along, here, log):
    # The keys of each part of 2^log by where they lie; what is no member comes last, but before NaN.
    CHUNK: tl.constexpr = $chunk
    place = tl.arange(0, CHUNK)
    # Floats as integers of the same order.
    along = tl.where(along == 0.0, 0.0, along)
    bits = tl.where(here, along, float("inf")).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 2147483647, bits)
    bits = tl.where(here & (along != along), 2147483647, bits)
    number = (bits.to(tl.int64) << 32) | (place * CHUNK + order % CHUNK)
    number = tl.reshape(number, [1] + [2] * $log)
    place = tl.reshape(place, [1] + [2] * $log)
    $sorted
    return order // CHUNK * CHUNK + tl.reshape((number & (CHUNK - 1)).to(tl.int32), [CHUNK])


@triton.jit
"""

LEVEL = """

# Halve each part of $part keys along the direction in which it is widest.
at = order
$here
order = ordered(order, coordinates($given, $part, $together, $block), here, $part_log)
"""


@dataclass(frozen=True, kw_only=True)
class ClusterSpec(SummarySpec):
    """What the source depends on; ``target``: ``cuda`` or ``hip``; ``small``: see ``device.is_small``."""

    dtype: str
    target: str
    small: bool = False

    @property
    def on_tensor_cores(self) -> bool:
        """Whether keys are projected by products of matrices."""
        return projection.fits(self.dtype, self.target, self.small, self.settings.chunk, tile_of(self.dim))

    @property
    def in_pieces(self) -> bool:
        """Whether each number of a key is the sum of several that tensor cores take: ``projection.pieces``."""
        return self.on_tensor_cores and projection.PIECES[self.dtype] > 1

    @property
    def warps(self) -> int:
        """Of a program."""
        if not self.on_tensor_cores:
            return WARPS
        few = projection.numbers(self.dtype, self.settings.chunk, tile_of(self.dim)) <= projection.MANY
        return WARPS // 2 if few else WARPS

    @property
    def keys(self) -> int:
        """Keys of which all features are held at once."""
        return min(self.settings.chunk, AT_ONCE // tile_of(self.dim))

    @property
    def features(self) -> int:
        """Features that are held at once of all keys."""
        return max(16, HELD * 32 * self.warps // self.settings.chunk)


def fits(plan: Plan, dim: int, value_dim: int) -> bool:
    """Whether a chunk fits on chip and is clustered by the tree, which is the one clustering written for it."""
    return plan.clustering == "pca_tree" and plan.chunk <= CHUNK and max(dim, value_dim) <= MOST_FEATURES


def tile_of(dim: int) -> int:
    """Features of a tile: a power of two."""
    return max(16, power_of_two(dim))


@functools.cache
def cluster_source(spec: ClusterSpec) -> str:
    """Source of ``cluster``."""
    plan = spec.settings
    more = spec.in_pieces
    names = ["key", *["pieces", "piece_size"] * more, "value", *["member"] * spec.valid, "order_out", "mean", "spread"]
    names += ["bias", "key_b", "key_h", "key_n", "value_b", "value_h", "value_n", "kv_heads", "k_len", "chunks"]
    parts: dict[str, Any] = dict(
        arguments=arguments(names),
        dim=spec.dim,
        value_dim=spec.value_dim,
        dim_tile=tile_of(spec.dim),
        value_tile=tile_of(spec.value_dim),
        chunk=plan.chunk,  # a power of two: a cluster is 16, 32 or 64 keys
        cluster=plan.cluster,
        clusters=plan.chunk // plan.cluster,
        sinks=plan.sinks,
        spread_factor=plan.spread_factor,
        steps=POWER_ITERATIONS,
        valid=spec.valid,
        more=more,
        features=min(tile_of(spec.dim), spec.features),
        value_features=min(tile_of(spec.value_dim), spec.features),
    )
    parts["here"] = fill(HERE, parts)
    parts["points"] = fill(POINTS, parts)
    parts["direction"] = fill(DIRECTION, parts)
    given = ", ".join(
        ["order", "key_head", "key_n", *["piece", "piece_size"] * more, *["members"] * spec.valid, "k_len"]
    )
    parts |= {"given": given, "log": plan.chunk.bit_length() - 1}
    parts["sorted"] = in_loop("number", "place", parts["log"], last="log")
    along, levels = projection.texts(parts, spec.dtype) if spec.on_tensor_cores else _levels(spec, parts)
    parts["levels"] = levels
    about = {"plan": spec.plan, "stage": "summarize, the clusters of a chunk"}
    helpers = exchange() + fill(ORDERED, parts) + "\n" + along + "\n" if levels else ""
    return source("cluster", about, helpers + fill(KERNEL, parts))


def _levels(spec: ClusterSpec, parts: dict[str, Any]) -> tuple[str, str]:
    """The function ``coordinates``, and a text for each level."""
    plan = spec.settings
    levels, part = [], plan.chunk
    while part > plan.cluster:
        block = min(part, spec.keys)
        own = dict(part=part, part_log=part.bit_length() - 1, block=block)
        own["together"] = min(plan.chunk // part, spec.keys // block)
        levels.append(fill(LEVEL, parts | own))
        part //= 2
    return fill(COORDINATES, parts), "\n\n".join(levels)


def clusters(
    key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor | None, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first four fields of ``Summary``; ``valid``: ``[B, Nk]`` bool.

    Where a median cut is decided by rounding, clusters may differ from the reference's.
    """
    batch, heads, k_len, dim = key.shape
    chunks = chunk_count(k_len, plan.chunk)
    count = chunks * (plan.chunk // plan.cluster)
    order = key.new_empty((batch, heads, chunks * plan.chunk), dtype=torch.int32)
    mean = key.new_empty((batch, heads, count, dim), dtype=torch.float32)
    spread = torch.empty_like(mean)
    bias = key.new_empty((batch, heads, count), dtype=torch.float32)
    key, value = (features_last(t) for t in (key, value))
    member = None if valid is None else members(valid, plan.sinks)
    spec = ClusterSpec(
        dim=int(dim), value_dim=int(value.shape[3]), plan=plan.text, valid=member is not None,
        dtype=DTYPES[key.dtype], target=device.target(), small=device.is_small(key.device),
    )  # fmt: skip
    values = strides("key", key) | strides("value", value) | dict(
        key=key, value=value, member=member, order_out=order, mean=mean, spread=spread, bias=bias,
        kv_heads=heads, k_len=k_len, chunks=chunks,
    )  # fmt: skip
    if spec.in_pieces:
        values |= dict(pieces=projection.pieces(key), piece_size=key.numel())
    kernel = load(cluster_source(spec), "cluster")
    launch(kernel, (batch * heads * chunks,), values, warps=spec.warps, stages=1)
    return order, mean, spread, bias


def members(valid: torch.Tensor, sinks: int) -> torch.Tensor:
    """The valid keys that are no sinks: ``[B, Nk]`` bool, contiguous, as kernels read it."""
    return (valid & (valid.cumsum(1) > sinks)).contiguous()
