"""The nodes that a site is replaced by."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..kernels import ops as _registers_the_operators  # noqa: F401
from ..kernels.logits import Logits
from ..kernels.reads import parts_of, reads_of
from ..kernels.summary import Summary
from .compat import add_value, value_of
from .decide import Decision, logits_of
from .emit import Sizes, canonical, laid_out_as, original
from .provenance import made_from, same_place
from .report import RECOGNIZED
from .site import Attention, Coordinates
from .unattended import or_mean


def insert(graph: fx.Graph, decision: Decision, rule: str, values: dict[str, Any]) -> None:
    """Put score, summarize, mass, route and attend in the place of a site's output.

    ``rule``: what found the site, which the new nodes tell. ``values``: what the graph's tensors are by the names of
    nodes, to which those of the new ones are added.
    """
    site, a = decision.site, decision.site.attention
    assert a is not None
    sizes, old = Sizes.of(a), value_of(site.output)
    first = site.output.prev
    with graph.inserting_before(site.output):
        query, key, value = _operands(graph, a, sizes, old.dtype)
        valid = None
        if decision.mask.keys is not None:
            sizes_of_keys = (a.size(*a.batch), a.size(a.k))
            valid = decision.mask.keys.emit(graph, query, key, sizes_of_keys, value_of(a.key.node).device)
        sink = [canonical(graph, a.sink_logit, (a.batch, a.heads, _one(a.q)), sizes)] if a.sink_logit else []
        out = _stages(graph, decision, (query, key, value, valid), sink)
        if decision.mask.mean and valid is not None:
            out = or_mean(graph, out, (query, key, value), valid, a, decision.mask)
        out = original(graph, out, (a.batch, a.heads, _one(a.q), _one(a.e)), a.result, sizes)
        out = laid_out_as(graph, out, old)
    node = first.next
    while node is not site.output:
        same_place(node, site.output)
        made_from(node, site.output, rule)
        add_value(node, values)
        node = node.next
    for kind in ("example_value", "val", "tensor_meta"):
        if kind in site.output.meta:
            out.meta[kind] = site.output.meta[kind]
    site.output.replace_all_uses_with(out)


def _operands(graph: fx.Graph, a: Attention, sizes: Sizes, dtype: torch.dtype) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Query, key and value ``[B, H or Hkv, N, D]`` in the output's dtype; the query with the site's factors."""
    q_group, k_group = _one(a.q), _one(a.k)
    query = canonical(graph, a.query, (a.batch, a.heads, q_group, _one(a.d)), sizes)
    key = canonical(graph, a.key, (a.batch, a.kv_heads, k_group, _one(a.d)), sizes)
    value = canonical(graph, a.value, (a.batch, a.kv_heads, k_group, _one(a.e)), sizes)
    given = ((query, a.query), (key, a.key), (value, a.value))
    query, key, value = (
        node if value_of(operand.node).dtype == dtype else graph.call_method("to", (node, dtype))  # autocast
        for node, operand in given
    )
    for factor in a.factors:
        by = canonical(graph, factor.operand, (a.batch, a.heads, q_group, ()), sizes)
        scaled = graph.call_function(operator.truediv if factor.inverse else operator.mul, (query, by))
        query = graph.call_method("type_as", (scaled, query))
    return query, key, value


def _stages(
    graph: fx.Graph, decision: Decision, operands: Sequence[fx.Node | None], sink: Sequence[fx.Node]
) -> fx.Node:
    """The operators of the plan, on ``operands``: query, key, value and which keys are valid (None: all)."""
    plan, a, causal = decision.plan, decision.site.attention, decision.mask.causal
    assert plan is not None and a is not None
    query, key, value, valid = operands
    settings, prescore = plan.text, torch.ops.prescore
    logits = logits_of(a, decision.mask)
    more = (logits.text, list(decision.mask.loads))

    def call(name: str, target: Any, *args: Any) -> fx.Node:
        return graph.create_node("call_function", target, args, name=f"prescore_{name}")

    of_sink = sink[0] if sink else None
    if decision.exact == "few":
        one, mask = prescore.attend_few.default, _parts(logits, decision.mask.loads)
        return call("attend_few", one, query, key, value, *mask, a.scale, logits.softcap, of_sink)
    if decision.recognized:
        known = decision.recognized
        plans = [known[name].text if name in known else "" for name in RECOGNIZED]
        one = prescore.attend_recognized.default
        return call("attend_recognized", one, query, key, value, a.scale, *more, of_sink, *plans)
    scores = routes = None
    if plan.keep:
        scores = call("score", prescore.score.default, query, key, valid, settings, causal, a.scale)
    summary = call("summarize", prescore.summarize.default, key, value, valid, scores, settings)
    found = [call(name, operator.getitem, summary, at) for at, name in enumerate(Summary._fields)]
    clusters, rows = found[:4], found[4:]
    if plan.routes:
        k_len = graph.call_method("size", (key, 2))
        near: list[fx.Node] = []
        if plan.needs_mass:
            mass = prescore.mass.default
            near = [call("mass", mass, query, key, valid, *rows, settings, causal, a.scale, *more, *sink)]
        routes = call("route", prescore.route.default, query, *clusters, settings, causal, k_len, a.scale, *more, *near)
    site_of = (*operands, clusters[0], routes, *rows)
    return call("attend", prescore.attend.default, *site_of, settings, causal, a.scale, *more, *sink)


def _parts(logits: Logits, loads: Sequence[fx.Node]) -> list[fx.Node | None]:
    """``parts_of`` a mask, in the graph."""
    tensors: Any = {name: fx.Proxy(node) for name, node in zip(logits.tensors, loads, strict=True)}
    parts = parts_of(reads_of(logits.uncapped) or [], tensors)
    return [part.node if isinstance(part, fx.Proxy) else None for part in parts]


def _one(coordinate: Any) -> Coordinates:
    return () if coordinate is None else (coordinate,)
