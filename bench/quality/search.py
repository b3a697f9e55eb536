"""Which routed plan is best at one density, on the texts that choices may be made on.

    python -m bench.quality.search
    python -m bench.quality.search --density 0.1

Every candidate spends the same share of the pairs; only ``CHOSEN_ON`` texts and tasks over them are read.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from prescore_compile import smollm
from prescore_compile.kernels.plan import Plan

from . import language
from .methods import Method, Planned, density, fit
from .store import RESULTS, Store
from .texts import CHOSEN_ON

SMALL = {
    "chunk 128, window 64, cluster 32": Plan(window=64, cluster=32),
    "chunk 128, window 0, cluster 32": Plan(window=0, cluster=32),
    "chunk 256, window 0, cluster 32": Plan(chunk=256, window=0, cluster=32),
    "chunk 128, window 0, cluster 64, residual": Plan(window=0, cluster=64, routes=1, residual=True),
    "chunk 256, window 0, cluster 64, residual": Plan(chunk=256, window=0, cluster=64, routes=1, residual=True),
}


def candidates(length: int, target: float) -> Iterator[Method]:
    """Routed plans of one density; of a small one, others: routing alone takes a third of it."""
    base = Plan()
    plans = (
        SMALL
        if target < 0.15
        else {
            "chunk 128, window 128": base,
            "chunk 128, window 64": replace(base, window=64),
            "chunk 128, window 0": replace(base, window=0),
            "chunk 256, window 64": replace(base, chunk=256, window=64),
            "chunk 256, window 0": replace(base, chunk=256, window=0),
            "chunk 512, window 0": replace(base, chunk=512, window=0),
            **{
                f"chunk 256, window 0, spread {s}": replace(base, chunk=256, window=0, spread=s)
                for s in (1.2, 1.4, 1.6)
            },
            "cluster 32": replace(base, cluster=32),
            "cluster 32, chunk 512, window 0": replace(base, cluster=32, chunk=512, window=0),
            "sinks 4": replace(base, sinks=4),
            "4 peak keys a segment": replace(base, keep=4),
        }
    )
    for name, settings in plans.items():

        def make(n: int, settings: Plan = settings) -> Plan:
            return replace(settings, routes=n)

        plan = fit(make, target, length)
        name = f"{100 * target:.0f} %: {name}" if target < 0.15 else name
        yield Method(f"{name}, {plan.routes} routes", Planned(plan), density(plan, length))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--density", type=float, default=0.22)
    parser.add_argument("--draws", type=int, default=4, help="instances of copies and facts, at most 6")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-search.json")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    store = Store(arguments.out, {"model": smollm.GGUF, "length": arguments.length, "torch": torch.__version__})
    model, tokenizer = smollm.load()
    language.check(model, tokenizer)
    tried = list(candidates(arguments.length, arguments.density))
    for draw in range(arguments.draws):
        for task, recall in language.tasks(tokenizer, arguments.length, CHOSEN_ON, draw).items():
            language.run_recall(store, model, task, recall, tried, draw)
    for name in CHOSEN_ON:
        language.run_text(store, model, tokenizer, name, arguments.length, tried)


if __name__ == "__main__":
    main()
