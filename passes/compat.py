"""What differs between torch versions, and what passes need that is not part of torch's stable API."""

from __future__ import annotations

import copy
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from traceback import FrameSummary
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import GlobalStateSource
from torch._dynamo.utils import get_metrics_context
from torch._guards import CompileContext, TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint, statically_known_true
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


def no_history() -> Any:
    """Context in which a capture is of the sizes that it is given, whatever Dynamo saw of the same code before."""
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False)


def raised(error: BaseException) -> tuple[BaseException, list[FrameSummary]]:
    """What a model raised, and where, the outermost frame first.

    Dynamo tells of an operator that fails on fake tensors in pages of its own; the frames are then those of the model
    where it traced them.
    """
    frames = list(traceback.extract_tb(error.__traceback__))
    if not isinstance(error, TorchRuntimeError):
        return error, frames
    frames = list(error.real_stack) or frames
    while _of_dynamo(error) and (inner := error.__cause__ or error.__context__):
        error = inner
    return error, frames


def _of_dynamo(error: BaseException) -> bool:
    """Whether an error tells of another one: from torch 2.14 on one of the other's own type does, too."""
    return isinstance(error, TorchDynamoException) or str(error).startswith("Dynamo failed to run FX node")


@contextmanager
def quiet_fakes() -> Iterator[None]:
    """Inside, torch does not log each operator that fails on fake tensors: pages, for an error that is told anyway."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def value_of(node: fx.Node) -> Any:
    """What a node computes, as fake tensor or SymInt: Dynamo's ``example_value``, export's ``val``."""
    found = node.meta.get("example_value")
    return node.meta.get("val") if found is None else found


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with the same weights; its code is made only when it is asked for, where that holds for ``gm``."""
    kind = _LazyGraphModule if isinstance(gm, _LazyGraphModule) else fx.GraphModule
    return kind(gm, copy.deepcopy(gm.graph), type(gm).__name__)


def has_shapes(gm: fx.GraphModule) -> bool:
    """Whether a graph's nodes say what they compute."""
    return any("example_value" in node.meta or "val" in node.meta for node in gm.graph.nodes)


def add_shapes(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Run fake inputs through the graph and set ``node.meta["val"]``."""
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)


def add_value(node: fx.Node, known: dict[str, Any]) -> None:
    """Set what a call on nodes that say what they compute, computes; nothing where that cannot be run.

    Under the name that the graph has for it: AOTAutograd keeps no graph of Dynamo's on disk that calls a method of what
    has no ``example_value``. ``known``: of earlier calls: the same call on alike tensors is run once; and the mode.
    """
    kind = "example_value" if any("example_value" in n.meta for n in node.all_input_nodes) else "val"
    try:
        given = fx.map_arg((node.args, node.kwargs), lambda n: _look(value_of(n)))
        key = f"{node.target} {given}"
        if key in known:
            node.meta[kind] = known[key]
            return
        args: Any = fx.map_arg(node.args, value_of)
        kwargs: Any = fx.map_arg(node.kwargs, value_of)
        # A tensor made of dynamic sizes alone (arange) would be a real one, of a size that is a guard then.
        if "" not in known:
            values = map(value_of, node.graph.nodes)
            known[""] = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
        with torch.no_grad(), known[""] or nullcontext():
            if node.op == "call_method":
                node.meta[kind] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            elif callable(node.target):
                node.meta[kind] = node.target(*args, **kwargs)
        known[key] = node.meta[kind]
    except Exception:  # what is not known is not shown to readers, and the graph is not kept
        return


def _look(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device}"
    return f"({', '.join(map(_look, value))})" if isinstance(value, (tuple, list)) else repr(value)


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


def settled(number: torch.SymFloat) -> float | None:
    """The value that a number has where it is compiled for, which becomes a guard; None: it is not known."""
    found = number.node.hint
    return float(found) if found is not None and guard_equal(number, found) else None


def known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every input that the graph's guards admit."""
    return bool(statically_known_true(a == b))


def guard_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for the inputs being compiled for, which becomes a guard."""
    # Outside of a compile nobody checks what is assumed here.
    return bool(a == b) if TracingContext.try_get() else known_equal(a, b)


def at_least(size: Any, least: int) -> bool:
    """Whether a size is at least this for the inputs being compiled for: a guard where it is dynamic.

    But where the user has fixed its range (``mark_dynamic`` with ``min`` or ``max``): a guard inside is an error then.
    """
    if isinstance(size, torch.SymInt) and size.node.hint is not None and _range_is_fixed(size):
        return hint(size) >= least
    return bool(size >= least)


def _range_is_fixed(size: torch.SymInt) -> bool:
    symbols = symbolic(size).free_symbols
    for tracked in getattr(size.node.shape_env, "tracked_fakes", None) or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", ())
        for of, constraint in zip(getattr(tracked.fake, "shape", ()), constraints, strict=False):
            if isinstance(constraint, StrictMinMaxConstraint) and symbolic(of).free_symbols & symbols:
                return True
    return False


def forward_mode() -> bool:
    """Whether a level of forward-mode AD is open."""
    return bool(forward_ad._current_level >= 0)


def function_gradient() -> bool:
    """Whether ``torch.func`` differentiates what runs now (``grad``, ``vjp``, ``jacrev``), uncompiled."""
    if torch.compiler.is_compiling():
        return False
    found = torch._C._functorch.peek_interpreter_stack()
    return found is not None and found.key() == torch._C._functorch.TransformType.Grad


def guard_forward_mode() -> None:
    """What is compiled now is compiled anew where a level of forward-mode AD is open, and where it is not."""
    context = TracingContext.try_get()
    if context is not None:
        guard = GlobalStateSource().make_guard(GuardBuilder.DUAL_LEVEL)
        context.guards_context.dynamo_guards.add(guard)


def gradient_stops(source: fx.Node, made: fx.Node) -> bool:
    """Whether ``made`` is made of ``source`` without a gradient (``detach``, ``no_grad``), where gradients matter."""
    if not torch.is_grad_enabled() or "example_value" not in made.meta:
        return False
    return bool(value_of(source).requires_grad and not value_of(made).requires_grad)


def gradient_wanted(node: fx.Node) -> bool:
    """Whether a gradient in the node's value is asked for."""
    return torch.is_grad_enabled() and bool(value_of(node).requires_grad)


def compile_id() -> str:
    """Which compile of Dynamo is under way: ``frame/recompile`` as in its logs; "" outside of one."""
    found = CompileContext.current_compile_id()
    return "" if found is None else str(found)


def compiled_function() -> str:
    """``name (file:line)`` of the function that Dynamo compiles; "" outside of a compile."""
    codes = TracingContext.get_traced_code() if TracingContext.try_get() else None
    return f"{codes[0].co_name} ({codes[0].co_filename}:{codes[0].co_firstlineno})" if codes else ""


def recompile_reason() -> str:
    """The guard that failed, where the compile under way is a recompile; else ""."""
    metrics = getattr(get_metrics_context(), "_metrics", {}) if compile_id() else {}
    return str(metrics.get("recompile_reason") or "")


def break_reason(gm: fx.GraphModule) -> str:
    """Why Dynamo ended the graph here, and the user's line; "" where it is the last one."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return ""
    frames = [f"{frame.filename}:{frame.lineno}" for frame in reason.user_stack]
    first = reason.reason.strip().splitlines()
    return f"{first[0] if first else 'graph break'}{f' at {frames[-1]}' if frames else ''}"
