"""The GPU benchmark without a GPU: its dry run, its model, its chart, and what it says where there is none."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from bench import model, roofline, svg
from bench.gpu import checks, measure, run, supervise, warm
from bench.gpu.apart import EndedError, HungError, apart, within
from bench.gpu.checks import Checks
from bench.gpu.machine import CASE, Case, Machine, cases
from bench.gpu.measure import OVER, Found, Task
from bench.gpu.ways import SCORED, Ways, scored, selected
from prescore_compile.kernels import ops
from prescore_compile.kernels.band import K, Q
from prescore_compile.kernels.logits import Logits
from prescore_compile.kernels.plan import WHOLE, Plan
from prescore_compile.passes import cost
from prescore_compile.passes.defaults import default_plan

ROOT = Path(__file__).resolve().parent.parent
HERE = Machine("cpu", torch.float32, rounds=1)
CASES = [Case(n, True, 16, 2, 2) for n in (256, 320)]


def measured(case: Case, plan: Plan, scoring: bool = True) -> dict[str, Any]:
    """The row of one case, on a CPU."""
    task = Task(case, plan, measure.ways_of(case, plan, scoring))
    *_, (_, found) = measure.measure(task, HERE, Found())
    return measure.row_of(task, HERE, found)


def kept(cases: list[Case], plan: Plan, out: Path, status: int = 0, **more: Any) -> dict[str, Any]:
    """What the file of a run in this process says."""
    assert run.run(cases, plan, HERE, out, 600, **{"process": within} | more) == status
    return json.loads(out.read_text())


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
        stages |= {"band", "band, backward", "sink", "sink, backward"} if case["causal"] else set()
        assert stages <= set(case["stages"]), case["failed"]
        assert {"sdpa efficient", "sdpa cudnn"} <= set(case["failed"]), "a CPU has neither"
        assert case["faster"] > 0 and case["attend_tflops"] > 0 and case["predicted"]["total"] > 0
    xml.etree.ElementTree.fromstring(out.with_suffix(".svg").read_text())


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a CPU, by the compiled kernels."""
    right = Ways.attend
    monkeypatch.setattr(Ways, "attend", lambda ways: right(ways) * 1.5)
    (row,) = kept(CASES[:1], Plan(chunk=32, window=16, routes=2), tmp_path / "out.json", 1)["cases"]
    assert "wrong result" in row["failed"]["attend"] and "attend" not in row["stages"] and "total" not in row["stages"]
    assert "attend_tflops" not in row and "faster" not in row and "sdpa math" in row["stages"]


def test_wrong_scores_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ways.score
    monkeypatch.setattr(Ways, "score", lambda ways, method: right(ways, method) * (1.5 if method == "peak" else 1))
    found = measured(CASES[0], Plan(routes=2))
    assert "wrong result" in found["failed"]["score peak"] and "score peak" not in found["stages"]
    assert {"score kmeans", "score kmedian", "score leverage"} <= found["stages"].keys() & found["predicted"].keys()


@pytest.mark.parametrize("wrong", ["row_value", "row_index", "row_owner"])
def test_wrong_centroids_get_no_time(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ways.centroids

    def bent(ways: Ways, *given: Any) -> Any:
        found = right(ways, *given)
        return found._replace(**{wrong: getattr(found, wrong) + 1})

    assert {"centroids", "centroids, backward"} <= measured(CASES[0], Plan(routes=2))["stages"].keys()
    monkeypatch.setattr(Ways, "centroids", bent)
    found = measured(CASES[0], Plan(routes=2))
    assert "wrong result" in found["failed"]["centroids"] and "centroids, backward" not in found["stages"]


@pytest.mark.parametrize("name", ["band", "sink"])
def test_wrong_results_of_what_is_attended_whole_get_no_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too wide a window, or a sink that takes a little more."""
    assert {name, f"{name}, backward"} <= measured(CASES[0], Plan(routes=2))["stages"].keys()
    if name == "band":

        def wider(ways: Ways, site: Any = None) -> Any:
            return ops.prescored(site or ways.site, WHOLE, Logits(Q - ways.window - 8 < K))

        monkeypatch.setattr(Ways, "band", wider)
    else:
        right = Ways.sink
        monkeypatch.setattr(Ways, "sink", lambda ways, site=None: right(ways, site) * 0.9)
    found = measured(CASES[0], Plan(routes=2))
    assert "wrong result" in found["failed"][name] and f"{name}, backward" not in found["stages"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_wrong_gradients_get_no_time(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In query, key and value, also where only the last queries and keys are compared."""
    right = Ways.backward

    def bent(ways: Ways, *given: Any) -> Any:
        found = list(right(ways, *given))
        found[place] = found[place] * 1.5
        return tuple(found)

    names = {"total, backward", "sdpa math, backward"}
    for whole in (4096, 128):
        with monkeypatch.context() as patched:
            patched.setattr(checks, "WHOLE", whole)
            assert names <= measured(CASES[0], Plan(routes=2), False)["stages"].keys()
            patched.setattr(Ways, "backward", bent)
            found = measured(CASES[0], Plan(routes=2), False)
        assert all("wrong result" in found["failed"][name] for name in names) and not names & found["stages"].keys()


def test_flex_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled: what it computes is checked all the same."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ways = Ways(Case(640, True, 16, 2, 2), Plan(window=16, routes=8), HERE)
    got = ways.flex()()
    wrong = Checks(ways).flex
    assert wrong(got) < 1e-4 < 0.1 < wrong(got * 1.5)


@pytest.mark.parametrize(("n", "causal"), [(1280, True), (1280, False), (1300, True)])
def test_blocks_of_flex_are_those_of_its_mask(n: int, causal: bool) -> None:
    ways = Ways(Case(n, causal, 16, 1, 1), Plan(window=200, routes=16, chunk=64), HERE)
    got, want = ways.block_mask(), create_block_mask(ways.mask_mod, None, None, n, n, device="cpu")
    assert got.seq_lengths == want.seq_lengths and got.BLOCK_SIZE == want.BLOCK_SIZE
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_indices", "full_q_indices"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.kv_num_blocks.sum() > 0 and got.full_kv_num_blocks.sum() > 0 and got.sparsity() > 0


def test_scorers_have_the_chunks_of_the_model() -> None:
    plan = default_plan(True, "cuda", 4096)
    assert plan.chunk == 256 and scored(plan, "peak").chunk == selected(plan).chunk == 128


def test_kernels_are_compiled_in_other_processes() -> None:
    """One of the cases that have the same kernels; what cannot be compiled says why."""
    plan = Plan(routes=2)
    many = [Task(Case(n, True, 16, 2, 2), plan, measure.ours(Case(n, True, 16, 2, 2), plan, False)) for n in (128, 256)]
    assert many[0].names == ("summarize", "route", "attend", "total", "total, backward")
    assert warm.warm_up(many, HERE, 600) == {many[0]: {}}
    assert warm.warm_up(many, HERE, 0) == {many[0]: {CASE: OVER}}
    broken = Task(many[0].case, plan, ("summarize", "no such way"))
    assert warm.warm_up([broken], HERE, 600) == {broken: {"no such way": "'no such way'"}}


def test_what_a_case_raises_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def raises(*_: Any) -> Any:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(measure, "Ways", raises)
    (row,) = kept(CASES[:1], Plan(), tmp_path / "out.json", 1)["cases"]
    assert row["failed"] == {"case": "out of resources"} and not row["stages"]
    assert run.run(CASES, Plan(), HERE, tmp_path / "late.json", -1) == 0
    assert len(json.loads((tmp_path / "late.json").read_text())["left_out"]) == 2


def test_a_stage_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(Ways, "route", raises)
    found = measured(CASES[0], Plan(routes=2))
    assert found["failed"]["route"] == "no such instruction" and "total" not in found["stages"]
    assert {"sdpa math", "sdpa math, backward", "score peak"} <= found["stages"].keys()


@pytest.mark.parametrize("plan", [Plan(chunk=32, routes=4, share=0.02), Plan(window=0, routes=2, residual=True)])
def test_other_plans_are_checked_and_timed(plan: Plan) -> None:
    case = Case(320, not plan.residual, 16, 2, 2)
    found = measured(case, plan, False)
    assert {"summarize", "route", "attend", "total", "total, backward"} <= found["stages"].keys(), found["failed"]
    assert ("mass" in found["stages"]) == plan.needs_mass and not any("score" in name for name in found["stages"])


def test_what_time_does_not_suffice_for_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A case that is begun in time ends soon after it, and what it has by then is kept; ``--resume`` does the rest."""
    right, over, out, plan = Ways.total, [], tmp_path / "out.json", Plan(routes=2)

    def late(ways: Ways) -> Any:
        over.append(True)
        return right(ways)

    with monkeypatch.context() as patched:
        patched.setattr(Ways, "total", late)
        patched.setattr(Machine, "over", lambda machine: bool(over))
        found = kept(CASES, plan, out)
    (row,) = found["cases"]
    assert {"summarize", "route", "attend", "total"} == row["stages"].keys()
    assert row["failed"]["sdpa math"] == OVER and found["left_out"] == ["n=320 causal D=16 group=2"]
    found = kept(CASES, plan, out, resume=True)
    assert found["left_out"] == [] and [case["n"] for case in found["cases"]] == [256, 320]
    assert found["cases"][0]["stages"]["attend"] == row["stages"]["attend"]
    assert all({"sdpa math", "total, backward"} <= case["stages"].keys() for case in found["cases"])
    monkeypatch.setattr(measure, "Ways", None)
    assert kept(CASES, plan, out, resume=True) == found, "nothing is left to measure"


def test_a_run_that_is_cut_off_keeps_its_cases(tmp_path: Path) -> None:
    out = tmp_path / "out.json"

    def cut_off(*given: Any) -> Iterator[Any]:
        for name, found in supervise.work(*given):
            yield name, found
            if name is None:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(CASES, Plan(routes=2), HERE, out, 60, worker=cut_off, process=within)
    assert [case.n for case in run.kept(out)] == [256]


def test_a_lost_device_is_left_to_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The next one goes on with the next way; the same kernels are not run again, nor is anything measured twice."""
    lost, begun, tried = [], [], []

    def raises(ways: Ways, method: str) -> Any:
        tried.append(ways.case.n)
        lost.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    def worker(tasks: tuple[Task, ...], *more: Any) -> Iterator[Any]:
        begun.append(tasks[0].case.n)
        lost.clear()
        return supervise.work(tasks, *more)

    monkeypatch.setattr(Ways, "score", raises)
    monkeypatch.setattr(Machine, "lost", lambda machine: bool(lost))
    first, second = kept(CASES, Plan(routes=2), tmp_path / "out.json", 1, worker=worker)["cases"]
    assert begun == [256] * 5 and tried == [256] * 4
    assert first["failed"]["score peak"] == "an illegal memory access was encountered"
    assert second["failed"]["score peak"] == f"left out: with {CASES[0]}, an illegal memory access was encountered"
    assert {"attend", "sdpa math, backward"} <= first["stages"].keys() & second["stages"].keys()


def hangs_and_crashes(*given: Any) -> Iterator[Any]:
    """``work``, where ``attend`` never ends and a score ends its process."""
    Ways.attend = lambda ways: time.sleep(3600)  # type: ignore[method-assign]
    Ways.score = lambda ways, method: os._exit(3)  # type: ignore[method-assign]
    yield from supervise.work(*given)


def test_a_kernel_that_hangs_ends_only_its_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is not run again; what else the case has is measured by the next process. So it is with one that crashes."""
    monkeypatch.setattr(Machine, "patience", lambda machine, way: 0.1 if way == "attend" else 600)
    monkeypatch.setattr(measure, "SELECTING", ("score peak",))
    out = tmp_path / "out.json"
    first, second = kept(CASES, Plan(routes=2), out, 1, process=apart, worker=hangs_and_crashes)["cases"]
    assert first["failed"]["attend"] == "killed after 0 s without a result"
    assert first["failed"]["score peak"] == "its process ended with exit status 3"
    assert second["failed"]["attend"] == f"left out: with {CASES[0]}, killed after 0 s without a result"
    for row in (first, second):
        assert {"summarize", "route", "sdpa math", "sdpa math, backward"} <= row["stages"].keys()
        assert "total" not in row["stages"]


@pytest.mark.parametrize(("problem", "times"), [(HungError, 1), (EndedError, supervise.LOSSES)])
def test_a_way_that_costs_processes_is_given_up(problem: type[EndedError], times: int) -> None:
    tasks = [Task(Case(4096, True, dim, 1), Plan(), ("sdpa math", "flex")) for dim in range(16, 160, 16)]
    founds: dict[Case, Found] = {}
    ended = []

    def process(_: Any, __: Any, left: tuple[Task, ...], ___: Machine, founds: dict[Case, Found]) -> Iterator[Any]:
        for task in left:
            found = founds.setdefault(task.case, Found())
            while (name := found.following(task)) is not None:
                yield name, found
                if name == "flex":
                    raise problem("gone")
                found.times[name] = 1.0
            yield None, found

    for task, lost in supervise.supervised(tasks, HERE, founds, supervise.work, process):
        ended += [task.case.dim] * (lost == "flex")
    assert len(ended) == times and len(founds) == len(tasks)
    assert all(found.times == {"sdpa math": 1.0} and "gone" in found.failed["flex"] for found in founds.values())


def test_a_device_that_never_answers_is_given_up() -> None:
    tasks = [Task(case, Plan(), ("attend",)) for case in CASES]
    founds: dict[Case, Found] = {}

    def process(_: Any, __: Any, left: tuple[Task, ...], *___: Any) -> Iterator[Any]:
        if CASE not in founds.get(left[0].case, Found()).failed:
            raise HungError("gone")
        yield from ((None, founds[task.case]) for task in left)

    found = list(supervise.supervised(tasks, HERE, founds, supervise.work, process))
    assert found == [(tasks[0], CASE), (tasks[0], None), (tasks[1], None)]
    assert "gone" in founds[CASES[1]].failed[CASE]


def test_nothing_is_asked_of_a_device_that_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_lazy_init", None)
    there = Machine("cuda", name="NVIDIA H200")
    assert run.about(there, None)["device"] == "NVIDIA H200" and there.model.name == "H200"
    (task, *_) = run.tasks_of(CASES, None, there)
    assert measure.row_of(task, there, Found({"attend": 1.0}))["predicted"]["attend"] > 0


def test_what_matters_most_comes_first() -> None:
    tasks = run.tasks_of(cases(), None, Machine("cuda"))
    flex = [place for place, task in enumerate(tasks) if task.names == ("flex",)]
    assert flex == [6, *range(len(tasks) - 5, len(tasks))] and tasks[6].case == Case(32768, True, 128, 4)
    assert {(task.case.causal, task.case.dim, task.case.group) for task in tasks[:6]} == {(True, 128, 4)}
    assert len({task.case for task in tasks}) == len(tasks) - len(flex) == 48
    names = tasks[1].names
    assert names[:5] == ("summarize", "mass", "route", "attend", "total") and names[5:9] == tuple(
        f"sdpa {name}" for name in ("flash", "efficient", "cudnn", "math")
    )


def test_a_way_has_until_soon_after_the_deadline() -> None:
    assert Machine("cpu").patience("attend") < Machine("cpu").patience("flex") == Machine("cpu").patience(None)
    assert Machine("cpu", deadline=0).patience("attend") == 0


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
