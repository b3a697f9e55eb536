"""One row of the census: a family run eagerly under the oracle, then compiled with every site exact."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from prescore_compile.passes import Config, Report, rewrite

from . import families
from .oracle import Attention, Watch, watch

TOLERANCE = 1e-4
"""Of outputs, relative to the largest value of the output; ten times as much of gradients."""
Row = dict[str, Any]


class _Graphs:
    """A backend that rewrites and runs without compiling further, and counts how often each graph runs."""

    def __init__(self, rewrites: bool = True) -> None:
        self.rewrites = rewrites
        self.reports: list[Report] = []
        self.runs: list[int] = []
        self.seen: Counter[str] = Counter()

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        if not self.rewrites:
            return lambda *args: self._watched(gm, args)
        gm, report = rewrite(gm, Config.exact())
        at = len(self.runs)
        self.reports.append(report)
        self.runs.append(0)

        def run(*args: Any) -> Any:
            self.runs[at] += 1
            return gm.forward(*args)

        return run

    def _watched(self, gm: fx.GraphModule, args: Any) -> Any:
        with torch.no_grad(), Watch([a for a in args if not isinstance(a, nn.Parameter)]) as seen:
            result = gm.forward(*args)
        self.seen.update(_kind(attention) for attention in seen.attentions())
        return result

    def sites(self) -> list[Any]:
        """Every site, as often as its graph ran."""
        return [s for report, runs in zip(self.reports, self.runs, strict=True) for s in report.sites * runs]


def measure(name: str, implementation: str, gradients: bool = False) -> Row:
    """Builds, runs, compiles and compares one family; never raises."""
    start = time.perf_counter()
    row: Row = {"family": name, "implementation": implementation}
    try:
        example = families.build(name, implementation)
    except families.CannotBuild as error:
        return row | {"unbuilt": str(error)}
    row["model"] = type(example.model).__name__
    row["inputs"] = " ".join(example.kwargs)
    try:
        row |= _measure(example, gradients)
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error).strip()[:2000]}"
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def _measure(example: families.Example, gradients: bool) -> Row:
    torch.manual_seed(0)
    watched, seen = watch(example.model, **example.kwargs)
    ran = seen.attentions()
    row: Row = {"ran": dict(Counter(map(_kind, ran))), "lookalikes": _told(seen)}
    want = _run(example.model, example, gradients)
    graphs = _Graphs()
    failure, got = _compiled(example, graphs, gradients)
    if failure:
        plain, _ = _compiled(example, "eager", gradients)
        return row | {"uncompiled" if plain else "failed": plain or failure}
    row |= _tally(ran, graphs)
    error = _error(got, want)
    row["error"] = float(f"{error:.2g}")
    if not error <= TOLERANCE:
        row |= _verdict(example, want, error, gradients)
    if any(row["missed"].values()):
        row |= _outside(example, row)
    return row


def _verdict(example: families.Example, want: list[Tensor], error: float, gradients: bool) -> Row:
    """Why outputs differ: wrong, or nothing that the rewrite did.

    "unsteady": the eager model differs from itself, or from Dynamo's plain graph. "sensitivity": what one
    rounding of the weights does to the eager model, where that is small and explains the error.
    """
    if not _error(_run(example.model, example, gradients), want) <= TOLERANCE:
        return {"unsteady": True}
    if not _error(_compiled(example, "eager", gradients)[1], want) <= TOLERANCE:
        return {"unsteady": True}
    sensitivity = max(_error(_nudged(example, gradients, seed), want) for seed in range(3))
    explained = error <= 4 * sensitivity and sensitivity <= 10 * TOLERANCE
    return {"sensitivity": float(f"{sensitivity:.2g}")} | ({} if explained else {"wrong": True})


def _nudged(example: families.Example, gradients: bool, seed: int) -> list[Tensor]:
    """The eager results with every weight off by about one rounding."""
    generator = torch.Generator().manual_seed(seed)
    weights = [p for p in example.model.parameters() if p.is_floating_point()]
    before = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for p in weights:
            p.mul_(1 + torch.finfo(p.dtype).eps / 2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    results = _run(example.model, example, gradients)
    with torch.no_grad():
        for p, old in zip(weights, before, strict=True):
            p.copy_(old)
    return results


def _told(seen: Watch) -> dict[str, int]:
    return dict(Counter(f"{other.reason} ({_short(other.line)})" for other in seen.lookalikes()))


def _kind(attention: Attention) -> str:
    return attention.kind


def _run(call: Callable[..., Any], example: families.Example, gradients: bool) -> list[Tensor]:
    """The floating tensors of the output, then the gradients of a scalar of them."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(gradients):
        result = call(**example.kwargs)
    floats = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
    if not gradients:
        return floats
    example.model.zero_grad()
    loss = sum(
        t.double().mul(torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in floats if t.requires_grad
    )
    if isinstance(loss, Tensor):
        loss.backward()  # type: ignore[no-untyped-call]
    grads = [p.grad.clone() / 10 for p in example.model.parameters() if p.grad is not None]
    return [t.detach() for t in floats] + grads


def _compiled(example: families.Example, backend: Any, gradients: bool) -> tuple[str, list[Tensor]]:
    """What went wrong ("" if nothing did), and the results."""
    torch._dynamo.reset()
    limits = {"recompile_limit": 2**16, "accumulated_recompile_limit": 2**16, "suppress_errors": False}
    try:
        with torch._dynamo.config.patch(**limits):
            call = torch.compile(example.model, backend=backend, dynamic=False)
            return "", _run(call, example, gradients)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:2000]}", []
    finally:
        torch._dynamo.reset()


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest difference, relative to the scale of its tensor; infinite where what is finite, shapes or counts differ.

    What is NaN in ``want`` is not compared: a query whose keys are all hidden by -inf gets 0, as from SDPA.
    Some tensors are rounding alone, as the gradient of a key's bias: no scale is below a hundredth of the largest.
    """
    if len(got) != len(want):
        return float("inf")
    worst = 0.0
    largest = max((b[b.isfinite()].abs().max().item() for b in want if b.isfinite().any()), default=0.0)
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape or not torch.equal(a.isfinite() | b.isnan(), b.isfinite() | b.isnan()):
            return float("inf")
        finite = b.isfinite()
        if finite.any():
            a, b = a[finite].double(), b[finite].double()
            worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp(min=max(largest / 100, 1e-3))).item())
    return worst


def _tally(ran: list[Attention], graphs: _Graphs) -> Row:
    """Found, rewritten and kept sites, and what ran and has no site."""
    sites = graphs.sites()
    unmatched, elsewhere = _unmatched(ran, [site.source for site in sites])
    kept = Counter(site.reason.split(":")[0] for site in sites if site.decision == "keep")
    return {
        "graphs": len(graphs.runs),
        "found": len(sites),
        "rewritten": sum(site.decision == "rewrite" for site in sites),
        "kept": dict(kept),
        "reasons": dict(Counter(site.reason for site in sites if site.decision == "keep")),
        "without_line": sum(not re.search(r":\d+$", site.source) for site in sites),
        "masks": dict(Counter(site.mask for site in sites)),
        "missed": dict(Counter(map(_kind, unmatched))),
        "missed_at": dict(Counter(" ".join(map(_short, a.lines)) for a in unmatched)),
        "extra": max(0, len(sites) - len(ran)),
        "elsewhere": elsewhere,
    }


def _unmatched(ran: list[Attention], sources: list[str]) -> tuple[list[Attention], int]:
    """The attentions without a site, and how many have one that is in no file of theirs.

    Sites take an attention of their line, then of their file, then any: a call into torch has a line there.
    """
    left, free, elsewhere = list(ran), list(sources), 0
    rules: list[Callable[[Attention, str], bool]] = [
        lambda attention, source: source in attention.lines,
        lambda attention, source: _file(source) in map(_file, attention.lines),
        lambda attention, source: True,
    ]
    for rule in rules:
        still = []
        for source in free:
            match = next((a for a in left if rule(a, source)), None)
            if match is None:
                still.append(source)
            else:
                left.remove(match)
                elsewhere += rule is rules[-1]
        free = still
    return left, elsewhere


def _file(line: str) -> str:
    return line.rsplit(":", 1)[0]


def _outside(example: families.Example, row: Row) -> Row:
    """Attentions that run between Dynamo's graphs are not the matcher's to find."""
    graphs = _Graphs(rewrites=False)
    failure, _ = _compiled(example, graphs, False)
    if failure:
        return {}
    outside = sum(row["ran"].values()) - sum(graphs.seen.values())
    return {"outside": max(0, outside)}


def _short(line: str) -> str:
    return "/".join(line.rsplit("/", 2)[-2:])
