"""Quality on trained weights; see docs/quality.md.

python -m bench.quality                       # everything; hours on two cores; goes on where it stopped
python -m bench.quality --part text --densities 0.2 --texts news --methods "default*"
python -m bench.quality --page                # tables and plots of what is stored
"""

from __future__ import annotations

import argparse
import os
from fnmatch import fnmatch
from pathlib import Path

import torch

from prescore_compile import smollm

from . import language, page
from .methods import methods
from .store import RESULTS, Store
from .texts import CHOSEN_ON, HELD_OUT

DENSITIES = (0.22, 0.10, 0.35)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=["text", "recall"], nargs="+", default=["text", "recall"])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--texts", nargs="+", default=[*HELD_OUT, *CHOSEN_ON])
    parser.add_argument("--methods", nargs="+", default=["*"], help="globs over the methods' names")
    parser.add_argument("--draws", type=int, default=1, help="seeds, and copies and facts, at most 6")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--page", action="store_true", help="only tell what is stored")
    arguments = parser.parse_args()
    if arguments.page:
        found = page.cells(arguments.out)
        for target in arguments.densities:
            print(f"\n{page.texts(found, (0.75 * target, target))}\n\n{page.recalls(found, (0.75 * target, target))}")
        arguments.out.with_suffix(".svg").write_text(page.plot(found))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    about = {"model": smollm.GGUF, "length": arguments.length, "torch": torch.__version__}
    store = Store(arguments.out, about)
    model, tokenizer = smollm.load()
    language.check(model, tokenizer)
    for target in arguments.densities:
        for draw in range(arguments.draws):
            found = methods(arguments.length, target, draw)
            wanted = [m for m in found if any(fnmatch(m.name, g) for g in arguments.methods)]
            if "recall" in arguments.part:
                for task, recall in language.tasks(tokenizer, arguments.length, arguments.texts, draw).items():
                    language.run_recall(store, model, task, recall, wanted, draw)
            if "text" in arguments.part:
                wanted = [m for m in wanted if m.drawn or not draw]
                for name in arguments.texts:
                    language.run_text(store, model, tokenizer, name, arguments.length, wanted, draw)


if __name__ == "__main__":
    main()
