"""Bands: masks that leave each query one run of keys are attended exactly, and what lies outside is skipped."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from conftest import check_budget, in_double, operands, summary_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Abs, And, Eq, Max, Or, floor

from bench import bands
from prescore_compile import Config, explain
from prescore_compile.calibration import calibrate
from prescore_compile.kernels import banded, ops, reference
from prescore_compile.kernels.band import H, K, Q, band
from prescore_compile.kernels.logits import Logits, value
from prescore_compile.kernels.plan import WHOLE, Plan
from prescore_compile.passes import cost, rewrite
from prescore_compile.passes.sources import sources_of

N = 150
BANDS: dict[str, Any] = {
    "sliding window": K >= Q - 20,
    "strictly": K > Q - 20,
    "both sides": Abs(Q - K) <= 9,
    "strictly both sides": Abs(K - Q) < 9,
    "two bounds": And(K >= Q - 30, K <= Q + 4),
    "chunks": Eq(floor(K / 24), floor(Q / 24)),
    "shifted chunks": Eq(floor((Q + 5) / 24), floor((K + 3) / 24)),
    "chunks in a window": And(Eq(floor(K / 64), floor(Q / 64)), K > Q - 40),
    "from the chunk's begin": 24 * floor(Q / 24) <= K,
    "behind": And(K >= Q - 40, K <= Q - 30),
    "ahead": K >= Q + 3,
    "near or later": Max(Q - 20, 2 * Q - 100) <= K,
}
NONE: dict[str, Any] = {
    "prefix": Or(K <= Q, K < 13),
    "falling": K <= 100 - Q,
    "of heads": K >= Q - 8 * H,
    "of keys": K >= 5,
    "of other chunks": sympy.Ne(floor(K / 8), floor(Q / 8)),
    "half": K >= Q / 2,
    "read": sympy.Function("t")(Q) <= K,
    "squares": K >= Q**2,
}


def pairs(expr: Any, length: int) -> torch.Tensor:
    """Where it holds, ``[queries, keys]``."""
    at = torch.arange(length)
    return value(expr, {"q": at[:, None], "k": at[None]}, {}).expand(length, length)


def run_of(found: Any, by: torch.Tensor, of: torch.Tensor, name: str) -> torch.Tensor:
    inside = torch.ones(1, dtype=torch.bool)
    for end, beyond in ((found.low, torch.lt), (found.high, torch.gt)):
        if end is not None:
            bound = torch.as_tensor(value(end, {"q": by, name: by}, {}))
            assert (bound.flatten().diff() >= 0).all(), "an end never falls"
            inside = inside & ~beyond(of, bound)
    return inside


@pytest.mark.parametrize("name", BANDS)
def test_the_ends_say_the_same_as_the_mask(name: str) -> None:
    at, expr = torch.arange(N), BANDS[name]
    keys = band(expr, K, Q)
    assert keys.rest == sympy.true
    assert torch.equal(run_of(keys, at[:, None], at[None], "q").expand(N, N), pairs(expr, N))
    queries = band(expr, Q, K)  # which may leave something unsaid, and never says too much
    assert run_of(queries, at[None], at[:, None], "k").expand(N, N)[pairs(expr, N)].all()


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_band_is_left_as_it_is(name: str) -> None:
    found = band(NONE[name], K, Q)
    assert (found.low, found.high, found.rest) == (None, None, NONE[name])
    assert band(And(NONE[name], K >= Q - 7), K, Q).rest == NONE[name]


@given(
    st.sampled_from([1, 2, 3]), st.integers(-40, 40), st.integers(-40, 40), st.integers(1, 30), st.booleans(),
    st.sampled_from([sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_bound_is_read_right(times: int, a: int, b: int, size: int, turned: bool, order: Any) -> None:
    expr = order(K + a, times * floor((Q + b) / size) + Q)
    expr = expr.reversed if turned else expr
    found = band(expr, K, Q)
    at = torch.arange(60)
    assert found.rest == sympy.true
    assert torch.equal(run_of(found, at[:, None], at[None], "q").expand(60, 60), pairs(expr, 60))


def test_keys_a_query() -> None:
    def of(expr: Any) -> tuple[float, int]:
        return banded.keys_a_query(band(expr, K, Q))

    assert of(And(K > Q - 512, K <= Q)) == (512, 512)
    assert of(Abs(Q - K) <= 64) == (129, 129)
    assert of(And(Eq(floor(K / 1024), floor(Q / 1024)), K <= Q)) == (512.5, 1024)
    assert of(K >= Q - 5) == of(And(floor(Q / 2) <= K, K <= Q)) == (0, 0)
    assert of(And(K <= Q - 5, K >= Q + 5)) == (0, 0)


def no_routes(site: Any) -> torch.Tensor:
    return torch.empty(*site.query.shape[:3], 0, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("causal", "padded"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("name", BANDS)
def test_forward_and_backward(name: str, causal: bool, padded: bool, dtype: torch.dtype) -> None:
    site = operands(N, causal=causal, padded=padded, heads=6, dim=20, value_dim=24, dtype=dtype)
    logits, grad = Logits(BANDS[name]), torch.randn(2, 6, N, 24, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in site[:3]]
    out = ops.prescored(site, WHOLE, logits)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def by_reference(site: Any, grad: torch.Tensor) -> list[torch.Tensor]:
        given = (site, summary_of(site, WHOLE), no_routes(site), WHOLE, logits)
        return [reference.attend(*given), *reference.attend_backward(grad, *given)[:3]]

    with torch.no_grad():
        low, true = by_reference(site, grad), by_reference(in_double(site), grad.double())
    for got, lo, want in zip(found, low, true, strict=True):
        check_budget(got, lo, want, times=4)


@pytest.mark.parametrize("queries", [1, 40])
def test_fewer_queries_than_keys(queries: int) -> None:
    site = operands(N)
    site = site._replace(query=site.query[:, :, -queries:])
    logits, at = Logits(Q + (N - queries) - 20 <= K), torch.arange(N)
    mask = (at <= at[-queries:, None]) & (at >= at[-queries:, None] - 20)
    want = F.scaled_dot_product_attention(*site[:3], attn_mask=mask, scale=site.scale, enable_gqa=True)
    torch.testing.assert_close(ops.prescored(site, WHOLE, logits), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", BANDS)
def test_what_lies_outside_does_not_change_a_bit(name: str) -> None:
    site, allowed = operands(N), pairs(BANDS[name], N)
    before = ops.prescored(site, WHOLE, Logits(BANDS[name]))
    for key in (3, 77, N - 1):
        changed = site._replace(key=site.key.clone(), value=site.value.clone())
        changed.key[:, :, key], changed.value[:, :, key] = float("nan"), float("inf")
        after = ops.prescored(changed, WHOLE, Logits(BANDS[name]))
        blind = ~allowed[:, key] | (torch.arange(N) < key)
        assert torch.equal(after[:, :, blind], before[:, :, blind]) and after[:, :, ~blind].isnan().all()


def test_no_query_and_no_key() -> None:
    logits, site = Logits(K >= Q - 20), operands(N)
    none = site._replace(query=site.query[:, :, :0])
    assert ops.prescored(none, WHOLE, logits).shape == (2, 4, 0, 16)
    beyond = Logits(K >= Q + N)
    assert (ops.prescored(site._replace(causal=False), WHOLE, beyond) == 0).all()


def test_routes_without_a_limit_are_none() -> None:
    """Every key is in the window, and which keys the kernel is handed has nothing to do with clusters."""
    site, logits = operands(N), Logits(K >= Q - 20)
    want = ops.prescored(site, WHOLE, logits)
    for plan in (Plan(window=None), Plan(window=None, sinks=3, keep=4, routes=2, residual=False)):
        assert torch.equal(ops.prescored(site, plan, logits), want)
    assert Config(window=None, min_seq_len=0).plan_for(True, "cpu", N) == WHOLE


# Through the compiler.

LENGTH = 2300


def masked(rule: Callable[[Any, Any], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        at = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=rule(at[:, None], at[None]), enable_gqa=True)

    return fn


SITES: dict[str, Callable[[Any, Any], torch.Tensor]] = {
    "sliding window": lambda q, k: (k <= q) & (q - k < 100),
    "both sides": lambda q, k: (q - k).abs() <= 50,
    "chunks": lambda q, k: (k <= q) & (k // 128 == q // 128),
    "one side": lambda q, k: (k <= q + 20) & (k >= q - 20),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SITES)
def test_by_default_sites_are_rewritten_and_exact(name: str, dynamic: bool) -> None:
    fn = masked(SITES[name])
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="prescore", options={"inner": "aot_eager"}, dynamic=dynamic)
    for length in (LENGTH, LENGTH + 257) if dynamic else (LENGTH,):
        inputs = [torch.randn(1, heads, length, 16) for heads in (4, 2, 2)]
        torch.testing.assert_close(compiled(*inputs), fn(*inputs), atol=1e-5, rtol=1e-5)
    report = explain(fn, *inputs)
    (site,) = report.sites
    assert site.decision == "rewrite" and site.exact and site.plan == WHOLE
    assert site.density is not None and site.density < 0.06 and site.gain is not None and site.gain > 3
    assert "1 rewritten (1 of them exact)" in str(report) and "every key that the mask allows" in str(report)


def test_settings_of_plans_are_for_others_and_lengths_for_all() -> None:
    fn, inputs = masked(SITES["sliding window"]), [torch.randn(1, 2, LENGTH, 16) for _ in range(3)]
    for config in (Config(routes=3, share=0.0), Config(window=0), Config(keep=8), Config(residual=True)):
        (site,) = explain(fn, *inputs, config=config).sites
        assert site.exact and site.plan == WHOLE
    for config, reason in (
        (Config(min_seq_len=4000), "too_short"),
        (Config(exclude=("*",)), "excluded"),
    ):
        (site,) = explain(fn, *inputs, config=config).sites
        assert site.reason == reason and not site.exact


def test_a_band_as_wide_as_the_sequence_gains_nothing() -> None:
    fn, inputs = masked(lambda q, k: (k <= q) & (q - k < 2400)), [torch.randn(1, 2, LENGTH, 16) for _ in range(3)]
    (site,) = explain(fn, *inputs).sites
    assert site.reason == "not_faster: breaks even at 2401 keys"
    assert cost.break_even(cost.Shape(1, 2, 2, 16, 16, True), WHOLE) is None


def test_what_is_no_band_alone_is_kept_on_a_cpu() -> None:
    document = torch.arange(LENGTH) // 100
    rules = {
        "unsupported_mask: ": lambda q, k: (k <= q) & (q - k < 100) & (document[q] == document[k]),
        "opaque_mask: ": lambda q, k: (k <= q) & (q - k < 100) & (torch.rand(LENGTH, LENGTH) > 0.5),
    }
    for reason, rule in rules.items():
        trained = [torch.randn(1, 2, LENGTH, 16, requires_grad=True) for _ in range(3)]
        (site,) = explain(masked(rule), *trained).sites
        assert site.decision == "keep" and site.reason.startswith(reason), site.reason


def test_on_a_gpu_bands_that_look_both_ways_are_exact_whatever_their_width() -> None:
    found = []

    def noted(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(rewrite(gm, Config(only_if_faster=False), device="cuda")[1].sites[0])
        return gm.forward

    inputs = [torch.randn(1, 2, 4096, 16, dtype=torch.bfloat16) for _ in range(3)]
    torch.compile(masked(lambda q, k: (q - k).abs() <= 1500), backend=noted)(*inputs)
    assert found[0].exact and found[0].plan == WHOLE


@pytest.mark.parametrize("backward", [False, True])
def test_the_benchmark_checks_what_it_times(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Namespace(rounds=1, flex=False, backward=backward)
    row = bands.row("both sides 64", 300, torch.float32, options)
    assert row["band, ms"] > 0 and row["faster"] > 0 and row["errors"]["band"] < 1e-4
    monkeypatch.setitem(bands.BANDS, "both sides 64", (Abs(Q - K) <= 63, False, bands.BANDS["both sides 64"][2]))
    with pytest.raises(AssertionError, match="wrong result: band is off by"):
        bands.row("both sides 64", 300, torch.float32, options)


@pytest.mark.parametrize(("width", "whole"), [(1024, True), (3000, False)])
def test_on_a_gpu_narrow_bands_are_exact_and_wide_ones_routed(width: int, whole: bool) -> None:
    graphs = []

    def captured(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(rewrite(gm, Config(only_if_faster=False), device="cuda"))
        return gm.forward

    inputs = [torch.randn(1, 4, 4096, 16, dtype=torch.bfloat16) for _ in range(3)]
    torch.compile(masked(lambda q, k: (k <= q) & (q - k < width)), backend=captured)(*inputs)
    new, report = graphs[0]
    (site,) = report.sites
    assert site.decision == "rewrite" and bool(site.exact) == whole and (site.plan == WHOLE) == whole
    assert site.kernel["logits"] == f"softcap 0.0; add 0; where k >= q - {width - 1}"
    routed = [node for node in new.graph.nodes if node.target is torch.ops.prescore.route.default]
    assert bool(routed) != whole
    bound = "start = tl.maximum(first_query - 1023, 0)"
    bounds = [source for source in sources_of(report) if bound in source.text]
    assert len(bounds) == 2 * whole, "attend and the gradient of the query, which print what runs"


class Mixed(torch.nn.Module):
    """One attention in a sliding window, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.take = torch.nn.ModuleList(torch.nn.Linear(16, 48) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1])
        near = (at <= at[:, None]) & (at > at[:, None] - 64)
        for layer, mask in zip(self.take, (near, None), strict=True):
            q, k, v = layer(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            x = x + out.transpose(1, 2).flatten(2)
        return x


def test_a_plan_file_leaves_bands_alone() -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(1, 640, 16)
    found = calibrate(model, [x], budget=0.9, candidates=[Plan(window=0, chunk=64, routes=4)], progress=None)
    assert len(found.sites) == 1, "a band has nothing to choose"
    compiled = torch.compile(model, backend="prescore", options={"plan": found, "min_seq_len": 0, "inner": "aot_eager"})
    with torch.no_grad():
        compiled(x)
        report = explain(model, x, config=Config(plan=found, min_seq_len=0, only_if_faster=False))
    assert [site.exact for site in report.sites] == ["band", ""] and not report.absent
    assert all(site.decision == "rewrite" for site in report.sites)


TINY = dict(vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
GROUPED = TINY | dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=8192)
LAYERS = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=100)
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3_text": GROUPED | LAYERS,
    "cohere2": GROUPED | LAYERS,
    "mistral": GROUPED | dict(sliding_window=100),
    "modernbert": TINY | dict(local_attention=128, global_attn_every_n_layers=2, max_position_embeddings=8192),
    "llama4_text": GROUPED
    | dict(layer_types=["chunked_attention", "full_attention"], attention_chunk_size=128, no_rope_layers=[1, 0],
           num_local_experts=2, moe_layers=[], intermediate_size_mlp=32),
}  # fmt: skip


@pytest.mark.parametrize(("padded", "implementation"), [(False, "sdpa"), (True, "sdpa"), (True, "eager")])
@pytest.mark.parametrize("name", FAMILIES)
def test_models_with_local_layers(name: str, padded: bool, implementation: str) -> None:
    """Each local layer is a band, and the model's output and gradients are the eager model's."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(name, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                               cls_token_id=1, sep_token_id=2, **FAMILIES[name])  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()
    ids, valid = torch.randint(3, 128, (2, 320)), torch.ones(2, 320, dtype=torch.long)
    valid[0, 300:] = 1 - padded
    more = dict(attention_mask=valid) if padded else {}
    local = 2 if name == "mistral" else 1
    trained = implementation == "sdpa"
    with torch.set_grad_enabled(trained):
        report = explain(model, ids, config=Config(min_seq_len=0, only_if_faster=False), **more)
    assert sum(site.exact == "band" for site in report.sites) == (0 if padded and name == "llama4_text" else local), (
        report
    )
    torch._dynamo.reset()
    options = dict(window=None, sinks=0, routes=0, min_seq_len=0, only_if_faster=False, inner="aot_eager")
    compiled = torch.compile(model, backend="prescore", options=options)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        with torch.set_grad_enabled(trained):
            out = run(ids, **more).last_hidden_state[valid.bool()]
        if trained:
            out.square().mean().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("queries", "width", "faster"), [(2, 0, False), (64, 0, False), (1024, 0, True), (2, 200, True), (256, 200, True)]
)
def test_few_queries_do_not_pay_for_what_keys_cost(queries: int, width: int, faster: bool) -> None:
    """Behind a cache: summaries of all keys for a few queries would take longer than exact attention."""
    keys = 4096

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        at = torch.arange(k.shape[2])
        here = at[-q.shape[2] :, None]
        mask = (at <= here) & (at > here - width) if width else at <= here
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    q, k = torch.randn(1, 8, queries, 64), torch.randn(1, 8, keys, 64)
    (site,) = explain(fn, q, k, k).sites
    assert site.decision == ("rewrite" if faster else "keep"), site
    assert site.reason.startswith("" if faster else "not_faster: ")
    assert not faster or (site.gain is not None and site.gain > 1)


def of_the_last_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    here = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    mask = torch.arange(k.shape[2]) <= here
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def test_more_queries_than_keys_cost_what_they_cost() -> None:
    for queries, keys in ((400, 150), (1000, 300), (300, 300), (100, 700)):
        q, k = torch.randn(1, 4, queries, 16), torch.randn(1, 4, keys, 16)
        (site,) = explain(of_the_last_queries, q, k, k, config=Config(min_seq_len=0, only_if_faster=False)).sites
        assert site.exact_cost > 0 and site.prescored_cost > 0 and 0 < site.density < 2 and site.gain > 0
        assert site.density == pytest.approx(site.prescored_cost / site.exact_cost, rel=1e-3)


def test_a_dynamic_number_of_queries_is_a_guard() -> None:
    """What is right for many queries is not for few, behind the same cache."""
    found = []

    def noted(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        new, report = rewrite(gm)
        found.append(report.sites[0].decision)
        return new.forward

    torch._dynamo.reset()
    compiled = torch.compile(of_the_last_queries, backend=noted, dynamic=True)
    for queries, keys in ((1024, 4096), (1400, 4500), (16, 4096), (20, 5000), (1100, 4096)):
        q, k = torch.randn(1, 8, queries, 64), torch.randn(1, 2, keys, 64)
        compiled(q, k, k)
    assert found == ["rewrite", "keep"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_bounds_of_keys_do_not_fix_a_dynamic_length(dynamic: bool) -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        at = torch.arange(q.shape[2])
        mask = (at <= at[:, None]) & (at > at[:, None] - 8) & (at >= 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    graphs = []

    def noted(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        new, report = rewrite(gm, Config(min_seq_len=0, only_if_faster=False))
        graphs.append(report.sites[0].exact)
        return new.forward

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=noted, dynamic=True if dynamic else None)
    for length in (37, 53, 91):
        inputs = [torch.randn(2, 4, length, 8) for _ in range(3)]
        for tensor in inputs if not dynamic else ():
            torch._dynamo.mark_dynamic(tensor, 2)
        torch.testing.assert_close(compiled(*inputs), fn(*inputs), atol=1e-5, rtol=1e-5)
    assert graphs == ["band"]


def test_a_model_of_bands_alone_has_nothing_to_calibrate() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return masked(SITES["sliding window"])(x, x, x)

    with pytest.raises(ValueError, match="what lies outside of its band is skipped"):
        calibrate(model, [torch.randn(1, 2, 300, 16)], budget=0.5, progress=None)
