"""Inspections as plain data, for ``--format json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..passes.diff import GraphDiff
from ..passes.snapshot import Snapshot
from ..passes.stages import GraphLog

if TYPE_CHECKING:
    from .inspection import Inspection

Data = dict[str, Any]


def explain(inspection: Inspection) -> Data:
    """``{"title", "graphs": [{"name", "function", "why", "ends", "stages", "sites"}]}``."""
    return {"title": inspection.title, "graphs": [_graph(graph) for graph in inspection.log.graphs]}


def diff(inspection: Inspection) -> Data:
    """The same, and for each graph "before", "after" (nodes), "matched" (pairs of places) and "regions"."""
    pairs = zip(inspection.log.graphs, inspection.diffs, strict=True)
    return {"title": inspection.title, "graphs": [_graph(graph) | _diff(difference) for graph, difference in pairs]}


def kernels(inspection: Inspection) -> Data:
    """``{"title", "kernels": [{"name", "language", "geometry", "sites", "text"}]}``."""
    return {"title": inspection.title, "kernels": [vars(source) for source in inspection.sources]}


def _graph(graph: GraphLog) -> Data:
    return {
        "name": graph.name,
        "function": graph.function,
        "why": graph.why,
        "ends": graph.ends,
        "stages": [{"name": stage.name, "nodes": len(stage.graph.nodes)} for stage in graph.stages],
        "sites": [site.data() | {"node": node} for site, node in zip(graph.sites, graph.nodes, strict=True)],
    }


def _diff(difference: GraphDiff) -> Data:
    return {
        "before": _nodes(difference.before),
        "after": _nodes(difference.after),
        "matched": [list(pair) for pair in difference.matched.items()],
        "removed": list(difference.removed),
        "added": list(difference.added),
        "rewired": [list(pair) for pair in difference.rewired],
        "regions": [vars(region) for region in difference.regions],
    }


def _nodes(graph: Snapshot) -> list[Mapping[str, Any]]:
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": node.target,
            "text": graph.text(at),
            "inputs": list(node.inputs),
            "value": node.value,
            "module": node.module,
            "source": node.source,
            "code": node.code,
            "origins": list(node.origins),
        }
        for at, node in enumerate(graph.nodes)
    ]
