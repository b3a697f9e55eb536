"""Runs, checks and times the ways of one case."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from bench import model
from bench.operands import counted
from prescore_compile.kernels.plan import Plan
from prescore_compile.passes import cost

from .checks import Checks
from .machine import Case, Machine, told
from .ways import BACKENDS, SCORED, SCORES, Ways, scored, selected

OVER = "left out, as time was up"
MATH_UP_TO, EFFICIENT_BACKWARD_UP_TO = 4096, 32768
"""Keys; beyond, these take longer than what they would say is worth."""


def measure(case: Case, plan: Plan, machine: Machine, flex: bool, scoring: bool = True) -> dict[str, Any]:
    """Times in seconds of every way that passed its check, and what there is to say of the others.

    ``flex``, ``scoring``: whether FlexAttention, the scorers and centroids are among them.
    """
    failed: dict[str, str] = {}
    times: dict[str, float] = {}
    taken = None
    with told(failed, "case"):
        ways = Ways(case, plan, machine)
        checks = Checks(ways)

        def way(names: Iterable[str]) -> None:
            """Those that run, are checked and timed; of the others the reason is kept."""
            for name in names:
                if machine.over():
                    failed[name] = OVER
                    continue
                with told(failed, name):
                    work = ways.flex() if name == "flex" else ways.all[name]
                    off, limit = checks.all[name](work()), checks.limit(name)
                    if not off <= limit:
                        failed[name] = f"wrong result: off by {off:.2g}, {limit:.2g} allowed"
                        continue
                    times[name] = machine.seconds(work)

        ways.prepare(failed)
        taken = ways.taken
        if not failed:
            way(ways.stages)
        if not failed:
            way(["total"])
        way(f"sdpa {name}" for name in BACKENDS if name != "math" or case.n <= MATH_UP_TO)
        forward = ["total", *(f"sdpa {name}" for name in BACKENDS)]
        if case.n > EFFICIENT_BACKWARD_UP_TO:
            forward.remove("sdpa efficient")
        way(f"{name}, backward" for name in forward if name in times)
        if scoring:
            way([*SCORES, "centroids"])
            way(["centroids, backward"] * ("centroids" in times))
        way(["flex"] * flex)
    return row(case, plan, machine, times, failed, taken)


def row(
    case: Case, plan: Plan, machine: Machine, times: dict[str, float], failed: dict[str, str], taken: float | None
) -> dict[str, Any]:
    """One case as data: times, rates on the pairs attended, shares, and the predicted times.

    ``taken``: routes of a query, counted.
    """
    shape = cost.Shape(1, case.heads, case.heads // case.group, case.dim, case.dim, case.causal)
    flops = 4 * case.dim * case.heads
    exact_flops = flops * cost.at(cost.exact_pairs(case.causal), case.n)
    attended_flops = flops * cost.at(cost.attended_pairs(counted(plan, taken), case.causal), case.n)
    backends = {name: times[f"sdpa {name}"] for name in BACKENDS if f"sdpa {name}" in times}
    best = min(backends, key=backends.__getitem__) if backends else None
    found: dict[str, Any] = asdict(case) | {"stages": times, "failed": failed, "routes": taken}
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
