"""Learned attention sinks: one more logit of the softmax, which belongs to no key."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import EVERYTHING, PLANS, ROUTED, check_budget, in_double, operands, routes_of, rows_in_double, summary_of
from torch import Tensor, nn

from bench import alone
from prescore_compile import Config, explain
from prescore_compile.calibration import calibrate
from prescore_compile.kernels import banded, cpu, ops, reference
from prescore_compile.kernels.band import K, Q
from prescore_compile.kernels.logits import Logits
from prescore_compile.kernels.plan import WHOLE, Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.passes import cost, rewrite
from prescore_compile.passes.cost import ALONE_FROM
from prescore_compile.passes.plans import SiteKey, plans_only
from prescore_compile.passes.sources import sources_of

N = 150


def with_sink(site: Operands, per_query: bool = False) -> Operands:
    batch, heads, length, _ = site.query.shape
    logits = torch.randn(batch, heads, length) if per_query else torch.randn(1, heads, 1).expand(batch, heads, length)
    return site._replace(sink_logit=2 * logits)


def by_hand(site: Operands) -> torch.Tensor:
    """As models write it: the logit is put beside those of the keys, and its weight is dropped."""
    group, length = site.query.shape[1] // site.key.shape[1], site.key.shape[2]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (site.key, site.value))
    logits = site.query @ key.mT * site.scale
    if site.causal:
        logits = logits.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
    if site.valid is not None:
        logits = logits.masked_fill(~site.valid[:, None, None], -math.inf)
    assert site.sink_logit is not None
    return torch.cat([logits, site.sink_logit.unsqueeze(3)], 3).softmax(3)[..., :-1] @ value


@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_plan_that_covers_every_key_is_exact(name: str, causal: bool, per_query: bool) -> None:
    """The result and all gradients are those of the attention written by hand; queries without a key get 0."""
    plan = EVERYTHING[name]
    if name == "rows" and not causal:
        plan = Plan(chunk=512, window=0, sinks=4, routes=0, keep=512)
    site = with_sink(operands(N, causal=causal, padded=True), per_query)
    leaves = [tensor.requires_grad_() for tensor in (*site[:3], site.sink_logit.detach())]
    site = site._replace(sink_logit=leaves[3])
    want, got = by_hand(site), ops.prescored(site, plan)
    torch.testing.assert_close(reference.exact(site), want)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    grad = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PLANS)
def test_attend_meets_the_reference(name: str, dtype: torch.dtype) -> None:
    plan = PLANS[name]
    site = with_sink(operands(N, padded=True, dim=24, value_dim=40, dtype=dtype), per_query=True)
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    true = reference.attend(in_double(site), rows_in_double(summary), routes, plan)
    got = cpu.attend(site, summary, routes, plan)
    assert got.dtype == dtype
    check_budget(got, reference.attend(site, summary, routes, plan), true)


@pytest.mark.parametrize("name", ROUTED)
def test_routing_and_attending_as_one(name: str) -> None:
    plan = PLANS[name]
    site = with_sink(operands(N, padded=True))
    summary = summary_of(site, plan)
    near = reference.mass(site, summary, plan)
    torch.testing.assert_close(cpu.mass(site, summary, plan), near, atol=1e-5, rtol=1e-5)
    mass = cpu.mass(site, summary, plan) if plan.needs_mass else None
    routes = cpu.route(site.query, summary, plan, site.causal, N, site.scale, mass)
    assert torch.equal(cpu.route_attend(site, summary, plan), cpu.attend(site, summary, routes, plan))


@pytest.mark.parametrize("name", PLANS)
def test_none_is_minus_infinity(name: str) -> None:
    site = operands(N, padded=True)
    sunk = site._replace(sink_logit=torch.full((2, 4, N), -math.inf))
    assert torch.equal(ops.prescored(sunk, PLANS[name]), ops.prescored(site, PLANS[name]))


@pytest.mark.parametrize("name", ["residual", "keep and routes"])
def test_what_it_takes_is_taken_from_all_keys_alike(name: str) -> None:
    """Routes that do not hang on the mass: the result is that without a sink times one number a query."""
    plan, site = PLANS[name], operands(N)
    without, got = ops.prescored(site, plan), ops.prescored(with_sink(site), plan)
    share = (got * without).sum(3, keepdim=True) / without.square().sum(3, keepdim=True)
    torch.testing.assert_close(got, share * without, atol=1e-6, rtol=1e-5)
    assert share.min() > 0 and share.max() < 1
    assert (ops.prescored(site._replace(sink_logit=torch.full((2, 4, N), 1e4)), plan).abs() < 1e-30).all()


@pytest.mark.parametrize("name", ["share", "together"])
def test_beside_a_strong_sink_no_cluster_has_its_share(name: str) -> None:
    plan, site = PLANS[name], operands(N)
    summary = summary_of(site, plan)
    sunk = site._replace(sink_logit=torch.full((2, 4, N), 20.0))
    assert (routes_of(site, summary, plan) >= 0).any() and (routes_of(sunk, summary, plan) < 0).all()


@pytest.mark.parametrize("name", PLANS)
def test_the_future_is_not_seen(name: str) -> None:
    site = with_sink(operands(N), per_query=True)
    base, cut = ops.prescored(site, PLANS[name]), 101
    moved = [torch.cat([tensor[:, :, :cut], torch.randn_like(tensor[:, :, cut:])], 2) for tensor in site[:3]]
    logits = torch.cat([site.sink_logit[:, :, :cut], torch.full((2, 4, N - cut), math.nan)], 2)
    later = ops.prescored(type(site)(*moved, *site[3:6], logits), PLANS[name])
    assert torch.equal(later[:, :, :cut], base[:, :, :cut])


@pytest.mark.parametrize("logit", [math.inf, math.nan, torch.finfo(torch.float32).max])
def test_one_that_is_not_finite_or_hardly(logit: float) -> None:
    """As torch's softmax: its query, and no other, gets NaN, or 0 of the largest number."""
    site = with_sink(operands(N), per_query=True)
    base = ops.prescored(site, PLANS["routes"])
    site.sink_logit[1, 2, 70] = logit
    out, finite = ops.prescored(site, PLANS["routes"]), math.isfinite(logit)
    assert (out[1, 2, 70].abs() < 1e-30).all() if finite else out[1, 2, 70].isnan().all()
    torch.testing.assert_close(out[1, 2, 70], by_hand(site)[1, 2, 70], equal_nan=True)
    out[1, 2, 70] = base[1, 2, 70]
    assert torch.equal(out, base)


@pytest.mark.parametrize("padded", [False, True])
def test_bands(padded: bool) -> None:
    """Local layers have sinks, too."""
    logits = Logits(K >= Q - 20)
    site = with_sink(operands(300, padded=padded), per_query=True)
    got, grad = ops.prescored(site, WHOLE, logits), torch.randn(2, 4, 300, 16)
    summary, routes = summary_of(site, WHOLE), torch.empty(2, 4, 300, 0, dtype=torch.int32)
    true = reference.attend(in_double(site), summary, routes, WHOLE, logits)
    check_budget(got, reference.attend(site, summary, routes, WHOLE, logits), true)
    ends = banded.ends(logits.band(), 300, 300, True)
    d_query, d_key, d_value, _, _, d_sink = cpu.attend_backward(grad, site, summary, routes, WHOLE, 0.0, ends)
    *wide, _, _, of_sink = reference.attend_backward(grad.double(), in_double(site), summary, routes, WHOLE, logits)
    for g, w in zip((d_query, d_key, d_value, d_sink), (*wide, of_sink), strict=True):
        torch.testing.assert_close(g.double(), w.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["share", "keep and routes", "residual"])
def test_the_operators(name: str) -> None:
    plan = PLANS[name]
    site = with_sink(operands(N, padded=True, batch=1, heads=2, kv_heads=1))
    parts = [part.detach() for part in summary_of(site, plan)]
    more = (plan.text, site.causal, site.scale)
    sink = site.sink_logit.contiguous().requires_grad_()
    tests: Any = ("test_schema", "test_faketensor", "test_autograd_registration")
    near = (site.query, site.key, site.valid, *parts[4:], *more, "", [], sink)
    torch.library.opcheck(ops.mass, near, test_utils=tests)
    mass = ops.mass(*near) if plan.needs_mass else None
    routes = ops.route(site.query, *parts[:4], plan.text, True, N, site.scale, "", [], mass)
    leaves = [tensor.requires_grad_() for tensor in (*site[:3], *parts[6:8])]
    given = (*leaves[:3], site.valid, parts[0], routes, *parts[4:6], *leaves[3:], parts[8], *more, "", [], sink)
    torch.library.opcheck(ops.attend_forward, given, test_utils=tests)
    as_one = (*leaves[:3], site.valid, *parts[:6], *leaves[3:], parts[8], *more, sink, 0.0)
    torch.library.opcheck(ops.route_attend, as_one)
    grad = torch.randn(1, 2, N, 16)
    three, one = ops.attend(*given), ops.route_attend(*as_one)
    assert torch.equal(three, one)
    found, same = (torch.autograd.grad(out, [*leaves, sink], grad) for out in (three, one))
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


class Layer(nn.Module):
    """As gpt-oss writes it: causal, perhaps in a sliding window, a finite number forbids."""

    def __init__(self, window: int = 0, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(heads))
        self.heads, self.kv_heads, self.window = heads, kv_heads, window
        self.project = nn.Linear(dim, (heads + 2 * kv_heads) * dim)

    def forward(self, x: Tensor, padding: Tensor | None = None, keys: int = 0) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.project(x).view(batch, length, -1, dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q = q[:, :, length - keys :] if keys else q
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        i, j = torch.arange(length - q.shape[2], length)[:, None], torch.arange(length)
        allowed = (j <= i) & (j > i - self.window) if self.window else j <= i
        if padding is not None:
            allowed = allowed & padding[:, None, None]
        logits = q @ k.mT * dim**-0.5
        logits = logits + torch.where(allowed, 0.0, torch.finfo(q.dtype).min)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(batch, -1, q.shape[2], -1)
        joined = torch.cat([logits, sinks], -1)
        joined = joined - joined.max(-1, keepdim=True).values
        return joined.softmax(-1)[..., :-1] @ v


def run(model: nn.Module, *args: Any, config: Config, dynamic: bool = False) -> tuple[Any, list[Any]]:
    """The model with its graph rewritten, called once, and the sites."""
    sites: list[Any] = []

    def backend(gm: Any, _: Any) -> Any:
        new, report = rewrite(gm, config)
        sites.extend(report.sites)
        return new.forward

    torch._dynamo.reset()
    call = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    call(*args)
    return call, sites


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer(window: int, padded: bool) -> None:
    """With padding on the left, whose queries have no key under a finite number: the sink has all the weight."""
    layer, x = Layer(window), torch.randn(2, 120, 16)
    padding = (torch.arange(120) >= torch.tensor([[30], [0]])) if padded else None
    call, (site,) = run(layer, x, padding, config=Config.exact())
    assert site.decision == "rewrite" and site.exact == ("band" if window else "")
    want, got = layer(x, padding), call(x, padding)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    leaves, grad = [layer.sinks, layer.project.weight], torch.randn_like(want)
    for g, w in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4)


CASES: dict[str, tuple[int, dict[str, Any], str, str]] = {
    "short": (ALONE_FROM, {}, "alone", "too_short"),
    "too short": (ALONE_FROM - 1, {}, "", "too_short"),
    "no plan gains": (2048, {"routes": 0, "window": None}, "alone", "not_faster: at no length"),
    "left out": (2048, {"exclude": ("*",)}, "", "excluded"),
    "a plan": (2048, {"only_if_faster": False}, "", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_where_nothing_is_approximated_one_kernel_attends_all(name: str) -> None:
    length, options, exact, reason = CASES[name]
    layer, x = Layer(heads=2, kv_heads=1), torch.randn(1, length, 16)
    with torch.no_grad():
        call, (site,) = run(layer, x, config=Config(**options))
        assert (site.exact, site.reason, site.plan == WHOLE) == (exact, reason, bool(exact))
        if exact:
            torch.testing.assert_close(call(x), layer(x), atol=1e-5, rtol=1e-5)
            assert site.gain is None and site.density == 1.0


def test_few_queries_are_left_to_torch() -> None:
    """Behind a cache: what is read of the keys counts, and packing them would be most of the work."""
    layer, x = Layer(window=40, heads=2, kv_heads=1), torch.randn(1, 1500, 16)
    for queries, exact in ((1, ""), (cpu.TILE - 1, ""), (cpu.TILE, "alone")):
        with torch.no_grad():
            call, (site,) = run(layer, x, None, queries, config=Config())
            assert site.exact == exact, queries
            torch.testing.assert_close(call(x, None, queries), layer(x, None, queries), atol=1e-5, rtol=1e-5)


def test_where_one_kernel_is_faster_than_by_hand() -> None:
    """As measured: without causality it computes what by hand is computed, and 16 bits may be AMX's by hand."""
    shape = cost.Shape(1, 16, 2, 64, 64, True)
    assert cost.alone_from(shape, False) == cost.alone_from(shape, True) == ALONE_FROM
    narrow, wide = replace(shape, narrow=True), replace(shape, head_dim=256, value_dim=256)
    assert cost.alone_from(narrow, True) == ALONE_FROM and cost.alone_from(wide, False) == ALONE_FROM
    few = replace(shape, heads=4, narrow=True)
    assert cost.alone_from(few, False) == cost.alone_from(few, True) == 2048, "logits of 8 MB fit into a cache"
    amx, both = replace(few, device="amx"), replace(few, narrow=False, causal=False)
    assert cost.alone_from(replace(few, narrow=False), True) == ALONE_FROM and cost.alone_from(amx, True) == 2048
    assert cost.alone_from(both, True) == 1448 and cost.alone_from(replace(both, head_dim=128), True) is None
    assert cost.alone_from(replace(narrow, head_dim=256, value_dim=256), False) is None
    assert cost.alone_from(replace(narrow, causal=False), False) is None
    assert cost.alone_from(replace(shape, causal=False), False) == ALONE_FROM
    assert cost.alone_from(replace(shape, queries=128), False) == 4096
    for other in (replace(narrow, band=128.0), replace(narrow, device="cuda", causal=False)):
        assert cost.alone_from(other, True) == ALONE_FROM
    gemma = cost.Shape(1, 8, 4, 256, 256, True, band=4096.0, narrow=True)
    assert cost.alone_from(gemma, False) > 3 * 4096, "a window as long as the sequence is no band yet"
    assert cost.alone_from(replace(gemma, narrow=False), False) == ALONE_FROM
    wide = replace(narrow, head_dim=256, value_dim=256)
    for shape in (few, gemma, wide, replace(wide, causal=False)):
        for trained in (False, True):
            assert cost.alone_from(replace(shape, unit=False), trained) == 128, "by hand is slow"
    for of_tiles in (few, gemma, replace(narrow, causal=False), replace(narrow, head_dim=256, value_dim=256)):
        assert cost.alone_from(replace(of_tiles, device="amx"), False) == ALONE_FROM, "one kernel has AMX, too"


def test_nothing_of_the_attention_by_hand_is_left() -> None:
    gm = torch.export.export(Layer(window=40), (torch.randn(1, 120, 16),)).module()
    new, _ = rewrite(gm, Config.exact())
    names = " ".join(node.name for node in new.graph.nodes)
    assert not any(word in names for word in ("cat", "matmul", "softmax", "max", "where")), names


def test_a_foreign_plan_is_told_of_where_its_sites_are_attended_whole(tmp_path: Any) -> None:
    plan = Config(plan=plans_only({SiteKey("other#0", 2, 1, 16, 16, True): Plan(routes=2)}))
    torch._dynamo.reset()
    call = torch.compile(Layer(heads=2, kv_heads=1), backend="prescore", options=plan.changed(inner="eager"))
    with torch.no_grad(), pytest.warns(UserWarning, match="1 of 1 attention sites are not in the plan file"):
        call(torch.randn(1, 1100, 16))


def test_dynamic_lengths_have_a_graph_on_each_side() -> None:
    layer = Layer(heads=2, kv_heads=1)
    with torch.no_grad():
        call, sites = run(layer, torch.randn(1, 1100, 16), config=Config(), dynamic=True)
        for length in (1200, 300, 400, 1300):
            x = torch.randn(1, length, 16)
            torch.testing.assert_close(call(x), layer(x), atol=1e-5, rtol=1e-5)
    assert [site.exact for site in sites] == ["alone", ""]


def test_report_and_kernels() -> None:
    layer, x = Layer(window=40, heads=2, kv_heads=1), torch.randn(1, 2048, 16)
    report = explain(layer, x)
    assert report.sites[0].exact == "band" and report.sites[0].kernel["sink_logit"]
    assert report.sites[0].mask == "k <= q and q - 39 <= k; learned sink"
    gm = torch.export.export(layer, (x,)).module()
    _, on_a_gpu = rewrite(gm, None, device="cuda")
    sources = {source.name: source.text for source in sources_of(on_a_gpu)}
    assert "sink_logit" in sources["attend.py"] and "sink_logit" not in sources["d_query.py"].split("@triton.jit")[1]


def test_calibrate_gives_such_sites_plans_and_what_stays_exact_is_one_kernel() -> None:
    layer, x = Layer(heads=2, kv_heads=1), torch.randn(1, 1100, 16)
    layer.eval()
    small = Plan(chunk=64, window=0, routes=4)
    same: dict[str, Any] = dict(measure="cosine", candidates=[small], progress=None)
    assert [site.plan for site in calibrate(layer, [x], drift=10.0, **same).sites] == [small]
    found = calibrate(layer, [x], drift=0.0, **same)
    assert [site.plan for site in found.sites] == [None]
    with torch.no_grad():
        _, (site,) = run(layer, x, config=Config(plan=found))
    assert site.exact == "alone" and site.plan == WHOLE


def test_the_benchmark_checks_what_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Namespace(rounds=1, dim=64, heads=16, group=8, backward=True)
    found = alone.row("sink, window 128", 300, torch.float32, options)
    assert found["faster"] > 0 and max(found["errors"].values()) < 1e-4
    right = ops.prescored
    monkeypatch.setattr(alone.ops, "prescored", lambda *given: 1.01 * right(*given))
    with pytest.raises(AssertionError, match="wrong result"):
        alone.row("softcap", 300, torch.float32, Namespace(**vars(options) | {"backward": False}))
