"""k-means and k-median on chip: the keys stay in the lanes, the centres are a matrix ``[features, centres]``.

The formulas are those of ``kernels.scorers.kmeans`` and ``kernels.scorers.kmedian``. Distances to all
centres, the sums over clusters and the centre of each key are products of matrices: a key's own
centre is picked by a product with zeros and ones, which is exact.
"""

from __future__ import annotations

from typing import Any

from ...scorers.kmeans import ITERATIONS, KEYS_PER_CENTROID
from ...scorers.kmedian import ITERATIONS as ROUNDS
from ...scorers.kmedian import STEPS
from ..render import fill

START = """
# Evenly spaced keys, by rank among the valid ones, are the first centres.
centre = tl.arange(0, $tile)
used = centre < $centres
rank = tl.cumsum(here.to(tl.int32), 0) - 1
wanted = centre * tl.maximum(tl.sum(here.to(tl.int32), 0), 1) // $centres
start = here[:, None] & (rank[:, None] == wanted[None, :])
first = chunk * CHUNK + tl.sum(tl.where(start, place[:, None], 0), 0)
centres = tl.load(
    key_head + first.to(tl.int64)[None, :] * key_n + feature[:, None],
    mask=used[None, :] & (feature < DIM)[:, None],
    other=0.0,
).to(tl.float32)
"""

NEAREST = """
square = tl.sum(centres * centres, 0)
apart = tl.where(used[None, :], square[None, :] - 2.0 * product(keys, centres), float("inf"))
owner = tl.argmin(apart, 1)
own = owner[:, None] == centre[None, :]
inside = own & here[:, None]
"""

DISTANCE = """
off = keys.to(tl.float32) - $picked(own.to(tl.float32), tl.trans(centres))
distance = tl.sqrt(tl.sum(off * off, 1))
"""

KMEANS = """
$start
own = (place[:, None] < 0) & used[None, :]
for step in range(0, $iterations):
    $nearest
    size = tl.sum(inside.to(tl.float32), 0)
    total = tl.trans(picked(tl.trans(inside.to(tl.float32)), keys))  #? wide
    total = tl.dot(tl.trans(keys)$wide_type, inside.to(tl.float32).to(keys.dtype)$wide_type)  #? not wide
    centres = tl.where((size > 0)[None, :], total / tl.maximum(size, 1.0)[None, :], centres)
$distance
whole = tl.sum(tl.where(own & here[:, None], distance[:, None], 0.0), 0)  #? relative
whole = tl.sum(tl.where(own, whole[None, :], 0.0), 1)  #? relative
result = distance  #? not relative
result = distance / tl.maximum(whole, $tiny)  #? relative
"""

# The mean needs no distance; but with a step of its own before the loop the kernel spills.
KMEDIAN = """
$start
for step in range(0, $iterations):
    $nearest
    for weiszfeld in range(0, $steps):
        # The mean of the cluster's keys; then each weighted by 1 / its distance from the median so far.
        $distance
        near = 1.0 / tl.maximum(distance, 1e-6)
        weight = tl.where(inside, tl.where(weiszfeld > 0, near, 1.0)[:, None], 0.0)
        total = tl.sum(weight, 0)
        moved = product(tl.trans(keys), weight) / tl.maximum(total, 1e-30)[None, :]
        centres = tl.where((total > 0)[None, :], moved, centres)
$nearest
$distance
result = distance
"""


def body(method: str, parts: dict[str, Any]) -> str:
    """Lines that make ``result`` ``[CHUNK]`` of ``keys`` ``[CHUNK, DIM_TILE]``."""
    count = max(1, parts["chunk"] // KEYS_PER_CENTROID)
    median = method == "kmedian"
    own = parts | dict(
        centres=count,
        tile=max(16, count),  # what a tensor core takes
        iterations=ROUNDS if median else ITERATIONS,
        steps=STEPS,
        relative=method == "kmeans_relative",
        tiny="1.1754943508222875e-38",
        picked="picked" if parts["wide"] else "product",
        nearest=NEAREST,
    )
    own |= dict(start=fill(START, own), distance=fill(DISTANCE, own))
    return fill(KMEDIAN if median else KMEANS, own)
