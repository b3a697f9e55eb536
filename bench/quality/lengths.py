"""What holds quality at which length: whole texts of 2k to 32k tokens.

    python -m bench.quality.lengths            # goes on where it stopped
    python -m bench.quality.lengths --page

SmolLM2-135M was trained on 8192 positions. Beyond, its rotary base is raised (NTK-aware scaling), which needs no
training; exact attention of the same model is what methods are compared with.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from prescore_compile import smollm
from prescore_compile.kernels.plan import Plan
from prescore_compile.passes import cost
from prescore_compile.passes.defaults import CAUSAL

from . import language, page
from .methods import FIXED, Method, Planned, density, fit
from .store import RESULTS, Store

LENGTHS = (2048, 4096, 8192, 16384, 32768)
TEXTS = ("glossary",)
"""Long enough, and held out."""
ROUTES = (17, 33, 65)
SHAPE = cost.Shape(1, 9, 3, 64, 64, True)
"""Of SmolLM2's attention."""


def candidates(length: int) -> Iterator[tuple[str, Plan]]:
    """The default, with more routes; numbers of routes without a share; the window alone that costs as much as 33."""
    yield "routes with a share", CAUSAL
    yield "routes with a share, at most 128", replace(CAUSAL, routes=128)
    for routes in ROUTES:
        yield f"{routes} routes", replace(FIXED, routes=routes)
    spent = density(replace(FIXED, routes=33), length)
    yield "StreamingLLM", fit(lambda n: Plan(routes=0, window=n), spent, length)


def stretch(model: Any, length: int) -> None:
    """Raise the rotary base for ``length`` positions: ``base * s^(d / (d - 2))``, s = length / trained positions.

    Where fewer positions were trained; "NTK-aware scaling", as ``rope_type="dynamic"`` in transformers.
    """
    rotary, trained = model.model.rotary_emb, model.config.max_position_embeddings
    if length > trained:
        dim = 2 * len(rotary.inv_freq)
        powers = torch.arange(0, dim, 2) / dim
        base = (1 / rotary.inv_freq[1].item()) ** (1 / powers[1].item())
        rotary.inv_freq = 1 / (base * (length / trained) ** (dim / (dim - 2))) ** powers


def table(found: list[dict[str, Any]]) -> str:
    """A line a length and method."""
    rows = []
    for length in LENGTHS:
        for name, plan in candidates(length):
            mine = {c["text"]: c for c in found if c["method"] == name and c["text"].endswith(f" {length}")}
            if mine:
                speed = cost.at(cost.exact_cost(SHAPE) / cost.prescored_time(SHAPE, plan), length)
                told = [page.told([mine[f"{t} {length}"]]) if f"{t} {length}" in mine else "" for t in TEXTS]
                pairs = "counted" if plan.share else f"{100 * density(plan, length):.1f}%"
                rows.append([length, name, pairs, f"{speed:.1f}x", *told])
    return tabulate(rows, ["n", "method", "pairs", "expected", *TEXTS], "github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--texts", nargs="+", default=TEXTS)
    parser.add_argument("--methods", nargs="+", default=["*"], help="globs over the methods' names")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-lengths.json")
    parser.add_argument("--page", action="store_true", help="only tell what is stored")
    arguments = parser.parse_args()
    if arguments.page:
        print(table(page.cells(arguments.out)))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    store = Store(arguments.out, {"model": smollm.GGUF, "torch": torch.__version__})
    for length in arguments.lengths:
        model, tokenizer = smollm.load()
        stretch(model, length)
        wanted = [(n, p) for n, p in candidates(length) if any(fnmatch(n, glob) for glob in arguments.methods)]
        methods = [Method(name, Planned(plan), density(plan, length)) for name, plan in wanted]
        for text in arguments.texts:
            language.run_text(store, model, tokenizer, text, length, methods, label=f"{text} {length}")


if __name__ == "__main__":
    main()
