"""Whether a product is near, before anything is proved: what keeps a near miss from passing in silence."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..calls import call_of, is_float
from ..compat import value_of
from ..contract import product

VIEWS = {"view", "permute", "transpose", "movedim", "mT", "t", "T", "expand", "getitem", "slice", "select", "narrow"}
_FREE = VIEWS | {"same", "to"}
# A search for a product that explains a near miss does not pass these: they begin something else.
_ENDS = {"linear", "addmm", "embedding", "softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm"} | {
    *("batch_norm", "native_layer_norm", "native_group_norm", "topk", "sum", "mean", "conv1d", "conv2d", "conv3d"),
    *("convolution", "scaled_dot_product_attention", "placeholder", "get_attr", "output", "opaque"),
}
# How many operators it does pass, views not counted.
REACH = 12
MOST = 200
# What makes several tensors of weights, of which one may go on.
_TUPLES = {"native_dropout", "split", "split_with_sizes", "tensor_split", "chunk", "unbind"}


def reaches_back(node: Any, steps: int) -> bool:
    """Whether a product lies behind ``node``, through operators that keep a tensor of logits one."""
    todo, seen = [(node, steps)], set()
    while todo:
        at, left = todo.pop()
        if not isinstance(at, fx.Node) or at in seen or not is_float(value_of(at)):
            continue
        seen.add(at)
        call = call_of(at)
        if product(at, call) is not None:
            return True
        if call.name in _ENDS or not left or len(seen) > MOST:
            continue
        cost = 0 if call.name in _FREE else 1
        todo += [(source, left - cost) for source in at.all_input_nodes]
    return False


def reaches_forward(weights: fx.Node, node: fx.Node, steps: int) -> bool:
    """Whether what ``node`` makes of the weights becomes the operand of a product."""
    todo = [(weights, node, steps)]
    seen: set[fx.Node] = set()
    while todo:
        source, at, left = todo.pop()
        call = call_of(at)
        found = product(at, call)
        if found is not None:
            if source in (found.left, found.right):
                return True
            continue
        value = value_of(at)
        tuple_of = isinstance(value, (tuple, list)) and call.spelled.strip("_") in _TUPLES
        if call.name in _ENDS or at in seen or not left or not (is_float(value) or tuple_of):
            continue
        seen.add(at)
        cost = 0 if call.name in _FREE else 1
        if len(seen) < MOST:
            todo += [(at, user, left - cost) for user in at.users]
    return False
