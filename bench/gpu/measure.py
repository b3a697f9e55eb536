"""Runs, checks and times the ways of one case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bench import model
from bench.operands import counted
from prescore_compile.kernels.plan import Plan
from prescore_compile.passes import cost

from .checks import Checks
from .machine import CASE, Case, Machine, told
from .ways import BACKENDS, MASKED, SCORED, SCORES, SELECTING, WHOLLY, Ways, scored, selected, stages_of

OVER = "left out, as time was up"
WRONG = "wrong result"
MATH_UP_TO, EFFICIENT_BACKWARD_UP_TO, MASKED_UP_TO = 4096, 32768, 32768
"""Keys; beyond, these take longer than what they would say is worth."""


@dataclass(frozen=True)
class Task:
    """A case, its plan, and the ways to try, by their names."""

    case: Case
    plan: Plan
    names: tuple[str, ...]

    @property
    def kernels(self) -> tuple[object, ...]:
        """Equal for those cases that run the same kernels."""
        case, plan = self.case, self.plan
        # Triton compiles sizes that 16 divides for themselves: numbers of chunks are the smallest.
        return case.causal, case.dim, case.group, plan.text, case.n // plan.chunk % 16 == 0


@dataclass
class Found:
    """What is known of a case: seconds of the ways that passed their check, and the reasons of those that did not."""

    times: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    taken: float | None = None
    """Routes of a query, counted."""

    def may(self, name: str, plan: Plan) -> bool:
        """Whether a way has what it reads: of stages those before it, if only wrong ones; else only right ones."""
        stages = stages_of(plan)
        if name == "total":
            return all(stage in self.times for stage in stages)
        if name.endswith(", backward"):
            return name.removesuffix(", backward") in self.times
        before = stages[: stages.index(name)] if name in stages else []
        return all(stage in self.times or self.failed.get(stage, "").startswith(WRONG) for stage in before)

    def following(self, task: Task) -> str | None:
        """The way to try next; None: the case is done."""
        tried = self.times.keys() | self.failed.keys()
        if CASE in tried:
            return None
        return next((name for name in task.names if name not in tried and self.may(name, task.plan)), None)


def ours(case: Case, plan: Plan, scoring: bool) -> tuple[str, ...]:
    """The ways that have kernels of ours."""
    return (*stages_of(plan), "total", "total, backward", *SELECTING * scoring, *wholly(case) * scoring)


def wholly(case: Case) -> tuple[str, ...]:
    """The ways that are measured of what is attended whole: where it is causal, as such models are."""
    return WHOLLY if case.causal else ()


def ways_of(case: Case, plan: Plan, scoring: bool) -> tuple[str, ...]:
    """All ways but FlexAttention, the most telling first."""
    exact = [f"sdpa {name}" for name in BACKENDS if name != "math" or case.n <= MATH_UP_TO]
    forward = ["total", *exact]
    if case.n > EFFICIENT_BACKWARD_UP_TO:
        forward.remove("sdpa efficient")
    beside = (*SELECTING, *wholly(case), *[MASKED] * (case.causal and case.n <= MASKED_UP_TO)) if scoring else ()
    return (*stages_of(plan), "total", *exact, *(f"{name}, backward" for name in forward), *beside)


def measure(task: Task, machine: Machine, found: Found, timing: bool = True) -> Iterator[tuple[str | None, Found]]:
    """Try what was not tried yet; before each way its name and what was found so far, at the end no name.

    Where a way takes the device from this process, its name comes again, and nothing after it.

    ``timing``: else each way only runs once.
    """
    name = found.following(task) and CASE
    while name is not None:
        if name != CASE and machine.over():
            found.failed[name] = OVER
        else:
            yield name, found
            with told(found.failed, name):
                if name == CASE:
                    ways = Ways(task.case, task.plan, machine)
                    ways.taken = found.taken
                    checks = Checks(ways)
                else:
                    if name == "route":
                        found.taken = ways.taken = ways.count()
                    found.times[name] = seconds_of(name, ways, checks) if timing else once(name, ways)
            if name in found.failed and machine.lost():
                yield name, found
                return
        name = found.following(task)
    yield None, found


def seconds_of(name: str, ways: Ways, checks: Checks) -> float:
    """Of a way that passes its check."""
    work = ways.flex() if name == "flex" else ways.all[name]
    off, limit = checks.all[name](work()), checks.limit(name)
    if not off <= limit:
        raise ValueError(f"{WRONG}: off by {off:.2g}, {limit:.2g} allowed")
    return ways.machine.seconds(work)


def once(name: str, ways: Ways) -> float:
    """Run a way; nothing is measured."""
    ways.all[name]()
    ways.machine.synchronize()
    return 0.0


def found_of(row: Mapping[str, Any]) -> Found:
    """What such a row says; what time did not suffice for is not part of it."""
    times = {name: seconds for name, seconds in row["stages"].items() if name != "exact"}
    return Found(times, {name: why for name, why in row["failed"].items() if why != OVER}, row["routes"])


def row_of(task: Task, machine: Machine, known: Found) -> dict[str, Any]:
    """One case as data: times, rates on the pairs attended, shares, and the predicted times."""
    case, plan, times, taken = task.case, task.plan, known.times, known.taken
    shape = cost.Shape(1, case.heads, case.heads // case.group, case.dim, case.dim, case.causal)
    flops = 4 * case.dim * case.heads
    exact_flops = flops * cost.at(cost.exact_pairs(case.causal), case.n)
    attended_flops = flops * cost.at(cost.attended_pairs(counted(plan, taken), case.causal), case.n)
    backends = {name: times[f"sdpa {name}"] for name in BACKENDS if f"sdpa {name}" in times}
    best = min(backends, key=backends.__getitem__) if backends else None
    found: dict[str, Any] = asdict(case) | {"stages": times, "failed": known.failed, "routes": taken}
    found["predicted"] = model.stages(model.Site(shape, case.n, plan), machine.model)
    for name, method in zip(SCORES, SCORED, strict=True):
        if name in times:
            kept = model.Site(shape, case.n, scored(plan, method))
            found["predicted"][name] = model.score(kept).seconds(machine.model)
    if "centroids" in times:
        kept = model.Site(shape, case.n, selected(plan))
        found["predicted"]["centroids"] = sum(
            work(kept).seconds(machine.model) for work in (model.select, model.summarize)
        )
    if best is not None:
        found["stages"] = times | {"exact": backends[best]}
        found |= {"best": best, "exact_tflops": exact_flops / backends[best] / 1e12}
    if "attend" in times:
        found["attend_tflops"] = attended_flops / times["attend"] / 1e12
        if best is not None:
            found["attend_share_of_best"] = found["attend_tflops"] / found["exact_tflops"]
    if "total" in times:
        chosen = times["summarize"] + times["route"] + times.get("mass", 0.0)
        found["scoring_and_routing_share"] = chosen / times["total"]
        if best is not None:
            found["faster"] = backends[best] / times["total"]
    backward = [times[f"sdpa {name}, backward"] for name in BACKENDS if f"sdpa {name}, backward" in times]
    if backward and "total, backward" in times:
        found["faster_backward"] = min(backward) / times["total, backward"]
    found["off_the_prediction"] = model.parts(found["stages"], found["predicted"])
    return found
