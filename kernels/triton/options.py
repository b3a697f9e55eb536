"""How kernels are cut: rows, keys, warps and stages by target, features and dtype.

Chosen so that nothing spills where the compilers were asked without a GPU: sm_80, sm_90 and gfx942
(`tests/test_triton_attend.py`). None was measured on a GPU yet.
"""

from __future__ import annotations

from .spec import Tile, power_of_two


def forward(target: str, dtype: str, dim: int, value_dim: int, routes: bool) -> Tile:
    """Of ``attend``. With routes a tile has 64 rows: its list of clusters grows with its rows."""
    wide = max(power_of_two(dim), power_of_two(value_dim))
    if dtype == "float32":
        return Tile(rows=64 if wide <= 128 else 32, keys=32, warps=4 if wide <= 64 else 8, stages=1)
    if target == "hip":
        return Tile(rows=64, keys=64 if wide <= 128 else 32, warps=4, stages=1)
    if wide <= 128:
        return Tile(rows=64 if routes else 128, keys=64, warps=8, stages=2)
    return Tile(rows=64, keys=32, warps=8, stages=2)


def backward(target: str, dtype: str, dim: int, value_dim: int) -> Tile:
    """Of the kernels of ``attend_backward``."""
    wide = max(power_of_two(dim), power_of_two(value_dim))
    if dtype == "float32":
        return Tile(rows=32, keys=32, warps=4 if wide <= 64 else 8, stages=1)
    if target == "hip":
        return Tile(rows=64 if wide <= 64 else 32, keys=64 if wide <= 128 else 32, warps=4, stages=1)
    if wide <= 128:
        return Tile(rows=64, keys=64, warps=8, stages=2)
    return Tile(rows=32, keys=32, warps=8, stages=1)
