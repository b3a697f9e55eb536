"""Numbers of 16 bits in the compiled kernels: read as they are, rounded as torch rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prescore_compile import Config, attention
from prescore_compile.kernels import library, ops

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler")
HALF = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
"""Every float16 that there is."""


def mean_of(*values: torch.Tensor) -> torch.Tensor:
    """By the kernel: of keys that weigh the same."""
    value = torch.stack(values, 2)
    key = torch.zeros(*value.shape[:3], 8, dtype=value.dtype)
    return ops.attend_few(key[:, :, :1], key, value, None, None, 1.0, 0.0, None)[:, :, 0]


@pytest.mark.parametrize("features", [64, 4])  # by vectors, one by one
def test_every_half_is_read_and_written(features: int) -> None:
    value = HALF.view(4, -1, features)
    torch.testing.assert_close(mean_of(value), value, atol=0, rtol=0, equal_nan=True)


def test_subnormals_are_read_where_results_flush_them() -> None:
    few, many = HALF[:2048].view(1, -1, 4), HALF[:2048].view(1, -1, 64)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush")
        found = [mean_of(value).flatten() for value in (few, many)]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], HALF[:2048])


@pytest.mark.parametrize("features", [64, 4])
def test_halves_are_rounded_to_nearest_and_ties_to_even(features: int) -> None:
    numbers = HALF[HALF.isfinite()].view(1, -1, features)
    near = numbers.flatten().roll(1).view(numbers.shape)  # ties, among subnormals as among the largest
    far = numbers.flatten()[torch.randperm(numbers.numel(), generator=torch.Generator().manual_seed(0))]
    for other in (near, far.view(numbers.shape)):
        want = (numbers.float() / 2 + other.float() / 2).half()
        torch.testing.assert_close(mean_of(numbers, other), want, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [dict(), dict(share=0.0), dict(method="kmeans", keep=8), dict(routes=0), dict(window=None)]
)
def test_as_in_float32_but_rounded(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The kernels compute in float32 whatever the dtype is (products by tiles of bfloat16 do not)."""
    if dtype == torch.bfloat16 and library.tiles():
        pytest.skip("products by tiles")
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 1100, 40, generator=make).to(dtype) for heads in (4, 2, 2))
    config = Config(min_seq_len=0, only_if_faster=False, **options)
    found = attention(q, k, v, is_causal=True, enable_gqa=True, config=config)
    want = attention(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True, config=config)
    assert found.dtype == dtype and torch.equal(found, want.to(dtype))
