"""The last step of ``rewrite``: operators that a device's kernels run as one become one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..kernels.logits import NOTHING, parse
from .compat import add_value, value_of
from .provenance import same_place


def lower(graph: fx.Graph, values: dict[str, Any], device: str = "") -> None:
    """On a CPU, ``mass``, ``route`` and ``attend`` become ``route_attend``: routes are never all in memory.

    What has more in its logits than a softcap (a bias, a mask of pairs) stays as it is: no compiled kernel has that.

    ``values``: of calls, see ``compat.add_value``. ``device``: as for ``rewrite``.
    """
    for attend in graph.find_nodes(op="call_function", target=torch.ops.prescore.attend.default):
        query, key, value, valid, order, routes, *more = attend.args
        rows, (plan, causal, scale, logits, _, *sink) = more[:5], more[5:]
        fake = value_of(query)
        if routes is None or fake is None or (device or fake.device.type) != "cpu":
            continue
        given = parse(logits)
        if given.uncapped != NOTHING:
            continue
        _, _, mean, spread, bias, _, _, k_len, _, _, _, *mass = routes.args
        args = (query, key, value, valid, order, mean, spread, bias, *rows, plan, causal, scale)
        args = (*args, sink[0] if sink else None, given.softcap)
        with graph.inserting_before(attend):
            merged = graph.create_node(
                "call_function", torch.ops.prescore.route_attend.default, args, name="prescore_route_attend"
            )
        same_place(merged, attend)
        if "from_node" in attend.meta:
            merged.meta["from_node"] = attend.meta["from_node"]
        add_value(merged, values)
        attend.replace_all_uses_with(merged)
        for node in (attend, routes, k_len, *mass):
            if isinstance(node, fx.Node) and not node.users:
                graph.erase_node(node)
