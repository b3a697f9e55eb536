"""How many clusters a tile of a GPU kernel walks over, for each that one of its queries routes to: on real text.

    python -m bench.quality.unions

The queries of a tile (and the heads that share a KV head) read the union of their routes; ``bench.model`` has
what was counted. Here the routes of SmolLM2's heads are counted, tiled as ``kernels.triton`` tiles them.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

import torch
from tabulate import tabulate
from torch import Tensor

from prescore_compile import smollm
from prescore_compile.kernels.coarse import best_chunks, coarse
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary
from prescore_compile.kernels.triton import listing
from prescore_compile.passes.defaults import CAUSAL, CAUSAL_ON_A_GPU, LONG_ON_A_GPU

from .language import SKIPPED
from .lengths import stretch
from .methods import Planned, exact
from .model import compare, hidden
from .texts import TEXTS

PLANS = {
    "heads alone": CAUSAL,
    "heads alone, two levels": replace(CAUSAL, coarse=LONG_ON_A_GPU.coarse),
    "together": CAUSAL_ON_A_GPU,
    "together, two levels": LONG_ON_A_GPU,
}


def union(routes: Tensor, group: int, queries: int, chunk: int) -> tuple[int, int]:
    """Clusters that tiles walk over, and routes of their rows, of ``routes`` ``[B, H, Nq, R]`` (-1: none).

    ``queries`` a tile, none of which lies across a border of chunks. Both are added up over tiles, the second as the
    mean of a tile's rows, times its rows.
    """
    batch, heads, length, count = routes.shape
    wide = int(routes.max()) + 1
    walked = routed = 0
    for first in range(0, length, chunk):
        for begin in range(first, min(first + chunk, length), queries):
            end = min(begin + queries, first + chunk, length)
            tile = routes[:, :, begin:end].reshape(batch * heads // group, -1)
            met = torch.zeros(len(tile), wide + 1, dtype=torch.bool)
            met.scatter_(1, tile.long().where(tile >= 0, wide), True)
            walked += int(met[:, :wide].sum()) * group * (end - begin)
            routed += int((tile >= 0).sum())
    return walked, routed


class Counted(Planned):
    """Counts ``union`` of its routes, and of the first of two levels."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.walked, self.of_rows, self.asked = [0, 0], [0, 0], 0

    def count(self, site: Operands, summary: Summary, routes: Tensor, mass: Tensor | None) -> None:
        super().count(site, summary, routes, mass)
        plan, group = self.plan, site.query.shape[1] // site.key.shape[1]
        spec = listing.spec(plan, dim=site.key.shape[3], group=group)
        found = [union(routes, group, spec.queries, plan.chunk)]
        if plan.coarse:
            chunks = coarse(summary, plan)
            best = best_chunks(site.query, chunks, plan, site.causal, site.key.shape[2], site.scale, mass=mass)
            # Where heads route together, a tile of ``route`` is of one of them.
            together = plan.together(group)
            queries = replace(spec, group=group // together).queries
            found.append(union(best[:, ::together], group // together, queries, plan.chunk))
        for level, (walked, routed) in enumerate(found):
            self.walked[level] += walked
            self.of_rows[level] += routed
        self.asked += routes[..., 0].numel()

    def ratios(self) -> list[str]:
        """Clusters that a row walks over; for each that it routes to; the same of chunks of the first level."""
        ratios = [f"{w / r:.2f}" if r else "" for w, r in zip(self.walked, self.of_rows, strict=True)]
        return [f"{self.walked[0] / self.asked:.1f}", *ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--texts", nargs="+", default=["news", "glossary"], choices=TEXTS)
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=PLANS)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = []
    for length in arguments.lengths:
        model, tokenizer = smollm.load()
        stretch(model, length)
        for text in arguments.texts:
            ids = smollm.token_ids(tokenizer, TEXTS[text](), length)
            before = hidden(model, ids, exact)
            for name in arguments.plans:
                attend = Counted(PLANS[name])
                after = hidden(model, ids, attend)
                found = compare(model, before[SKIPPED:-1], after[SKIPPED:-1], ids[0, SKIPPED + 1 :])
                rows.append([length, text, name, *attend.ratios(), f"{found.kl:.4f}"])
                print(rows[-1], flush=True)
    columns = ["n", "text", "plan", "walked", "a route", "a chunk", "KL"]
    print(tabulate(rows, columns, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
