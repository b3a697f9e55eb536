"""The diff of two graphs: by structure, and the same however nodes are called."""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from prescore_compile import observe
from prescore_compile.passes import GraphDiff, diff, snapshot

UNARY = (torch.relu, torch.tanh, torch.exp)
BINARY = (operator.add, operator.sub, torch.matmul)


def drawn(seed: int, size: int = 40) -> fx.Graph:
    """A random graph in which every node is used."""
    draw = random.Random(seed)
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(3)]
    for _ in range(size):
        recent = nodes[-8:]
        if draw.random() < 0.5:
            nodes.append(graph.call_function(draw.choice(BINARY), (draw.choice(recent), draw.choice(nodes))))
        elif draw.random() < 0.3:
            nodes.append(graph.call_method("view", (draw.choice(recent), draw.randrange(4), [-1])))
        else:
            nodes.append(graph.call_function(draw.choice(UNARY), (draw.choice(recent),)))
    graph.output(tuple(node for node in nodes if not node.users))
    return graph


def copied(graph: fx.Graph, rename: bool = False) -> fx.Graph:
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    if rename:
        for at, node in enumerate(new.nodes):
            node.name = f"other_{len(new.nodes) - at}"
            if node.op == "placeholder":
                node.target = node.name
    return new


def changed(graph: fx.Graph, seed: int) -> fx.Graph:
    """A copy with some nodes put in, taken out and replaced."""
    draw = random.Random(seed)
    new = copied(graph)
    for node in draw.sample([n for n in new.nodes if n.op.startswith("call")], 4):
        kind = draw.randrange(3)
        with new.inserting_after(node):
            if kind == 0:
                made = new.call_function(torch.sigmoid, (node,))
                node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
            elif kind == 1:
                node.replace_all_uses_with(node.all_input_nodes[0])
            else:
                node.replace_all_uses_with(new.call_function(torch.neg, (node.all_input_nodes[0],)))
    new.eliminate_dead_code()
    return new


def layers(count: int, without: int | None = None) -> fx.Graph:
    """Layers that are all alike, of four nodes each."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    for i in range(count):
        if i != without:
            y = graph.call_function(torch.matmul, (x, x))
            y = graph.call_method("softmax", (y,), {"dim": -1})
            x = graph.call_function(operator.add, (graph.call_function(torch.relu, (y,)), x))
    graph.output(x)
    return graph


def names(difference: GraphDiff) -> tuple[set[str], set[str]]:
    before, after = difference.before.nodes, difference.after.nodes
    return {before[at].name for at in difference.removed}, {after[at].name for at in difference.added}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_renaming_every_node_changes_nothing(seed: int, how: int) -> None:
    before = drawn(seed)
    after = changed(before, how)
    plain, renamed = diff(before, after), diff(copied(before, rename=True), copied(after, rename=True))
    assert plain.matched == renamed.matched and plain.rewired == renamed.rewired
    assert not diff(before, copied(before, rename=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_diff_is_the_mirror_of_the_diff_the_other_way(seed: int, how: int) -> None:
    before = drawn(seed)
    after = changed(before, how)
    there, back = diff(before, after), diff(after, before)
    assert {b: a for a, b in there.matched.items()} == back.matched
    assert (there.added, there.removed) == (back.removed, back.added)
    assert {(b, a) for a, b in there.rewired} == set(back.rewired)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_every_node_is_in_one_row_and_matched_nodes_do_the_same(seed: int, how: int) -> None:
    before = drawn(seed)
    difference = diff(before, changed(before, how))
    lefts = [row.before for row in difference.rows if row.before is not None]
    rights = [row.after for row in difference.rows if row.after is not None]
    assert lefts == list(range(len(difference.before.nodes))) and rights == list(range(len(difference.after.nodes)))
    nodes = difference.before.nodes, difference.after.nodes
    assert all(nodes[0][a].label[:2] == nodes[1][b].label[:2] for a, b in difference.matched.items())
    inside = [at for region in difference.regions for at in region.removed]
    assert sorted(inside) == list(difference.removed)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 39))
def test_what_is_put_in_is_all_that_is_added(seed: int, at: int) -> None:
    before = drawn(seed)
    after = copied(before)
    node = [n for n in after.nodes if n.op.startswith("call")][at]
    users = len(node.users)
    with after.inserting_after(node):
        made = after.call_function(torch.sigmoid, (node,))
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    difference = diff(before, after)
    assert names(difference) == (set(), {made.name}) and len(difference.rewired) == users


@pytest.mark.parametrize("without", [0, 3, 7])
def test_one_of_many_layers_that_are_alike(without: int) -> None:
    """Which one is gone cannot be told; that the others keep their order can."""
    difference = diff(layers(8), layers(8, without))
    assert (len(difference.removed), len(difference.added)) == (4, 0) and len(difference.rewired) <= 2
    assert "moved" not in {row.change for row in difference.rows}


def linear(function: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(function(graph, x, y))
    return graph


def test_the_order_of_operands_and_constants_are_seen() -> None:
    swapped = diff(linear(lambda g, x, y: g.call_function(operator.sub, (x, y))),
                   linear(lambda g, x, y: g.call_function(operator.sub, (y, x))))  # fmt: skip
    assert len(swapped.rewired) == 1 and not swapped.added
    scaled = diff(linear(lambda g, x, y: g.call_function(operator.mul, (x, 2.0))),
                  linear(lambda g, x, y: g.call_function(operator.mul, (x, 3.0))))  # fmt: skip
    assert len(scaled.rewired) == 1 and not scaled.added and "~ mul = x * 3.0" in str(scaled)


def test_nodes_in_another_order_are_the_same_nodes() -> None:
    def either(first: str) -> fx.Graph:
        def body(g: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
            made = {}
            for name in ("relu", "tanh") if first == "relu" else ("tanh", "relu"):
                made[name] = g.call_function(getattr(torch, name), (x,))
            return g.call_function(operator.add, (made["relu"], made["tanh"]))

        return linear(body)

    difference = diff(either("relu"), either("tanh"))
    assert not difference and [row.change for row in difference.rows].count("moved") == 2


def test_arguments_of_every_kind() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    deep: object = x
    for _ in range(60):
        deep = [deep]
    graph.call_function(print, (deep, {"a": (x, slice(x, None)), "b": torch.float32}), {"end": "\0<script>"})
    graph.output((x,))
    text = snapshot(graph).text(1)
    assert (
        text
        == f"print_1 = print({'[' * 60}x{']' * 60}, {{'a': (x, slice(x, None, None)), 'b': torch.float32}}, "
        + (r"end='\x00<script>')")
    )
    assert not diff(graph, copied(graph))


def test_a_graph_in_the_middle_of_a_pass() -> None:
    """It reads what comes later, and a node of another graph."""
    graph = layers(2)
    nodes = list(graph.nodes)
    nodes[1].args = (nodes[4], linear(lambda g, x, y: x).output_node().args[0])
    difference = diff(graph, layers(2))
    assert "<x of another graph>" in str(difference) and diff(layers(2), graph).added == difference.removed


def test_what_is_not_a_graph() -> None:
    with pytest.raises(TypeError, match=r"got Linear; allowed: torch\.fx\.GraphModule"):
        diff(torch.nn.Linear(2, 2), fx.Graph())  # type: ignore[arg-type]


def calls_of(count: int) -> int:
    """Calls, of Python's and of C's functions, that a diff of ``count`` layers makes."""
    before, after = layers(count), layers(count, without=count * 2 // 5)
    for node in list(after.nodes)[::10]:
        if node.target is torch.relu:
            node.target = torch.tanh
    graphs = snapshot(before), snapshot(after)
    calls = 0

    def seen(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        difference = diff(*graphs)
    finally:
        sys.setprofile(None)
    assert len(difference.before.nodes) > 4 * count and difference and difference.rows
    return calls


def test_the_work_grows_as_the_nodes_do() -> None:
    """Counted: a clock depends on what else runs. Ten thousand nodes take less than a second of an idle core."""
    assert calls_of(2500) < 2.2 * calls_of(1250)


class Held(nn.Module):
    def __init__(self, act: nn.Module, number: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.act = act
        self.register_buffer("c", torch.full((5000,), number, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * self.c


def of(function: Any, *args: Any) -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.call_function(function, (*args, graph.placeholder("x"))))
    return graph


def test_what_stands_behind_a_name_counts() -> None:
    def graph(*held: Any) -> fx.GraphModule:
        return fx.symbolic_trace(Held(*held))

    base = graph(nn.LayerNorm(4), 1.0)
    assert not diff(base, graph(nn.LayerNorm(4), 1.0))
    for other in (
        graph(nn.LayerNorm(4, eps=0.1), 1.0),
        graph(nn.Sigmoid(), 1.0),
        graph(nn.LayerNorm(4), 2.0),
        graph(nn.LayerNorm(4), 1.0, torch.float64),
    ):
        found = diff(base, other)
        assert len(found.rewired) == 1 and not found.removed and not found.added
        assert len([line for line in str(found).splitlines() if line.startswith("~")]) == 2
    assert diff(of(lambda v: v + 1), of(lambda v: v - 1)) and not diff(of(lambda v: v + 1), of(lambda v: v + 1))
    assert diff(of(torch.einsum, "a" * 3000 + "x"), of(torch.einsum, "a" * 3000 + "y"))
    before = snapshot(base)
    base.c.zero_()
    assert diff(before, base), "written in place"


class Constant(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.register_buffer("c", torch.tensor([1.0, 2.0]))
        self.broken = broken

    def extra_repr(self) -> str:
        if self.broken:
            raise ValueError("boom")
        return f"{self.extra_repr}"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.c + torch.tensor([3.0, 4.0])


def test_looking_changes_nothing_that_is_traced() -> None:
    x = torch.ones(2)
    for mode in ("real", "fake", "symbolic"):
        plain = make_fx(lambda x: Constant()(x), tracing_mode=mode)(x)
        with observe():
            watched = make_fx(lambda x: Constant()(x), tracing_mode=mode)(x)
            torch.compile(Constant(), backend="aot_eager")(x)
        assert [node.name for node in watched.graph.nodes] == [node.name for node in plain.graph.nodes]
    with FakeTensorMode():
        assert snapshot(fx.symbolic_trace(Constant())).nodes


def test_a_module_that_prints_badly() -> None:
    def graph(module: nn.Module) -> fx.GraphModule:
        found = fx.Graph()
        found.output(found.call_module("m", (found.placeholder("x"),)))
        return fx.GraphModule({"m": module}, found)

    assert not diff(graph(Constant()), graph(Constant())) and not diff(graph(Constant(True)), graph(Constant(True)))
