"""Tables and a plot of what the quality bench stored."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import svg


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"] if path.is_file() else []


def texts(found: list[dict[str, Any]], target: tuple[float, float]) -> str:
    """Perplexity ratio / KL / top-1 agreement of each method with a density in the range, a column a text."""
    names = list(dict.fromkeys(c["text"] for c in found if c["part"] == "text"))
    rows: dict[tuple[str, float], dict[str, str]] = {}
    for c in found:
        if c["part"] == "text" and target[0] <= c["density"] <= target[1]:
            told = f"{c['ratio']:.3f} / {c['kl']:.3f} / {c['top1']:.3f}"
            if "spent" in c:
                told += f" at {100 * c['spent']:.1f}%"
            rows.setdefault((c["method"], c["density"]), {})[c["text"]] = told
    lines = [[m, f"{100 * d:.1f}%", *(r.get(n, "") for n in names)] for (m, d), r in rows.items()]
    return tabulate(lines, ["method", "pairs", *names], "github", disable_numparse=True)


def recalls(found: list[dict[str, Any]], target: tuple[float, float]) -> str:
    """Loss over exact in nats, and accuracy (exact's), of each method, a column a task.

    Means over the draws of a task; with several, +- the standard error of the mean of the loss.
    """
    names = list(dict.fromkeys(c["text"] for c in found if c["part"] == "recall"))
    rows: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for c in found:
        if c["part"] == "recall" and target[0] <= c["density"] <= target[1]:
            rows.setdefault((c["method"], c["density"]), {}).setdefault(c["text"], []).append(c)
    lines = [[m, f"{100 * d:.1f}%", *(_recall(r[n]) if n in r else "" for n in names)] for (m, d), r in rows.items()]
    return tabulate(lines, ["method", "pairs", *names], "github", disable_numparse=True)


def _recall(draws: list[dict[str, Any]]) -> str:
    over = [c["loss"] - c["exact_loss"] for c in draws]
    told = f"{statistics.mean(over):+.2f}"
    if len(draws) > 1:
        told += f" ± {statistics.stdev(over) / len(draws) ** 0.5:.2f}"
    got, exact = (statistics.mean(c[name] for c in draws) for name in ("accuracy", "exact_accuracy"))
    return f"{told}, {got:.3f} ({exact:.3f})"


def plot(found: list[dict[str, Any]]) -> str:
    """Mean KL of the measured texts by density, as SVG: a line a method."""
    points: dict[str, dict[float, list[float]]] = {}
    for c in found:
        if c["part"] == "text":
            points.setdefault(c["method"], {}).setdefault(c.get("spent", c["density"]), []).append(c["kl"])
    series = {m: [(100 * d, sum(k) / len(k)) for d, k in by.items()] for m, by in points.items()}
    return svg.lines("KL(exact || method), mean of the texts", "pairs, %", "nats", series)
