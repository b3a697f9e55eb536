"""The graph after a pass for Graphviz: what was added, removed and rewired, in colour."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..passes.diff import GraphDiff

if TYPE_CHECKING:
    from .inspection import Inspection

_COLOURS = {"added": "#b7e4c7", "removed": "#f8c4c4", "rewired": "#ffe8a3", "moved": "#cfe2ff", "": "white"}


def dot(inspection: Inspection) -> str:
    """One digraph; a cluster for each graph of the model.

    Nodes are those of both graphs, a matched node once; removed nodes and what they read is dashed.
    """
    lines = ["digraph prescore {", '  node [shape=box, style=filled, fillcolor=white, fontname="monospace"];']
    for at, (graph, difference) in enumerate(zip(inspection.log.graphs, inspection.diffs, strict=True)):
        lines += [f"  subgraph cluster_{at} {{", f"    label={_quoted(graph.title)};"]
        lines += [f"    {line}" for line in _graph(difference, f"g{at}_")]
        lines.append("  }")
    return "\n".join([*lines, "}"])


def _graph(difference: GraphDiff, prefix: str) -> Iterable[str]:
    before, after, matched = difference.before, difference.after, difference.matched
    names = {
        ("a", at): f"{prefix}b{matched[at]}" if at in matched else f"{prefix}a{at}" for at in range(len(before.nodes))
    }
    names |= {("b", at): f"{prefix}b{at}" for at in range(len(after.nodes))}
    for row in difference.rows:
        side, at, graph = ("b", row.after, after) if row.after is not None else ("a", row.before, before)
        if at is None or (side == "a" and at in matched):
            continue
        node = graph.nodes[at]
        label = f"{node.name}\n{node.target}" + (f"\n{node.value}" if node.value else "")
        look = f"fillcolor={_quoted(_COLOURS[row.change])}, tooltip={_quoted(f'{node.source} {node.code}'.strip())}"
        dashed = ', style="filled,dashed"' if row.change == "removed" else ""
        yield f"{names[side, at]} [label={_quoted(label)}, {look}{dashed}];"
    for at, node in enumerate(after.nodes):
        yield from (f"{names['b', source]} -> {names['b', at]};" for source in node.inputs)
    for at in difference.removed:
        yield from (f"{names['a', i]} -> {names['a', at]} [style=dashed];" for i in before.nodes[at].inputs)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "")
    return f'"{escaped}"'
