"""A staged trial: four questions, answered by measurement, and a verdict."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from prescore_compile import Config, OptionError, Verdict, trial
from prescore_compile.adoption import command, verdict
from prescore_compile.adoption.step import apart
from prescore_compile.cli import main
from prescore_compile.drift import difference
from prescore_compile.kernels import cpu, library
from prescore_compile.tokens import next_tokens

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler")
QUICK: dict[str, Any] = dict(min_seq_len=0, only_if_faster=False, inner="eager", chunk=16, window=0, sinks=2, routes=2)
LENIENT: dict[str, Any] = dict(drift=9.0, faster=0.0, rounds=1, progress=None)
WORDS = 13


class Model(nn.Module):
    """A causal language model, or an encoder of vectors."""

    def __init__(self, causal: bool = True, noise: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, 48), nn.Linear(16, WORDS)
        self.causal, self.noise = causal, noise
        self.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        x = self.embed(input_ids) if self.causal else input_ids
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + 3 * F.scaled_dot_product_attention(4 * q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        if self.noise:
            x = x + self.noise * torch.rand_like(x)
        return {"logits": self.head(x)} if self.causal else x


def ids(length: int = 128, batch: int = 1) -> torch.Tensor:
    return torch.randint(WORDS, (batch, length), generator=torch.Generator().manual_seed(length))


def tried(model: Any = None, batches: Any = None, **more: Any) -> Verdict:
    options = QUICK | more.pop("options", {})
    return trial(Model() if model is None else model, batches or [ids()], **LENIENT | {"options": options} | more)


def test_a_model_that_passes() -> None:
    lines: list[str] = []
    found = tried(progress=lines.append)
    assert found.adopt and found.failed is None and [stage.name for stage in found.stages] == list(verdict.STAGES)
    sites, same, quality, speed = found.stages
    assert sites.evidence["rewritten"] == [1] and sites.found == "1 sites: 1 rewritten, 0 kept exact"
    assert same.evidence["error"] < 1e-6 and same.evidence["largest_difference"] < 1e-5
    assert 1e-4 < quality.evidence["drift"] < 9 and quality.evidence["measure"] == "kl"
    assert speed.evidence["faster"] == pytest.approx(speed.evidence["ratios"][0]) and speed.evidence["held"] == 1
    assert [len(times) for times in speed.evidence["seconds"].values()] == [1, 1]
    assert str(found).startswith("adopt\n") and "Config(chunk=16" in str(found)
    assert any(line.startswith("[3/4] quality: ") for line in lines) and "  round 1/1: inner" in "\n".join(lines)


def test_the_evidence_is_what_was_measured() -> None:
    """Drift, perplexity and agreement, against the same by hand."""
    model, batches = Model(), [ids(), ids(160, 2)]
    quality = tried(model, batches).stages[2].evidence
    with torch.no_grad():
        compiled = torch.compile(model, backend="prescore", options=QUICK)
        pairs = [(model(batch)["logits"], compiled(batch)["logits"], batch) for batch in batches]
    total = sum(F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="sum", log_target=True) for a, b, _ in pairs)
    count = sum(batch.numel() for batch in batches)
    assert quality["drift"] == pytest.approx(float(total) / count, rel=1e-3)
    assert len(quality["of_batches"]) == 2
    for at, name in ((0, "exact_perplexity"), (1, "perplexity")):
        losses = [F.cross_entropy(p[at][:, :-1].flatten(0, 1), p[2][:, 1:].flatten(), reduction="none") for p in pairs]
        assert quality[name] == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-4)
    same = torch.cat([(a.argmax(-1) == b.argmax(-1))[:, :-1].flatten() for a, b, _ in pairs])
    assert quality["top1_agreement"] == pytest.approx(same.float().mean().item())


def test_padding_does_not_count() -> None:
    batch = {"input_ids": ids(batch=2), "attention_mask": torch.ones(2, 128, dtype=torch.long)}
    batch["attention_mask"][1, :50] = 0
    logits = Model()(**batch)["logits"].detach()
    losses, best = next_tokens(logits, batch["input_ids"], batch["attention_mask"] != 0)
    parts = [(logits[0], batch["input_ids"][0]), (logits[1, 50:], batch["input_ids"][1, 50:])]
    want = [F.cross_entropy(part[:-1], own[1:], reduction="none") for part, own in parts]
    torch.testing.assert_close(losses, torch.cat(want))
    assert torch.equal(best, torch.cat([part[:-1].argmax(1) for part, _ in parts]))
    assert [len(t) for t in next_tokens(logits[:, :1], batch["input_ids"][:, :1])] == [0, 0]
    found = tried(batches=[batch]).stages[2].evidence
    assert found["exact_perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)


def test_an_encoder_has_no_perplexity() -> None:
    found = tried(Model(causal=False), [torch.randn(1, 128, 16)], drift=None)
    assert found.stages[2].evidence["measure"] == "cosine" and "perplexity" not in str(found)


def next_token_loss(output: Any) -> torch.Tensor:
    return F.cross_entropy(output["logits"][0, :-1], ids()[0, 1:])


def test_a_training_step() -> None:
    """Its gradients, too, are compared, and told as they are by hand."""
    model = Model()
    model.head.bias.requires_grad_(False)
    found = tried(model, loss=next_token_loss, every_stage=True)
    sites, same, quality, speed = found.stages
    assert found.about["runs"] == "forward and backward" and speed.evidence["held"] == 1
    assert same.passed and 0 < same.evidence["gradients_error"] < 1e-5 and "gradients: error" in same.found
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ways = [model, torch.compile(model, backend="prescore", options=QUICK)]
    losses = [next_token_loss(way(ids())) for way in ways]
    assert quality.evidence["losses"] == [pytest.approx([float(loss.detach()) for loss in losses], rel=1e-5)]
    one, two = (torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in losses)
    gap = 1 - float(torch.cosine_similarity(one, two, dim=0))
    assert gap > 1e-4 and quality.evidence["gradients"] == [pytest.approx(gap, rel=1e-2)]
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_gradients_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = cpu.attend_backward
    monkeypatch.setattr(cpu, "attend_backward", lambda *given: tuple(2 * grad for grad in usual(*given)))
    found = failed("same", loss=next_token_loss)
    assert found.stages[1].evidence["error"] < 1e-6 and found.stages[1].evidence["gradients_error"] > 0.1
    monkeypatch.undo()
    monkeypatch.setattr(importlib.import_module("prescore_compile.adoption.trial"), "GRADIENTS", 1e-9)
    assert failed("quality", loss=next_token_loss).stages[2].evidence["drift"] < 9


class Checkpointed(Model):
    """Reentrant: what cannot be asked for by ``torch.autograd.grad``."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        return {"logits": self.head(checkpoint(self.attended, x, use_reentrant=True))}

    def attended(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Sparse(Model):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16, sparse=True)
        self.eval()


@pytest.mark.parametrize("model", [Checkpointed, Sparse])
def test_models_that_train_by_backward_alone(model: type[Model]) -> None:
    own = model()
    own.head.bias.grad = kept = torch.ones(WORDS)
    same = tried(own, loss=next_token_loss).stages[1]
    assert same.passed and 0 < same.evidence["gradients_error"] < 1e-5
    assert own.head.bias.grad is kept and own.head.weight.grad is None


def test_a_loss_that_takes_members_out() -> None:
    assert tried(loss=lambda output: output.pop("logits").square().mean()).adopt


def test_in_inference_mode() -> None:
    model = Model()
    with torch.inference_mode():
        batch = ids()
        assert tried(model, [batch], loss=next_token_loss).adopt
        with pytest.raises(OptionError, match="made in inference mode"):
            tried(Model(), loss=next_token_loss)


def test_a_backward_that_trains() -> None:
    model = Model()

    def trained(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        weight.sub_(0.1 * weight.grad)

    model.head.weight.register_post_accumulate_grad_hook(trained)
    with pytest.raises(ValueError, match="the backward changes parameters"):
        tried(model, loss=next_token_loss)


def test_a_loss_that_draws_noise() -> None:
    with pytest.raises(ValueError, match="gradients differ from run to run"):
        tried(loss=lambda output: (output["logits"] - torch.randn_like(output["logits"])).square().mean())


def test_how_far_gradients_are_apart() -> None:
    a, b = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])], [torch.tensor([0.0, 4.0]), torch.tensor([[3.0]])]
    assert apart(a, a) == 0.0 and apart(a, b) == pytest.approx(1 - 12 / 25)
    none = [torch.zeros(2), torch.zeros(1, 1)]
    assert apart(none, none) == 0.0 and apart(a, none) == 1.0
    assert apart(a, [torch.tensor([math.nan, 0.0]), a[1]]) == math.inf


def failed(stage: str, **more: Any) -> Verdict:
    found = tried(**more)
    assert not found.adopt and found.failed is not None and found.failed.name == stage and found.failed.advice
    assert str(found).startswith(f"do not adopt: {stage} failed\n")
    assert len(found.stages) == list(verdict.STAGES).index(stage) + 1
    return found


def test_no_site() -> None:
    found = failed("sites", options={"exclude": ["*"]})
    assert found.stages[0].evidence["kept"] == [{"excluded": 1}] and "(1 excluded)" in str(found)
    whole = tried(options={"exclude": ["*"]}, every_stage=True)
    assert len(whole.stages) == 4 and not whole.adopt and whole.stages[2].evidence["drift"] == 0


def test_a_rewriting_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda *given, **more: usual(*given, **more) * 1.1)
    found = failed("same")
    assert found.stages[1].evidence["error"] > 1e-3 and "not run" in str(found)
    monkeypatch.setattr(cpu, "attend", lambda *given, **more: usual(*given, **more) * 0)
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2).eval().bfloat16()
    failed("same", model=encoder, batches=[torch.randn(1, 128, 32, dtype=torch.bfloat16)])


def test_the_batch_with_most_sites_is_tried() -> None:
    model = Model()

    def at_length(x: torch.Tensor) -> Any:
        return model(x) if x.shape[1] > 100 else {"logits": model.head(model.embed(x))}

    same = tried(at_length, [ids(50), ids(128)]).stages[1]
    assert same.evidence["batch"] == 1 and same.found.startswith("batch 2: ")


def test_outputs_of_other_kinds() -> None:
    """With a measure of one's own, whatever a model returns is compared."""
    model = Model()
    own: dict[str, Any] = dict(
        drift=2.0, measure=lambda exact, other: float((exact.nan_to_num() != other.nan_to_num()).float().mean())
    )
    for last in (lambda x: x.argmax(-1), lambda x: x.mean(), lambda x: x.sum((1, 2)),
                 lambda x: torch.cat([x, x[:, :1] * math.nan], 1)):  # fmt: skip
        found = tried(lambda x, last=last: last(model(x)["logits"]), **own)
        assert found.adopt, str(found)


def test_a_buffer_that_is_returned_is_compared_as_it_was() -> None:
    class Writes(Model):
        def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> Any:
            if not hasattr(self, "kept"):
                self.kept = torch.zeros(1, 128, WORDS)
            return self.kept.copy_(super().forward(input_ids)["logits"] + self.noise * torch.rand(1, 128, WORDS))

    with pytest.raises(ValueError, match="differs from run to run"):
        tried(Writes(noise=1.0), measure="kl")
    usual, patch = cpu.attend, pytest.MonkeyPatch()
    with patch.context() as wrong:
        wrong.setattr(cpu, "attend", lambda *given, **more: usual(*given, **more) * 1.1)
        assert failed("same", model=Writes(), measure="kl").stages[1].evidence["largest_difference"] > 1e-3


def test_a_compiled_model_is_compared_with_what_it_is_uncompiled() -> None:
    compiled: Any = torch.compile(Model(), backend="prescore", options=QUICK)
    want = tried().stages[2].evidence["drift"]
    assert tried(compiled).stages[2].evidence["drift"] == pytest.approx(want)


def test_a_perplexity_beyond_all_numbers() -> None:
    model = Model()
    model.head.weight.data *= 1e5
    found = tried(lambda input_ids: model(input_ids), drift=1e9).stages[2]
    assert found.evidence["exact_perplexity"] == math.inf and "perplexity inf -> inf" in found.found
    assert "(" not in found.found.partition("perplexity")[2]


def test_difference() -> None:
    a = torch.tensor([[1.0, -math.inf, math.nan], [3.0, 0.0, 4.0]])
    assert difference([a], [a]) == (0.0, 0.0, 4.0)
    b = a.clone()
    b[1, 1] = 2.6
    error, most, largest = difference([a], [b])
    assert (error, most, largest) == pytest.approx((2.6 / math.sqrt(26), 2.6, 4.0))
    b[0, 1] = 7.0
    assert difference([a], [b])[0] == math.inf == difference([a], [a[:1]])[0] == difference([a], [])[0]
    many = torch.randn(1000, 7), torch.randn(5)
    assert difference(many, [tensor * 1.01 for tensor in many])[0] == pytest.approx(0.01, rel=1e-3)


def test_a_drift_that_is_too_large() -> None:
    assert failed("quality", drift=1e-9).stages[2].evidence["allowed"] == 1e-9
    failed("quality", drift=0.5, measure=lambda exact, other: 0.6 if exact["logits"].ne(other["logits"]).any() else 0.0)


def test_too_little_is_gained() -> None:
    found = failed("speed", faster=1e9)
    assert "wanted: 1e+09x" in found.stages[3].found


def test_a_model_that_does_not_repeat_itself() -> None:
    with pytest.raises(ValueError, match="differs from run to run"):
        tried(Model(noise=1.0))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"drift": -1.0}, "'drift': got -1.0"), ({"faster": "2"}, "'faster': got '2'"), ({"rounds": 0}, "'rounds': got 0"),
    ({"faster": math.nan}, "'faster': got nan"), ({"drift": None, "measure": lambda a, b: 0.0}, "beside a measure"),
    ({"measure": "x"}, "'kl', 'cosine'"), ({"measure": lambda a, b: math.nan}, "no number for the exact"),
    ({"options": {"chunk": 100}}, "'chunk': got 100"),
    ({"batches": {"input_ids": ids()}}, r"as in \[dict\]"),
    ({"model": functools.partial(Model().train())}, "in training mode"),
    ({"batches": 3}, "'batches': got 3"), ({"model": 3}, "'model': got 3"), ({"progress": 3}, "'progress': got 3"),
    ({"model": Model().train()}, "in training mode"), ({"loss": 3}, "'loss': got 3"),
    ({"loss": lambda output: output["logits"]}, "one number"), ({"loss": lambda output: 1.0}, "got 'float'"),
    ({"loss": lambda output: output["logits"].detach().mean()}, "a tensor without gradients"),
    ({"loss": lambda output: output["logits"].mean() * 1j}, r"torch.complex64 \[\]"),
    ({"loss": lambda output: torch.zeros((), requires_grad=True) + 1}, "no gradient in any parameter"),
    ({"loss": lambda output: output["logits"].mul_(2).mean()}, "writes into the output"),
    ({"model": lambda x: {"logits": x}, "loss": next_token_loss}, "parameters that ask for gradients"),
])  # fmt: skip
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tried(**arguments)


def test_data_is_json() -> None:
    found = Verdict((verdict.Stage("sites", True, "", {"drift": math.inf, "of": [math.nan, 1.0]}),), "Config()", {})
    assert json.loads(found.to_json())["stages"][0]["evidence"] == {"drift": None, "of": [None, 1.0]}
    assert not found.adopt  # a trial that ended early


FILE = """
import sys, torch
sys.path.insert(0, {here!r})
from test_trial import Model, ids
def make(): return Model(), {{"input_ids": ids()}}
def trained(): return Model().train(), ids()
class Labelled(Model):
    def forward(self, input_ids, labels=None):
        found = super().forward(input_ids)
        return found | {{"loss": found["logits"].logsumexp(-1).mean()}} if labels is not None else found
def labelled(): return Labelled(), {{"input_ids": ids(), "labels": ids()}}
def raises():
    def model(x): raise KeyError("no such word")
    return model, ids()
"""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "toy.py", tmp_path / "found.json"
    file.write_text(FILE.format(here=str(Path(__file__).parent)))
    options = [part for key, value in QUICK.items() for part in ("--set", f"{key}={value}")]
    common = [*options, "--rounds", "1"]

    def said(target: str, *more: str) -> tuple[int, str, str]:
        code = main(["trial", f"{file}:{target}", *common, *more])
        return code, *capsys.readouterr()

    code, text, told = said("make", "--drift", "9", "--faster", "0", "--json", str(out))
    assert code == 0 and text.startswith("adopt\n") and "[4/4] speed" in told
    assert json.loads(out.read_text())["adopt"] is True
    with pytest.MonkeyPatch.context() as patch:  # whoever reads it is gone
        patch.setattr(command, "say", lambda text: (_ for _ in ()).throw(BrokenPipeError()))
        patch.setattr(os, "dup2", lambda *_: None)
        patch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
        assert said("make", "--drift", "0", "--faster", "0", "--json", str(out))[0] == 1
        assert not json.loads(out.read_text())["adopt"]
    code, text, _ = said("make", "--drift", "0", "--faster", "0", "--json", str(out))
    assert code == 1 and text.startswith("do not adopt: quality failed") and not json.loads(out.read_text())["adopt"]
    assert said("make", "--drift", "0", "--faster", "0", "--all")[1].count("not run") == 0
    code, text, _ = said("labelled", "--train", "--drift", "9", "--faster", "0")
    assert code == 0 and "gradients: error" in text and "runs forward and backward" in text
    code, _, told = said("make", "--train", "--drift", "9", "--faster", "0")
    assert code == 2 and "inputs with labels" in told
    assert "eval" in said("trained")[2] and said("trained")[0] == 2
    code, _, told = said("raises")
    assert code == 3 and "no such word" in told
    assert said("make", "--json", str(tmp_path / "no" / "x"))[0] == 2
    assert main(["trial", str(tmp_path)]) == 2 and "which has no weights" in capsys.readouterr()[1]


def test_a_config_is_taken_as_it_is() -> None:
    config = Config(**QUICK)
    assert trial(Model(), [ids()], options=config, **LENIENT).options == repr(config)
