"""A model captured once, to be run with any plan at any site."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..backend import fresh
from ..batches import Call
from ..kernels.plan import Plan
from ..passes import Config, Report, SiteReport, rewrite
from ..passes.compat import many_recompiles
from ..passes.find import bodies
from ..passes.plans import SiteKey, plans_only
from ..passes.report import EXACT

Plans = Mapping[SiteKey, Plan]
"""The plan of each site; the others are exact."""


@dataclass
class Spent:
    """(query, key) pairs by site: what exact attention computes, and what the plans attend, routing counted in."""

    exact: Counter[SiteKey] = field(default_factory=Counter)
    attended: Counter[SiteKey] = field(default_factory=Counter)

    def add(self, other: Spent) -> None:
        self.exact.update(other.exact)
        self.attended.update(other.attended)

    @property
    def density(self) -> float:
        return self.attended.total() / max(self.exact.total(), 1)


class Switch:
    """Runs a model, uncompiled, with the plans of the moment: Dynamo captures it once, and each graph is
    rewritten by ``rewrite`` where plans at its sites change.

    Attributes:
        sites: every site that a plan can be given, as first reported. kept: why the others cannot.
    """

    def __init__(self, model: Callable[..., Any], config: Config) -> None:
        self.sites: dict[SiteKey, SiteReport] = {}
        self.kept: dict[str, str] = {}
        self._model = model
        self._config = config.changed(min_seq_len=0, only_if_faster=False)
        self._graphs: list[_Graph] = []
        self._plans: Plans = {}
        self._spent = Spent()
        self._compiled: Callable[..., Any] | None = None

    def run(self, call: Call, plans: Plans) -> tuple[Any, Spent]:
        """The model's output with these plans, and what they spent."""
        self._plans, self._spent = plans, Spent()
        own = call.copied()
        call_of, args, kwargs = fresh(self._model, own.args, own.kwargs)
        self._compiled = self._compiled or torch.compile(call_of, backend=self._captured, dynamic=False)
        with torch.no_grad(), many_recompiles():
            output = self._compiled(*args, **kwargs)
        return output, self._spent

    def refusals(self, plan: Plan) -> dict[SiteKey, str]:
        """Why the sites seen so far cannot run a plan; "" for one that can."""
        found: dict[SiteKey, str] = {}
        for graph in self._graphs:
            _, report = graph.rewritten(self._config, dict.fromkeys(graph.sites, plan))
            reasons = {site.key: site.reason for site in report.sites}
            found.update({key: reasons[key.site] for key in graph.sites})
        return found

    def close(self) -> None:
        """Let the graphs go. The model's own code objects may have been compiled: give their recompiles back."""
        self._graphs.clear()
        torch._dynamo.reset()

    def _captured(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = _Graph(_kept(gm), self._config)
        self._graphs.append(graph)
        for site in graph.report.rewritten:
            if not site.exact:
                self.sites.setdefault(SiteKey.of(site), site)
        self.kept.update({site.key: site.reason for site in graph.report.kept})
        self.kept.update({site.key: EXACT[site.exact] for site in graph.report.sites if site.exact})

        def run(*args: Any) -> Any:
            module, spent = graph.ready(self._config, self._plans)
            self._spent.add(spent)
            return module.forward(*args)

        return run


class _Graph:
    """One captured graph, its sites, and its last rewriting."""

    def __init__(self, gm: fx.GraphModule, config: Config) -> None:
        self.gm = gm
        # A plan without a limit shows every site that some plan can be given.
        everything = config.changed(window=None, sinks=0, keep=0, centroids=0, routes=0)
        _, self.report = rewrite(gm, everything)
        self.sites = {SiteKey.of(site): _pairs(site) for site in self.report.rewritten if not site.exact}
        self._last: tuple[Plans, fx.GraphModule, Spent] | None = None

    def ready(self, config: Config, plans: Plans) -> tuple[fx.GraphModule, Spent]:
        """The graph with the plans of its own sites."""
        own = {key: plan for key, plan in plans.items() if key in self.sites}
        if self._last is None or self._last[0] != own:
            self._last = (own, *self._prepared(config, own))
        return self._last[1:]

    def _prepared(self, config: Config, plans: Plans) -> tuple[fx.GraphModule, Spent]:
        spent = Spent(Counter(self.sites), Counter(self.sites))
        if not plans:
            return self.gm, spent
        module, report = self.rewritten(config, plans)
        for site in report.rewritten:
            if not site.exact:
                assert site.density is not None
                key = SiteKey.of(site)
                spent.attended[key] = round(site.density * self.sites[key])
        return module, spent

    def rewritten(self, config: Config, plans: Plans) -> tuple[fx.GraphModule, Report]:
        """The graph rewritten, and what was decided; without gradients, as it was captured."""
        with torch.no_grad():
            return rewrite(self.gm, config.changed(plan=plans_only(plans)))


def _pairs(site: SiteReport) -> int:
    """(query, key) pairs of exact attention, of all heads and batches."""
    assert site.exact_cost is not None and site.value_dim is not None
    return site.exact_cost // (int(site.shape["head_dim"]) + site.value_dim)


def _kept(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that keeps its shapes: Dynamo takes them from its own graph after the compile."""
    kept = fx.GraphModule(gm, copy.deepcopy(gm.graph), gm.__class__.__name__)
    for name, body in bodies(kept):
        setattr(kept, name, _kept(body))
    return kept
