"""Find the attention sites of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .compat import known_equal, module_path, source_line, value_of
from .elements import modified_in_place

_SDPA_ARGS: dict[str, Any] = {
    "query": None,
    "key": None,
    "value": None,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


@dataclass(frozen=True)
class Site:
    """One attention of a graph.

    ``key`` and ``value`` are the unexpanded ones, ``[B, Hkv, Nk, D]``: ``repeat_kv`` and
    ``enable_gqa`` are undone. ``output`` is the node that computes it now. ``modified`` are the
    graph's nodes that are written to after they were made.
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    is_causal: bool
    dropout: Any
    scale: Any
    module: str
    source: str
    code: str
    modified: frozenset[fx.Node]


def find(gm: fx.GraphModule) -> list[Site]:
    """Every call of ``F.scaled_dot_product_attention`` in the graph, in graph order."""
    modified = modified_in_place(gm.graph)
    calls = (n for n in gm.graph.nodes if n.op == "call_function" and n.target is F.scaled_dot_product_attention)
    return [_site(node, modified) for node in calls]


def _site(node: fx.Node, modified: frozenset[fx.Node]) -> Site:
    positional: dict[str, Any] = dict(zip(_SDPA_ARGS, node.args, strict=False))
    call = _SDPA_ARGS | positional | node.kwargs
    key, value = _unrepeated(call["key"]), _unrepeated(call["value"])
    repeated = (*_between(call["key"], key), *_between(call["value"], value))
    if _heads(key) != _heads(value) or modified.intersection(repeated):  # not both repeated, or written to since
        key, value = call["key"], call["value"]
    source, code = source_line(node)
    return Site(
        output=node,
        query=call["query"],
        key=key,
        value=value,
        mask=call["attn_mask"],
        is_causal=bool(call["is_causal"]),
        dropout=call["dropout_p"],
        scale=call["scale"],
        module=module_path(node),
        source=source,
        code=code,
        modified=modified,
    )


def _between(node: fx.Node, source: fx.Node) -> list[fx.Node]:
    """The nodes from ``node`` back to ``source``, both included."""
    found = [node]
    while found[-1] is not source:
        found.append(found[-1].all_input_nodes[0])
    return found if len(found) > 1 else []


def _heads(node: fx.Node) -> Any:
    shape = value_of(node).shape
    return shape[1] if len(shape) == 4 else None


def _unrepeated(node: fx.Node) -> fx.Node:
    """The ``[B, Hkv, N, D]`` tensor that ``node`` repeats head by head, or ``node`` itself."""
    repeated = _repeat_interleave_source(node) or _expand_source(node)
    return node if repeated is None else _unrepeated(repeated)


def _repeat_interleave_source(node: fx.Node) -> fx.Node | None:
    is_method = node.op == "call_method" and node.target == "repeat_interleave"
    if not is_method and node.target is not torch.repeat_interleave:
        return None
    args = dict(zip(("input", "repeats", "dim"), node.args, strict=False)) | node.kwargs
    shape = value_of(node).shape
    if args.get("dim") in (1, -3) and isinstance(args.get("repeats"), int) and len(shape) == 4:
        source = args["input"]
        return source if isinstance(source, fx.Node) else None
    return None


def _expand_source(node: fx.Node) -> fx.Node | None:
    """Undo ``x[:, :, None].expand(B, Hkv, G, N, D).reshape(B, Hkv * G, N, D)``, proved by shapes."""
    if not _is_call(node, ("reshape", "view", "flatten")):
        return None
    expand = node.args[0]
    if not isinstance(expand, fx.Node) or not _is_call(expand, ("expand",)):
        return None
    insert = expand.args[0]
    if not isinstance(insert, fx.Node) or not _inserts_axis_2(insert):
        return None
    source = insert.args[0]
    assert isinstance(source, fx.Node)
    inner, wide, out = (value_of(n).shape for n in (source, expand, node))
    if len(inner) != 4 or len(wide) != 5 or len(out) != 4:
        return None
    kept = (wide[0], wide[1], wide[3], wide[4])
    same = all(known_equal(a, b) for a, b in zip(inner, kept, strict=True))
    merged = (wide[0], wide[1] * wide[2], wide[3], wide[4])
    return source if same and all(known_equal(a, b) for a, b in zip(out, merged, strict=True)) else None


def _is_call(node: fx.Node, names: tuple[str, ...]) -> bool:
    if node.op == "call_method":
        return node.target in names
    return node.op == "call_function" and getattr(node.target, "__name__", "") in names


def _inserts_axis_2(node: fx.Node) -> bool:
    if _is_call(node, ("unsqueeze",)):
        return (list(node.args[1:]) + list(node.kwargs.values())) in ([2], [-3])
    if _is_call(node, ("getitem",)):
        full = slice(None, None, None)
        index = node.args[1]
        return isinstance(index, tuple) and index[:3] == (full, full, None) and all(i == full for i in index[3:])
    return False
