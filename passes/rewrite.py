"""The pipeline: find -> lift masks -> decide -> insert, from graph to graph."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx

from ..kernels import ops as _registers_the_operators  # noqa: F401
from .compat import value_of
from .config import Config
from .decide import Decision, decide, describe
from .find import find
from .report import Report

_SUMMARY_OUTPUTS = ("order", "mean", "spread", "bias", "row_index", "row_owner", "row_key", "row_value", "row_bias")


def rewrite(gm: fx.GraphModule, config: Config | None = None) -> tuple[fx.GraphModule, Report]:
    """Replace attention by score, summarize, route and attend nodes where that is decided.

    Args:
        gm: a graph with Dynamo's metadata; it is not changed.
        config: default ``Config()``.

    Returns:
        The new graph (the same weights) and what was decided for each site.
    """
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph), gm.__class__.__name__)
    inner = Report()
    # The bodies of higher-order operators (activation checkpoints, branches) are graphs of their own.
    for name, child in list(gm.named_children()):
        if isinstance(child, fx.GraphModule):
            body, found = rewrite(child, config)
            setattr(gm, name, body)
            inner.sites.extend(found.sites)
    decisions = [decide(site, config or Config()) for site in find(gm)]
    report = Report([describe(decision) for decision in decisions] + inner.sites)
    rewritten = [decision for decision in decisions if decision.rewrite]
    for decision in rewritten:
        _insert(gm.graph, decision)
    for decision in rewritten:
        _drop_unused(gm.graph, decision.mask.producers)
    gm.graph.lint()
    gm.recompile()
    return gm, report


def _insert(graph: fx.Graph, decision: Decision) -> None:
    site, plan = decision.site, decision.plan
    assert plan is not None
    causal, settings = decision.mask.causal, plan.text
    query, key, value = site.query, site.key, site.value
    scale = int(value_of(query).shape[3]) ** -0.5 if site.scale is None else site.scale

    def call(name: str, target: Any, *args: Any) -> fx.Node:
        node = graph.create_node("call_function", target, args, name=f"prescore_{name}")
        for kind in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if kind in site.output.meta:
                node.meta[kind] = site.output.meta[kind]
        return node

    with graph.inserting_before(site.output):
        valid = _bool_mask(graph, decision.mask.valid, query)
        scores = routes = None
        if plan.keep:
            score = torch.ops.prescore.score.default
            scores = call("score", score, query, key, valid, settings, causal, scale)
        summary = call("summarize", torch.ops.prescore.summarize.default, key, value, valid, scores, settings)
        order, mean, spread, bias, *rows = (
            call(name, operator.getitem, summary, at) for at, name in enumerate(_SUMMARY_OUTPUTS)
        )
        if plan.routes:
            k_len = graph.call_method("size", (key, 2))
            route = torch.ops.prescore.route.default
            routes = call("route", route, query, mean, spread, bias, settings, causal, k_len, scale)
        attend = torch.ops.prescore.attend.default
        out = call("attend", attend, query, key, value, valid, order, routes, *rows, settings, causal, scale)
        if value_of(site.output).is_contiguous():
            # Code after the site may rely on the layout it was traced with.
            out = graph.call_method("contiguous", (out,))
        site.output.replace_all_uses_with(out)
    _drop_unused(graph, (site.output, *_expansion(site.output, (key, value))))


def _bool_mask(graph: fx.Graph, valid: fx.Node | None, query: fx.Node) -> fx.Node | None:
    if valid is None:
        return None
    mask = value_of(valid)
    if mask.dtype != torch.bool:
        valid = graph.call_method("to", (valid, torch.bool))
    if isinstance(mask.shape[0], int) and mask.shape[0] == 1 and value_of(query).shape[0] != 1:
        valid = graph.call_method("expand", (valid, graph.call_method("size", (query, 0)), -1))
    return valid


def _expansion(output: fx.Node, sources: tuple[fx.Node, ...]) -> list[fx.Node]:
    """The ``repeat_kv`` nodes between the unexpanded keys and values and the old attention."""
    found, todo = [], [arg for arg in output.all_input_nodes[1:3] if arg not in sources]
    while todo:
        node = todo.pop()
        found.append(node)
        todo += [arg for arg in node.all_input_nodes if arg not in sources and len(arg.users) <= 1]
    return found


def _drop_unused(graph: fx.Graph, nodes: tuple[fx.Node, ...]) -> None:
    """Erase those of the nodes that nothing uses, users before producers."""
    alive = set(graph.nodes)
    place = {node: at for at, node in enumerate(graph.nodes)}
    for node in sorted({n for n in nodes if n in alive}, key=place.__getitem__, reverse=True):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
