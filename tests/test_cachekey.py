"""What torch.compile keeps on disk: used again where it fits, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import prescore_compile  # noqa: F401
from prescore_compile import cachekey

SMALL: dict[str, Any] = dict(chunk=32, window=16, sinks=4, routes=3, only_if_faster=False)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(self.query(x), x, x, is_causal=True)


def compiled(x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient, compiled as in a new process."""
    torch._dynamo.reset()
    counters.clear()
    layer = Layer()
    out = torch.compile(layer, backend="prescore", options=SMALL | options)(x)
    out.sum().backward()
    assert layer.query.weight.grad is not None
    return out, layer.query.weight.grad


def from_disk() -> bool:
    found = counters["aot_autograd"]
    assert found["autograd_cache_hit"] + found["autograd_cache_miss"] == 1, dict(found)
    return bool(found["autograd_cache_hit"])


def test_a_graph_is_kept_for_this_package_and_this_config(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 150, 8)
    with fresh_cache():
        first = compiled(x, min_seq_len=0)
        assert not from_disk()
        again = compiled(x, min_seq_len=0)
        assert from_disk()
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one, other)
        compiled(x, min_seq_len=1)
        assert not from_disk()
        monkeypatch.setattr(cachekey, "_sources", lambda: "another version")
        compiled(x, min_seq_len=0)
        assert not from_disk()


def test_guards_of_one_config_do_not_meet_the_lengths_of_another() -> None:
    with fresh_cache():
        for least in (64, 0):
            x = torch.randn(1, 2, 150, 8)
            torch._dynamo.mark_dynamic(x, 2, min=max(least, 16), max=2048)
            compiled(x, min_seq_len=least)
