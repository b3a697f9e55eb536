"""The pipeline: find -> lift masks -> decide -> insert -> lower, from graph to graph."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..kernels import ops as _registers_the_operators  # noqa: F401
from ..kernels.plan import OptionError
from .calls import ASSERTS, PURE, call_of, is_dead, mutates
from .compat import add_value, connect, copied, made_from, same_place, value_of
from .config import Config
from .decide import Decision, decide, describe, logits_of
from .emit import Sizes, canonical, laid_out_as, original
from .expand import Expansion, composite, expand, restore
from .find import add_missing_shapes, bodies, find_here
from .lower import lower
from .masks import Lifted, Mask
from .memory import storage_of
from .report import Report, SiteReport
from .sdpa import fused_call
from .site import Coordinates, Site
from .stages import CAPTURED, INSERTED, Recorder, recording
from .unattended import or_mean

_SUMMARY_OUTPUTS = ("order", "mean", "spread", "bias", "row_index", "row_owner", "row_key", "row_value", "row_bias")


def rewrite(
    gm: fx.GraphModule, config: Config | None = None, *inputs: Any, device: str = ""
) -> tuple[fx.GraphModule, Report]:
    """Replace attention by score, summarize, route and attend nodes where that is decided.

    Args:
        gm: a graph of Dynamo, ``torch.export(...).module()`` or ``torch.fx.symbolic_trace``; it is not changed.
        config: default ``Config()``.
        *inputs: example inputs, needed where the graph's nodes carry no shapes; see ``find``.
        device: one of ``sources.DEVICES``: as if the tensors were there, to be looked at; such a graph may run slowly
            where they are. "": what is right for where they are.

    Returns:
        The new graph (the same weights) and what was decided for each site. Who listens (``observe``) is
        told each stage.
    """
    with recording(gm) as recorder:
        return _rewrite(gm, Config.of(config), inputs, recorder, Counter(), device)


def _rewrite(
    gm: fx.GraphModule, config: Config, inputs: Sequence[Any], recorder: Recorder, named: Counter[str], device: str
) -> tuple[fx.GraphModule, Report]:
    gm = copied(gm)
    recorder.stage(CAPTURED, gm)
    inner = Report()
    # The bodies of higher-order operators (activation checkpoints, branches) are graphs of their own.
    for name, child in bodies(gm):
        child = copied(child)
        connect(gm, name, child)
        body, found = _rewrite(child, config, (), recorder.body(child, name), named, device)
        setattr(gm, name, body)
        inner.sites.extend(found.sites)
    add_missing_shapes(gm, inputs)
    expansions = expand(gm)
    origin = {node: expansion for expansion in expansions for node in expansion.nodes}
    known: Lifted = {}
    sites = [_asked(site, device) for site in find_here(gm)]
    decided = [_decided(site, config, origin, _key(site, named), known) for site in sites]
    decisions, own = [decision for decision, _ in decided], [site for _, site in decided]
    report = Report(own + inner.sites)
    recorder.decided(gm, own, [_captured(origin, decision).name for decision in decisions])
    rewritten = [decision for decision in decisions if decision.rewrite]
    values: dict[str, Any] = {}
    for decision, site in zip(decisions, own, strict=True):
        if decision.rewrite:
            _insert(gm.graph, decision, site.rule, values)
    recorder.stage(INSERTED, gm)
    producers = {node for decision in rewritten for node in decision.mask.producers}
    _drop_dead(gm.graph, [decision.site.output for decision in rewritten], producers)
    used = {id(origin[decision.site.output]) for decision in rewritten if decision.site.output in origin}
    for expansion in expansions:
        if id(expansion) in used:
            _drop_call(gm.graph, expansion)
        else:
            restore(gm.graph, expansion)
    lower(gm.graph, values, device)
    gm.graph.lint()
    gm.recompile()
    recorder.done(gm)
    return gm, report


def _asked(site: Site, device: str) -> Site:
    """The site on the device that was asked about."""
    return replace(site, attention=replace(site.attention, asked=device)) if site.attention else site


def _key(site: Site, named: Counter[str]) -> str:
    """The site's name in a plan file; ``named``: how many sites of a module there were before."""
    named[site.module] += 1
    return f"{site.module}#{named[site.module] - 1}"


def _decided(
    site: Site, config: Config, origin: dict[fx.Node, Expansion], key: str, known: Lifted
) -> tuple[Decision, SiteReport]:
    try:
        decision = decide(site, config, key, known)
        return decision, describe(decision, _composite(origin, decision), key)
    except OptionError:  # a plan that was measured for another site
        raise
    except Exception as error:  # sizes that only the run time knows, say: it must cost the speed, never the model
        reason = f"unproved_axes: {type(error).__name__}: {error}"
        decision = Decision(replace(site, attention=None, reason=reason), Mask("?"), reason, None)
        return decision, describe(decision, _composite(origin, decision), key)


def _composite(origin: dict[fx.Node, Expansion], decision: Decision) -> str:
    found = origin.get(decision.site.output)
    return composite(found.call) if found else decision.site.kind


def _captured(origin: dict[fx.Node, Expansion], decision: Decision) -> fx.Node:
    """What the site was in the captured graph: its output, or the call that it is inside."""
    found = origin.get(decision.site.output)
    return found.call if found else decision.site.output


def _drop_call(graph: fx.Graph, expansion: Expansion) -> None:
    for node in (*list(expansion.call.users), expansion.call):
        if not node.users and node.op != "output":
            graph.erase_node(node)


def _insert(graph: fx.Graph, decision: Decision, rule: str, values: dict[str, Any]) -> None:
    site, plan, attention = decision.site, decision.plan, decision.site.attention
    assert plan is not None and attention is not None
    a, causal, settings = attention, decision.mask.causal, plan.text
    sizes = Sizes.of(a)
    q_group, k_group = _one(a.q), _one(a.k)
    old = value_of(site.output)

    def call(name: str, target: Any, *args: Any) -> fx.Node:
        return graph.create_node("call_function", target, args, name=f"prescore_{name}")

    first = site.output.prev
    with graph.inserting_before(site.output):
        query = canonical(graph, a.query, (a.batch, a.heads, q_group, _one(a.d)), sizes)
        key = canonical(graph, a.key, (a.batch, a.kv_heads, k_group, _one(a.d)), sizes)
        value = canonical(graph, a.value, (a.batch, a.kv_heads, k_group, _one(a.e)), sizes)
        if value_of(a.query.node).dtype != old.dtype:  # autocast
            query, key, value = (graph.call_method("to", (n, old.dtype)) for n in (query, key, value))
        for factor in a.factors:
            by = canonical(graph, factor.operand, (a.batch, a.heads, q_group, ()), sizes)
            scaled = graph.call_function(operator.truediv if factor.inverse else operator.mul, (query, by))
            query = graph.call_method("type_as", (scaled, query))
        valid = None
        if decision.mask.keys is not None:
            sizes_of_keys = (a.size(*a.batch), a.size(a.k))
            valid = decision.mask.keys.emit(graph, query, key, sizes_of_keys, value_of(a.key.node).device)
        more = (logits_of(a, decision.mask).text, list(decision.mask.loads))
        sink = [canonical(graph, a.sink_logit, (a.batch, a.heads, q_group), sizes)] if a.sink_logit else []
        scores = routes = None
        if plan.keep:
            score = torch.ops.prescore.score.default
            scores = call("score", score, query, key, valid, settings, causal, a.scale)
        summary = call("summarize", torch.ops.prescore.summarize.default, key, value, valid, scores, settings)
        order, mean, spread, bias, *rows = (
            call(name, operator.getitem, summary, at) for at, name in enumerate(_SUMMARY_OUTPUTS)
        )
        if plan.routes:
            k_len = graph.call_method("size", (key, 2))
            near: list[fx.Node] = []
            if plan.needs_mass:
                mass = torch.ops.prescore.mass.default
                near = [call("mass", mass, query, key, valid, *rows, settings, causal, a.scale, *more, *sink)]
            route, means = torch.ops.prescore.route.default, (order, mean, spread, bias)
            routes = call("route", route, query, *means, settings, causal, k_len, a.scale, *more, *near)
        attend = torch.ops.prescore.attend.default
        site_of = (query, key, value, valid, order, routes, *rows)
        out = call("attend", attend, *site_of, settings, causal, a.scale, *more, *sink)
        if decision.mask.mean and valid is not None:
            out = or_mean(graph, out, (query, key, value), valid, a, decision.mask)
        out = original(graph, out, (a.batch, a.heads, q_group, _one(a.e)), a.result, sizes)
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


def _one(coordinate: Any) -> Coordinates:
    return () if coordinate is None else (coordinate,)


def _drop_dead(graph: fx.Graph, outputs: Iterable[fx.Node], producers: set[fx.Node]) -> None:
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
