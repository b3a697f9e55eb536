"""A graph as plain data: what a node computes, from what, and where the user wrote it.

Passes change graphs in place; a snapshot stays. It holds no tensor and no ``fx.Node``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from .compat import value_of
from .held import digest, held, holding, repr_of, writing
from .provenance import module_path, origins, source_line

HOLE = "\0"
"""Stands for an input in ``Node.template``."""
_OPERATORS = {
    f"operator.{name}": sign
    for name, sign in zip(
        "add sub mul truediv floordiv mod pow matmul eq ne lt le gt ge and_ or_ xor".split(),
        "+ - * / // % ** @ == != < <= > >= & | ^".split(),
        strict=True,
    )
}
_LONGEST = 2000


@dataclass(frozen=True)
class Node:
    """One node of a graph.

    Attributes:
        name, op: as in FX. target: ``aten.add.Tensor``, ``torch.matmul``, ``.view`` (a method), a module's
            or an attribute's path; a placeholder's is its argument's name.
        template: the arguments with a hole for each input. inputs: those, as places in the graph, in order.
        value: ``float32[2, 4, s0, 8]``; "" where that is not known.
        module: path as in ``model.named_modules()``. source: ``file:line`` of the user's innermost frame.
        code: that line. origins: what it was made from and by which rule (FX ``from_node``), nearest first.
        held: what a module or an attribute is, and its numbers, as ``held.held`` says it.
    """

    name: str
    op: str
    target: str
    template: str
    inputs: tuple[int, ...]
    value: str = ""
    module: str = ""
    source: str = ""
    code: str = ""
    origins: tuple[str, ...] = ()
    held: str = ""

    def reading(self, inputs: tuple[int, ...]) -> Node:
        """The same node with other inputs."""  # ``dataclasses.replace`` takes four times as long, for each node
        return Node(
            self.name, self.op, self.target, self.template, inputs,
            self.value, self.module, self.source, self.code, self.origins, self.held,
        )  # fmt: skip

    @property
    def label(self) -> tuple[str, str, str, str]:
        """What it does apart from its inputs: no name is part of it, a placeholder's neither."""
        return self.op, "" if self.op == "placeholder" else self.target, self.template, self.held

    @property
    def form(self) -> str:
        """The node as one line of Python with holes for its name (an output has none) and its inputs."""
        if self.op == "placeholder":
            return f"{HOLE} = <input>" + (f"  # default: {self.template}" if self.template else "")
        if self.op == "output":
            return f"return {self.template}"
        if self.op == "get_attr":
            return f"{HOLE} = {_path(self.target)}"
        parts = self.template.split(", ", 1)
        if any(bracket in parts[0] for bracket in "([{"):  # the first argument has commas of its own
            parts = [self.template]
        if self.op == "call_method":
            return f"{HOLE} = {parts[0]}{self.target}({''.join(parts[1:])})"
        if self.target == "operator.getitem" and len(parts) == 2:
            return f"{HOLE} = {parts[0]}[{_subscript(parts[1])}]"
        if self.target in _OPERATORS and len(parts) == 2:
            return f"{HOLE} = {parts[0]} {_OPERATORS[self.target]} {parts[1]}"
        called = _path(self.target) if self.op == "call_module" else self.target
        return f"{HOLE} = {called}({self.template})"


@dataclass(frozen=True)
class Snapshot:
    """A graph's nodes in their order; ``name`` is the module's class."""

    name: str
    nodes: tuple[Node, ...] = field(repr=False)

    def text(self, at: int) -> str:
        """The node as one line of Python."""
        node = self.nodes[at]
        names = [*(() if node.op == "output" else (node.name,)), *(self.nodes[i].name for i in node.inputs)]
        first, *rest = node.form.split(HOLE)
        return first + "".join(name + text for name, text in zip(names, rest, strict=True))

    @cached_property
    def users(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each node the ``(user, which of its inputs)`` that read it."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.nodes]
        for at, node in enumerate(self.nodes):
            for slot, source in enumerate(node.inputs):
                found[source].append((at, slot))
        return tuple(tuple(users) for users in found)

    def same(self, other: Snapshot) -> bool:
        """Whether the graphs are equal but for names, node by node."""
        return self.shape == other.shape

    @cached_property
    def shape(self) -> tuple[tuple[tuple[str, str, str, str], tuple[int, ...]], ...]:
        """Each node's label and inputs: all that a comparison looks at."""
        return tuple((node.label, node.inputs) for node in self.nodes)


Graph = fx.GraphModule | fx.Graph | Snapshot
Known = dict[fx.Node, tuple[tuple[Any, ...], tuple[fx.Node, ...], Node]]
"""For each node what it was made of when it was last read, the nodes that it read, and what was made of it."""


def snapshot(graph: Graph, known: Known | None = None) -> Snapshot:
    """The graph as it is now.

    Args:
        graph: is not changed. known: of an earlier snapshot; nodes that are as they were then are not read again.

    Raises:
        TypeError: it is not a graph.
    """
    if isinstance(graph, Snapshot):
        return graph
    name = type(graph).__name__
    if isinstance(graph, fx.GraphModule):
        graph = graph.graph
    if not isinstance(graph, fx.Graph):
        raise TypeError(f"got {name}; allowed: torch.fx.GraphModule, torch.fx.Graph or passes.Snapshot")
    places = {node: at for at, node in enumerate(graph.nodes)}
    known = {} if known is None else known
    nodes: list[Node] = []
    # Nodes of one line share a stack trace, nodes of one module a path: each is read once.
    sources = _cached(source_line, lambda node: (node.meta.get("stack_trace"), node.op, _innermost(node)))
    modules = _cached(module_path, _innermost)
    for node in places:
        made_of = _made_of(node)
        before, sees, found = known.get(node, ((), (), None))
        if found is None or not _same(before, made_of):
            reads: list[fx.Node] = []
            template = _template(node, places, reads)
            source, code = sources(node)
            found = Node(
                node.name,
                node.op,
                target_text(node),
                template,
                (),
                value_text(value_of(node)),
                modules(node),
                source,
                code,
                origins(node),
                held(node),
            )
            sees = tuple(reads)
        inputs = tuple([places[source] for source in sees])
        if inputs != found.inputs:
            found = found.reading(inputs)
        known[node] = made_of, sees, found
        nodes.append(found)
    return Snapshot(name, tuple(nodes))


def _made_of(node: fx.Node) -> tuple[Any, ...]:
    """All that ``snapshot`` reads of a node; FX puts new objects there, it does not change these."""
    of = node.meta.get
    own = (node.name, node.target, node.args, node.kwargs, *writing(holding(node)))
    return (*own, value_of(node), of("stack_trace"), of("nn_module_stack"), of("from_node"))


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(map(operator.is_, a, b))


def _template(node: fx.Node, places: Mapping[fx.Node, int], reads: list[fx.Node]) -> str:
    if node.op == "placeholder":  # its default
        return "".join(_constant(arg) for arg in node.args)
    positional = [_render(arg, places, reads) for arg in node.args]
    named = [f"{key}={_render(node.kwargs[key], places, reads)}" for key in sorted(node.kwargs)]
    return ", ".join([*positional, *named])


def _cached(function: Callable[[fx.Node], Any], key: Callable[[fx.Node], Any]) -> Callable[[fx.Node], Any]:
    known: dict[Any, Any] = {}

    def found(node: fx.Node) -> Any:
        at = key(node)
        if at not in known:
            known[at] = function(node)
        return known[at]

    return found


def _innermost(node: fx.Node) -> Any:
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else None


def target_text(node: fx.Node) -> str:
    """What a node calls or reads, the same in every process."""
    target = node.target
    if node.op == "call_method":
        return f".{target}"
    if isinstance(target, str):
        return target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return str(target)
    module = (getattr(target, "__module__", None) or "").replace("_operator", "operator")
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or type(target).__name__
    for private, public in (("torch._C._nn", "torch.nn.functional"), ("torch._C", "torch")):
        module = public if module.startswith(private) else module
    if name.startswith("_VariableFunctionsClass."):
        module, name = "torch", name.rpartition(".")[2]
    return f"{module}.{name}" if module and module != "builtins" else name


def value_text(value: Any) -> str:
    """``float32[2, 4, s0, 8]`` for a tensor, the value of a size, a tuple of these."""
    if isinstance(value, torch.Tensor):
        where = "" if value.device.type == "cpu" else f" {value.device.type}"
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]{where}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(value_text(part) for part in value[:20])}{', ...' if len(value) > 20 else ''})"
    return "" if value is None else _constant(value)


def _render(arg: Any, places: Mapping[fx.Node, int], reads: list[fx.Node]) -> str:
    def inside(parts: Iterable[Any]) -> str:
        return ", ".join([_render(part, places, reads) for part in parts])

    if isinstance(arg, fx.Node):
        if arg not in places:
            return f"<{arg.name} of another graph>"
        reads.append(arg)
        return HOLE
    if isinstance(arg, tuple):
        return f"({inside(arg)}{',' if len(arg) == 1 else ''})"
    if isinstance(arg, list):
        return f"[{inside(arg)}]"
    if isinstance(arg, dict):
        pairs = (f"{_constant(key)}: {_render(part, places, reads)}" for key, part in arg.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(arg, slice):
        return f"slice({inside((arg.start, arg.stop, arg.step))})"
    return _constant(arg)


def _path(target: str) -> str:
    """A module's or attribute's path as Python: ``self.layers[0].out``."""
    parts = target.split(".")
    return "self" + "".join(f".{p}" if p.isidentifier() else f"[{p}]" if p.isdecimal() else f"[{p!r}]" for p in parts)


def _subscript(text: str) -> str:
    """``:, None, 1:`` for ``(slice(None, None, None), None, slice(1, None, None))``."""

    def colon(found: re.Match[str]) -> str:
        start, stop, step = ("" if part == "None" else part for part in found.groups())
        return f"{start}:{stop}{f':{step}' if step else ''}"

    short = re.sub(r"slice\(([^,()]*), ([^,()]*), ([^,()]*)\)", colon, text)
    return short[1:-1].rstrip(",") if re.fullmatch(r"\([^()]*\)", short) else short


def _constant(value: Any) -> str:
    """A constant without its address; a hole in it would be taken for an input."""
    if value is None or isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{getattr(value, '__module__', None) or 'builtins'}.{value.__qualname__}"
    text = repr_of(value).replace(HOLE, "\\0")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({digest(text)} in all)"
