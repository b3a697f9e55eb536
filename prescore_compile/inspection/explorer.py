"""Graphs for Google's Model Explorer, and the mapping with which it shows two side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..passes.diff import GraphDiff
from ..passes.snapshot import Node, Snapshot

if TYPE_CHECKING:
    from .inspection import Inspection

_COLOURS = {"added": "#b7e4c7", "removed": "#f8c4c4", "rewired": "#ffe8a3"}
MAPPING = "mapping.json"


def write(inspection: Inspection, folder: Path) -> list[Path]:
    """Write ``before.json``, ``after.json`` and ``mapping.json`` for each graph, numbered from the second on.

    Open the first two in Model Explorer, in two panes, and choose "Match node id" under "Sync": a node that is in both
    graphs has one id. The third says the same, for "Upload mapping".

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for at, (graph, difference) in enumerate(zip(inspection.log.graphs, inspection.diffs, strict=True)):
        home = folder if at == 0 else folder / str(at + 1)
        home.mkdir(exist_ok=True)
        files = {
            f"{side}.json": graphs(nodes, f"{side}: {graph.name}", _changes(difference, at), _ids(difference)[at])
            for at, (side, nodes) in enumerate((("before", difference.before), ("after", difference.after)))
        } | {MAPPING: mapping(difference)}
        for name, data in files.items():
            written.append(home / name)
            written[-1].write_text(json.dumps(data), encoding="utf-8")
    return written


def _changes(difference: GraphDiff, side: int) -> dict[int, str]:
    alone = {at: "added" for at in difference.added} if side else {at: "removed" for at in difference.removed}
    return alone | {pair[side]: "rewired" for pair in difference.rewired}


def _ids(difference: GraphDiff) -> tuple[list[str], list[str]]:
    """Of the nodes before and after; the same for what is matched."""
    back = {after: before for before, after in difference.matched.items()}
    before = [str(at) for at in range(len(difference.before.nodes))]
    return before, [before[back[at]] if at in back else f"new {at}" for at in range(len(difference.after.nodes))]


def graphs(graph: Snapshot, name: str, changes: dict[int, str], ids: list[str]) -> list[dict[str, Any]]:
    """A list with the one graph, as Model Explorer reads it from a JSON file."""
    return [{"id": name, "nodes": [_node(ids, at, node, changes.get(at, "")) for at, node in enumerate(graph.nodes)]}]


def mapping(difference: GraphDiff) -> dict[str, Any]:
    """Which node on the left is which on the right; nothing stands for an added or removed one."""
    before, after = _ids(difference)
    pairs = {before[a]: after[b] for a, b in difference.matched.items()}
    return {"type": "sync_navigation", "mapping": pairs}  # layers are not in it: they go by their names


def _node(ids: list[str], at: int, node: Node, change: str) -> dict[str, Any]:
    told = {
        "name": node.name,
        "arguments": node.template.replace("\0", "_"),
        "module": node.module,
        "source": node.source,
        "code": node.code,
        "change": change,
        "made from": ", ".join(node.origins),
    }
    found: dict[str, Any] = {
        "id": ids[at],
        "label": node.name if node.op == "placeholder" else node.target.lstrip("."),
        "namespace": node.module.replace(".", "/"),
        "attrs": [{"key": key, "value": value} for key, value in told.items() if value],
        "incomingEdges": [
            {"sourceNodeId": ids[source], "sourceNodeOutputId": "0", "targetNodeInputId": str(slot)}
            for slot, source in enumerate(node.inputs)
        ],
        "outputsMetadata": [{"id": "0", "attrs": [{"key": "tensor_shape", "value": node.value}]}] if node.value else [],
    }
    return found | ({"style": {"backgroundColor": _COLOURS[change]}} if change else {})
