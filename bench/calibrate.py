"""A calibrated SmolLM2-135M against uniform plans of the same density, on texts that the calibration did not see.

    python -m bench.calibrate --out bench/results/calibrate.json

Checks first that what is compared is what it should be. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from prescore_compile import Calibration, Plan, calibrate, smollm

CANDIDATES = [Plan(chunk=64, window=64, routes=0), Plan(chunk=64, window=64, routes=3)]
UNIFORM = CANDIDATES[1]
ALWAYS: dict[str, Any] = {"min_seq_len": 0, "only_if_faster": False, "inner": "eager"}
ROWS = 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=768)
    parser.add_argument("--out", type=Path, default=Path("bench/results/calibrate.json"))
    parser.add_argument("--measured", type=Path, help="a plan file of an earlier run, whose trials are not run again")
    arguments = parser.parse_args()
    model, tokenizer = smollm.load()
    length = arguments.seq_len
    ids = smollm.token_ids(tokenizer, smollm.topics(), 20 * length)
    calls = {
        "calibrated on": ids[:, :length],
        "same book, later": ids[:, -length:],
        "source code": smollm.token_ids(tokenizer, inspect.getsource(argparse), length),
    }
    batch = [{"input_ids": calls["calibrated on"], "use_cache": False}]
    plan_file = arguments.out.with_suffix(".plan.json")
    begin = time.perf_counter()
    first = calibrate(model, batch, budget=0.99, candidates=CANDIDATES, measured=arguments.measured)
    seconds = time.perf_counter() - begin
    first.save(plan_file)
    same: dict[str, Any] = {"candidates": CANDIDATES, "measured": first}
    with torch.no_grad():
        exact = {name: _logarithms(model, ids) for name, ids in calls.items()}
        uniform = {name: _compare(model, ids, exact[name], UNIFORM.settings()) for name, ids in calls.items()}
    budget = _density(first, UNIFORM)
    plans = {
        "same density": calibrate(model, batch, budget=budget, **same),
        "same drift": calibrate(model, batch, drift=uniform["calibrated on"]["kl"], **same),
    }
    plans["same density"].save(plan_file)
    with torch.no_grad():
        _check(model, calls["calibrated on"], exact["calibrated on"], plans["same density"], budget)
        rows = [{"plan": "uniform", "density": budget, "text": name} | found for name, found in uniform.items()]
        for name, plan in plans.items():
            for text, ids in calls.items():
                found = _compare(model, ids, exact[text], {"plan": plan})
                rows.append({"plan": name, "density": plan.density, "text": text} | found)
                print(rows[-1], file=sys.stderr, flush=True)
    report = {
        "model": "SmolLM2-135M-Instruct",
        "seq_len": length,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "sweep_seconds": None if arguments.measured else round(seconds),
        "uniform": UNIFORM.settings(),
        "predicted": {name: plan.predicted for name, plan in plans.items()},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 0


def _check(model: Any, ids: torch.Tensor, exact: torch.Tensor, plan: Calibration, budget: float) -> None:
    """The compiled model does what was calibrated; all exact is exact; the budget held."""
    assert plan.density <= budget + 1e-6, f"density {plan.density} over the budget {budget}"
    everything = Plan(window=None, sinks=0, routes=0).settings()
    kl = _compare(model, ids, exact, everything)["kl"]
    assert kl < 1e-6, f"a plan that keeps everything drifts by {kl}"
    kl = _compare(model, ids, exact, {"plan": plan})["kl"]
    assert math.isclose(kl, plan.drift, rel_tol=1e-3), f"compiled, the drift is {kl}; calibrated, {plan.drift}"
    print("checks passed", file=sys.stderr, flush=True)


def _density(calibration: Calibration, plan: Plan) -> float:
    """Of one plan at all sites, which have the same sizes here."""
    (found,) = {trial.density for site in calibration.sites for trial in site.trials if trial.plan == plan}
    return found


def _logarithms(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), -1)
    return found


def _compare(model: Any, ids: torch.Tensor, exact: torch.Tensor, options: dict[str, Any]) -> dict[str, float]:
    """KL (nats), perplexity ratio and top-1 agreement against exact, over all positions."""
    torch._dynamo.reset()
    other = _logarithms(torch.compile(model, backend="prescore", options=ALWAYS | options), ids)
    parts = list(zip(exact.split(ROWS), other.split(ROWS), strict=True))
    kl = sum((a.exp() * (a - b)).sum().item() for a, b in parts) / len(exact)
    loss, before = (F.nll_loss(rows[:-1], ids[0, 1:]).item() for rows in (other, exact))
    agree = sum((a.argmax(-1) == b.argmax(-1)).sum().item() for a, b in parts) / len(exact)
    return {"kl": kl, "perplexity_ratio": math.exp(loss - before), "top1": agree}


if __name__ == "__main__":
    sys.exit(main())
