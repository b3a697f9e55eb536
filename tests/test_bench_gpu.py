"""The GPU benchmark without a GPU: its dry run, its model, its chart, and what it says where there is none."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from bench import model, roofline, svg
from bench.gpu import checks, run, warm
from bench.gpu import measure as measuring
from bench.gpu.checks import Checks
from bench.gpu.machine import Case, Machine
from bench.gpu.measure import OVER, measure
from bench.gpu.ways import SCORED, Ways, scored, selected
from prescore_compile.kernels.plan import Plan
from prescore_compile.passes import cost
from prescore_compile.passes.defaults import default_plan

ROOT = Path(__file__).resolve().parent.parent


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.attention", "--device", "cuda", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = bench()
    assert done.returncode == 2 and done.stdout.startswith("No GPU") and "Traceback" not in done.stderr


def test_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "dry.json"
    done = bench("--dry-run", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(out.read_text())["cases"]
    assert [case["causal"] for case in cases] == [True, False]
    for case in cases:
        stages = {"summarize", "route", "attend", "total", "total, backward", "sdpa math", "sdpa math, backward"}
        stages |= {f"score {method}" for method in SCORED} | {"centroids", "centroids, backward"}
        assert stages <= set(case["stages"]), case["failed"]
        assert {"sdpa efficient", "sdpa cudnn"} <= set(case["failed"]), "a CPU has neither"
        assert case["faster"] > 0 and case["attend_tflops"] > 0 and case["predicted"]["total"] > 0
    xml.etree.ElementTree.fromstring(out.with_suffix(".svg").read_text())


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a CPU, by the compiled kernels."""
    machine = Machine("cpu", torch.float32, rounds=1)
    right = Ways.attend
    monkeypatch.setattr(Ways, "attend", lambda ways: right(ways) * 1.5)
    case = Case(256, True, 16, 2, 2)
    assert run.run([case], Plan(chunk=32, window=16, routes=2), machine, tmp_path / "out.json", 60) == 1
    (row,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert "wrong result" in row["failed"]["attend"] and "attend" not in row["stages"] and "total" not in row["stages"]
    assert "attend_tflops" not in row and "faster" not in row and "sdpa math" in row["stages"]


def test_wrong_scores_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ways.score
    monkeypatch.setattr(Ways, "score", lambda ways, method: right(ways, method) * (1.5 if method == "peak" else 1))
    found = measure(Case(256, True, 16, 2, 2), Plan(routes=2), Machine("cpu", torch.float32, 1), False)
    assert "wrong result" in found["failed"]["score peak"] and "score peak" not in found["stages"]
    assert {"score kmeans", "score kmedian", "score leverage"} <= found["stages"].keys() & found["predicted"].keys()


@pytest.mark.parametrize("wrong", ["row_value", "row_index", "row_owner"])
def test_wrong_centroids_get_no_time(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ways.centroids

    def bent(ways: Ways, *given: Any) -> Any:
        found = right(ways, *given)
        return found._replace(**{wrong: getattr(found, wrong) + 1})

    case, machine = Case(256, True, 16, 2, 2), Machine("cpu", torch.float32, 1)
    assert {"centroids", "centroids, backward"} <= measure(case, Plan(routes=2), machine, False)["stages"].keys()
    monkeypatch.setattr(Ways, "centroids", bent)
    found = measure(case, Plan(routes=2), machine, False)
    assert "wrong result" in found["failed"]["centroids"] and "centroids, backward" not in found["stages"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_wrong_gradients_get_no_time(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In query, key and value, also where only the last queries and keys are compared."""
    right = Ways.backward

    def bent(ways: Ways, *given: Any) -> Any:
        found = list(right(ways, *given))
        found[place] = found[place] * 1.5
        return tuple(found)

    case, machine = Case(256, True, 16, 2, 2), Machine("cpu", torch.float32, 1)
    names = {"total, backward", "sdpa math, backward"}
    for whole in (4096, 128):
        with monkeypatch.context() as patched:
            patched.setattr(checks, "WHOLE", whole)
            assert names <= measure(case, Plan(routes=2), machine, False, False)["stages"].keys()
            patched.setattr(Ways, "backward", bent)
            found = measure(case, Plan(routes=2), machine, False, False)
        assert all("wrong result" in found["failed"][name] for name in names) and not names & found["stages"].keys()


def test_flex_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled: what it computes is checked all the same."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ways = Ways(Case(640, True, 16, 2, 2), Plan(window=16, routes=8), Machine("cpu", torch.float32, 1))
    ways.prepare({})
    got = ways.flex()()
    wrong = Checks(ways).flex
    assert wrong(got) < 1e-4 < 0.1 < wrong(got * 1.5)


@pytest.mark.parametrize(("n", "causal"), [(1280, True), (1280, False), (1300, True)])
def test_blocks_of_flex_are_those_of_its_mask(n: int, causal: bool) -> None:
    ways = Ways(Case(n, causal, 16, 1, 1), Plan(window=200, routes=16, chunk=64), Machine("cpu", torch.float32, 1))
    got, want = ways.block_mask(), create_block_mask(ways.mask_mod, None, None, n, n, device="cpu")
    assert got.seq_lengths == want.seq_lengths and got.BLOCK_SIZE == want.BLOCK_SIZE
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_indices", "full_q_indices"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.kv_num_blocks.sum() > 0 and got.full_kv_num_blocks.sum() > 0 and got.sparsity() > 0


def test_scorers_have_the_chunks_of_the_model() -> None:
    plan = default_plan(True, "cuda", 4096)
    assert plan.chunk == 256 and scored(plan, "peak").chunk == selected(plan).chunk == 128


def test_kernels_are_compiled_in_other_processes() -> None:
    """One of the cases that have the same kernels; a failure there is the measurement's to tell."""
    machine = Machine("cpu", torch.float32, 1)
    many = [(Case(n, True, 16, 2, 2), Plan(routes=2), False) for n in (128, 256)]
    assert warm.warm_up(many, machine, 600) == 1
    assert set(warm.compile_all(*many[0], machine)) == {"summarize", "route", "attend", "total, backward"}
    assert warm.warm_up(many, machine, 0) == 0


def test_what_a_case_raises_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def raises(*_: Any) -> Any:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(measuring, "Ways", raises)
    machine = Machine("cpu", torch.float32, rounds=1)
    cases = [Case(256, True, 16, 2, 2)]
    assert run.run(cases, Plan(), machine, tmp_path / "out.json", 60) == 1
    assert run.run(cases, Plan(), machine, tmp_path / "late.json", -1) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert row["failed"] == {"case": "out of resources"} and not row["stages"]
    assert len(json.loads((tmp_path / "late.json").read_text())["left_out"]) == 1


def test_a_stage_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(Ways, "route", raises)
    found = measure(Case(256, True, 16, 2, 2), Plan(routes=2), Machine("cpu", torch.float32, 1), False)
    assert found["failed"]["route"] == "no such instruction" and "total" not in found["stages"]
    assert {"sdpa math", "sdpa math, backward", "score peak"} <= found["stages"].keys()


@pytest.mark.parametrize("plan", [Plan(chunk=32, routes=4, share=0.02), Plan(window=0, routes=2, residual=True)])
def test_other_plans_are_checked_and_timed(plan: Plan) -> None:
    case = Case(320, not plan.residual, 16, 2, 2)
    found = measure(case, plan, Machine("cpu", torch.float32, 1), False, False)
    assert {"summarize", "route", "attend", "total", "total, backward"} <= found["stages"].keys(), found["failed"]
    assert ("mass" in found["stages"]) == plan.needs_mass and not any("score" in name for name in found["stages"])


def test_what_time_does_not_suffice_for_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A case that is begun in time ends soon after it, and what it has by then is kept."""
    right, over = Ways.total, []

    def late(ways: Ways) -> Any:
        over.append(True)
        return right(ways)

    monkeypatch.setattr(Ways, "total", late)
    monkeypatch.setattr(Machine, "over", lambda machine: bool(over))
    machine, cases = Machine("cpu", torch.float32, 1), [Case(n, True, 16, 2, 2) for n in (256, 320)]
    assert run.run(cases, Plan(routes=2), machine, tmp_path / "out.json", 60) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    (row,) = found["cases"]
    assert {"summarize", "route", "attend", "total"} == row["stages"].keys()
    assert row["failed"]["sdpa math"] == OVER and found["left_out"] == ["n=320 causal D=16 group=2"]


def test_a_run_that_is_cut_off_keeps_its_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, right = tmp_path / "out.json", measure

    def cut_off(case: Case, *more: Any) -> Any:
        if case.n > 256:
            raise KeyboardInterrupt
        return right(case, *more)

    monkeypatch.setattr(run, "measure", cut_off)
    machine, cases = Machine("cpu", torch.float32, 1), [Case(n, True, 16, 2, 2) for n in (256, 320)]
    with pytest.raises(KeyboardInterrupt):
        run.run(cases, Plan(routes=2), machine, out, 60)
    assert [row["n"] for row in run.kept(out)] == [256]


def test_a_lost_device_is_left_to_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    machine, cases = Machine("cpu", torch.float32, 1), [Case(n, True, 16, 2, 2) for n in (256, 320)]
    lost = [True, False]
    monkeypatch.setattr(Machine, "lost", lambda machine: lost.pop(0))
    left = []

    def again(seconds: float) -> int:
        left.append(seconds)
        return run.run(cases, Plan(routes=2), machine, out, seconds, again)

    assert run.run(cases, Plan(routes=2), machine, out, 600, again) == 0
    assert [row["n"] for row in run.kept(out)] == [256, 320] and len(left) == 1 and 0 < left[0] < 600


def test_the_model_grows_as_the_formulas_do() -> None:
    device = model.DEVICES["H100"]

    def site(length: int, coarse: int = 0) -> model.Site:
        return model.Site(cost.Shape(1, 32, 8, 128, 128, True), length, Plan(coarse=coarse))

    short, long = (model.stages(site(n), device) for n in (65536, 131072))
    assert math.isclose(long["exact"] / short["exact"], 4, rel_tol=0.01)
    assert math.isclose(long["route"] / short["route"], 4, rel_tol=0.01)
    assert 2 < long["attend"] / short["attend"] < 2 * 6 / 5.5  # tiles meet more clusters: half a one a doubling
    assert model.stages(site(131072, 32), device)["route"] < long["route"]
    assert model.exact(site(131072)).bound(device) == "products"
    assert model.parts({"attend": 3.0, "route": 1.1}, {"attend": 1.0, "route": 1.0}) == {"attend": 3.0}


def test_decisions_on_a_gpu_expect_what_the_model_says() -> None:
    for dim in (64, 128):
        for plan in (Plan(), Plan(coarse=32), Plan(routes=0), Plan(keep=32, routes=0, method="kmeans")):
            shape = cost.Shape(1, 32, 8, dim, dim, True, "cuda")
            for length in (8192, 32768, 262144):
                times = model.stages(model.Site(shape, length, plan), model.DEVICES["H100"])
                said = cost.at(cost.exact_cost(shape) / cost.prescored_time(shape, plan), length)
                assert 0.6 < said / (times["exact"] / times["total"]) < 1.6, (dim, plan, length)


def test_roofline_scales_with_what_was_measured() -> None:
    shape = (8, 32, 8, 128)
    rows = roofline.table([1024, 1048576], ["H100", "H200"], *shape, {})
    assert [row["levels"] for row in rows] == [1, 1, 2] * 2
    case = {
        "causal": True,
        "n": 4096,
        "stages": {"route": 2.0, "exact": 3.0},
        "predicted": {"route": 1.0, "exact": 1.0},
    }
    scales = roofline.scales_of({"cases": [case, case | {"causal": False}]})
    assert scales == {"route": 2.0, "exact": 3.0} and roofline.scales_of({"cases": []}) == {}
    scaled = roofline.table([1024, 1048576], ["H100", "H200"], *shape, scales)
    assert all(math.isclose(s["route, ms"], 2 * r["route, ms"]) for s, r in zip(scaled, rows, strict=True))


def test_the_chart_is_well_formed() -> None:
    for series in ({}, {"one": [(1024.0, 3.0)]}, {"a < b": [(1024.0, 3.0), (4096.0, 0.5)], "none": [(1.0, 0.0)]}):
        root = xml.etree.ElementTree.fromstring(svg.lines("title & more", "x", "y", series))
        assert root.tag.endswith("svg")
