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
from ..passes.report import EXACT, SiteReport
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
    graphs: dict[int, tuple[int, dict[str, Any]]] = {}  # by identity: steps share their graphs

    def number(graph: Snapshot) -> int:
        if id(graph) not in graphs:
            graphs[id(graph)] = len(graphs), _graph(graph, strings)
        return graphs[id(graph)][0]

    logs = inspection.log.graphs
    views = [
        {
            "graph": at,
            "name": name,
            "summary": difference.summary(),
            "before": number(difference.before),
            "after": number(difference.after),
            "rows": list(_rows(difference)),
        }
        for at, (graph, whole) in enumerate(zip(logs, inspection.diffs, strict=True))
        for name, difference in _views(graph, whole)
    ]
    data = {
        "title": inspection.title,
        "tab": tab,
        "logs": [{"title": graph.title, "sites": [*map(_site, graph.sites, graph.nodes)]} for graph in logs],
        "graphs": [columns for _, columns in graphs.values()],
        "views": views,
        "kernels": _kernels(inspection.sources),
        "reasons": REASONS,
        "exact": EXACT,
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


def _views(graph: GraphLog, whole: GraphDiff) -> Iterable[tuple[str, GraphDiff]]:
    """The whole, then each step that changed something, where there are several."""
    yield f"{graph.stages[0].name} → {graph.stages[-1].name}", whole
    pairs = [(a, b) for a, b in zip(graph.stages, graph.stages[1:], strict=False) if not a.graph.same(b.graph)]
    if len(pairs) > 1:
        yield from ((f"{a.name} → {b.name}", diff(a.graph, b.graph)) for a, b in pairs)


def _rows(difference: GraphDiff) -> Iterable[int]:
    """Place before, place after, change; -1 for no place."""
    for row in difference.rows:
        yield -1 if row.before is None else row.before
        yield -1 if row.after is None else row.after
        yield _CHANGES.index(row.change)


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
    plan = site.plan.text if site.plan else ""
    by_mask = [f"{name}: {found.text}" for name, found in site.recognized.items()]
    return site.data() | {"plan": plan, "recognized": "; ".join(by_mask), "node": node}


def _kernels(sources: Iterable[Source]) -> list[dict[str, Any]]:
    """A text once, with everybody that runs it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for s in sources:
        kernel = {"name": s.name, "language": s.language, "text": s.text, "users": []}
        found.setdefault((s.name, s.text), kernel)["users"].append(described(s))
    return list(found.values())
