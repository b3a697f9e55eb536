"""What a query without any key gets where a finite number forbids: its logits are all that number, and its result is
the mean of all values."""

from __future__ import annotations

import operator

import sympy
import torch
from torch import fx

from ..kernels.band import Band
from .compat import symbolic, value_of
from .keys import General, Q
from .masks import Mask
from .site import Attention


def or_mean(
    graph: fx.Graph, out: fx.Node, query: fx.Node, value: fx.Node, valid: fx.Node, a: Attention, mask: Mask
) -> fx.Node:
    """``out`` ``[B, H, Nq, Dv]``, with the mean of ``value`` ``[B, Hkv, Nk, Dv]`` for queries without a key.

    ``valid``: ``[B, Nk]``.
    """
    some = _some(graph, query, valid, a, mask)
    for axis in (1, 3):
        some = graph.call_method("unsqueeze", (some, axis))
    group = int(a.size(*a.heads)) // int(a.size(*a.kv_heads))
    mean = graph.call_method("repeat_interleave", (graph.call_method("mean", (value, 2, True)), group, 1))
    return graph.call_function(torch.where, (some, out, mean))


def _some(graph: fx.Graph, query: fx.Node, valid: fx.Node, a: Attention, mask: Mask) -> fx.Node:
    """Whether there is a key for each query, ``[B, Nq]`` or ``[B, 1]``."""
    if mask.logits.allowed == sympy.true:
        if mask.causal:
            return graph.call_function(operator.gt, (graph.call_method("cumsum", (valid, 1)), 0))
        return graph.call_method("any", (valid, 1, True))
    ends = reach_of(mask, a)
    k_len = graph.call_method("size", (valid, 1))
    q_len, device = graph.call_method("size", (query, 2)), value_of(a.key.node).device
    places = General(graph, {}, {Q: graph.call_function(torch.arange, (q_len,), {"device": device})})
    before = graph.call_function(torch.nn.functional.pad, (graph.call_method("cumsum", (valid, 1)), (1, 0)))

    def counted(end: sympy.Expr) -> fx.Node:
        """Valid keys before ``end``, of each query."""
        place = graph.call_method("clamp", (places.tensor(places.of(end)), 0, k_len))
        return graph.call_function(torch.index_select, (before, 1, place))

    low = 0 if ends.low is None else ends.low
    last = graph.call_method("narrow", (before, 1, k_len, 1)) if ends.high is None else counted(ends.high + 1)
    return graph.call_function(operator.gt, (last, counted(low) if low != 0 else 0))


def reach_of(mask: Mask, a: Attention) -> Band:
    """The run of keys that causality and the rest of the mask leave each query."""
    shift = symbolic(a.size(a.k)) - symbolic(a.size(a.q))
    return mask.logits.band(mask.causal, shift)
