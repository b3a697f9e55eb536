"""Image classifiers: what prescored attention costs in accuracy, put in after training or trained with.

    python -m bench.quality.vision [--tasks digits photographs] [--out FILE] [--seeds 3]

Trains small vision transformers on real images that packages carry. Cells that FILE has are not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from prescore_compile import Config, explain
from prescore_compile.kernels.plan import Plan

from . import images, methods
from .images import Images

RESULTS = Path(__file__).parents[1] / "results" / "quality-vision.json"
CHECKPOINTS = Path(__file__).parents[2] / "build" / "quality-vision"
DENSITIES = (0.10, 0.25, 0.35)
SCORED = ("kmeans", "kmedian", "leverage", "peak", "random")
TOLERANCE = 1e-4

Call = Callable[[Tensor], Tensor]
Cells = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A data set and how its classifier is trained.

    Attributes:
        steps: of training, with ``batch`` images each. late: how many of them, the last ones, a classifier that
            is trained prescored runs prescored; the batches and the schedule are those of the exact one.
        trained: the (method, density) pairs that are trained with.
    """

    name: str
    load: Callable[[], Images]
    tokens: int
    layers: int
    steps: int
    late: int
    batch: int
    trained: tuple[tuple[str, float], ...]


_FEW = ("kmeans", "kmeans + residual", "leverage", "random")
TASKS = {
    "digits": Task(
        "digits", images.digits, 64, 2, 240, 40, 48, tuple((method, d) for d in (0.10, 0.25) for method in _FEW)
    ),
    "photographs": Task(
        "photographs",
        images.photographs,
        256,
        2,
        280,
        30,
        16,
        tuple((method, 0.25) for method in ("kmeans", "kmeans + residual", "routes", "routes + residual")),
    ),
}


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Classifier(nn.Module):
    """A vision transformer that averages its tokens."""

    def __init__(self, tokens: int, values: int, classes: int, layers: int, dim: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(values, dim)
        self.places = nn.Parameter(torch.randn(tokens, dim) * 0.1)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def plans(tokens: int, target: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """The methods that reach this density: names and options. A query's own place is not favoured, but by "window"."""
    chunk, kept = min(tokens, 128), int(tokens * target)
    # Said in full: what an option leaves out is a site's default, not ``Plan``'s.
    base: dict[str, Any] = dict(chunk=chunk, window=0, sinks=0, routes=0, cluster=16, residual=False)
    for method in SCORED:
        yield method, base | dict(method=method, keep=kept)
    yield "kmeans + residual", base | dict(method="kmeans", keep=kept - kept // 4, centroids=kept // 4)
    clusters = tokens // 16
    routes = max(1, (kept - clusters) // 16)
    free = kept - clusters - (routes - 1) * 16
    if clusters + routes * 16 <= 1.3 * kept:
        yield "routes", base | dict(routes=routes)
    beside = max(1, (kept - 2 * clusters) // 16)  # every cluster that is not routed to is a centroid
    if 2 * clusters + (beside - 1) * 16 + 15 <= 1.3 * kept:
        yield "routes + residual", base | dict(routes=beside, residual=True)
    if routes > 1:
        yield "routes + kmeans", base | dict(method="kmeans", routes=routes - 1, keep=free)
    windows = [base | dict(chunk=16, window=window) for window in range(8, tokens, 8)]
    near = [window for window in windows if density(Plan(**window), tokens) <= target]
    if near:
        yield "window", near[-1]


def density(plan: Plan, tokens: int) -> float:
    """Attended pairs and routing scores over the pairs of exact attention, counted; no overlap is taken off."""
    return methods.density(plan, tokens, causal=False)


def prescored(model: nn.Module, options: dict[str, Any]) -> Call:
    """The model through ``torch.compile``, whatever its length."""
    torch._dynamo.reset()
    everywhere = dict(min_seq_len=0, only_if_faster=False, inner="eager")
    return torch.compile(model, backend="prescore", options=everywhere | options, dynamic=False)


def build(task: Task, data: Images, seed: int) -> Classifier:
    """An untrained classifier; no global generator is touched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(task.tokens, data.train.shape[2], data.classes, task.layers)


def check(task: Task, data: Images) -> float:
    """Largest error of the logits under plans that keep everything.

    Raises:
        ValueError: it is too large, or an attention was not rewritten.
    """
    model = build(task, data, 0).eval()
    batch = data.test[:8]
    chunk = min(task.tokens, 128)
    everything: list[dict[str, Any]] = [
        dict(window=None, sinks=0, routes=0),
        dict(chunk=chunk, window=0, sinks=0, routes=task.tokens // 16),
    ]
    if task.tokens == chunk:
        everything.append(dict(chunk=chunk, window=0, sinks=0, routes=0, keep=chunk, method="kmeans"))
    worst = 0.0
    with torch.no_grad():
        for options in everything:
            report = explain(model, batch, config=Config(min_seq_len=0, only_if_faster=False, **options))
            rewritten = sum(site.decision == "rewrite" for site in report.sites)
            if rewritten != task.layers:
                raise ValueError(f"{task.name}: {rewritten} of {task.layers} attentions were rewritten\n{report}")
            worst = max(worst, (prescored(model, options)(batch) - model(batch)).abs().max().item())
    if not worst <= TOLERANCE:
        raise ValueError(f"{task.name}: keeping everything is off by {worst:.2g}; allowed: {TOLERANCE}")
    return worst


def train(
    model: nn.Module, call: Call, optimizer: torch.optim.Optimizer, task: Task, data: Images, seed: int, steps: range
) -> list[float]:
    """Runs these steps of the task's schedule; returns their losses. Step and seed settle the batch."""
    losses = []
    model.train()
    for step in steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(len(data.train), (task.batch,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 40, (task.steps - step) / (0.6 * task.steps))
        loss = F.cross_entropy(call(data.train[index]), data.train_labels[index])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def accuracy(model: nn.Module, call: Call, data: Images) -> float:
    """Share of the test images that are told right, in batches of one size."""
    model.eval()
    size = len(data.test) // 5
    with torch.no_grad():
        right = [
            (call(x).argmax(1) == y).sum().item()
            for x, y in zip(data.test.split(size), data.test_labels.split(size), strict=True)
        ]
    return sum(right) / len(data.test)


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)


def exactly_trained(task: Task, data: Images, seed: int) -> dict[str, Any]:
    """Model and optimizer where the trained ones branch off, and the model at the end; kept in a file."""
    path = CHECKPOINTS / f"{task.name}-{task.steps}-{task.late}-{task.batch}-{seed}.pt"
    if not path.exists():
        model = build(task, data, seed)
        optimizer = new_optimizer(model)
        early = task.steps - task.late
        train(model, model, optimizer, task, data, seed, range(early))
        path.parent.mkdir(parents=True, exist_ok=True)
        branch = path.with_suffix(".branch")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, branch)
        train(model, model, optimizer, task, data, seed, range(early, task.steps))
        torch.save(torch.load(branch) | {"end": model.state_dict()}, path)
        branch.unlink()
    saved: dict[str, Any] = torch.load(path)
    return saved


def measure(task: Task, seeds: int, cells: Cells, save: Callable[[], None]) -> None:
    """Adds the cells of a task that are not there yet, seed by seed."""
    data = task.load()
    start = time.perf_counter()
    print(f"{task.name}: keeping everything is exact within {check(task, data):.1g}", flush=True)

    def put(method: str, when: str, seed: int, run: Callable[[], float], dense: float, target: float) -> None:
        key = f"{task.name}/{seed}/{when}/{method}/{target}"
        if key in cells:
            return
        began = time.perf_counter()
        cells[key] = dict(task=task.name, seed=seed, when=when, method=method, target=target, density=round(dense, 4))
        cells[key] |= dict(accuracy=run(), seconds=round(time.perf_counter() - began, 1))
        save()
        took = time.perf_counter() - start
        print(f"{took:6.0f} s  {key:<50} {dense:6.1%} of pairs  accuracy {cells[key]['accuracy']:.3f}", flush=True)

    for seed in range(seeds):
        model = build(task, data, seed)

        def exact(seed: int = seed, model: Classifier = model) -> float:
            model.load_state_dict(exactly_trained(task, data, seed)["end"])
            return accuracy(model, model, data)

        def after(options: dict[str, Any], seed: int = seed, model: Classifier = model) -> float:
            model.load_state_dict(exactly_trained(task, data, seed)["end"])
            return accuracy(model, prescored(model, options), data)

        def trained(options: dict[str, Any], seed: int = seed, model: Classifier = model) -> float:
            saved = exactly_trained(task, data, seed)
            model.load_state_dict(saved["model"])
            optimizer = new_optimizer(model)
            optimizer.load_state_dict(saved["optimizer"])
            call = prescored(model, options)
            train(model, call, optimizer, task, data, seed, range(task.steps - task.late, task.steps))
            return accuracy(model, call, data)

        put("exact", "exact", seed, exact, 1.0, 1.0)
        for target in DENSITIES:
            for method, options in plans(task.tokens, target):
                options = options | {"seed": seed}
                dense = density(Plan(**options), task.tokens)
                put(method, "after", seed, lambda options=options: after(options), dense, target)
                if (method, target) in task.trained:
                    put(method, "trained", seed, lambda options=options: trained(options), dense, target)


def table(cells: Cells) -> str:
    """Accuracies in per cent, mean and standard deviation over the seeds; differences are of the same seed."""
    rows = []
    exact = {(c["task"], c["seed"]): c["accuracy"] for c in cells.values() if c["when"] == "exact"}
    for name in dict.fromkeys(c["task"] for c in cells.values()):
        own = [c for c in cells.values() if c["task"] == name]
        for target, method in dict.fromkeys((c["target"], c["method"]) for c in own):
            these = [c for c in own if (c["target"], c["method"]) == (target, method)]
            row = [name, method, f"{these[0]['density']:.1%}"]
            for when in ("exact", "after", "trained"):
                runs = [c for c in these if c["when"] == when]
                row.append(_spread([c["accuracy"] for c in runs], ""))
                if when != "exact":
                    row.append(_spread([c["accuracy"] - exact[name, c["seed"]] for c in runs], "+"))
            rows.append(row)
    headers = ["images", "method", "pairs", "exact", "put in after training", "- exact", "trained with", "- exact"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _spread(values: Sequence[float], sign: str) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):{sign}.1f}{spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells: Cells = json.loads(args.out.read_text()) if args.out.exists() else {}

    def save() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(cells, indent=1) + "\n")

    for name in args.tasks:
        measure(TASKS[name], args.seeds, cells, save)
    print(table(cells))


if __name__ == "__main__":
    main()
