"""Everything that differs between torch versions or is not part of torch's stable API."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

OUTSIDE = "prescore_outside"
"""Key of ``node.meta``: what a placeholder of a body is called with, a node of the graph around it."""


def connect(gm: fx.GraphModule, name: str, body: fx.GraphModule) -> None:
    """Note in the placeholders of ``body`` what the one higher-order operator that calls it gives them."""
    calls = [user for node in gm.graph.find_nodes(op="get_attr", target=name) for user in node.users]
    if len(calls) != 1:
        return
    (call,) = calls
    places = [i for i, arg in enumerate(call.args) if isinstance(arg, fx.Node) and arg.target == name]
    if not places:  # inside a tuple, as in FlexAttention
        return
    at = places[0]
    given: Any = call.args[at + 1 :]
    if call.target is torch.ops.higher_order.cond:
        given = call.args[3] if len(call.args) > 3 else ()
    inputs = body.graph.find_nodes(op="placeholder")
    if len(given) == len(inputs):
        for inner, outer in zip(inputs, given, strict=True):
            if isinstance(outer, fx.Node):
                inner.meta[OUTSIDE] = outer


def many_recompiles() -> Any:
    """Context in which Dynamo's recompile limit does not end a capture (it would run eager, silently)."""
    return torch._dynamo.config.patch(recompile_limit=2**16)


def value_of(node: fx.Node) -> Any:
    """What a node computes, as fake tensor or SymInt: Dynamo's ``example_value``, export's ``val``."""
    found = node.meta.get("example_value")
    return node.meta.get("val") if found is None else found


def has_shapes(gm: fx.GraphModule) -> bool:
    """Whether a graph's nodes say what they compute."""
    return any("example_value" in node.meta or "val" in node.meta for node in gm.graph.nodes)


def add_shapes(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Run fake inputs through the graph and set ``node.meta["val"]``."""
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)


def trace(function: Callable[..., Any], fakes: Sequence[Any]) -> fx.GraphModule:
    """The ATen graph, differentiable, of a function called with these fake tensors."""
    mode = detect_fake_mode(fakes)
    assert mode is not None
    # A function may make tensors of its own (zeros, say), which are real while it is traced.
    allowed, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        found: fx.GraphModule = make_fx(function, pre_dispatch=True)(*fakes)
    finally:
        mode.allow_non_fake_inputs = allowed
    return found


def symbolic(size: Any) -> sympy.Expr:
    """A size (int, SymInt, SymFloat, float or a node of one) as a sympy expression."""
    if isinstance(size, fx.Node):
        size = value_of(size)
    if isinstance(size, (torch.SymInt, torch.SymFloat)):
        expr: sympy.Expr = size.node.expr
        return expr
    return sympy.sympify(size)


def hint(size: Any) -> int:
    """The value a size has in the inputs being compiled for; installs no guard."""
    if isinstance(size, torch.SymInt):
        found = size.node.hint
        if found is None:
            raise ValueError(f"the size {size} has no value before the run")
        return int(found)
    return int(size)


def known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every input that the graph's guards admit."""
    return bool(statically_known_true(a == b))


def guard_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for the inputs being compiled for, which becomes a guard."""
    return bool(a == b)


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose forward made the node, as in ``model.named_modules()``."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    path = re.sub(r"^[LG]\[['\"](self['\"]\])?|\.slice\([^)]*\)", "", str(path))
    path = re.sub(r"\._modules\b|['\"\]]", "", path).replace("[", ".")
    return path.strip(".")


def source_line(node: fx.Node) -> tuple[str, str]:
    """``("file:line", "the code there")`` of the user's innermost frame; empty when not recorded."""
    frames = re.findall(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]*)', node.meta.get("stack_trace") or "")
    if not frames:
        return "", ""
    file, line, code = frames[-1]
    return f"{file}:{line}", code.strip()
