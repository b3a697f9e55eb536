"""Hand-written attention: every spelling is found in every kind of graph, and what is not attention is not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prescore_compile import Config
from prescore_compile.passes import REASONS, find, rewrite

B, H, N, D = 2, 4, 12, 8
Case = tuple[Callable[..., Any], tuple[Tensor, ...]]


def t(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


Q, K, V = t(B, H, N, D), t(B, H, N, D) + 0.1, t(B, H, N, D) - 0.1
SHORT_KV = t(B, 2, N, D), t(B, 2, N, D) - 0.1
VALID = torch.arange(N) < torch.tensor([[N], [N - 5]])


def causal() -> Tensor:
    return torch.arange(N) <= torch.arange(N)[:, None]


def fold(x: Tensor) -> Tensor:
    return x.reshape(-1, N, x.shape[-1])


def bmm(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    s = torch.bmm(fold(q), fold(k).transpose(1, 2)) * 0.3
    s = s.view(B, H, N, N) + torch.where(valid, 0.0, -math.inf)[:, None, None, :]
    w = F.dropout(F.softmax(s.view(B * H, N, N), -1), 0.1, training=False)
    return torch.bmm(w, fold(v)).view(B, H, N, D).transpose(1, 2).reshape(B, N, H * D)


def baddbmm(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    bias = torch.where(causal(), 0.0, -math.inf).expand(B * H, N, N)
    return torch.bmm(torch.baddbmm(bias, fold(q), fold(k).mT, alpha=0.3).softmax(-1), fold(v))


def repeat_kv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(B, 2, 2, N, D).reshape(B, 4, N, D) for x in (k, v))
    return (q @ k.mT).softmax(-1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhgqd,bhkd->bhgqk", q.view(B, 2, 2, N, D), k)
    return torch.einsum("bhgqk,bhkd->bqhgd", s.softmax(-1), v).reshape(B, N, H * D)


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s *= 0.3
    s += torch.full((N, N), -math.inf).triu(1)
    return s.softmax(-1) @ v


def float_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.where(causal(), q @ k.mT * 0.3, torch.finfo(torch.float32).min)
    return F.softmax(s, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def joined(logits: Tensor, sinks: Tensor) -> Tensor:
    """The logits of the keys, and after them those of a learned sink of each head."""
    batch, _, length, _ = logits.shape
    return torch.cat([logits, sinks.reshape(1, -1, 1, 1).expand(batch, -1, length, -1)], dim=-1)


def gpt_oss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(B, 2, 2, N, D).reshape(B, H, N, D) for x in (k, v))
    s = joined(q @ k.transpose(2, 3) * 0.3 + torch.full((N, N), torch.finfo(torch.float32).min).triu(1), sinks)
    s = s - s.max(dim=-1, keepdim=True).values
    w = F.softmax(s, dim=-1, dtype=s.dtype)[..., :-1]
    return (F.dropout(w, p=0.0, training=False).to(v.dtype) @ v).transpose(1, 2).contiguous()


def sunk_bmm(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    s = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) * 0.3
    s = torch.cat([s, sinks.repeat(B).view(-1, 1, 1).expand(-1, N, 1)], 2).softmax(2)
    return torch.bmm(s.narrow(2, 0, N), v.flatten(0, 1)).view(B, H, N, D)


SPELLINGS: dict[str, Case] = {
    "matmul": (lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D), -1) @ v, (Q, K, V)),
    "methods": (lambda q, k, v: q.matmul(k.mT).mul(0.3).softmax(dim=3).matmul(v), (Q, K, V)),
    "einsum": (
        lambda q, k, v: torch.einsum("bhqk,bkhd->bqhd", torch.einsum("bqhd,bkhd->bhqk", q * 0.3, k).softmax(-1), v),
        (t(B, N, H, D), t(B, N, H, D) + 1, t(B, N, H, D) - 1),
    ),
    "einsum with an ellipsis": (
        lambda q, k, v: torch.einsum("...ij,...jd->...id", torch.einsum("...id,...jd->...ij", q, k).softmax(-1), v),
        (Q, K, V),
    ),
    "masked_fill": (lambda q, k, v: (q @ k.mT * 0.3).masked_fill(~causal(), -math.inf).softmax(-1) @ v, (Q, K, V)),
    "scale after the mask": (
        lambda q, k, v: ((q @ k.mT).masked_fill(~causal(), -math.inf) * 0.3).softmax(-1) @ v,
        (Q, K, V),
    ),
    "softmax in float32": (float_softmax, (Q, K, V)),
    "bmm": (bmm, (Q, K, V, VALID)),
    "baddbmm": (baddbmm, (Q, K, V, VALID)),
    "repeat_kv": (repeat_kv, (Q, *SHORT_KV)),
    "grouped": (grouped, (Q, *SHORT_KV)),
    "one head, by a list": (
        lambda q, k, v: (q @ k[:, [-2]].mT).softmax(-1) @ v[:, [-2]].expand(B, H, N, D),
        (Q, *SHORT_KV),
    ),
    "one head of keys": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (Q, K[:, :1], V[:, :1])),
    "key stored transposed": (lambda q, k, v: (q @ k).softmax(-1) @ v, (Q, K.mT.contiguous(), V)),
    "transposed all the way": (lambda q, k, v: v.mT @ (k @ q.mT).softmax(-2), (Q, K, V)),
    "less its maximum": (lambda q, k, v: (lambda s: (s - s.amax(-1, True)).softmax(-1) @ v)(q @ k.mT), (Q, K, V)),
    "gpt-oss": (gpt_oss, (Q, *SHORT_KV, t(H))),
    "a sink, by bmm": (sunk_bmm, (Q, K, V, t(H))),
    "a sink in float32": (
        lambda q, k, v, s: F.softmax(joined(q @ k.mT * 0.3, s).float(), -1)[..., :N].to(v.dtype) @ v,
        (Q, K, V, t(H).double().float()),
    ),
    "a sink of each query": (
        lambda q, k, v: torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)[..., :-1] @ v,
        (Q, K, V),
    ),
    "softcap": (lambda q, k, v: (torch.tanh(q @ k.mT * 0.3 / 5) * 5).softmax(-1) @ v, (Q, K, V)),
    "a negative softcap": (lambda q, k, v: ((q @ k.mT * 0.3).tanh() * -0.5).softmax(-1) @ v, (Q, K, V)),
    "a softcap and a sink": (
        lambda q, k, v, s: joined((q @ k.mT * 0.3).tanh() * 2, s).softmax(-1)[..., :-1] @ v,
        (Q, K, V, t(H)),
    ),
    "rank 5": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (t(B, 3, H, N, D), t(B, 3, H, N, D), t(B, 3, H, N, D))),
    "rank 3": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (Q[0], K[0], V[0])),
    "rank 2": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (Q[0, 0], K[0, 0], V[0, 0])),
    "other lengths": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (Q[:, :, :5], K, V)),
    "other value width": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (Q, K, t(B, H, N, 5))),
    "in place": (in_place, (Q, K, V)),
    "temperature of a head": (
        lambda q, k, v, s: (q @ k.mT * s.clamp(max=3).exp()).softmax(-1) @ v,
        (Q, K, V, t(H, 1, 1)),
    ),
    "divided by a tensor": (lambda q, k, v, s: (q @ k.mT / s).softmax(-1) @ v, (Q, K, V, torch.tensor(1.7))),
    "two": (
        lambda q, k, v: (lambda o: (o @ k.mT).softmax(-1) @ v)((q @ k.mT).softmax(-1) @ v),
        (Q, K, V),
    ),
}
KINDS = ("dynamo", "dynamic", "export", "decomposed", "symbolic_trace")


def run(fn: Callable[..., Any], args: tuple[Tensor, ...], kind: str) -> list[Any]:
    """Rewrite with the plan that keeps everything; the result must be the original's. Returns the sites."""
    sites: list[Any] = []

    def rewritten(gm: fx.GraphModule, *inputs: Any) -> fx.GraphModule:
        new, report = rewrite(gm, Config.exact(), *inputs)
        sites.extend(report.sites)
        return new

    class Module(nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return fn(*inputs)

    want = fn(*(a.clone() for a in args))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if kind == "symbolic_trace":
            call: Any = rewritten(fx.symbolic_trace(fn), *args)
        elif kind in ("export", "decomposed"):
            program = torch.export.export(Module(), tuple(a.clone() for a in args))
            call = rewritten((program.run_decompositions() if kind == "decomposed" else program).module())
        else:
            dynamic = kind == "dynamic"
            call = torch.compile(fn, backend=lambda gm, _: rewritten(gm).forward, dynamic=dynamic, fullgraph=True)
        got = call(*(a.clone() for a in args))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    return sites


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_rewritten(name: str, kind: str) -> None:
    fn, args = SPELLINGS[name]
    sites = run(fn, args, kind)
    assert [s.decision for s in sites] == ["rewrite"] * (2 if name == "two" else 1), [s.reason for s in sites]
    assert sites[0].kind == "hand-written"
    if kind.startswith("dyn"):
        assert "test_find.py:" in sites[0].source


def test_grouped_heads_are_not_expanded() -> None:
    for fn in (repeat_kv, grouped):
        (site,) = run(fn, (Q, *SHORT_KV), "dynamo")
        assert (site.shape["batch"], site.shape["heads"], site.shape["kv_heads"]) == ("2", "4", "2")


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1)


KEPT: dict[str, tuple[Callable[..., Any], str]] = {
    "weights returned": (lambda q, k, v: (lambda w: (w @ v, w))(weights(q, k)), "weights_observed"),
    "weights summed, too": (lambda q, k, v: (lambda w: w @ v + w.sum())(weights(q, k)), "weights_observed"),
    "weights used twice": (lambda q, k, v: (lambda w: w @ v + w @ k)(weights(q, k)), "weights_observed"),
    "weights gated": (lambda q, k, v: (weights(q, k) * q.sum()) @ v, "weights_changed"),
    "weights masked": (lambda q, k, v: weights(q, k).masked_fill(~causal(), 0.0) @ v, "weights_changed"),
    "weights squared": (lambda q, k, v: weights(q, k).square() @ v, "weights_changed"),
    "softmax over queries": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "wrong_axis"),
    "softmax over heads": (lambda q, k, v: (q @ k.mT).softmax(1) @ v, "wrong_axis"),
    "weights transposed": (lambda q, k, v: weights(q, k).mT @ v, "wrong_axis"),
    "values on the left": (lambda q, k, v: v.mT @ weights(q, k), "wrong_axis"),
    "rounded": (lambda q, k, v: (q @ k.mT).bfloat16().float().softmax(-1) @ v, "unsupported_logits"),
    "another function": (lambda q, k, v: (q @ k.mT).relu().softmax(-1) @ v, "unsupported_logits"),
    "the best few": (
        lambda q, k, v: (lambda s: s.masked_fill(s < s.topk(3, -1)[0][..., -1:], -math.inf).softmax(-1) @ v)(q @ k.mT),
        "opaque_mask",
    ),
    "a sink first": (
        lambda q, k, v: torch.cat([q[..., :1], q @ k.mT], -1).softmax(-1)[..., 1:] @ v,
        "extra_logits",
    ),
    "two sinks": (
        lambda q, k, v: torch.cat([q @ k.mT, q[..., :2]], -1).softmax(-1)[..., :-2] @ v,
        "extra_logits",
    ),
    "a sink with a value": (
        lambda q, k, v: torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1) @ torch.cat([v, v[:, :, :1]], 2),
        "extra_logits",
    ),
    "a sink that takes a key's place": (
        lambda q, k, v: torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)[..., 1:] @ v,
        "weights_changed",
    ),
    "a sink and its weight": (
        lambda q, k, v: (lambda w: w[..., :-1] @ v * (1 - w[..., -1:]))(
            torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1)
        ),
        "weights_observed",
    ),
    "a sink is scaled, too": (
        lambda q, k, v: (torch.cat([q @ k.mT, q[..., :1]], -1) * 0.3).softmax(-1)[..., :-1] @ v,
        "extra_logits",
    ),
    "a sink beside logits less their maximum": (
        lambda q, k, v: torch.cat([(lambda s: s - s.amax(-1, True))(q @ k.mT), q[..., :1]], -1).softmax(-1)[..., :-1]
        @ v,
        "unsupported_mask: + -amax",
    ),
    "a sink that is split off": (
        lambda q, k, v: torch.split(torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1), [N, 1], -1)[0] @ v,
        "weights_changed: split",
    ),
    "0 or weights": (lambda q, k, v: torch.where(q.sum() > 0, 0.0, weights(q, k)) @ v, "weights_changed"),
    "a sink along another axis": (
        lambda q, k, v: torch.cat([q @ k.mT, k[:, :, :1, :1].expand(B, H, 1, N)], 2).softmax(-1)[:, :, :-1] @ v,
        "extra_logits",
    ),
    "values of another head order": (lambda q, k, v: weights(q, k) @ v.transpose(0, 1)[:, :2].repeat(1, 2, 1, 1)[:2],
                                     ""),
    "dropout": (lambda q, k, v: F.dropout(weights(q, k), 0.0, training=True) @ v, ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", ("dynamo", "symbolic_trace"))
@pytest.mark.parametrize("name", KEPT)
def test_near_misses_name_what_is_not_proved(name: str, kind: str) -> None:
    fn, reason = KEPT[name]
    (site,) = run(fn, (Q, K, V), kind)
    assert site.reason.startswith(reason) if reason else not site.reason
    assert not reason or site.reason.partition(":")[0] in REASONS


NOTHING: dict[str, Callable[..., Any]] = {
    "linear attention": lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),
    "a router": lambda q, k, v: (lambda w: (w.values[..., None] * v[:, :, :, None, :]).sum(3))(
        (q @ k.mT).softmax(-1).topk(2)
    ),
    "a classifier": lambda q, k, v: (q @ k.mT).softmax(-1),
    "halves side by side": lambda q, k, v: torch.cat(q.split(2), 1).softmax(1),
    "a softmax before": lambda q, k, v: q.softmax(-1) @ k.mT @ v,
}


@pytest.mark.parametrize("kind", ("dynamo", "symbolic_trace"))
@pytest.mark.parametrize("name", NOTHING)
def test_what_is_no_attention_is_not_found(name: str, kind: str) -> None:
    assert run(NOTHING[name], (Q, K, V), kind) == []


BIASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    # i, j: queries and keys. The first three are bands, which are taken.
    "sliding window": (lambda i, j: (j <= i) & (i - j < 5), "k <= q and q - 4 <= k"),
    "chunked": (lambda i, j: (j <= i) & (i // 4 == j // 4), "k <= q and k//4 == q//4"),
    "offset": (lambda i, j: j <= i + 3, "k <= q + 3"),
    "prefix": (lambda i, j: (j <= i) | (j < 3), "k <= 2 or k <= q"),
    "strided": (lambda i, j: (i - j) % 2 == 0, "(q - k) % 2 == 0"),
}


@pytest.mark.parametrize("name", BIASES)
def test_masks_of_pairs_are_told_in_plain_maths(name: str) -> None:
    make, text = BIASES[name]

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(N)
        return (q @ k.mT).masked_fill(~make(at[:, None], at[None]), -math.inf).softmax(-1) @ v

    for kind in ("dynamo", "dynamic", "decomposed"):
        (site,) = run(fn, (Q, K, V), kind)
        assert site.mask == text
        no_band = site.exact == "mask" or site.reason.startswith("unsupported_mask: ")
        assert no_band == (name in ("prefix", "strided")), site.reason


def test_biases_are_told_in_plain_maths() -> None:
    slopes = t(H)

    def alibi(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        at = torch.arange(N)
        bias = slope[:, None, None] * (at - at[:, None])
        return (q @ k.mT + bias + torch.where(causal(), 0.0, -math.inf)).softmax(-1) @ v

    def documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        same = ids[:, None, :, None] == ids[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, same & causal())

    def table(q: Tensor, k: Tensor, v: Tensor, values: Tensor) -> Tensor:
        distance = (torch.arange(N)[:, None] - torch.arange(N)).abs()
        return (q @ k.mT + values[:, distance] + torch.where(causal(), 0.0, -math.inf)).softmax(-1) @ v

    def images(q: Tensor, k: Tensor, v: Tensor, types: Tensor) -> Tensor:
        group, at = torch.where(types == 1, 0, -1), torch.arange(N)
        one, other = group[:, at[:, None]], group[:, at[None, :]]
        return F.scaled_dot_product_attention(q, k, v, (causal() | ((one == other) & (one >= 0)))[:, None])

    (site,) = run(alibi, (Q, K, V, slopes), "dynamo")
    assert site.mask == "k <= q + (k - q)*l_slope_[h]"
    (site,) = run(documents, (Q, K, V, (torch.arange(N) // 5).expand(B, N)), "dynamo")
    assert site.mask == "k <= q and l_ids_[b, k] == l_ids_[b, q]"
    (site,) = run(table, (Q, K, V, t(H, N)), "dynamo")
    assert site.mask == "k <= q + l_values_[h, abs(k - q)]"
    (site,) = run(images, (Q, K, V, (torch.arange(N) > 6).long().expand(B, N)), "dynamo")
    assert site.mask == "(1 == l_types_[b, k] and 1 == l_types_[b, q]) or k <= q"


def test_a_folded_batch_is_told_from_its_heads() -> None:
    (site,) = run(bmm, (Q, K, V, VALID), "dynamo")
    assert site.mask == "l_valid_[b, k]" and site.shape["batch"] == "2" and site.shape["heads"] == "4"


def test_a_graph_without_shapes_needs_inputs() -> None:
    gm = fx.symbolic_trace(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)
    with pytest.raises(ValueError, match="pass example inputs: find\\(gm, \\*inputs\\)"):
        find(gm)
    assert len(find(gm, Q, K, V)) == 1


def test_renaming_every_node_changes_nothing() -> None:
    gm = fx.symbolic_trace(lambda q, k, v: (q @ k.mT * 0.3).masked_fill(~causal(), -math.inf).softmax(-1) @ v)
    before = rewrite(gm, Config.exact(), Q, K, V)[1].to_json()
    for at, node in enumerate(gm.graph.nodes):
        node.name = f"n{at}"
    assert rewrite(gm, Config.exact(), Q, K, V)[1].to_json() == before
