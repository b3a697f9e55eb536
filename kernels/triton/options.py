"""How kernels are cut: rows, keys, warps and stages by target, dtype and features.

Chosen so that default plans in 16 bits spill no register up to 128 features where the compilers were asked
without a GPU, for sm_80, sm_90 and gfx942; what else spills is in docs/triton.md. None was measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import replace

from .spec import Tile, check, power_of_two

# By target, whether the dtype is float32, and the most features: rows, keys, warps, stages.
FORWARD = {
    ("cuda", False, 64): (64, 64, 8, 2),
    ("cuda", False, 128): (64, 64, 8, 2),
    ("cuda", False, 256): (64, 32, 8, 2),
    ("cuda", True, 64): (32, 32, 4, 1),
    ("cuda", True, 128): (16, 32, 4, 1),
    ("cuda", True, 256): (16, 16, 8, 1),
    ("hip", False, 64): (64, 64, 4, 1),
    ("hip", False, 128): (64, 64, 4, 1),
    ("hip", False, 256): (64, 32, 4, 1),
    ("hip", True, 64): (64, 32, 4, 1),
    ("hip", True, 128): (64, 32, 8, 1),
    ("hip", True, 256): (32, 32, 4, 1),
}
BACKWARD = {
    ("cuda", False, 64): (64, 32, 4, 2),
    ("cuda", False, 128): (64, 64, 8, 2),
    ("cuda", False, 256): (32, 32, 8, 1),
    ("cuda", True, 64): (32, 32, 4, 1),
    ("cuda", True, 128): (16, 32, 4, 1),
    ("cuda", True, 256): (16, 16, 8, 1),
    ("hip", False, 64): (64, 64, 4, 1),
    ("hip", False, 128): (32, 64, 4, 1),
    ("hip", False, 256): (32, 32, 4, 1),
    ("hip", True, 64): (32, 32, 4, 1),
    ("hip", True, 128): (32, 32, 4, 1),
    ("hip", True, 256): (32, 16, 4, 1),
}


def forward(target: str, dtype: str, dim: int, value_dim: int, routes: bool) -> Tile:
    """Of ``attend``; with routes a tile has 64 rows at most: its list of clusters grows with its rows.

    So it does with values of more than 64 features: where a mask says more than causality, 128 rows would spill.
    """
    tile = _of(FORWARD, target, dtype, dim, value_dim)
    wider = target == "cuda" and dtype != "float32" and dim <= 128 and value_dim <= 64 and not routes
    return replace(tile, rows=128) if wider else tile


def backward(target: str, dtype: str, dim: int, value_dim: int) -> Tile:
    """Of the kernels of ``attend_backward``."""
    return _of(BACKWARD, target, dtype, dim, value_dim)


def _of(
    table: dict[tuple[str, bool, int], tuple[int, int, int, int]], target: str, dtype: str, dim: int, value_dim: int
) -> Tile:
    check(target, dtype, dim, value_dim)
    most = max(64, power_of_two(max(dim, value_dim)))
    rows, keys, warps, stages = table[target, dtype == "float32", most]
    return Tile(rows=rows, keys=keys, warps=warps, stages=stages)
