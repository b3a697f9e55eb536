"""Tables and a plot of what the quality bench stored."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import svg


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"] if path.is_file() else []


def texts(found: list[dict[str, Any]], target: tuple[float, float]) -> str:
    """Perplexity ratio / KL / top-1 agreement of each method with a density in the range, a column a text.

    Means over the seeds of a method that draws; with several, the KL +- its standard deviation.
    """
    return _table(found, "text", target, told)


def told(draws: list[dict[str, Any]]) -> str:
    """Ratio / KL / top-1 of a cell, or of the seeds of one."""
    ratio, kl, top1 = (statistics.mean(c[name] for c in draws) for name in ("ratio", "kl", "top1"))
    more = f" ± {statistics.stdev(c['kl'] for c in draws):.3f}" if len(draws) > 1 else ""
    spent = f" at {100 * draws[0]['spent']:.1f}%" if "spent" in draws[0] else ""
    return f"{ratio:.3f} / {kl:.3f}{more} / {top1:.3f}{spent}"


def _table(
    found: list[dict[str, Any]],
    part: str,
    target: tuple[float, float],
    tell: Callable[[list[dict[str, Any]]], str],
) -> str:
    names = list(dict.fromkeys(c["text"] for c in found if c["part"] == part))
    rows: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for c in found:
        if c["part"] == part and target[0] <= c["density"] <= target[1]:
            rows.setdefault((c["method"], c["density"]), {}).setdefault(c["text"], []).append(c)
    lines = [[m, f"{100 * d:.1f}%", *(tell(r[n]) if n in r else "" for n in names)] for (m, d), r in rows.items()]
    return tabulate(lines, ["method", "pairs", *names], "github", disable_numparse=True)


def recalls(found: list[dict[str, Any]], target: tuple[float, float]) -> str:
    """Loss over exact in nats, and accuracy (exact's), of each method, a column a task.

    Means over the draws of a task; with several, +- the standard error of the mean of the loss.
    """
    return _table(found, "recall", target, _recall)


def _recall(draws: list[dict[str, Any]]) -> str:
    over = [c["loss"] - c["exact_loss"] for c in draws]
    loss = f"{statistics.mean(over):+.2f}"
    if len(draws) > 1:
        loss += f" ± {statistics.stdev(over) / len(draws) ** 0.5:.2f}"
    got, exact = (statistics.mean(c[name] for c in draws) for name in ("accuracy", "exact_accuracy"))
    return f"{loss}, {got:.3f} ({exact:.3f})"


def plot(found: list[dict[str, Any]]) -> str:
    """Mean KL of the measured texts by density, as SVG: a line a method."""
    points: dict[str, dict[float, list[float]]] = {}
    for c in found:
        if c["part"] == "text":
            points.setdefault(c["method"], {}).setdefault(c.get("spent", c["density"]), []).append(c["kl"])
    series = {m: [(100 * d, sum(k) / len(k)) for d, k in by.items()] for m, by in points.items()}
    return svg.lines("KL(exact || method), mean of the texts", "pairs, %", "nats", series)
