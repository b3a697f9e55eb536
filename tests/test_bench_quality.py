"""The quality bench: full rivals are exact, densities are counted right, runs go on where they stopped."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.quality import encoder, lengths, methods, page, rivals
from bench.quality.language import tasks
from bench.quality.model import compare, context, hidden, tail
from bench.quality.store import Store
from bench.quality.texts import _stdlib
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands

LENGTH = 384


def site(length: int = LENGTH) -> Operands:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    return Operands(query, key, value, None, True, 0.25)


EVERYTHING = {
    "planned": methods.Planned(Plan(routes=64, window=0)),
    "moba": rivals.moba(Plan(routes=64, window=0)),
    "quest": rivals.quest(Plan(routes=64, window=0)),
    "oracle": rivals.oracle(Plan(routes=0), LENGTH),
    "hyper": rivals.Hyper(64, 64, LENGTH, None),
}


@pytest.mark.parametrize("first", [0, 300])
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_way_that_attends_everything_is_exact(name: str, first: int) -> None:
    if name == "hyper" and first:
        pytest.skip("keys before the tail are met by sorted blocks, never all")
    torch.testing.assert_close(EVERYTHING[name](site(), first), methods.exact(site(), first), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["planned", "moba", "quest", "oracle"])
def test_a_tail_attends_as_the_whole_does(name: str) -> None:
    plan = Plan(routes=3, window=0)
    ways = {
        "planned": methods.Planned(plan),
        "moba": rivals.moba(plan),
        "quest": rivals.quest(plan),
        "oracle": rivals.oracle(replace(plan, routes=0), 48),
    }
    whole = ways[name](site(), 0)
    torch.testing.assert_close(ways[name](site(), 300), whole[:, :, 300:], rtol=1e-4, atol=1e-5)
    assert (whole - methods.exact(site(), 0)).abs().max() > 1e-3


def test_the_sorted_blocks_approximate_and_are_not_causal() -> None:
    hyper = rivals.Hyper(64, 64, 64, None)
    before = hyper(site(512), 0)
    assert (before - methods.exact(site(512), 0)).abs().mean() < 0.5
    moved = site(512)
    moved.query[:, :, 400:] += 3
    assert not torch.equal(before[:, :, 300:400], hyper(moved, 0)[:, :, 300:400])


@pytest.mark.parametrize("scoring", ["drop", "zero"])
def test_scored_blocks_leave_keys_out(scoring: str) -> None:
    plain, scored = (rivals.Hyper(64, 64, 64, how)(site(512), 0) for how in (None, scoring))  # type: ignore[arg-type]
    assert scored.isfinite().all() and not torch.equal(plain, scored)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("plan", [Plan(routes=0, sinks=0, window=None), Plan(routes=64, window=0, sinks=0)])
def test_counted_pairs(plan: Plan, causal: bool) -> None:
    got = methods.density(plan, LENGTH, causal)
    if plan.window is None:
        assert got == 1
    else:  # every key, and a representative for every 16 of them outside the query's own chunk
        assert 1 < got <= 1 + 1 / 16


def test_counted_pairs_are_those_that_attend_reads() -> None:
    plan = Plan(routes=2, window=0, sinks=4, keep=3, method="norm")
    value = torch.eye(LENGTH)[None, None]
    one = site()._replace(query=site().query[:, :1], key=site().key[:, :1], value=value)
    read = (methods.Planned(plan)(one, 0) > 0).sum().item()
    chunks = LENGTH // plan.chunk
    representatives = sum(plan.chunk * c * plan.chunk // plan.cluster for c in range(chunks))
    counted = methods.pairs(plan, LENGTH, True) - representatives
    # A routed key that also stands in a row is read once and counted twice.
    assert read <= counted <= 1.1 * read


def test_fitted_plans_keep_to_their_density() -> None:
    for target in (0.1, 0.22, 0.35):
        for method in methods.methods(8192, target):
            assert 0.5 * target < method.density <= target or method.name.startswith("HyperAttention"), method
    for _, plan in encoder.plans(0.25):
        assert methods.density(plan, encoder.LENGTH, causal=False) <= 0.25
    with pytest.raises(ValueError, match="no setting reaches"):
        methods.fit(lambda n: Plan(routes=n, window=1024), 0.01, 2048)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    Store(path, {}).measure({"method": "a"}, lambda: {"loss": 1.0})
    again = Store(path, {})
    assert again.measure({"method": "a"}, lambda: pytest.fail("measured twice"))["loss"] == 1.0
    assert again.find(method="b") is None


def tiny() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_replacing_attention_by_itself_changes_nothing() -> None:
    model, ids = tiny(), torch.randint(64, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model.model(ids, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(hidden(model, ids, methods.exact), want, rtol=1e-4, atol=1e-5)
    before = context(model, ids[:, :200], methods.exact)
    torch.testing.assert_close(tail(model, ids[:, 200:], before, methods.exact), want[200:], rtol=1e-4, atol=1e-5)
    same = compare(model, want[:-1], want[:-1], ids[0, 1:])
    assert same.kl == 0 and same.top1 == 1 and same.loss == same.exact_loss
    other = compare(model, want[:-1], want[:-1] * 1.5, ids[0, 1:])
    logits = [F.log_softmax(model.lm_head(h), 1) for h in (want[:-1], want[:-1] * 1.5)]
    assert other.kl == pytest.approx(
        F.kl_div(logits[1], logits[0], reduction="batchmean", log_target=True).item(), rel=1e-3
    )


class Letters:
    """A tokenizer that takes each character for a token."""

    def __call__(self, text: str, **_: object) -> Letters:
        found = Letters()
        codes = [ord(c) % 128 for c in text]
        found.input_ids = torch.tensor([codes]) if _ else codes  # type: ignore[attr-defined]
        return found

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids if isinstance(ids, list) else [ids]))


@pytest.mark.parametrize("draw", [0, 5])
def test_planted_facts_and_copies_can_be_found_in_their_context(draw: int) -> None:
    for name, recall in tasks(Letters(), 8192, ["code"], draw).items():
        ids = recall.ids[0].tolist()
        assert len(ids) == 8192 and not recall.scored[: recall.first].any()
        context_text = "".join(map(chr, ids[: recall.first]))
        answers = "".join(chr(i) if s else "|" for i, s in zip(ids, recall.scored.tolist(), strict=True))
        parts = [part for part in answers.split("|") if part]
        assert len(parts) == (24 if name.startswith("facts") else 2)
        assert all(part in context_text for part in parts)


@pytest.mark.skipif(not (_stdlib() / "idlelib" / "NEWS.txt").is_file(), reason="this Python comes without IDLE's news")
def test_draws_are_other_instances_and_have_cells_of_their_own(tmp_path: Path) -> None:
    found = [tasks(Letters(), 8192, ["code", "news"], draw) for draw in (0, 1)]
    for task, recall in found[0].items():
        assert not torch.equal(recall.ids, found[1][task].ids)
    alone = tasks(Letters(), 8192, ["news"])
    assert torch.equal(alone["facts news"].ids, found[0]["facts news"].ids), "whatever other texts there are"
    store = Store(tmp_path / "cells.json", {})
    key = {"part": "recall", "text": "copy", "method": "a", "density": 0.2}
    cells = [store.measure(key, lambda: told(0.5)), store.measure(key | {"draw": 1}, lambda: told(0.7))]
    assert len(store.cells) == 2 and store.find(text="copy") == cells[0] and store.find(draw=1) == cells[1]
    assert "+0.60 ± 0.10, 0.400 (0.500)" in page.recalls(cells, (0.1, 0.3))


def told(over: float) -> dict[str, float]:
    return {"loss": 1 + over, "exact_loss": 1.0, "accuracy": 0.4, "exact_accuracy": 0.5}


def test_a_raised_rotary_base_keeps_the_fastest_and_stretches_the_slowest() -> None:
    """The highest frequency stays, the lowest is that of so many times as many positions."""
    rotary, config = types.SimpleNamespace(), types.SimpleNamespace(max_position_embeddings=8192)
    before = 1 / 100000.0 ** (torch.arange(0, 64, 2) / 64)
    rotary.inv_freq = before.clone()
    model = types.SimpleNamespace(model=types.SimpleNamespace(rotary_emb=rotary), config=config)
    lengths.stretch(model, 8192)
    assert torch.equal(rotary.inv_freq, before)
    lengths.stretch(model, 32768)
    ratio = before / rotary.inv_freq
    assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(4, rel=1e-4) and (ratio.diff() > 0).all()
