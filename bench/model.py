"""What a stage should cost on a GPU, from flops, instructions and bytes.

A stage takes the longest of three times: its matrix products at the rate of the tensor cores, its
other arithmetic at the rate of the lanes, its traffic at the rate of the memory; and its launches.
Constants of devices are those of their makers' data sheets; those of kernels are counted, or, where
marked so, assumed. What was measured on a GPU replaces them: see ``bench.roofline``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.triton.mass import FEATURES
from prescore_compile.passes import cost


@dataclass(frozen=True)
class Device:
    """Rates a second: ``products`` flops of bf16 on tensor cores, ``lanes`` instructions, ``traffic`` bytes.

    ``memory``: bytes.
    """

    name: str
    products: float
    lanes: float
    traffic: float
    memory: float


DEVICES = {
    "A100": Device("A100", 312e12, 108 * 64 * 1.41e9, 2.04e12, 80e9),
    "H100": Device("H100", 989e12, 132 * 128 * 1.755e9, 3.35e12, 80e9),
    "H200": Device("H200", 989e12, 132 * 128 * 1.755e9, 4.8e12, 141e9),
    "MI300X": Device("MI300X", 1307e12, 304 * 64 * 2.1e9, 5.3e12, 192e9),
}
LAUNCH = 5e-6
"""Seconds a kernel launch; assumed."""
EXACT_SHARE = 0.6
"""Of the tensor cores' rate that exact attention reaches on long inputs; FlashAttention-3 reports 0.5 to 0.75."""
ATTEND_SHARE = 0.4
"""The same of ``attend``; assumed."""
UNION = (4.0, 0.5)
"""Clusters that a tile of 64 rows walks over, for each route of one of its rows: at 8192 tokens, and how many more for
each doubling. Counted on text up to 16,384 by `python -m bench.quality.unions`; beyond, extrapolated."""
UNION_TOGETHER = (2.64, 0.3)
"""The same where the heads of a group route together."""
CHUNK_UNION = (1.2, 0.3)
"""The same of chunks on the first of two levels."""
BACKWARD = 2.5
"""Products of a backward, for each of its forward: five of them, not two."""
ROUTE_PAIR = (67, 71)
"""Instructions of a lane for one pair of row and representative of 64 or 128 features: counted in sm_90's binary."""
ROUTE_TOGETHER = ((12.3, 13.5), (51, 54))
"""The same of heads that route together: for each head, and for each query."""
ROUTE_LISTED = 8
"""More of them for each query where its chunks are listed."""
LISTED_ROUTE = (235, 120)
"""Instructions of a lane to sort one route of a tile, and to find its cluster's others where it is taken: of a tile of
64 that choose, 64 routes each, and of one of 16, as where the heads of a group of 4 route together; counted too."""
LISTED_CLUSTER = 40
"""The same for one listed cluster and each query that may have chosen it (or row, where heads route alone)."""
SCORE_LANES = {
    "kmeans": (3250, 5690), "kmeans_relative": (3450, 6000), "kmedian": (8650, 20_800), "leverage": (16_600, 47_800),
    "peak": (2070, 3870), "query": (840, 1540), "norm": (630, 1340), "inverse_norm": (630, 1340),
}  # fmt: skip
"""Instructions of a lane for one scored key of 64 or 128 features, chunks of 128: counted in sm_90's binary; leverage's
as `bench/ptx` counts what is executed."""
SCORE_LANES_A_HEAD = {"peak": (1910, 2780), "query": (700, 900)}
"""More of them for each query head of the KV head."""
SCORE_STALLS = 2.0
"""By how much barriers slow down a kernel of scores, clusters or centroids, of which one to four run on a
multiprocessor; assumed."""
SELECT_LANES = 1460
"""Instructions of a lane for one key: to select it in its chunk, and a segment's program without its steps."""
SEGMENT_LANES = 1770
"""The same of one step of a segment's program, for each key that it reads; counted too."""
CLUSTER_LANES = (2420, 3850)
"""The same to cluster one key of 64 or 128 features, for each level that its chunk is halved on: executed, as
`bench/ptx` counts it for sm_90 (chunks of 256, down to clusters of 16). What products read from shared memory, 80 times
a chunk, takes two thirds as long, beside it."""
CENTROID_LANES = (6070, 10_500)
"""The same of one key, for up to 16 centroids of one of its segments: moments and two Lloyd iterations."""
NUMBER_BYTES = 2


@dataclass(frozen=True)
class Work:
    """What a stage does: flops, instructions, bytes and launches.

    ``lists``: instructions of the launches that list what the last one reads, which nothing overlaps with.
    """

    products: float = 0.0
    lanes: float = 0.0
    traffic: float = 0.0
    launches: int = 0
    share: float = 1.0
    lists: float = 0.0

    def seconds(self, device: Device) -> float:
        """The longest of the three times, the lists and the launches."""
        return (
            self.launches * LAUNCH
            + (self.lists / device.lanes)
            + max(
                self.products / (device.products * self.share), self.lanes / device.lanes, self.traffic / device.traffic
            )
        )

    def bound(self, device: Device) -> str:
        """Which of the times is the longest."""
        times = {
            "products": self.products / (device.products * self.share),
            "lanes": self.lanes / device.lanes,
            "traffic": self.traffic / device.traffic,
        }
        longest = max(times, key=times.__getitem__)
        return "launches" if self.launches * LAUNCH > times[longest] else longest


@dataclass(frozen=True)
class Site:
    """One attention."""

    shape: cost.Shape
    length: int
    plan: Plan = field(default_factory=Plan)

    @property
    def rows(self) -> int:
        """Queries of all heads."""
        return self.shape.batch * self.shape.heads * self.length

    @property
    def keys(self) -> int:
        """Keys of all KV heads."""
        return self.shape.batch * self.shape.kv_heads * self.length

    @property
    def together(self) -> int:
        """Query heads that route together."""
        return self.plan.together(self.shape.heads // self.shape.kv_heads)

    @property
    def union(self) -> float:
        """See ``UNION``."""
        return _grown(UNION_TOGETHER if self.together > 1 else UNION, self.length)

    @property
    def chunk_union(self) -> float:
        """See ``CHUNK_UNION``."""
        return _grown(CHUNK_UNION, self.length)


def exact(site: Site) -> Work:
    """Exact attention."""
    shape = site.shape
    pairs = cost.at(cost.exact_pairs(shape.causal), site.length) * shape.batch * shape.heads
    return Work(2 * pairs * _features(site), 0, _operands(site), 1, EXACT_SHARE)


def score(site: Site) -> Work:
    """A read of the keys, and of the queries where those are read."""
    plan, shape = site.plan, site.shape
    if not plan.keep:
        return Work()
    wide = int(shape.head_dim > 64)
    lanes = SCORE_LANES[plan.method][wide]
    heads = shape.heads // shape.kv_heads if plan.method in SCORE_LANES_A_HEAD else 0
    if heads:
        lanes += heads * SCORE_LANES_A_HEAD[plan.method][wide]
    traffic = NUMBER_BYTES * shape.head_dim * (1 + heads) + 4
    return Work(lanes=site.keys * lanes * SCORE_STALLS, traffic=site.keys * traffic, launches=1)


def select(site: Site) -> Work:
    """The best keys of chunks and of segments."""
    plan = site.plan
    if not plan.keep:
        return Work()
    lanes = SELECT_LANES + cost.at(cost.segments(plan), site.length) * plan.keep / plan.chunk * SEGMENT_LANES
    return Work(lanes=site.keys * lanes * SCORE_STALLS, traffic=site.keys * 4, launches=2)


def summarize(site: Site) -> Work:
    """Clusters of each chunk: a read of keys and values, and the halving of each level; rows and centroids."""
    plan, dim = site.plan, site.shape.head_dim
    copied = site.keys * plan.keep / plan.chunk * 2 * NUMBER_BYTES * _features(site)
    if plan.centroids:  # of plans without routes; keys and values are read three times for each segment
        read, lanes = 3 * NUMBER_BYTES * _features(site), CENTROID_LANES[int(dim > 64)] * SCORE_STALLS
        visits = site.keys * cost.at(cost.segments(plan), site.length)
        return Work(lanes=visits * lanes, traffic=copied + visits * read, launches=5)
    if not plan.routes:
        return Work(traffic=copied, launches=1)
    levels = (plan.chunk // plan.cluster).bit_length() - 1
    lanes = levels * CLUSTER_LANES[int(dim > 64)] * SCORE_STALLS
    written = 4 + (8 * dim + 4) / plan.cluster
    traffic = site.keys * (NUMBER_BYTES * _features(site) + written) + copied
    return Work(lanes=site.keys * lanes, traffic=traffic, launches=2)


def mass(site: Site) -> Work:
    """The logits of window and sinks, by ``attend`` with few features of values."""
    plan, shape = site.plan, site.shape
    if not plan.needs_mass:
        return Work()
    pairs = 2 * cost.at(cost.mass_pairs(plan, shape.causal), site.length) * shape.batch * shape.heads
    products = 2 * pairs * (shape.head_dim + FEATURES)
    return Work(products, 0, NUMBER_BYTES * (site.rows + site.keys) * shape.head_dim, 1, ATTEND_SHARE)


def route(site: Site) -> Work:
    """A walk over the representatives, of two products; or over chunks, then over the chosen ones."""
    plan, shape = site.plan, site.shape
    if not plan.routes:
        return Work()
    exact = cost.at(cost.exact_pairs(shape.causal), site.length) * shape.batch * shape.heads
    pairs, launches, listed, walked = exact / plan.cluster, 1, 0.0, 0.0
    if plan.coarse:
        walked = min(site.rows * plan.coarse * (plan.chunk // plan.cluster) * site.chunk_union, pairs)
        pairs, launches = exact / plan.chunk + walked, 13
        listed = _lists(site, LISTED_ROUTE[0] * plan.coarse, plan.coarse * site.chunk_union)
    traffic = site.rows * (NUMBER_BYTES * shape.head_dim + 4 * plan.routes)
    wide = int(shape.head_dim > 64)
    lanes = pairs * ROUTE_PAIR[wide]
    if site.together > 1:
        lanes = pairs * (ROUTE_TOGETHER[0][wide] + ROUTE_TOGETHER[1][wide] / site.together)
    lanes += walked * ROUTE_LISTED / site.together
    return Work(4 * pairs * shape.head_dim, lanes, traffic, launches, lists=listed)


def attend(site: Site) -> Work:
    """The attended pairs; a tile computes the union of its rows' routes for each of them."""
    plan, shape = site.plan, site.shape
    pairs = cost.at(cost.attended_pairs(plan, shape.causal), site.length) * shape.batch * shape.heads
    routed = site.rows * cost.routed_keys(plan)
    pairs += min(routed, pairs) * (site.union - 1)
    # Sorting a tile's routes: each is read, written and read again.
    traffic = _operands(site) + 12 * site.rows / site.together * plan.routes
    found = cost.routed_keys(plan) / plan.cluster * site.union
    listed = _lists(site, LISTED_ROUTE[int(site.together > 1)] * plan.routes, found)
    if plan.residual:  # the centroids' members
        traffic += NUMBER_BYTES * site.keys * _features(site)
    launches = 1 + 3 * bool(plan.routes) + plan.residual
    return Work(2 * pairs * _features(site), 0, traffic, launches, ATTEND_SHARE, listed)


def _lists(site: Site, lanes: float, walked: float) -> float:
    """Instructions that list what tiles walk over: ``lanes`` to sort what each query routes to, ``walked`` listed."""
    return site.rows / site.together * (lanes + walked * LISTED_CLUSTER)


def stages(site: Site, device: Device) -> dict[str, float]:
    """Predicted seconds of each stage of a forward, of all of them, and of exact attention."""
    found = {name: work(site).seconds(device) for name, work in STAGES.items() if work(site) != Work()}
    return found | {"total": sum(found.values()), "exact": exact(site).seconds(device)}


STAGES = {"score": score, "select": select, "summarize": summarize, "mass": mass, "route": route, "attend": attend}


def parts(measured: Mapping[str, float], predicted: Mapping[str, float], factor: float = 2.0) -> dict[str, float]:
    """The stages whose measured time is more than ``factor`` times the predicted one, or less than its inverse."""
    ratios = {name: measured[name] / predicted[name] for name in predicted if name in measured and predicted[name]}
    return {name: ratio for name, ratio in ratios.items() if not 1 / factor <= ratio <= factor}


def _features(site: Site) -> int:
    return site.shape.head_dim + site.shape.value_dim


def _operands(site: Site) -> float:
    return NUMBER_BYTES * (site.rows + site.keys) * float(_features(site))


def _grown(of: tuple[float, float], length: int) -> float:
    """A value at 8192 tokens that grows with each doubling, at another length; at least 1."""
    return max(1.0, of[0] + of[1] * math.log2(length / 8192))
