"""In-place writes: whose value is still what it was when it was made."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import fx

from .calls import mutates
from .compat import value_of


class Memory:
    """What the nodes of one graph write to each other's tensors.

    A fake tensor carries a version counter and a storage that its views share. A write that no
    operator is known for (a custom operator, a ``_foreach`` function) raises the counter all the
    same: every tensor of that memory is then distrusted.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._place = {node: at for at, node in enumerate(graph.nodes)}
        self._writes: dict[int, list[int]] = defaultdict(list)
        versions: dict[int, int] = defaultdict(int)
        for node, at in self._place.items():
            value = value_of(node)
            if isinstance(value, torch.Tensor):
                key = storage_of(value)
                versions[key] = max(versions[key], _version(value))
            for target in mutates(node):
                written: list[fx.Node] = []
                fx.map_arg(target, written.append)
                for n in written:
                    self._writes[storage_of(value_of(n))].append(at)
        self._distrusted = {key for key, count in versions.items() if count > len(self._writes[key])}

    def stale(self, node: fx.Node) -> bool:
        """Whether one of the node's users may see something else than what the node computed."""
        key = storage_of(value_of(node))
        if key in self._distrusted:
            return True
        born = self._place[node]
        first = min((at for at in self._writes.get(key, ()) if at > born), default=None)
        return first is not None and any(self._place[user] > first for user in node.users)

    def changes(self, node: fx.Node, until: fx.Node) -> bool:
        """Whether ``node`` no longer holds, just before ``until`` runs, what it held when it was made."""
        key = storage_of(value_of(node))
        born, end = self._place[node], self._place[until]
        return key in self._distrusted or any(born < at < end for at in self._writes.get(key, ()))


def storage_of(value: Any) -> int:
    """What tells whether two nodes' values share memory."""
    try:
        return value.untyped_storage()._cdata
    except (AttributeError, NotImplementedError, RuntimeError):  # no tensor, or a wrapper without a storage
        return id(value)


def _version(value: torch.Tensor) -> int:
    return 0 if value.is_inference() else value._version
