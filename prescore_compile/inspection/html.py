"""One self-contained HTML page: viewer.html, viewer.css and viewer.js around the data as JSON.

Everything that comes from a model reaches the page inside a JSON block, without ``<``, and is put
into it as text, never as markup. Strings are kept once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ..passes import REASONS
from ..passes.diff import GraphDiff, diff
from ..passes.dump import described
from ..passes.report import SiteReport
from ..passes.rules import RULES
from ..passes.snapshot import Snapshot
from ..passes.sources import Source
from ..passes.stages import GraphLog

if TYPE_CHECKING:
    from .inspection import Inspection

_CHANGES = ("", "added", "removed", "rewired", "moved")


class _Strings:
    """Each string once, by number; 0 is ""."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {"": 0}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def page(inspection: Inspection, tab: str = "diff") -> str:
    """The page of an inspection, opened at "diff", "decisions" or "kernels"."""
    strings = _Strings()
    graphs: list[dict[str, Any]] = []
    views: list[dict[str, Any]] = []
    numbers: dict[int, int] = {}

    def number(graph: Snapshot) -> int:
        if id(graph) not in numbers:
            numbers[id(graph)] = len(graphs)
            graphs.append(_graph(graph, strings))
        return numbers[id(graph)]

    for at, graph in enumerate(inspection.log.graphs):
        for name, difference in _views(graph):
            views.append(
                {
                    "graph": at,
                    "name": name,
                    "summary": difference.summary(),
                    "before": number(difference.before),
                    "after": number(difference.after),
                    "rows": [x for row in difference.rows for x in (_place(row.before), _place(row.after),
                                                                    _CHANGES.index(row.change))],
                }
            )  # fmt: skip
    data = {
        "title": inspection.title,
        "tab": tab,
        "logs": [
            {"title": graph.title, "sites": [*map(_site, graph.sites, graph.nodes)]} for graph in inspection.log.graphs
        ],
        "graphs": graphs,
        "views": views,
        "kernels": _kernels(inspection.sources),
        "reasons": REASONS,
        "rules": RULES,
        "strings": list(strings.numbers),
    }
    body = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    # "<" inside JSON stands only in strings: no text can end the script element or begin a comment in it.
    safe = body.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return _filled(safe.encode("utf-8", "replace").decode("utf-8"))


def _filled(data: str) -> str:
    here = files(__package__)
    html, css, js = (here.joinpath(f"viewer.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    # The data last, so that nothing in it is taken for a place to fill.
    head, tail = html.replace("/*css*/", css).replace("/*js*/", js).split("/*data*/")
    return head + data + tail


def _views(graph: GraphLog) -> Iterable[tuple[str, GraphDiff]]:
    """The whole, then each step that changed something, where there are several."""
    if not graph.stages:
        return
    first, last = graph.stages[0], graph.stages[-1]
    yield f"{first.name} → {last.name}", graph.diff
    pairs = [(a, b) for a, b in zip(graph.stages, graph.stages[1:], strict=False) if not a.graph.same(b.graph)]
    if len(pairs) > 1:
        yield from ((f"{a.name} → {b.name}", diff(a.graph, b.graph)) for a, b in pairs)


def _place(at: int | None) -> int:
    return -1 if at is None else at


def _graph(graph: Snapshot, strings: _Strings) -> dict[str, Any]:
    """Columns, so that no key is repeated."""
    nodes = graph.nodes
    return {
        "name": [strings(node.name) for node in nodes],
        "form": [strings(node.form) for node in nodes],
        "inputs": [node.inputs for node in nodes],
        "value": [strings(node.value) for node in nodes],
        "module": [strings(node.module) for node in nodes],
        "source": [strings(node.source) for node in nodes],
        "code": [strings(node.code) for node in nodes],
        "origin": [strings(", ".join(node.origins)) for node in nodes],
    }


def _site(site: SiteReport, node: str) -> dict[str, Any]:
    plan = " ".join(f"{key}={value}" for key, value in site.plan.settings().items()) if site.plan else ""
    return site.data() | {"plan": plan, "node": node}


def _kernels(sources: Iterable[Source]) -> list[dict[str, Any]]:
    """A text once, with everybody that runs it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for s in sources:
        kernel = {"name": s.name, "language": s.language, "text": s.text, "users": []}
        found.setdefault((s.name, s.text), kernel)["users"].append(described(s))
    return list(found.values())
