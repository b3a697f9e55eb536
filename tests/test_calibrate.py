"""Per-site plans: measured, chosen, kept in a file, and run."""

from __future__ import annotations

import copy
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prescore_compile import Calibration, Config, OptionError, Plan, calibrate, explain
from prescore_compile.calibration import allocate, command
from prescore_compile.calibration.allocate import Option
from prescore_compile.calibration.candidates import ladder
from prescore_compile.cli import main
from prescore_compile.passes import cost
from prescore_compile.passes.planfile import data, load, text

CANDIDATES = [Plan(chunk=16, window=w, sinks=2, routes=r) for w, r in ((0, 0), (16, 1), (60, 0))]
ALWAYS: dict[str, Any] = dict(min_seq_len=0, only_if_faster=False, inner="eager")


class Block(nn.Module):
    def __init__(self, causal: bool, breaks: bool) -> None:
        super().__init__()
        self.qkv, self.causal, self.breaks = nn.Linear(16, 48), causal, breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.breaks:
            torch._dynamo.graph_break()
        return x + F.scaled_dot_product_attention(4 * q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, causal: bool = True, logits: bool = True, layers: int = 3, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(causal, breaks) for _ in range(layers))
        self.head, self.logits = nn.Linear(16, 11), logits
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(x)} if self.logits else x


def batch() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 128, 16)


@pytest.fixture(scope="module")
def found() -> Calibration:
    lines: list[str] = []
    result = calibrate(Model(), [batch()], budget=0.6, candidates=CANDIDATES, progress=lines.append)
    assert sum(line.startswith("[") for line in lines) == 9  # sites x candidates
    return result


def test_the_budget_is_kept_and_each_site_was_tried(found: Calibration) -> None:
    assert [site.key.site for site in found.sites] == [f"layers.{i}#0" for i in range(3)]
    assert all([trial.plan for trial in site.trials] == CANDIDATES for site in found.sites)
    assert 0 < found.density <= 0.6 and found.drift > 0
    total = sum(site.chosen.density if site.chosen else 1.0 for site in found.sites) / 3
    assert total == pytest.approx(found.density, rel=1e-3)
    assert "layers.1#0" in found.table() and "budget 0.6" in found.table()
    with pytest.raises(OptionError, match=r"'budget': got 0.01.*or more"):
        calibrate(Model(), [batch()], budget=0.01, candidates=CANDIDATES, measured=found, progress=None)


def test_the_drift_is_kept_or_every_site_is_exact(found: Calibration) -> None:
    same: dict[str, Any] = dict(candidates=CANDIDATES, measured=found, progress=None)
    half = calibrate(Model(), [batch()], drift=found.drift / 2, **same)
    assert half.drift <= found.drift / 2 and half.density > found.density
    lines: list[str] = []
    none = calibrate(Model(), [batch()], drift=0, **same | {"progress": lines.append})
    assert set(none.plans.values()) == {None} and none.drift == 0 and none.density == 1
    assert any("every site stays exact" in line for line in lines) and not any("left]" in line for line in lines)


@torch.no_grad()
def test_what_runs_is_what_was_measured(found: Calibration, tmp_path: Path) -> None:
    plans = dict(zip(found.plans, (CANDIDATES[0], None, CANDIDATES[1]), strict=True))
    mixed = data(found)
    for site in mixed["sites"]:
        plan = plans[site["site"]]
        site["plan"] = next((n for n, s in mixed["plans"].items() if plan and s == plan.settings()), "exact")
    model, x = Model(), batch()
    report = explain(model, x, config=Config(plan=mixed, **ALWAYS))
    assert [site.plan for site in report.sites] == [CANDIDATES[0], None, CANDIDATES[1]]
    assert [site.reason for site in report.sites] == ["", "plan_exact", ""] and "routes=1" in str(report)
    found.save(tmp_path / "plan.json")
    options = ALWAYS | {"plan": str(tmp_path / "plan.json")}
    exact = model(x)["logits"].log_softmax(-1)
    other = torch.compile(model, backend="prescore", options=options)(x)["logits"].log_softmax(-1)
    assert (exact.exp() * (exact - other)).sum(-1).mean().item() == pytest.approx(found.drift, rel=1e-3)


@torch.no_grad()
def test_all_exact_is_exact(found: Calibration) -> None:
    file = data(found)
    for site in file["sites"]:
        site["plan"] = "exact"
    model, x = Model(), batch()
    got = torch.compile(model, backend="prescore", options=ALWAYS | {"plan": file})(x)["logits"]
    assert torch.equal(got, model(x)["logits"])


def test_the_same_calibration_writes_the_same_file(found: Calibration, tmp_path: Path) -> None:
    again = calibrate(Model(), [batch()], budget=0.6, candidates=CANDIDATES, progress=None)
    assert text(again) == text(found)
    found.save(tmp_path / "plan.json")
    assert load(tmp_path / "plan.json") == found == load(json.loads(text(found))) == load(found)


def test_another_model_is_told(found: Calibration) -> None:
    x = batch()
    longer = explain(Model(layers=4), x, config=Config(plan=found, **ALWAYS))
    assert longer.sites[3].reason == "not_in_plan" and longer.sites[3].key == "layers.3#0"
    shorter = explain(Model(layers=2), x, config=Config(plan=found, **ALWAYS))
    assert shorter.absent == ["layers.2#0"] and "in no graph: layers.2#0" in str(shorter)
    with pytest.warns(UserWarning, match=r"1 of 4 attention sites are not in the plan file.*layers.3#0"):
        torch.compile(Model(layers=4), backend="prescore", options=ALWAYS | {"plan": found})(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"'causal': False.*layers.0#0.*'causal': True"):
        torch.compile(Model(causal=False), backend="prescore", options=ALWAYS | {"plan": found})(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(Model(), x, config=Config(plan=found, **ALWAYS))
    kept = explain(Model(), x, config=Config(plan=found, exclude=("layers.0",), min_seq_len=500))
    assert kept.sites[0].reason == "excluded" and {s.reason for s in kept.sites[1:]} <= {"too_short", "plan_exact"}


WRONG: dict[str, tuple[Any, str]] = {
    "format": (2, r"format'.*got 2.*allowed: 1"),
    "sites": ({}, "sites'.*a list"),
    "plans": ([], "plans'.*an object"),
    "drift": (-1, "drift'.*>= 0"),
    "target": ({"x": 1}, "target'"),
    "torch": (1, "torch'.*a string"),
    "more": (1, "more'.*no such key; the keys are format"),
}


@pytest.mark.parametrize("key", WRONG)
def test_what_is_wrong_in_a_file_is_named(found: Calibration, key: str) -> None:
    value, message = WRONG[key]
    with pytest.raises(OptionError, match=message):
        load(data(found) | {key: value})
    with pytest.raises(OptionError, match="'measure' is missing"):
        load({name: part for name, part in data(found).items() if name != "measure"})


@pytest.mark.parametrize("key, value, message", [
    ("heads", True, r"sites\[1\]: heads'.*an int >= 1"), ("causal", 1, "causal'.*a bool"),
    ("plan", "x", "'exact' or the name of a plan"), ("window", 3, "window'.*no such key"),
    ("site", "layers.0#0", "once"),
])  # fmt: skip
def test_what_is_wrong_at_a_site_is_named(found: Calibration, key: str, value: Any, message: str) -> None:
    file = copy.deepcopy(data(found))
    file["sites"][1][key] = value
    with pytest.raises(OptionError, match=message):
        load(file)


def test_options(found: Calibration, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"not together with routes=3"):
        Config(plan=found, routes=3)
    with pytest.raises(OptionError, match="'plan': got 3"):
        Config(plan=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="a file that calibrate wrote"):
        Config(plan=str(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(OptionError, match="which is JSON"):
        Config(plan=tmp_path / "broken.json")
    file = copy.deepcopy(data(found))
    next(iter(file["plans"].values()))["chunk"] = 100
    with pytest.raises(OptionError, match=r"plans: .*: chunk'.*got 100"):
        Config(plan=file)


@pytest.mark.parametrize("arguments, message", [
    ({}, "exactly one"), ({"budget": 0.5, "drift": 1}, "exactly one"), ({"budget": 0}, "above 0"),
    ({"drift": True}, "0 or more"), ({"budget": 0.5, "candidates": []}, "one Plan or more"),
    ({"budget": 0.5, "options": {"plan": "x"}}, "not when calibrating"),
    ({"budget": 0.5, "options": "abc"}, "a dict of options"),
    ({"budget": 0.5, "measured": "no/such.json"}, "'measured': got"),
    ({"budget": 0.5, "measure": "x"}, "'kl', 'cosine'"),
    ({"budget": 0.5, "measure": lambda exact, other: None}, "'measure': got None"),
    ({"budget": 0.5, "measure": lambda exact, other: torch.zeros(2)}, "a function that gives a number"),
    ({"budget": 0.5, "measure": lambda exact, other: float("nan")}, "no number for the exact model's output, twice"),
    ({"budget": 0.5, "progress": 1}, "'progress': got 1"),
])  # fmt: skip
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        calibrate(Model(layers=1), [batch()], **{"progress": None} | arguments)


def test_what_cannot_be_calibrated() -> None:
    for model, batches, message in ((3, [batch()], "'model': got 3"), (Model(), 7, "'batches': got 7")):
        with pytest.raises(OptionError, match=message):
            calibrate(model, batches, budget=0.5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="one batch or more"):
        calibrate(Model(), [], budget=0.5)
    with pytest.raises(OptionError, match="eval"):
        calibrate(Model().train(), [batch()], budget=0.5)
    with pytest.raises(ValueError, match=r"no attention site.*layers.0#0: excluded"):
        calibrate(Model(), [batch()], budget=0.5, options={"exclude": ["*"]}, progress=None)


def test_an_encoder_with_graph_breaks() -> None:
    plans = [
        Plan(chunk=16, window=0, sinks=2, routes=2),
        Plan(chunk=16, window=0, sinks=1, routes=0, keep=6, centroids=2),
    ]
    x = batch()
    model = Model(causal=False, logits=False, layers=2, breaks=True)
    found = calibrate(model, [x], drift=1e-2, candidates=plans, progress=None)
    assert found.measure == "cosine" and found.drift <= 1e-2
    report = explain(model, x, config=Config(plan=found, **ALWAYS))
    assert report.sites and not {site.reason for site in report.sites} & {"not_in_plan"} and not report.absent


def test_the_hull_and_the_steps() -> None:
    a = [Option("a", 1, 8.0), Option("b", 2, 7.5), Option("c", 3, 2.0), Option("d", 4, 3.0), Option("e", 5, 0.0)]
    assert [option.choice for option in allocate.hull(a)] == ["a", "c", "e"]
    sites = {"x": a, "y": [Option("f", 1, 1.0), Option("g", 5, 0.0)]}
    assert allocate.cheapest(sites) == 2
    picked = {pairs: [o.choice for o in allocate.within(sites, pairs).values()] for pairs in (2, 4, 6, 10)}
    assert picked == {2: ["a", "f"], 4: ["c", "f"], 6: ["e", "f"], 10: ["e", "g"]}
    assert [[o.choice for o in step.values()] for step in allocate.path(sites)] == [
        list(p) for p in ("af", "cf", "ef", "eg")
    ]


@pytest.mark.parametrize("causal", [True, False])
def test_the_ladder_has_the_densities_it_names(causal: bool) -> None:
    plans = ladder(8192, causal, Plan())
    densities = [cost.at(cost.density(plan, causal), 8192) for plan in plans]
    assert densities == sorted(densities) and densities[0] < 0.12 and len(plans) >= 5
    assert any(plan.routes for plan in plans) and any(not plan.routes for plan in plans)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made.py").write_text(
        "import torch\nfrom tests.test_calibrate import Model, batch\ndef make(): return Model(layers=1), batch()\n"
    )
    target, out = f"{tmp_path}/made.py:make", tmp_path / "plan.json"
    options = ["--set", "chunk=16", "--set", "sinks=2", "--set", "min_seq_len=0"]
    assert main(["calibrate", target, "--budget", "1", "--out", str(out), *options]) == 0
    assert "1 sites" in capsys.readouterr().out and load(out).sites[0].key.site == "layers.0#0"
    assert main(["calibrate", target, "--budget", "2", "--out", str(out)]) == 2
    assert "up to 1" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path), "--budget", "1", "--out", str(out)]) == 2
    out.unlink()
    with pytest.MonkeyPatch.context() as patch:  # whoever reads what is told is gone
        patch.setattr(command, "say", lambda text: (_ for _ in ()).throw(BrokenPipeError()))
        patch.setattr(sys, "stderr", Gone())
        patch.setattr(os, "dup2", lambda *_: None)
        patch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
        main(["calibrate", target, "--budget", "1", "--out", str(out), *options])
    assert load(out).sites[0].key.site == "layers.0#0"


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


class Writes(Model):
    """Its output is a buffer."""

    def __init__(self) -> None:
        super().__init__(logits=False)
        self.register_buffer("out", torch.zeros(1, 128, 11))

    def forward(self, x: torch.Tensor) -> Any:
        self.out.copy_(self.head(super().forward(x)))
        return self.out


class Appends(Model):
    """Writes into its inputs, and adds to them."""

    def forward(self, x: torch.Tensor, past: list[torch.Tensor]) -> Any:
        past.append(x.mul_(1.5))
        return super().forward(torch.cat(past, 1))


class Counts(Model):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return super().forward(x * self.calls)


class Bad(Model):
    def forward(self, x: torch.Tensor) -> Any:
        found = super().forward(x)
        found["logits"][..., 0] = float("nan")
        return found


QUIETLY: dict[str, Any] = dict(budget=0.5, candidates=CANDIDATES, progress=None)


def test_outputs_and_inputs_are_each_runs_own() -> None:
    found = calibrate(Writes(), [batch()], **QUIETLY)
    assert found.drift > 0 and all(trial.drift > 0 for site in found.sites for trial in site.trials)
    x, past = batch(), [torch.zeros(1, 16, 16)]
    found = calibrate(Appends(), [{"x": x, "past": past}], **QUIETLY)
    assert torch.equal(x, batch()) and len(past) == 1
    assert all(trial.density < 1 for site in found.sites for trial in site.trials)


def test_a_model_must_repeat_itself() -> None:
    with pytest.raises(ValueError, match="differs from run to run"):
        calibrate(Counts(), [batch()], **QUIETLY)
    with pytest.raises(ValueError, match="not finite"):
        calibrate(Bad(), [batch()], **QUIETLY)
    model = Model()
    model.layers[1].train()
    with pytest.raises(OptionError, match=r"Block 'layers\.1' in training mode"):
        calibrate(model, [batch()], **QUIETLY)


def test_padding_everywhere_is_no_measurement() -> None:
    class Padded(Model):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return super().forward(x)

    with pytest.raises(ValueError, match="attention_mask pads every position"):
        calibrate(Padded(), [{"x": batch(), "attention_mask": torch.zeros(1, 128)}], **QUIETLY)


def test_a_config_and_a_drift_that_is_not_a_number(tmp_path: Path) -> None:
    def measure(exact: Any, other: Any) -> float:
        return 0.0 if torch.equal(exact["logits"], other["logits"]) else float("nan")

    options = Config(exclude=("layers.0",))
    found = calibrate(Model(layers=2), [batch()], measure=measure, options=options, **QUIETLY)
    found.save(tmp_path / "plan.json")
    assert "Infinity" not in (tmp_path / "plan.json").read_text() and load(tmp_path / "plan.json") == found
    assert [site.key.site for site in found.sites] == ["layers.1#0"]
    with pytest.raises(OptionError, match="not when calibrating"):
        calibrate(Model(), [batch()], options=Config(plan=found), **QUIETLY)


def test_what_was_measured_otherwise_is_not_taken(found: Calibration) -> None:
    assert found.measure == "kl"
    with pytest.raises(OptionError, match="'measured': got 'kl'"):
        calibrate(Model(), [batch()], measured=found, measure="cosine", **QUIETLY)
    with pytest.raises(OptionError, match="'measure': got -"):
        calibrate(Model(), [batch()], measure=lambda exact, other: -1.0, **QUIETLY)
    with pytest.raises(OptionError, match="a list of batches"):
        calibrate(Model(), batch(), **QUIETLY)


TARGET = """
import torch
from test_calibrate import Model

class Gains(Model):
    def forward(self, x, gain=1.0):
        if gain == 0:
            raise RuntimeError("no gain")
        return super().forward(x * gain)

def plain():
    return Gains(), (torch.ones(1, 1024, 16).cumsum(1).sin(),), {}

def loud():
    return Gains(), (torch.ones(1, 1024, 16).cumsum(1).sin(),), {"gain": 4.0}

def broken():
    return Gains(), (torch.ones(1, 1024, 16).cumsum(1).sin(),), {"gain": 0}
"""


def test_the_command_passes_keywords_and_says_who_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "target.py"
    file.write_text(TARGET)
    plans = {}
    for name in ("plain", "loud"):
        out = tmp_path / f"{name}.json"
        arguments = ["--budget", "0.5", "--out", str(out), "--set", "chunk=16"]
        assert main(["calibrate", f"{file}:{name}", *arguments]) == 0
        plans[name] = load(out)
    assert plans["loud"].drift != plans["plain"].drift
    assert main(["calibrate", f"{file}:broken", "--budget", "0.5", "--out", str(tmp_path / "no.json")]) == 3
    assert main(["calibrate", f"{file}:plain", "--budget", "0.5", "--out", "/nowhere/at/all.json"]) == 2
    said = capsys.readouterr().err
    assert "the model raised" in said and "no gain" in said and "allowed: a file in a folder that exists" in said


class Zeroed(Model):
    """Some of its rows are zeros; asks whether its inputs are one."""

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> Any:
        assert q is k
        return super().forward(q) * (torch.arange(128) < 100)[:, None]


def test_zeros_inputs_that_are_one_and_inputs_of_a_graph() -> None:
    x = batch()
    found = calibrate(Zeroed(logits=False), [(x, x)], **QUIETLY)
    assert found.measure == "cosine" and 0 < found.drift < 0.1
    past = [torch.zeros(1, 16, 16, requires_grad=True) * 1.0]
    assert calibrate(Appends(), [{"x": x, "past": past}], **QUIETLY).drift > 0 and len(past) == 1


def test_methods_can_be_calibrated() -> None:
    options = dict(method="norm", keep=4, chunk=16, sinks=2)
    assert calibrate(Model(), [torch.randn(1, 1024, 16)], budget=0.6, options=options, progress=None).drift > 0
    assert Config(method="norm", keep=4).changed(keep=0) == Config(keep=0)


def test_settings_of_routes_can_be_calibrated() -> None:
    """What shows the sites is a plan without routes; so are candidates."""
    options = dict(chunk=32, sinks=2, share=0.01, spread=1.4, coarse=14)
    assert calibrate(Model(), [torch.randn(1, 1024, 16)], budget=0.9, options=options, progress=None).sites
    base = Plan(coarse=32)
    assert {bool(plan.routes) for plan in ladder(8192, True, base) if plan.coarse} == {True}


def test_a_plan_that_reads_nothing_is_no_candidate() -> None:
    nothing = Plan(window=0, sinks=0, routes=0)
    with pytest.raises(OptionError, match=r"'window': got 0.*at a bidirectional site"):
        calibrate(Model(causal=False), [batch()], budget=0.6, candidates=[nothing], progress=None)
