"""What only computed the old attention and its mask is erased."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import fx

from .calls import ASSERTS, PURE, call_of, is_dead, mutates
from .compat import value_of
from .memory import storage_of
from .sdpa import fused_call


def drop_dead(graph: fx.Graph, outputs: Iterable[fx.Node], producers: set[fx.Node]) -> None:
    """Erase what only computed the old attention and its mask, users before producers.

    Only operators that are known to do nothing else; the inner compiler drops any other.
    """
    place = {node: at for at, node in enumerate(graph.nodes)}
    holders = Counter(storage_of(value_of(node)) for node in graph.nodes)
    first = set(outputs) | producers
    todo = {node for node in first if node in place}
    while todo:
        node = max(todo, key=place.__getitem__)
        todo.remove(node)
        for user in list(node.users):
            if is_dead(user):
                _erase(graph, user, holders)
        known = node in first or call_of(node).name in PURE | ASSERTS or fused_call(node) is not None
        if (
            known
            and not node.users
            and _writes_nothing_else(node, holders)
            and node.op not in ("placeholder", "output")
        ):
            todo.update(node.all_input_nodes)
            _erase(graph, node, holders)


def _writes_nothing_else(node: fx.Node, holders: Counter[int]) -> bool:
    """Whether what the node writes to is held by no other node that is left, an input of the graph say;
    ``holders``: how many nodes hold a storage."""
    for target in mutates(node):
        if not isinstance(target, fx.Node) or target.op in ("placeholder", "get_attr"):
            return False
        place = storage_of(value_of(target))
        if holders[place] > sum(storage_of(value_of(n)) == place for n in {node, target}):
            return False
    return True


def _erase(graph: fx.Graph, node: fx.Node, holders: Counter[int]) -> None:
    """Erase a node and its users, all of them dead."""
    for user in list(node.users):
        _erase(graph, user, holders)
    holders[storage_of(value_of(node))] -= 1
    graph.erase_node(node)
