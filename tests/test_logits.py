"""Softcaps, biases and masks of pairs: as the operators compute them, and through the graph pass for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from conftest import EVERYTHING, PLANS, in_double, operands
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from prescore_compile.kernels import ops
from prescore_compile.kernels.band import B, H, K, Q
from prescore_compile.kernels.logits import Logits, parse, settled, value
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.triton.maths import triton_text
from prescore_compile.passes import Config, decide, rewrite

N = 150
DOCUMENT = torch.arange(N).div(40, rounding_mode="floor").expand(2, N)
T0 = sympy.Function("t0")
CASES: dict[str, tuple[Logits, Any]] = {
    "sliding window": (Logits(K >= Q - 70), lambda h, q, k: (k >= q - 70, 0.0)),
    "chunked": (
        Logits(sympy.Eq(sympy.floor(K / 48), sympy.floor(Q / 48))),
        lambda h, q, k: (k // 48 == q // 48, 0.0),
    ),
    "prefix": (Logits(sympy.Or(K <= Q, K < 50)), lambda h, q, k: ((k <= q) | (k < 50), 0.0)),
    "documents": (
        Logits(sympy.Eq(T0(B, Q), T0(B, K))),
        lambda h, q, k: (DOCUMENT[0][q] == DOCUMENT[0][k], 0.0),
    ),
    "alibi": (
        Logits(bias=-sympy.Rational(1, 4) * 2 ** (-H / 2) * (Q - K)),
        lambda h, q, k: (k >= 0, -0.25 * 2 ** (-h / 2) * (q - k)),
    ),
    "softcap": (Logits(softcap=1.5), lambda h, q, k: (k >= 0, 0.0)),
}


def exact(site: Any, logits: Logits, rule: Any) -> torch.Tensor:
    h, q, k = torch.meshgrid(torch.arange(4), torch.arange(N), torch.arange(N), indexing="ij")
    allowed, bias = rule(h, q, k)
    found = site.query @ site.key.repeat_interleave(2, 1).mT * site.scale
    if logits.softcap:
        found = logits.softcap * torch.tanh(found / logits.softcap)
    allowed = allowed & (k <= q) if site.causal else allowed
    return torch.softmax((found + bias).masked_fill(~allowed, -torch.inf), 3) @ site.value.repeat_interleave(2, 1)


def tensors(logits: Logits) -> dict[str, torch.Tensor]:
    return dict.fromkeys(logits.tensors, DOCUMENT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("plan", ["window", "routes", "two levels"])
@pytest.mark.parametrize("name", CASES)
def test_a_plan_that_keeps_everything_is_exact(name: str, plan: str, causal: bool) -> None:
    logits, rule = CASES[name]
    assert settled(logits).text == parse(settled(logits).text).text
    site = in_double(operands(N, causal=causal))
    leaves = [tensor.requires_grad_() for tensor in site[:3]]
    got = ops.prescored(site, EVERYTHING[plan], logits, tensors(logits))
    want = exact(site, logits, rule)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", ["sliding window", "documents", "alibi", "softcap"])
@pytest.mark.parametrize("plan", ["keep and routes", "two levels"])
def test_perturbing_the_future_leaves_the_past_bit_equal(plan: str, name: str) -> None:
    logits, _ = CASES[name]
    site = operands(N)
    base = ops.prescored(site, PLANS[plan], logits, tensors(logits))
    for tensor in site[:3]:
        tensor[:, :, 101:] = 7.0
    assert torch.equal(ops.prescored(site, PLANS[plan], logits, tensors(logits))[:, :, :101], base[:, :, :101])


def test_routes_do_not_go_where_no_key_is_allowed() -> None:
    plan = Plan(chunk=32, window=0, sinks=0, routes=3)
    site = operands(N, causal=True)
    parts = ops.summarize(site.key, site.value, None, None, plan.text)
    reachable = {
        "documents": lambda q, c: c >= q // 40 * 40 // 32,
        "sliding window": lambda q, c: 32 * c + 31 >= q - 70,
    }
    for name, may in reachable.items():
        logits, _ = CASES[name]
        more = (plan.text, True, N, site.scale, logits.text, list(tensors(logits).values()))
        routes = ops.route(site.query, *parts[:4], *more)
        q = torch.arange(N)[:, None].expand_as(routes)
        assert ((routes < 0) | may(q, routes // 2)).all()


LONG = 32768


@fx.wrap
def positions(like: torch.Tensor) -> torch.Tensor:
    """``torch.arange(LONG)`` on the device of ``like``, as a node of its own in the traced graph."""
    return torch.arange(LONG, device=like.device)


def traced(function: Any, *last: torch.dtype | tuple[int, ...], device: str, dim: int = 128) -> fx.GraphModule:
    """The graph of ``function(q, k, v, last)`` with the values of a long site on a device that is not there."""
    gm = fx.symbolic_trace(function)
    for node in gm.graph.nodes:
        if node.target is positions:
            node.target, node.args, node.kwargs = torch.arange, (LONG,), {"device": torch.device(device)}
            node.meta.pop("is_wrapped")
    gm.recompile()
    shape, dtype = last
    with FakeTensorMode() as mode:
        q, k = (torch.empty(1, heads, LONG, dim, device=device, dtype=torch.bfloat16) for heads in (32, 32))
        given = [q, k, k, torch.empty(shape, device=device, dtype=dtype)]
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*given)
    return gm


def sliding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    at = positions(q)
    mask = (at <= at.unsqueeze(1)) & (at > at.unsqueeze(1) - 9000)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    at = positions(q)
    mask = (at <= at.unsqueeze(1)) & (document.view(1, 1, LONG, 1) == document.view(1, 1, 1, LONG))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    at = positions(q)
    logits = torch.tanh(q @ k.mT * 0.125 / 50) * 50
    return logits.masked_fill(at > at.unsqueeze(1), -torch.inf).softmax(-1) @ v


def gemma(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    at = positions(q)
    far = (at > at.unsqueeze(1)) | (at <= at.unsqueeze(1) - 4096)
    logits = torch.tanh(q @ k.mT * 0.125 / 50) * 50
    return logits.masked_fill(far, -torch.inf).softmax(-1) @ v


def linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    at = positions(q)
    logits = q @ k.mT * 0.125 + (at - at.unsqueeze(1)) * 0.01
    return logits.masked_fill(at > at.unsqueeze(1), -torch.inf).softmax(-1).to(v.dtype) @ v


def alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    at = positions(q)
    logits = q @ k.mT * 0.125 + slope.view(32, 1, 1) * (at - at.unsqueeze(1))
    return logits.masked_fill(at > at.unsqueeze(1), -torch.inf).softmax(-1).to(v.dtype) @ v


def padded_by_a_float(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    at = positions(q)
    logits = (q @ k.mT * 0.125 + added.view(1, 1, 1, LONG)).masked_fill(at > at.unsqueeze(1), -torch.inf)
    return logits.softmax(-1).to(v.dtype) @ v


def before(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    at = positions(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(at <= at.unsqueeze(1)) & (at <= at.unsqueeze(1) - 3000))


def prefix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    at = positions(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(at <= at.unsqueeze(1)) | (at < 500))


DOCUMENTS, SLOPES = ((1, LONG), torch.int64), ((32,), torch.float32)
SITES: dict[str, tuple[Any, Any, str]] = {
    "sliding window": (sliding, DOCUMENTS, "softcap 0.0; add 0; where k >= q - 8999"),
    "documents": (packed, DOCUMENTS, "softcap 0.0; add 0; where Eq(t00(0, q), t00(0, k))"),
    "softcap": (capped, SLOPES, "softcap 50.0; add 0; where True"),
    "softcap and window": (gemma, SLOPES, "softcap 50.0; add 0; where k >= q - 4095"),
    "alibi": (alibi, SLOPES, "softcap 0.0; add (k - q)*t00(h); where True"),
    "linear bias": (linear, SLOPES, "softcap 0.0; add 0.01*k - 0.01*q; where True"),
}


@pytest.mark.parametrize("name", SITES)
def test_sites_on_a_gpu_take_masks_and_softcaps(name: str) -> None:
    function, last, text = SITES[name]
    new, report = rewrite(traced(function, *last, device="cuda"))
    assert [site.decision for site in report.sites] == ["rewrite"], report.sites[0].reason
    for operator in (torch.ops.prescore.attend.default, torch.ops.prescore.route.default):
        (call,) = (node for node in new.graph.nodes if node.target is operator)
        names = (argument.name for argument in operator._schema.arguments)
        given = dict(zip(names, call.args, strict=False))
        assert given["logits"] == text and len(given["tensors"]) == len(parse(text).tensors)


def test_a_bias_that_is_trained_is_kept_on_a_gpu() -> None:
    """The operators have no gradient in what logits read."""
    gm = traced(alibi, *SLOPES, device="cuda")
    *_, slopes = gm.graph.find_nodes(op="placeholder")
    slopes.meta["val"].requires_grad_()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            (site,) = rewrite(gm)[1].sites
            assert ("a gradient in" in site.reason) == grad and (site.decision == "keep") == grad, site.reason


@pytest.mark.parametrize("name", SITES)
def test_a_cpu_reads_what_it_does_not_take_and_centroids_take_none(name: str) -> None:
    function, last, _ = SITES[name]
    (site,) = rewrite(traced(function, *last, device="cpu"))[1].sites
    assert site.decision == "rewrite", site.reason
    assert bool(site.recognized) == (name in ("documents", "alibi", "linear bias"))
    for plan in (Config(routes=0, keep=8, centroids=2), Config(routes=8, residual=True)):
        _, report = rewrite(traced(function, *last, device="cuda"), plan)
        assert "a centroid stands for several keys" in report.sites[0].reason


def test_with_gradients_they_are_kept_on_a_cpu() -> None:
    gm = traced(alibi, *SLOPES, device="cpu")
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta["val"].requires_grad_()
    assert rewrite(gm)[1].sites[0].reason.startswith("unsupported_mask: ")


@pytest.mark.parametrize("function", [padded_by_a_float, before, prefix])
def test_what_could_lose_a_key_or_show_the_future_is_kept_on_a_gpu_too(function: Any) -> None:
    last = ((1, LONG), torch.float32) if function is padded_by_a_float else SLOPES
    _, report = rewrite(traced(function, *last, device="cuda"))
    assert report.sites[0].decision == "keep" and report.sites[0].reason.startswith("unsupported_mask: ")


def test_a_common_factor_does_not_lose_small_differences_of_large_places() -> None:
    logits = parse(Logits(bias=sympy.Float(1 / 3) * (K - Q)).text)
    at = {"q": torch.tensor([[120_001]]), "k": torch.tensor([120_000])}
    assert value(logits.bias, at, {}).item() == pytest.approx(-1 / 3, abs=1e-7)
    assert triton_text(logits.bias) == "0.3333333333333333 * (k - q)"


SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": SMALL | dict(num_hidden_layers=1, num_key_value_heads=2, head_dim=8, sliding_window=40),
    "gemma2": SMALL | dict(num_key_value_heads=2, head_dim=8, sliding_window=40, attn_logit_softcapping=1.0),
    "bloom": dict(vocab_size=64, hidden_size=32, n_head=4, n_layer=2),
}


@pytest.mark.parametrize(
    ("name", "dynamic", "padded"), [("mistral", True, True), ("gemma2", False, True), ("bloom", False, False)]
)
def test_models_are_exact_where_a_plan_keeps_everything(
    name: str, dynamic: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decided as on a GPU, run by the reference: gradients, padding, dynamic lengths.

    BLOOM makes its bias from its padding, so that it is taken where it is given none.
    """
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(decide, "_generated", lambda device: True)
    reasons: list[str] = []
    pairs = decide._pairs

    def noted(*args: Any) -> str:
        reasons.append(pairs(*args))
        return reasons[-1]

    monkeypatch.setattr(decide, "_pairs", noted)
    config = transformers.AutoConfig.for_model(name, **FAMILIES[name])
    implementation = "eager" if name == "gemma2" else None
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    everything = dict(chunk=32, window=8, sinks=4, routes=10**6, share=0.0)
    options = everything | dict(min_seq_len=0, only_if_faster=False, inner="aot_eager")
    compiled = torch.compile(model, backend="prescore", options=options, dynamic=dynamic)
    for length in (150, 97) if dynamic else (97,):
        ids = torch.randint(0, 64, (2, length))
        valid = torch.ones_like(ids)
        valid[0, length - 20 :] = 1 - padded
        more = dict(attention_mask=valid) if padded else {}
        results = []
        for run in (model, compiled):
            model.zero_grad()
            out = run(ids, use_cache=False, **more).logits[valid.bool()]
            out.square().mean().backward()
            results.append([out, *(p.grad for p in model.parameters())])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-4)
    assert reasons and not any(reasons), reasons
