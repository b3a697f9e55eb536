"""A stage as Python that can be read, with the user's file, line and code above each block."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .snapshot import Node, Snapshot
from .stages import GraphLog, Stage


def printed(graph: GraphLog, stage: Stage) -> str:
    """The graph after one stage as a Python function.

    Lines of one place in the user's code are one block; above it, as a comment, ``file:line``, the
    module and the code there. What a stage has to say about a node stands above that.
    """
    made = f", by {stage.made_by}" if stage.made_by else ""
    head = [f"# {_one_line(graph.title)}", f"# stage: {stage.name}{made}", ""]
    inputs = [node for node in stage.graph.nodes if node.op == "placeholder"]
    signature = [f"    {node.name},{_value(node)}" for node in inputs]
    body = [f"    {line}" if line else "" for line in _blocks(stage)]
    return "\n".join([*head, "def forward(", "    self,", *signature, "):", *(body or ["    pass"])]) + "\n"


def _blocks(stage: Stage) -> Iterable[str]:
    last: tuple[str, str, str] | None = None
    for at, node in enumerate(stage.graph.nodes):
        if node.op == "placeholder":
            continue
        where = (node.source, node.module, node.code)
        if where != last and last is not None:
            yield ""
        if where != last and node.source:
            yield f"# {_one_line(node.source)}{f' in {_one_line(node.module)}' if node.module else ''}"
            yield f"# {_one_line(node.code)}"
        last = where
        if node.name in stage.notes:
            yield from (f"# >>> {line}" for line in stage.notes[node.name].splitlines())
        yield _statement(stage.graph, at)


def _statement(graph: Snapshot, at: int) -> str:
    return f"{_one_line(graph.text(at))}{_value(graph.nodes[at])}"


def _value(node: Node) -> str:
    made = f"; from {', '.join(node.origins)}" if node.origins and " (by " in node.origins[0] else ""
    return f"  # {_one_line(node.value)}{made}" if node.value or made else ""


def in_short(names: Iterable[str]) -> str:
    """Module paths with runs of numbers drawn together: ``layers.{0-29}.self_attn``."""
    found: dict[tuple[str, ...], list[int]] = {}
    for name in dict.fromkeys(names):
        parts = re.split(r"(?<=\.)(\d+)(?=\.|$)", name, maxsplit=1)
        found.setdefault((parts[0], *parts[2:]), []).extend(int(number) for number in parts[1:2])
    return ", ".join(f"{key[0]}{_runs(numbers)}{''.join(key[1:])}" for key, numbers in found.items())


def _runs(numbers: list[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) + "}"


def _one_line(text: str) -> str:
    """Names of modules are the user's: one with a line break must not end the comment that it is in."""
    return " ".join(text.splitlines())
