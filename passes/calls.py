"""One vocabulary: what a node calls, whether it is written for Dynamo, ``symbolic_trace`` or ATen.

``call_of(node)`` gives the operator's one name (``torch.Tensor.matmul``, ``operator.matmul`` and
``aten.matmul.default`` are all "matmul") and its arguments by one set of names ("input" for the
first tensor, "dim" for an axis). An operator that is written in place has the name of the one that
is not: ``memory.Memory`` says whether that difference matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .compat import guard_equal, value_of

_ALIASES = {
    "__and__": "and",
    "and_": "and",
    "logical_and": "and",
    "bitwise_and": "and",
    "__or__": "or",
    "or_": "or",
    "logical_or": "or",
    "bitwise_or": "or",
    "__xor__": "xor",
    "logical_xor": "xor",
    "bitwise_xor": "xor",
    "__invert__": "not",
    "invert": "not",
    "inv": "not",
    "logical_not": "not",
    "bitwise_not": "not",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "not_equal": "ne",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "__truediv__": "div",
    "__rtruediv__": "rdiv",
    "__rdiv__": "rdiv",
    "floor_divide": "floordiv",
    "__floordiv__": "floordiv",
    "mod": "remainder",
    "__mod__": "remainder",
    "multiply": "mul",
    "__rmul__": "mul",
    "__radd__": "add",
    "subtract": "sub",
    "__rsub__": "rsub",
    "negative": "neg",
    "absolute": "abs",
    "special_softmax": "softmax",
    "_safe_softmax": "softmax",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "reshape": "view",
    "unsafe_view": "view",
    "reshape_alias": "view",
    "view_copy": "view",
    "view_as": "view",
    "reshape_as": "view",
    "unflatten": "view",
    "flatten": "view",
    "ravel": "view",
    "squeeze": "view",
    "unsqueeze": "view",
    "squeeze_copy": "view",
    "unsqueeze_copy": "view",
    "permute_copy": "permute",
    "expand_copy": "expand",
    "expand_as": "expand",
    "broadcast_to": "expand",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "transpose_copy": "transpose",
    "moveaxis": "movedim",
    "adjoint": "mT",
    "tile": "repeat",
    "slice_copy": "slice",
    "select_copy": "select",
    "native_dropout": "dropout",
    "feature_dropout": "dropout",
    "alpha_dropout": "opaque",
    # What changes no element (a cast is looked at by whoever asks).
    "to_copy": "to",
    "type": "to",
    "type_as": "to",
    "float": "to",
    "double": "to",
    "half": "to",
    "bfloat16": "to",
    "bool": "to",
    "int": "to",
    "long": "to",
    "convert_element_type": "to",
    "contiguous": "same",
    "clone": "same",
    "alias": "same",
    "positive": "same",
    "lift_fresh": "same",
    "lift_fresh_copy": "same",
    "requires_grad": "same",
    "identity": "same",
    "data": "detach",
}
_SIGNATURES: dict[str, tuple[str, ...]] = {
    "matmul": ("input", "other"),
    "bmm": ("input", "mat2"),
    "mm": ("input", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
    "softmax": ("input", "dim", "_stacklevel", "dtype"),
    "dropout": ("input", "p", "training", "inplace"),
    "masked_fill": ("input", "mask", "value"),
    "where": ("condition", "input", "other"),
    "transpose": ("input", "dim0", "dim1"),
    "movedim": ("input", "source", "destination"),
    "permute": ("input", "dims"),
    "expand": ("input", "size"),
    "repeat": ("input", "repeats"),
    "repeat_interleave": ("input", "repeats", "dim"),
    "view": ("input", "size"),
    "select": ("input", "dim", "index"),
    "narrow": ("input", "dim", "start", "length"),
    "slice": ("input", "dim", "start", "end", "step"),
    "getitem": ("input", "index"),
    "index": ("input", "index"),
    "gather": ("input", "dim", "index"),
    "getattr": ("input", "name"),
    "tril": ("input", "diagonal"),
    "triu": ("input", "diagonal"),
    "full": ("size", "fill_value"),
    "full_like": ("input", "fill_value"),
    "new_full": ("input", "size", "fill_value"),
    "scalar_tensor": ("s",),
    "cumsum": ("input", "dim"),
    "diff": ("input", "n", "dim", "prepend", "append"),
    "clamp": ("input", "min", "max"),
    "clamp_min": ("input", "min"),
    "clamp_max": ("input", "max"),
    "cat": ("tensors", "dim"),
    "iota": ("length",),
    "amax": ("input", "dim", "keepdim"),
    "max": ("input", "dim", "keepdim"),
    "sum": ("input", "dim", "keepdim"),
    "to": ("input", "dtype"),
    "same": ("input",),
    "detach": ("input",),
}
_VARIADIC = {"permute": "dims", "expand": "size", "repeat": "repeats", "view": "size"}
_RENAMED = {"self": "input", "axis": "dim", "x": "input", "a": "input", "b": "other", "repeat_times": "repeats"}
_INPLACE_OPERATORS = {"iadd", "isub", "imul", "iand", "ior", "ixor", "itruediv", "ifloordiv", "imod", "imatmul"}
PURE = {
    *("matmul", "bmm", "mm", "baddbmm", "einsum", "softmax", "dropout", "same", "to", "tanh", "amax", "max", "any"),
    *("add", "sub", "rsub", "mul", "div", "rdiv", "neg", "masked_fill", "where", "eq", "not", "transpose", "permute"),
    *("movedim", "view", "expand", "repeat_interleave", "getitem", "slice", "select", "narrow", "mT", "t", "T", "full"),
    *("full_like", "zeros_like", "ones_like", "detach", "cat"),
}
"""Operators that do nothing but compute, of those that an attention is written with."""

ASSERTS = {"assert_tensor_metadata"}
SHAPE_ONLY = {
    "full_like",
    "zeros_like",
    "ones_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "size",
} | ASSERTS
"""Operators that read the shape of their input, not its elements."""

_VIEWS = {"view", "transpose", "permute", "t", "movedim", "expand"}
_PROPERTIES = {"mT", "T", "H", "mH"}


@dataclass(frozen=True)
class Call:
    """``name``: the operator. ``args``: what it got, by name. ``spelled``: its name in the graph."""

    name: str
    args: Mapping[str, Any]
    spelled: str

    def __getitem__(self, key: str) -> Any:
        return self.args[key]

    def get(self, key: str, default: Any = None) -> Any:
        found = self.args.get(key, default)
        return default if found is None else found

    @property
    def inputs(self) -> list[Any]:
        """The operands, in order."""
        return list(self.args.values())


def call_of(node: fx.Node) -> Call:
    """What ``node`` calls. Placeholders and attributes are calls named after ``node.op``."""
    if node.op in ("placeholder", "get_attr", "output"):
        return Call(node.op, {}, node.op)
    if node.op == "call_module":
        return _module_call(node)
    spelled = node.target if isinstance(node.target, str) else _function_name(node.target)
    name = _canonical(spelled)
    if name in _VIEWS and spelled.endswith("_") and not spelled.startswith("__"):
        name = "opaque"  # it changes the shape of its input, whose record here may be the new one
    if name == "getattr" and node.args[1] in _PROPERTIES:
        return Call(str(node.args[1]), {"input": node.args[0]}, spelled)
    return Call(name, _arguments(node, name, spelled), spelled)


def mutates(node: fx.Node) -> list[Any]:
    """The arguments that the node's operator is known to write to."""
    found: list[Any] = [node.kwargs["out"]] if "out" in node.kwargs else []
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        for at, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found.append(node.args[at] if at < len(node.args) else node.kwargs.get(argument.name))
        return found
    if node.op not in ("call_function", "call_method"):
        return found
    spelled = node.target if isinstance(node.target, str) else _function_name(node.target)
    dunder = spelled.startswith("__") and spelled.endswith("__")
    in_place = spelled.strip("_") in _INPLACE_OPERATORS | {"setitem", "ipow", "ilshift", "irshift"}
    trailing = spelled.endswith("_") and not dunder and spelled not in _ALIASES
    if in_place or trailing or node.kwargs.get("inplace"):
        found += node.args[:1]
    return found


def is_dead(node: fx.Node, depth: int = 8) -> bool:
    """Whether nothing comes of what the node computes: no user, or only such users, or assertions."""
    if call_of(node).name in ASSERTS:
        return True
    if node.op not in ("call_function", "call_method") or mutates(node) or not depth:
        return False
    known = call_of(node).name in PURE | SHAPE_ONLY | {"mean", "sum"}
    return known and all(is_dead(user, depth - 1) for user in node.users)


_OWN = ("torch", "_operator", "operator", "builtins", "math")


def _function_name(target: Any) -> str:
    """The name of an operator or function of torch or Python; of any other, one that no rule has."""
    packet = getattr(target, "overloadpacket", target)
    qualified = getattr(packet, "_qualified_op_name", None)  # namespace::name
    if qualified is not None:
        return str(packet.__name__) if qualified.partition("::")[0] in ("aten", "prims") else str(qualified)
    module = getattr(target, "__module__", None)
    name = getattr(target, "__name__", str(target))
    return name if module is None or module.partition(".")[0] in _OWN else f"{module}.{name}"


def _canonical(spelled: str) -> str:
    if spelled in _ALIASES:
        return _ALIASES[spelled]
    bare = spelled.strip("_")
    if spelled in _INPLACE_OPERATORS or bare in _INPLACE_OPERATORS:
        bare = bare[1:]
    return _ALIASES.get(bare, _ALIASES.get(bare + "_", bare))


def _arguments(node: fx.Node, name: str, spelled: str) -> dict[str, Any]:
    if name == "where" and node.op == "call_method":
        names: tuple[str, ...] = ("input", "condition", "other")  # yes.where(condition, no)
    elif name == "softmax" and (node.op == "call_method" or hasattr(node.target, "_schema")):
        names = ("input", "dim", "half_to_float" if spelled == "_softmax" else "dtype")
    elif name == "dropout" and spelled == "dropout" and hasattr(node.target, "_schema"):
        names = ("input", "p", "training")
    else:
        names = _SIGNATURES.get(name, ("input", "other"))
    args = node.args
    if name in _VARIADIC and spelled in (name, "reshape", "broadcast_to", "tile") and node.op == "call_method":
        args = (*args[:1], args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:])
    elif name == "view":
        args = args[:1]  # which view it is, shapes tell
    elif name in ("ones", "zeros", "ones_like", "zeros_like", "new_ones", "new_zeros", "arange"):
        args = ()  # the size is the shape; ``Elements`` reads the range
    found = dict(zip(names, args, strict=False))
    found |= {f"argument {at}": arg for at, arg in enumerate(args) if at >= len(names)}
    return found | {_RENAMED.get(key, key): value for key, value in node.kwargs.items()}


def _module_call(node: fx.Node) -> Call:
    """A leaf module of ``symbolic_trace`` that is one of the operators."""
    owner = node.graph.owning_module
    module = owner.get_submodule(str(node.target)) if owner is not None else None
    spelled = type(module).__name__
    if module is not None and hooked(module):
        return Call("opaque", dict(node.kwargs), spelled)
    given = {"input": node.args[0] if node.args else next(iter(node.kwargs.values()), None)}
    if isinstance(module, nn.Softmax):
        return Call("softmax", given | {"dim": module.dim}, spelled)
    if isinstance(module, nn.Dropout):
        return Call("dropout", given | {"p": module.p, "training": module.training}, spelled)
    if isinstance(module, nn.Identity):
        return Call("same", given, spelled)
    if isinstance(module, (nn.Flatten, nn.Unflatten)):
        return Call("view", given, spelled)
    return Call("call_module", dict(node.kwargs), spelled)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module, or one inside it, also calls hooks of the user."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(part, kind, None) for part in module.modules() for kind in kinds)


def dropout_of(call: Call) -> Any:
    """The probability with which a "dropout" drops: 0.0 where it is off."""
    training = call.get("training", call.get("train", True))
    # native_dropout(input, p, train): train=None means on.
    return probability(call.get("p", 0.5)) if training else 0.0


def probability(given: Any) -> Any:
    """A dropout's probability: a float of the run time, as dynamic graphs have, that is 0.0 is fixed by a guard."""
    value = value_of(given) if isinstance(given, fx.Node) else given
    return 0.0 if isinstance(value, torch.SymFloat) and guard_equal(value, 0.0) else given


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
