"""The eager twin, and what it does with bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from prescore_compile import Config, attention

SMALL = Config(chunk=32, window=16, sinks=4, routes=3, min_seq_len=0)


def qkv(length: int = 150, heads: int = 4, kv_heads: int = 4, **kwargs: Any) -> list[torch.Tensor]:
    return [torch.randn(2, h, length, 16, **kwargs) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_exact_config_equals_sdpa(causal: bool, dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype)
    got = attention(q, k, v, is_causal=causal, scale=0.2, config=Config.exact())
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.2)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_a_short_input_is_sdpa_itself() -> None:
    q, k, v = qkv(heads=8)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(attention(q, k, v, is_causal=True, enable_gqa=True), want)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_key_mask(causal: bool, short: bool) -> None:
    q, k, v = qkv()
    valid = torch.rand(2, 1, 1, 150) > 0.3
    config = Config() if short else Config.exact()
    mask = valid & torch.ones(150, 150, dtype=torch.bool).tril() if causal else valid
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attention(q, k, v, valid, is_causal=causal, config=config), want, atol=1e-5, rtol=1e-5)


def test_gradients_flow() -> None:
    leaves = [t.requires_grad_() for t in qkv()]
    attention(*leaves, is_causal=True, config=SMALL).sum().backward()
    assert all(t.grad is not None and torch.isfinite(t.grad).all() and t.grad.abs().sum() > 0 for t in leaves)


def test_double_runs_the_reference() -> None:
    q, k, v = qkv(dtype=torch.float64)
    got = attention(q, k, v, is_causal=True, config=SMALL)
    low = attention(q.float(), k.float(), v.float(), is_causal=True, config=SMALL)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, low.double(), atol=1e-4, rtol=1e-4)


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "rank 3": (lambda q, k, v: (q[0], k[0], v[0]), {}, r"allowed: three tensors \[batch, heads, length, head_dim\]"),
    "head_dim": (lambda q, k, v: (q[..., :8], k, v), {}, "query and key of the same head_dim"),
    "dtype": (lambda q, k, v: (q, k.bfloat16(), v), {}, "one floating dtype for all three"),
    "ints": (lambda q, k, v: (q.long(), k.long(), v.long()), {}, "one floating dtype"),
    "batch": (lambda q, k, v: (q, k[:1], v[:1]), {}, "one batch size"),
    "lengths": (lambda q, k, v: (q, k, v[:, :, :9]), {}, "same heads and length"),
    "gqa not enabled": (lambda q, k, v: (q, k[:, :2], v[:, :2]), {}, "enable_gqa"),
    "gqa not a multiple": (lambda q, k, v: (q, k[:, :3], v[:, :3]), {"enable_gqa": True}, "a multiple"),
    "dropout": (lambda q, k, v: (q, k, v), {"dropout_p": 0.1}, "dropout_p=0.1; allowed: 0.0"),
    "cross": (lambda q, k, v: (q[:, :, :9], k, v), {}, "as many queries as keys"),
    "causal cross": (lambda q, k, v: (q[:, :, :9], k, v), {"is_causal": True}, "as many queries as keys"),
    "dense mask": (lambda q, k, v: (q, k, v), {"attn_mask": torch.ones(150, 150, dtype=torch.bool)}, "key padding"),
    "a mask elsewhere": (
        lambda q, k, v: (q, k, v),
        {"attn_mask": torch.ones(2, 1, 1, 150, dtype=torch.bool, device="meta")},
        "on cpu",
    ),
    "a mask of another library": (lambda q, k, v: (q, k, v), {"attn_mask": [[True]]}, "attn_mask: got list"),
    "an array": (lambda q, k, v: (q, k.numpy(), v), {}, "key: got ndarray; allowed: a tensor"),
    "a word": (lambda q, k, v: (q, k, v), {"is_causal": "yes"}, "is_causal: got 'yes'; allowed: a bool"),
    "float mask": (lambda q, k, v: (q, k, v), {"attn_mask": torch.zeros(2, 1, 1, 150)}, "key padding"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_clear_error(name: str) -> None:
    change, kwargs, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        attention(*change(*qkv()), **kwargs, config=SMALL)
    assert "got" in str(caught.value) and "allowed" in str(caught.value)


def test_on_a_device_without_autocast() -> None:
    q, k, v = (t.to("meta") for t in qkv())
    assert attention(q, k, v, config=SMALL).shape == attention(q, k, v).shape == q.shape


def test_forward_mode_is_a_clear_error() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"forward-mode AD.*allowed: gradients in reverse mode"):
        torch.func.jvp(lambda q: attention(q, k, v, config=SMALL), (q,), (torch.ones_like(q),))


def test_gradients_of_functions_are_a_clear_error() -> None:
    q, k, v = qkv()
    for transform, of in ((torch.func.grad, ()), (torch.func.vjp, (q,)), (torch.func.jacrev, ())):
        with pytest.raises(ValueError, match=r"torch.func.grad.*allowed: torch.autograd.grad"):
            transform(lambda q: attention(q, k, v, config=SMALL).sum(), *of)(q)


def test_autocast_is_as_for_sdpa() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        got, want = attention(*qkv(), config=SMALL), F.scaled_dot_product_attention(*qkv())
    assert got.dtype == want.dtype == torch.bfloat16


def test_under_a_checkpoint() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in qkv())

    def run(q: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, is_causal=True, config=SMALL)

    got = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, q, use_reentrant=False).sum(), (q, k, v))
    torch.testing.assert_close(got, torch.autograd.grad(run(q).sum(), (q, k, v)))


OF_A_GRAPH: list[dict[str, Any]] = [
    {"include": ["a.*"]}, {"exclude": ["*"]}, {"inner": "eager"}, {"dump": "stages"},
]  # fmt: skip


@pytest.mark.parametrize("options", OF_A_GRAPH)
def test_what_is_for_a_graph_is_an_error(options: dict[str, Any]) -> None:
    q, k, v = qkv()
    message = f"got {next(iter(options))}, which is for a graph.*allowed: settings of one plan"
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, config=Config(**options))
    assert torch.equal(attention(q, k, v, config=Config(only_if_faster=False)), attention(q, k, v))


@pytest.mark.parametrize("shape", [(0, 4, 100, 16), (2, 4, 0, 16), (2, 4, 100, 0)])
def test_empty_inputs_give_what_sdpa_gives(shape: tuple[int, ...]) -> None:
    q = torch.zeros(shape)
    assert attention(q, q, q, config=SMALL, scale=1.0).shape == shape


def test_under_torch_compile_too() -> None:
    q, k, v = qkv()
    got = torch.compile(lambda q, k, v: attention(q, k, v, is_causal=True, config=SMALL), fullgraph=True)(q, k, v)
    torch.testing.assert_close(got, attention(q, k, v, is_causal=True, config=SMALL))
