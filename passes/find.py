"""Find the attention sites of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .axes import Miss
from .calls import call_of
from .compat import add_shapes, connect, has_shapes, value_of
from .emit import Sizes
from .expand import composite
from .expand import output_of as output_of_composite
from .memory import Memory
from .provenance import module_path, source_line
from .sdpa import fused_call, output_of, prove_fused
from .site import Attention, Site
from .written import match


def find(gm: fx.GraphModule, *inputs: Any) -> list[Site]:
    """Every attention of the graph, in graph order, and then those of the bodies of its higher-order operators
    (activation checkpoints, branches, scans): fused calls and hand-written ones.

    A site whose ``reason`` is not "" is nearly an attention, or one that cannot be replaced: the
    reason names the first thing that is not proved.

    Args:
        gm: a graph of Dynamo, ``torch.export(...).module()`` or ``torch.fx.symbolic_trace``.
        *inputs: example inputs, needed where the graph's nodes carry no shapes (``symbolic_trace``):
            fake ones are run through it and ``node.meta["val"]`` is set.

    Raises:
        ValueError: the graph carries no shapes and no inputs were given.
    """
    add_missing_shapes(gm, inputs)
    sites = find_here(gm)
    for name, body in bodies(gm):
        connect(gm, name, body)
        sites += find(body)
    return sites


def bodies(gm: fx.GraphModule) -> list[tuple[str, fx.GraphModule]]:
    """The graphs that the graph's higher-order operators run, by the name of their submodule.

    A graph without shapes (of constants, or a part that ``split_module`` made) is none of them.
    """
    children = [(name, child) for name, child in gm.named_children() if isinstance(child, fx.GraphModule)]
    return [(name, child) for name, child in children if has_shapes(child)]


def find_here(gm: fx.GraphModule) -> list[Site]:
    """``find`` without the bodies, in a graph that has shapes."""
    memory = Memory(gm.graph)
    sites: list[Site] = []
    transformed = _transformed(gm.graph)
    for node in gm.graph.nodes:
        call = fused_call(node)
        alive = any(user.users or user.op == "output" for user in node.users)
        name = composite(node) if alive else ""
        if name:
            sites.append(_site(node, node, name, None, _whole(node), memory))
        elif getattr(node.target, "__name__", "") == "flex_attention":
            sites.append(_site(node, node, "flex_attention", None, "flex_attention", memory))
        elif call is not None:
            sites.append(_fused(node, call, memory))
        elif isinstance(value_of(node), torch.Tensor) and call_of(node).name == "softmax":
            site = _hand_written(node, memory)
            if site is not None:
                sites.append(site)
    return [replace(site, transformed=True) if site.output in transformed else site for site in sites]


def _transformed(graph: fx.Graph) -> set[fx.Node]:
    """What lies between the begin and the end of a torch.func transform, or of a level of forward-mode AD."""
    depth, found = 0, set()
    for node in graph.nodes:
        if depth:
            found.add(node)
        if "_functorch" in str(getattr(node.target, "__module__", "")):
            name = node.target.__name__
            depth += name.endswith(("increment_nesting", "enter_dual_level"))
            depth -= name.endswith(("decrement_nesting", "exit_dual_level"))
    return found


def add_missing_shapes(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Shapes for a graph that has none.

    Raises:
        ValueError: there are no inputs to take them from.
    """
    if has_shapes(gm) or all(node.op == "output" for node in gm.graph.nodes):
        return
    if not inputs:
        raise ValueError(
            f"{type(gm).__name__}: the graph's nodes carry no shapes (no 'example_value' or 'val' in "
            "node.meta), as after torch.fx.symbolic_trace; pass example inputs: find(gm, *inputs)"
        )
    add_shapes(gm, inputs)


def _whole(node: fx.Node) -> str:
    return "composite_call" if output_of_composite(node) is not None else "weights_observed"


def _fused(node: fx.Node, call: Any, memory: Memory) -> Site:
    try:
        return _site(output_of(node), node, "sdpa", prove_fused(node, call, memory), "", memory)
    except Miss as miss:
        return replace(_site(node, node, "sdpa", None, str(miss), memory), missed=miss.node)
    except Exception as error:  # an unforeseen spelling must cost the speed, never the model
        return _site(node, node, "sdpa", None, _unforeseen(error), memory)


def _hand_written(softmax: fx.Node, memory: Memory) -> Site | None:
    try:
        found = match(softmax, memory)
    except Miss as miss:
        return replace(_site(softmax, softmax, "hand-written", None, str(miss), memory), missed=miss.node)
    except Exception as error:
        return _site(softmax, softmax, "hand-written", None, _unforeseen(error), memory)
    if found is None:
        return None
    output, attention = found
    return _site(output, output, "hand-written", attention, "", memory)


def _unforeseen(error: Exception) -> str:
    return f"unproved_axes: a spelling that is not understood ({type(error).__name__}: {error})"


def _site(output: fx.Node, named: fx.Node, kind: str, attention: Attention | None, reason: str, memory: Memory) -> Site:
    source, code = source_line(named)
    if attention is not None and not _can_be_moved(attention):
        attention, reason = None, "unproved_axes: several axes of dynamic size are merged"
    if attention is not None:
        attention = replace(attention, dtype=value_of(output).dtype)
    return Site(output, kind, attention, reason, module_path(named), source, code, memory)


def _can_be_moved(a: Attention) -> bool:
    """Whether ``emit`` can bring the operands to ``[batch, heads, length, features]``."""
    sizes = Sizes.of(a)
    operands = all(sizes.separable(o.axes) for o in (a.query, a.key, a.value))
    whole = all(
        len(set(group) & f.operand.coordinates) in (0, len(group)) for f in a.factors for group in (a.batch, a.heads)
    )
    return operands and whole and sizes.separable((a.batch, a.heads))
