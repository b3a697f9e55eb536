"""What differs between two graphs, node by node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from .matching import increasing, matching
from .snapshot import Graph, Node, Snapshot, snapshot


@dataclass(frozen=True)
class Row:
    """One line of a side-by-side view: places in the graphs, None where a side has nothing.

    ``change``: "" (the same), "added", "removed", "rewired" (matched, but it reads something else or
    with other constants) or "moved" (the same, at another place in the order).
    """

    before: int | None
    after: int | None
    change: str


@dataclass(frozen=True)
class Region:
    """Changed nodes that hang together: what one rule did at one place.

    Attributes:
        rule: what made the added nodes, by FX's ``from_node``; "" where that is not recorded.
        module, source, code: of the first changed node that has a source.
        removed, added, rewired: places in the graph before, in the one after, and in the one after.
    """

    rule: str
    module: str
    source: str
    code: str
    removed: tuple[int, ...]
    added: tuple[int, ...]
    rewired: tuple[int, ...]


@dataclass(frozen=True)
class GraphDiff:
    """Two graphs and which node of one is which of the other.

    Attributes:
        before, after: the graphs. matched: place before -> place after.
    """

    before: Snapshot
    after: Snapshot
    matched: Mapping[int, int]

    @cached_property
    def removed(self) -> tuple[int, ...]:
        """Places in ``before`` that nothing in ``after`` matches."""
        return tuple(at for at in range(len(self.before.nodes)) if at not in self.matched)

    @cached_property
    def added(self) -> tuple[int, ...]:
        """Places in ``after`` that nothing in ``before`` matches."""
        known = set(self.matched.values())
        return tuple(at for at in range(len(self.after.nodes)) if at not in known)

    @cached_property
    def rewired(self) -> tuple[tuple[int, int], ...]:
        """Matched places whose nodes read other nodes, or have other constants."""
        return tuple((a, b) for a, b in self.matched.items() if self._differs(a, b))

    def _differs(self, a: int, b: int) -> bool:
        old, new = self.before.nodes[a], self.after.nodes[b]
        return old.label != new.label or [self.matched.get(i) for i in old.inputs] != list(new.inputs)

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.removed or self.added or self.rewired)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The graphs side by side, in the order of both."""
        rewired = set(self.rewired)
        steady = increasing(sorted(self.matched.items()))
        back = {b: a for a, b in self.matched.items()}
        rows: list[Row] = []
        a = b = 0
        for x, y in [*steady, (len(self.before.nodes), len(self.after.nodes))]:
            rows += [Row(at, None, "moved" if at in self.matched else "removed") for at in range(a, x)]
            rows += [Row(None, at, "moved" if at in back else "added") for at in range(b, y)]
            if x < len(self.before.nodes):
                rows.append(Row(x, y, "rewired" if (x, y) in rewired else ""))
            a, b = x + 1, y + 1
        return tuple(rows)

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """The changes, connected along the dataflow, in the order of the graphs.

        What several modules read (a mask that all layers share) does not connect them.
        """
        rewired = dict(self.rewired)
        changed = [("-", at) for at in self.removed] + [("+", at) for at in (*self.added, *rewired.values())]
        import networkx  # slow to import, and seldom needed

        graph = networkx.Graph()
        graph.add_nodes_from(changed)
        for sign, side in (("-", self.before), ("+", self.after)):
            for at in range(len(side.nodes)):
                users = [user for user, _ in side.users[at] if (sign, user) in graph]
                if (sign, at) in graph and len({side.nodes[user].module for user in users}) == 1:
                    graph.add_edges_from(((sign, at), (sign, user)) for user in users)
        # What was removed and what reads its place now belong together.
        for a, b in rewired.items():
            for old in self.before.nodes[a].inputs:
                if ("-", old) in graph and len(self.before.users[old]) == 1:
                    graph.add_edge(("-", old), ("+", b))
        again = set(rewired.values())
        found = [self._region(component, again) for component in networkx.connected_components(graph)]
        return tuple(sorted(found, key=self._first))

    def _region(self, places: set[tuple[str, int]], rewired: set[int]) -> Region:
        removed = tuple(sorted(at for sign, at in places if sign == "-"))
        added = tuple(sorted(at for sign, at in places if sign == "+" and at not in rewired))
        again = tuple(sorted(at for sign, at in places if sign == "+" and at in rewired))
        rules = Counter(origin.partition(" (by ")[2].rstrip(")") for at in added for origin in
                        self.after.nodes[at].origins[:1])  # fmt: skip
        nodes = [self.after.nodes[at] for at in added] or [self.before.nodes[at] for at in removed]
        nodes += [self.after.nodes[at] for at in again]
        at = next((node for node in nodes if node.source), nodes[0])
        rule = rules.most_common(1)[0][0] if rules else ""
        return Region(rule, at.module, at.source, at.code, removed, added, again)

    def _first(self, region: Region) -> tuple[float, float]:
        ahead = [self._before(at) for at in (*region.added, *region.rewired)] + [float(at) for at in region.removed]
        return min(ahead), -len(region.added)

    def _before(self, at: int) -> float:
        """Where in ``before`` a place of ``after`` would lie."""
        return self._behind[at] + 0.5

    @cached_property
    def _behind(self) -> list[int]:
        """For each place of ``after``, where the last matched one up to it lies in ``before``; -1: nowhere."""
        back, found = {b: a for a, b in self.matched.items()}, [-1]
        for at in range(len(self.after.nodes)):
            found.append(back.get(at, found[-1]))
        return found[1:]

    def summary(self) -> str:
        """``12 removed, 30 added, 5 rewired, 800 unchanged``."""
        counts = {"removed": self.removed, "added": self.added, "rewired": self.rewired}
        same = len(self.matched) - len(self.rewired)
        return ", ".join([*(f"{len(nodes)} {what}" for what, nodes in counts.items()), f"{same} unchanged"])

    def __str__(self) -> str:
        return "\n".join([self.summary(), *unified(self)])


def diff(before: Graph, after: Graph) -> GraphDiff:
    """What a pass changed: which nodes of two graphs are the same, by structure and not by name.

    Args:
        before, after: ``fx.GraphModule``, ``fx.Graph`` or ``Snapshot``; neither is changed.

    Returns:
        The matched nodes; from them ``added``, ``removed`` and ``rewired`` ones, ``rows`` for a
        side-by-side view, ``regions`` of changes that hang together. ``print`` it for a unified diff;
        it is false where nothing differs: calls, what they read, constants, modules as they print, and tensors that
        the graph holds (of large ones, every so many numbers). What nodes are expected to compute (dtypes, shapes) is
        shown and not compared.

    Raises:
        TypeError: one is not a graph.
    """
    first, second = snapshot(before), snapshot(after)
    return GraphDiff(first, second, matching(first, second))


def unified(difference: GraphDiff, context: int = 2) -> list[str]:
    """The changed rows as lines that begin with ``-``, ``+``, ``~`` or a blank, the user's code above them."""
    lines: list[str] = []
    last: tuple[str, str, str] | None = None
    for hunk in hunks(difference, context):
        first = difference.rows[hunk.start]
        lines.append(f"@@ {_place('before', first.before)} {_place('after', first.after)} @@".replace("  ", " "))
        last = None
        for row in (difference.rows[at] for at in hunk):
            node, texts = _texts(difference, row)
            where = (node.module, node.source, node.code)
            if where != last and node.source:
                lines.append(f"# {node.source}  {node.module}: {node.code}")
            last = where
            lines += texts
    return lines


def hunks(difference: GraphDiff, context: int = 2) -> list[range]:
    """Ranges of rows that hold every change and some rows around it."""
    found: list[range] = []
    end = len(difference.rows)
    for at, row in enumerate(difference.rows):
        if row.change:
            start, stop = max(0, at - context), min(end, at + context + 1)
            if found and start <= found[-1].stop:
                found[-1] = range(found[-1].start, stop)
            else:
                found.append(range(start, stop))
    return found


def _place(side: str, at: int | None) -> str:
    return "" if at is None else f"{side} {at}"


def _texts(difference: GraphDiff, row: Row) -> tuple[Node, list[str]]:
    old = None if row.before is None else difference.before.text(row.before)
    new = None if row.after is None else difference.after.text(row.after)
    node = difference.after.nodes[row.after] if row.after is not None else difference.before.nodes[row.before or 0]
    if row.change == "":
        return node, [f"  {new}"]
    if row.change == "rewired":
        if old == new and row.before is not None and difference.before.nodes[row.before].held != node.held:
            old, new = f"{old}  # {difference.before.nodes[row.before].held}", f"{new}  # {node.held}"
        return node, [f"~ {old}", f"~ {new}"] if old != new else [f"~ {new}"]
    sign = ">" if row.change == "moved" else "-" if new is None else "+"
    return node, [f"{sign} {old if new is None else new}"]
