"""Which node of one graph is which of another, by structure alone: no name is looked at.

From the surest to the least sure: nodes that compute the same from the same inputs, or to which the
same happens up to the output; the inputs and users of what is matched; nodes whose neighbours are
alike; last, what is left between two matched nodes, in order. Repeated layers that are all alike
therefore keep their order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from .snapshot import Snapshot

_LARGEST_TABLE = 250_000
"""Two sequences whose product of lengths is larger are aligned greedily, which is linear."""
_FAR = 64
"""How far ahead the greedy alignment looks."""
Pairs = dict[int, int]


def matching(before: Snapshot, after: Snapshot) -> Pairs:
    """Places in ``before`` and the same nodes' places in ``after``.

    Swapping the graphs gives the inverse: both ways the same one is taken first.
    """
    if before.same(after):
        return {at: at for at in range(len(before.nodes))}
    if before.shape > after.shape:
        return dict(sorted((b, a) for a, b in _Matching(after, before).run().items()))
    return dict(sorted(_Matching(before, after).run().items()))


def increasing(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The most pairs that are in the same order on both sides; the pairs come in order of the first side."""
    tails: list[int] = []
    last: list[int] = []
    found = list(pairs)
    back: list[int] = []
    for at, (_, b) in enumerate(found):
        place = bisect_left(tails, b)
        back.append(last[place - 1] if place else -1)
        if place == len(tails):
            tails.append(b)
            last.append(at)
        else:
            tails[place], last[place] = b, at
    chain = []
    at = last[-1] if last else -1
    while at >= 0:
        chain.append(found[at])
        at = back[at]
    return chain[::-1]


def aligned(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple[int, int]]:
    """A longest common subsequence, as pairs of places; one that is not the longest where that would be slow."""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    middle = _middle(a[start : len(a) - end], b[start : len(b) - end])
    head = [(i, i) for i in range(start)]
    tail = [(len(a) - i, len(b) - i) for i in range(end, 0, -1)]
    return [*head, *((x + start, y + start) for x, y in middle), *tail]


def _middle(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple[int, int]]:
    if not a or not b:
        return []
    if len(a) * len(b) > _LARGEST_TABLE:
        return _greedy(a, b)
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) - 1, -1, -1):
        row, below = table[i], table[i + 1]
        for j in range(len(b) - 1, -1, -1):
            row[j] = below[j + 1] + 1 if a[i] == b[j] else max(below[j], row[j + 1])
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif table[i + 1][j] >= table[i][j + 1]:
            i += 1
        else:
            j += 1
    return found


def _greedy(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple[int, int]]:
    places: dict[Hashable, list[int]] = defaultdict(list)
    for j, key in enumerate(b):
        places[key].append(j)
    found, free = [], 0
    for i, key in enumerate(a):
        at = bisect_left(places[key], free) if key in places else 0
        if at < len(places[key]) and places[key][at] - free <= _FAR:
            found.append((i, places[key][at]))
            free = places[key][at] + 1
    return found


class _Matching:
    """The pairs found so far, both ways."""

    def __init__(self, a: Snapshot, b: Snapshot) -> None:
        self.graphs = a, b
        self.to: Pairs = {}
        self.back: Pairs = {}
        self.fresh: list[tuple[int, int]] = []
        self._ids: dict[Hashable, int] = {}
        self.labels = [[self._id(node.label) for node in graph.nodes] for graph in self.graphs]
        self.loose = [[self._id(node.label[:2]) for node in graph.nodes] for graph in self.graphs]

    def run(self) -> Pairs:
        self._placeholders()
        down, up = self._down(), self._up()
        many = len(self._ids)
        self._alike(lambda side, at: down[side][at] * many + up[side][at], in_order=True)
        self._alike(lambda side, at: down[side][at])
        self._alike(lambda side, at: up[side][at])
        self._spread(self.labels)
        for context in (self._both_sides, self._inputs):
            while self._alike(context):
                self._spread(self.labels)
        self._fill(self.labels)
        self._spread(self.labels)
        self._spread(self.loose, again=True)  # the same operator with other numbers
        return self.to

    def _id(self, key: Hashable) -> int:
        return self._ids.setdefault(key, len(self._ids))

    def _pair(self, a: int, b: int) -> bool:
        if a in self.to or b in self.back:
            return False
        self.to[a], self.back[b] = b, a
        self.fresh.append((a, b))
        return True

    def _placeholders(self) -> None:
        """By position; where there are more on one side, by what is the same and in order."""
        places = [[at for at, node in enumerate(graph.nodes) if node.op == "placeholder"] for graph in self.graphs]
        if len(places[0]) == len(places[1]):
            pairs = [(i, i) for i in range(len(places[0]))]
        else:
            keys = [
                [(graph.nodes[at].value, self._read_by(side, at)) for at in places[side]]
                for side, graph in enumerate(self.graphs)
            ]
            pairs = aligned(*keys)
        for i, j in pairs:
            self._pair(places[0][i], places[1][j])

    def _read_by(self, side: int, at: int) -> tuple[Any, ...]:
        return tuple(sorted({(self.labels[side][user], slot) for user, slot in self.graphs[side].users[at]}))

    def _seed(self, side: int, at: int) -> Hashable:
        """A placeholder is nothing but its partner's."""
        own = at if side == 0 else self.back.get(at)
        return ("input", own) if own is not None else ("input of b", at)

    def _down(self) -> list[list[int]]:
        """What a node computes from the inputs."""
        found: list[list[int]] = []
        for side, graph in enumerate(self.graphs):
            keys: list[int] = []
            for at, node in enumerate(graph.nodes):
                if node.op == "placeholder":
                    key = self._seed(side, at)
                else:
                    # Half-way through a pass, a graph may read what comes later.
                    key = ("down", self.labels[side][at], *(keys[i] if i < at else -1 for i in node.inputs))
                keys.append(self._id(key))
            found.append(keys)
        return found

    def _up(self) -> list[list[int]]:
        """What happens to a node's result."""
        found: list[list[int]] = []
        for side, graph in enumerate(self.graphs):
            keys = [0] * len(graph.nodes)
            for at in range(len(keys) - 1, -1, -1):
                users = sorted((keys[user], slot) for user, slot in graph.users[at])
                keys[at] = self._id(("up", self.labels[side][at], *users))
            found.append(keys)
        return found

    def _alike(self, key: Callable[[int, int], Hashable], in_order: bool = False) -> bool:
        """Pair what has a key that nothing else has; ``in_order``: or that equally many have on both sides."""
        held: list[dict[Hashable, list[int]]] = []
        for side, matched in enumerate((self.to, self.back)):
            places: dict[Hashable, list[int]] = {}
            for at in range(len(self.graphs[side].nodes)):
                if at not in matched:
                    places.setdefault(key(side, at), []).append(at)
            held.append(places)
        found = False
        for same, mine in held[0].items():
            theirs = held[1].get(same, [])
            if len(mine) == len(theirs) and (len(mine) == 1 or in_order):
                for a, b in zip(mine, theirs, strict=True):
                    found = self._pair(a, b) or found
        return found

    def _known(self, side: int, at: int) -> tuple[int, int]:
        matched = at if side == 0 and at in self.to else self.back.get(at) if side == 1 else None
        return (0, self.labels[side][at]) if matched is None else (1, matched)

    def _inputs(self, side: int, at: int) -> Hashable:
        inputs = self.graphs[side].nodes[at].inputs
        return (self.labels[side][at], *(self._known(side, i) for i in inputs))

    def _both_sides(self, side: int, at: int) -> Hashable:
        users = sorted((self._known(side, user), slot) for user, slot in self.graphs[side].users[at])
        return (self._inputs(side, at), *users)

    def _spread(self, labels: Sequence[Sequence[int]], again: bool = False) -> None:
        """From pairs to their inputs and users, until nothing is added."""
        if again:
            self.fresh = list(self.to.items())
        a, b = self.graphs
        while self.fresh:
            todo, self.fresh = self.fresh, []
            for x, y in todo:
                ins, outs = a.nodes[x].inputs, b.nodes[y].inputs
                if len(ins) == len(outs):
                    for p, q in zip(ins, outs, strict=True):
                        if labels[0][p] == labels[1][q] and a.nodes[p].op != "placeholder":
                            self._pair(p, q)
            for x, y in todo:
                self._users(x, y, labels)

    def _users(self, x: int, y: int, labels: Sequence[Sequence[int]]) -> None:
        held: list[dict[Hashable, list[int]]] = []
        for side, (at, matched) in enumerate(((x, self.to), (y, self.back))):
            by: dict[Hashable, list[int]] = {}
            for user, slot in self.graphs[side].users[at]:
                if user not in matched:
                    by.setdefault((labels[side][user], slot), []).append(user)
            held.append(by)
        for key, mine in held[0].items():
            theirs = held[1].get(key, [])
            if len(mine) == len(theirs) == 1:
                self._pair(mine[0], theirs[0])

    def _fill(self, labels: Sequence[Sequence[int]]) -> None:
        """What is left between matched nodes, in order."""
        ends = (len(self.graphs[0].nodes), len(self.graphs[1].nodes))
        last = (-1, -1)
        for pair in [*increasing(sorted(self.to.items())), ends]:
            mine = [at for at in range(last[0] + 1, pair[0]) if at not in self.to and self._free(0, at)]
            theirs = [at for at in range(last[1] + 1, pair[1]) if at not in self.back and self._free(1, at)]
            last = pair
            if mine and theirs:
                pairs = aligned([labels[0][at] for at in mine], [labels[1][at] for at in theirs])
                self._supported({mine[i]: theirs[j] for i, j in pairs})

    def _supported(self, pairs: Pairs) -> None:
        """Pair those that have an input or a user in common; that two nodes only do the same is not enough."""
        a, b = self.graphs
        found: set[tuple[int, int]] = set()
        for x, y in pairs.items():
            sources = zip(a.nodes[x].inputs, b.nodes[y].inputs, strict=False)
            for p, q in sources:
                if self.to.get(p) == q:
                    found.add((x, y))
                elif pairs.get(p) == q:
                    found |= {(x, y), (p, q)}
            users = set(b.users[y])
            if any((self.to.get(user), slot) in users for user, slot in a.users[x]):
                found.add((x, y))
        for x, y in sorted(found):
            self._pair(x, y)

    def _free(self, side: int, at: int) -> bool:
        return self.graphs[side].nodes[at].op != "placeholder"
