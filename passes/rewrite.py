"""The pipeline: find -> lift masks -> decide -> insert -> lower, from graph to graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ..kernels.plan import OptionError
from .compat import connect, copied
from .config import Config
from .decide import Decision, decide
from .describe import describe
from .drop import drop_dead
from .expand import Expansion, composite, expand, restore
from .find import add_missing_shapes, bodies, find_here
from .insert import insert
from .lower import lower
from .masks import Lifted, Mask
from .report import Report, SiteReport
from .site import Site
from .stages import CAPTURED, INSERTED, Recorder, recording


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
            insert(gm.graph, decision, site.rule, values)
    recorder.stage(INSERTED, gm)
    producers = {node for decision in rewritten for node in decision.mask.producers}
    drop_dead(gm.graph, [decision.site.output for decision in rewritten], producers)
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
