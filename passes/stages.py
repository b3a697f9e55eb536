"""Record the stages of passes: every graph they make, in order, while somebody listens.

Who listens is a context variable, so nothing is recorded, and nothing costs time, outside of
``listening(log)``; two threads do not see each other's graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from . import compat
from .diff import GraphDiff, diff
from .report import Report, SiteReport
from .snapshot import Known, Snapshot, snapshot
from .watching import watch_graphs

CAPTURED, FOUND, LIFTED, DECIDED, INSERTED, LOWERED = (
    "captured", "sites found", "masks lifted", "decided", "inserted", "lowered",
)  # fmt: skip
"""The stages of ``rewrite``, in order."""
Notes = Mapping[str, str]
"""Node name -> what is to be said about it."""


@dataclass(frozen=True)
class Stage:
    """A graph after one step.

    ``made_by``: ``function (file:line)`` of what made it, where that is not this package.
    """

    name: str
    graph: Snapshot
    notes: Notes = field(default_factory=dict)
    made_by: str = ""


@dataclass
class GraphLog:
    """What happened to one graph.

    Attributes:
        name: ``graph 0/1``: Dynamo's frame and recompile; the class of a graph that was not compiled.
        function: what Dynamo compiled. why: the guard that failed, for a recompile; "" for a first compile.
        ends: why Dynamo ended the graph, where it is not the last one (a graph break).
        stages: in order. sites: what was decided; ``nodes``: the name of each in the captured graph.
    """

    name: str
    function: str = ""
    why: str = ""
    ends: str = ""
    stages: list[Stage] = field(default_factory=list)
    sites: list[SiteReport] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)

    def add(self, stage: Stage) -> None:
        """Append a stage that is not just the last one with other names.

        What is captured is one stage, in its last form.
        """
        if self.stages and self.stages[-1].name == stage.name == CAPTURED:
            self.stages.pop()
        if not self.stages or not self.stages[-1].graph.same(stage.graph):
            self.stages.append(stage)

    @property
    def diffs(self) -> list[GraphDiff]:
        """Each stage against the one before it."""
        return [diff(a.graph, b.graph) for a, b in zip(self.stages, self.stages[1:], strict=False)]

    @property
    def diff(self) -> GraphDiff:
        """The last stage against the first."""
        return diff(self.stages[0].graph, self.stages[-1].graph)

    @property
    def title(self) -> str:
        """Name, function, and why there is one more graph."""
        why = f"; recompiled: {' '.join(self.why.split())}" if self.why else ""
        ends = f"; ends with a graph break: {self.ends}" if self.ends else ""
        return f"{self.name}{f' of {self.function}' if self.function else ''}{why}{ends}"


@dataclass
class Log:
    """The graphs that were seen, in order.

    ``every``: record what any pass or backend does, not only ``rewrite``; set by ``observe``.
    ``absent``, ``idle``: see ``Report``; set by who knows that all graphs were seen.
    """

    graphs: list[GraphLog] = field(default_factory=list)
    every: bool = False
    absent: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    _open: dict[Any, GraphLog] = field(default_factory=dict, repr=False)
    _seen: list[tuple[fx.GraphModule, GraphLog]] = field(default_factory=list, repr=False)

    @property
    def report(self) -> Report:
        """The sites of all graphs."""
        return Report([site for graph in self.graphs for site in graph.sites], self.absent, self.idle)

    def graph(self, gm: fx.GraphModule, body: str = "", rewrites: bool = False) -> GraphLog:
        """The log of the graph that is being compiled, or of ``gm`` outside of a compile.

        ``rewrites``: for one more ``rewrite``, which in one compile is of another graph.
        """
        compiled = compat.compile_id()
        key = (compiled or id(gm), body)
        graph = self._open.get(key)
        if graph is None or (rewrites and any(stage.name == LOWERED for stage in graph.stages)):
            name = f"graph {compiled}" if compiled else type(gm).__name__
            same = sum(other.name.partition(" #")[0] == name for other in self.graphs)
            name = f"{name} #{same + 1}" if same and not body else name
            function = compat.compiled_function() if compiled else ""
            graph = GraphLog(f"{name}: {body}" if body else name, function, compat.recompile_reason())
            self._open[key] = graph
            self.graphs.append(graph)
        self._seen.append((gm, graph))  # kept, so that no other graph gets its id
        return graph

    def run(self, change: Callable[[fx.GraphModule], Any], gm: fx.GraphModule) -> Any:
        """Run a pass and record the graph before and after it, whether or not it recompiles.

        Returns:
            What ``change`` returns; a pass that returns no graph is taken to have changed ``gm``.
        """
        graph = self.graph(gm)
        graph.add(Stage("before", snapshot(gm)))
        every, self.every = self.every, False  # what happens inside is one step
        try:
            result = change(gm)
        finally:
            self.every = every
        after = result if isinstance(result, (fx.GraphModule, fx.Graph)) else gm
        if isinstance(after, fx.GraphModule):
            self.follow(after, graph)
        graph.add(Stage(getattr(change, "__name__", type(change).__name__), snapshot(after)))
        return result

    def follow(self, gm: fx.GraphModule, graph: GraphLog) -> None:
        """What happens to ``gm`` from now on has happened to ``graph``, which it was made from."""
        if not compat.compile_id():
            self._open[id(gm), ""] = graph
            self._seen.append((gm, graph))

    def clear(self) -> None:
        """Forget everything."""
        self.graphs.clear()
        self._open.clear()
        self._seen.clear()

    def close(self) -> None:
        """Let go of the graphs; Dynamo has by now said where they end."""
        for gm, graph in self._seen:
            graph.ends = graph.ends or compat.break_reason(gm)
        self._open.clear()
        self._seen.clear()

    def __str__(self) -> str:
        lines: list[str] = []
        for graph in self.graphs:
            lines.append(graph.title)
            changes = ["", *(difference.summary() for difference in graph.diffs)]
            for stage, change in zip(graph.stages, changes, strict=True):
                made = f"  {stage.made_by}" if stage.made_by else ""
                lines.append(f"  {stage.name}: {change or f'{len(stage.graph.nodes)} nodes'}{made}")
        return "\n".join(lines) or "no graph was seen"


_LOGS: ContextVar[tuple[Log, ...]] = ContextVar("prescore_logs", default=())


@contextmanager
def listening(*logs: Log) -> Iterator[None]:
    """Record into these logs, and into those that listen already."""
    token = _LOGS.set((*_LOGS.get(), *logs))
    try:
        yield
    finally:
        _LOGS.reset(token)
        for log in logs:
            log.close()


@contextmanager
def observe() -> Iterator[Log]:
    """Record what any backend or FX pass does to graphs.

        with prescore_compile.observe() as log:
            torch.compile(model, backend="inductor")(x)
        print(log)

    Seen are all graphs of Dynamo, with why each was recompiled and where a graph break ended it, and
    every graph whose code is made inside the block: a pass that changes a graph must ask for that
    (``gm.recompile()``). To see the graph as it was before a pass changed it, it must have been made
    inside the block, too; else use ``log.run(pass, gm)``.

    Not seen: what runs in another thread (the backward graph that autograd compiles when it is first
    needed). One thread at a time can observe.
    """
    log = Log(every=True)

    def seen(gm: fx.GraphModule, made_by: str) -> None:
        for listener in _LOGS.get():
            if listener.every:
                graph, now = listener.graph(gm), snapshot(gm)
                name = made_by.partition(" (")[0] or CAPTURED
                # While it compiles a graph, a backend traces others, which have no line of the user's: its patterns.
                if not graph.stages or not compat.compile_id() or any(node.source for node in now.nodes):
                    graph.add(Stage(name, now, made_by=made_by))

    watched = any(listener.every for listener in _LOGS.get())  # by an observer around this one
    with listening(log), nullcontext() if watched else watch_graphs(seen):
        yield log


class Recorder:
    """What ``rewrite`` tells its listeners about one graph."""

    def __init__(self, logs: Sequence[Log], gm: fx.GraphModule, body: str = "") -> None:
        self.logs = logs
        self.body_name = body
        self.graphs = [log.graph(gm, body, rewrites=True) for log in logs]
        self._known: Known = {}

    def body(self, gm: fx.GraphModule, name: str) -> Recorder:
        """For the body of a higher-order operator, which is a graph of its own."""
        return Recorder(self.logs, gm, f"{self.body_name}.{name}".lstrip("."))

    def stage(self, name: str, gm: fx.GraphModule) -> None:
        """The graph after a step."""
        if self.graphs:
            stage = Stage(name, snapshot(gm, self._known))
            for graph in self.graphs:
                if graph.stages and graph.stages[-1].name == name == CAPTURED:
                    graph.stages.pop()  # seen before it was complete
                graph.stages.append(stage)

    def done(self, gm: fx.GraphModule) -> None:
        """The last stage; ``gm`` is what became of the graph."""
        self.stage(LOWERED, gm)
        for log, graph in zip(self.logs, self.graphs, strict=True):
            log.follow(gm, graph)

    def decided(self, gm: fx.GraphModule, sites: Sequence[SiteReport], nodes: Sequence[str]) -> None:
        """Sites (and the nodes they are), masks, decisions: three stages of a graph that does not change yet."""
        if not self.graphs:
            return
        now = snapshot(gm, self._known)
        notes: dict[str, str] = {}
        for name, tell in ((FOUND, told_site), (LIFTED, told_mask), (DECIDED, told_decision)):
            for site, node in zip(sites, nodes, strict=True):
                notes[node] = "\n".join(filter(None, (notes.get(node), tell(site))))
            for graph in self.graphs:
                graph.stages.append(Stage(name, now, dict(notes)))
        for graph in self.graphs:
            graph.sites.extend(sites)
            graph.nodes.extend(nodes)


def told_site(site: SiteReport) -> str:
    """What was found."""
    sizes = ", ".join(f"{name} {size}" for name, size in site.shape.items())
    return f"site: {site.kind}, by {site.rule}{f': {sizes}' if sizes else ''}"


def told_mask(site: SiteReport) -> str:
    """What its mask means."""
    return f"mask: {site.mask}"


def told_decision(site: SiteReport) -> str:
    """What is done, and why not more."""
    if site.plan is not None:
        share = "" if site.density is None else f", density {100 * site.density:.1f}%"
        known = "".join(f", with {plan.settings()} where its mask is {name}" for name, plan in site.recognized.items())
        return f"decision: rewrite with {site.plan.settings()}{share}{known}"
    failed = f"\nfirst condition that failed, at {site.failed}" if site.failed else ""
    return f"decision: keep exact, {site.reason}{failed}"


@contextmanager
def recording(gm: fx.GraphModule) -> Iterator[Recorder]:
    """A recorder for one graph; what happens inside is told by it, and not seen a second time."""
    logs = _LOGS.get()
    token = _LOGS.set(())
    try:
        yield Recorder(logs, gm)
    finally:
        _LOGS.reset(token)
