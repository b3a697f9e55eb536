"""The census's oracle on small functions whose attentions are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.oracle import Watch, watch

B, H, N, M, D = 2, 4, 10, 13, 8


def qkv(kv_heads: int = H, keys: int = M) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, H, N, D), torch.randn(B, kv_heads, keys, D), torch.randn(B, kv_heads, keys, D)


def seen(function: Callable[..., object], *args: object) -> Watch:
    return watch(function, *args)[1]


def kinds(function: Callable[..., object], *args: object) -> list[str]:
    return [attention.kind for attention in seen(function, *args).attentions()]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D), -1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(torch.matmul(q * 0.3, k.mT)) + torch.randn(1, 1, N, M)
    scores = scores.masked_fill(torch.rand(N, M) > 0.7, float("-inf")).float()
    return torch.matmul(F.dropout(scores.softmax(-1), 0.1, training=False).to(v.dtype), v)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bqhd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(torch.randn(B * H, 1, M), q, k.mT, alpha=0.3)
    return torch.bmm(F.softmax(scores, 2), v)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].mT
    return scores.softmax(-1) @ v[:, :, None]


def with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, torch.ones(B, H, N, 1)], -1)
    scores = scores - scores.amax(-1, keepdim=True)
    return scores.softmax(-1)[..., :-1] @ v


def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.mT @ torch.softmax(k @ q.mT, -2)


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.zeros(B, H, N, M + 3)
    scores = torch.zeros(B, H, N, M)
    scores[..., 2:] = (q @ k.mT)[..., 2:]
    scores[..., :2].fill_(-1.0)
    weights[..., :M] = scores.softmax(-1)
    return weights[..., :M] @ v


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(plain(q, k, v), k, v)


@pytest.mark.parametrize("function", [plain, masked, by_einsum, by_bmm, with_sinks, transposed, in_place])
def test_hand_written(function: Callable[..., object]) -> None:
    assert kinds(function, *qkv()) == ["hand"]


def test_grouped_and_repeated() -> None:
    assert kinds(grouped, *qkv(kv_heads=2)) == ["hand"]
    assert kinds(twice, *qkv()) == ["hand", "hand"]


def test_lines() -> None:
    (attention,) = seen(by_einsum, *qkv()).attentions()
    assert all("test_oracle.py:" in line for line in attention.lines)
    assert attention.shape == (B, H, N, M)


def test_sdpa_is_counted_once_on_every_path() -> None:
    q, k, v = qkv()
    assert kinds(F.scaled_dot_product_attention, q, k, v) == ["sdpa"]
    group = (q, k[:, :2].clone(), v[:, :2].clone())
    assert kinds(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), *group) == ["sdpa"]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert kinds(F.scaled_dot_product_attention, q, k, v) == ["sdpa"]
        assert kinds(torch.ops.aten.scaled_dot_product_attention, q, k, v) == ["sdpa"]
        both = lambda q, k, v: F.scaled_dot_product_attention(plain(q, k, v), k, v)  # noqa: E731
        assert kinds(both, q, k, v) == ["hand", "sdpa"]


def test_through_the_dispatcher_is_hand_written() -> None:
    """Each operator has a Python frame of its own, at the same instruction of the same code."""
    aten = torch.ops.aten
    q, k, v = (x.flatten(0, 1) for x in qkv())
    assert kinds(lambda q, k, v: aten.bmm(aten._softmax(aten.bmm(q, k.mT), -1, False), v), q, k, v) == ["hand"]


def projected(x: Tensor) -> Tensor:
    layer = nn.Linear(D, 3 * D)
    q, k, v = layer(x).chunk(3, -1)
    return plain(q, k, v)


def learned_queries(x: Tensor) -> Tensor:
    """Queries that only parameters make are activations once they are projected (DETR, Perceiver)."""
    project = nn.Linear(D, D)
    return plain(project(torch.randn(1, N, D)), project(x), x)


def test_projections_are_not_scores() -> None:
    x = torch.randn(B, N, D)
    assert kinds(projected, x) == ["hand"]
    assert kinds(learned_queries, x) == ["hand"]


def router(x: Tensor) -> Tensor:
    weights, index = F.linear(x, torch.randn(4, D)).softmax(-1).topk(2, -1)
    experts = torch.randn(4, D, D)
    return (torch.einsum("bnd,bnkde->bnke", x, experts[index]) * weights[..., None]).sum(2)


def dense_router(x: Tensor) -> Tensor:
    weights = F.linear(x, torch.randn(4, D)).softmax(-1)
    return torch.einsum("bne,bned->bnd", weights, torch.einsum("bnd,edf->bnef", x, torch.randn(4, D, D)))


def classifier(x: Tensor) -> Tensor:
    return F.linear(x.mean(1), torch.randn(5, D)).softmax(-1)


def wrong_axis(x: Tensor) -> Tensor:
    return torch.softmax(x @ torch.randn_like(x).mT * 1.0, -2) @ x


def wrong_axis_of_activations(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.mT, -2) @ x


def linear_attention(x: Tensor) -> Tensor:
    q, k, v = F.linear(x, torch.randn(3 * D, D)).chunk(3, -1)
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def no_softmax(x: Tensor) -> Tensor:
    return torch.relu(x @ x.mT) @ x


def expectation(x: Tensor) -> Tensor:
    """A distribution over bins, and its mean."""
    return F.linear(F.linear(x, torch.randn(7, D)).softmax(-1), torch.arange(7.0)[None])


def weights_alone(x: Tensor) -> Tensor:
    return (x @ x.mT).softmax(-1)


@pytest.mark.parametrize(
    "function",
    [
        router,
        dense_router,
        classifier,
        wrong_axis,
        wrong_axis_of_activations,
        linear_attention,
        no_softmax,
        expectation,
        weights_alone,
    ],
)
def test_lookalikes(function: Callable[..., object]) -> None:
    what = seen(function, torch.randn(B, N, D))
    assert what.attentions() == []
    assert all(other.reason for other in what.lookalikes())


def test_torch_modules() -> None:
    x = torch.randn(B, N, D)
    mha = nn.MultiheadAttention(D, 2, batch_first=True).eval()
    assert kinds(lambda x: mha(x, x, x, need_weights=False), x) == ["fused"]
    assert kinds(lambda x: mha(x, x, x * 2, need_weights=True), x) == ["hand"]
    assert kinds(lambda x: mha(x, x, x * 2, need_weights=False), x) == ["sdpa"]
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True).eval()
    assert kinds(layer, x) == ["fused"]
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True, norm_first=True, activation=torch.tanh).eval()
    assert kinds(layer, x) == ["fused"]  # the attention's own fast path
