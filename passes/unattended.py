"""What a query without any key gets where a finite number forbids: its logits are all that number, and its result is
the mean of all values."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import sympy
import torch
from torch import fx

from ..kernels.band import Q
from .compat import value_of
from .keys import General
from .masks import Mask, band_of
from .site import Add, Attention


def or_mean(
    graph: fx.Graph, out: fx.Node, operands: Sequence[fx.Node], valid: fx.Node, a: Attention, mask: Mask
) -> fx.Node:
    """``out`` ``[B, H, Nq, Dv]``, with the mean of all values for queries without a key.

    ``operands``: query ``[B, H, Nq, D]``, key ``[B, Hkv, Nk, D]``, value ``[B, Hkv, Nk, Dv]``. ``valid``: ``[B, Nk]``.
    Where the number is added, query and key have gradients there, too.
    """
    query, _, value = operands
    some = _some(graph, query, valid, a, mask)
    for axis in (1, 3):
        some = graph.call_method("unsqueeze", (some, axis))
    if a.trained and any(isinstance(term, Add) for term in a.terms):
        found = graph.call_function(torch.ops.prescore.attend_uniform.default, (*operands, a.scale, a.softcap or 0.0))
    else:
        group = int(a.size(*a.heads)) // int(a.size(*a.kv_heads))
        found = graph.call_method("repeat_interleave", (graph.call_method("mean", (value, 2, True)), group, 1))
    return graph.call_function(torch.where, (some, out, found))


def _some(graph: fx.Graph, query: fx.Node, valid: fx.Node, a: Attention, mask: Mask) -> fx.Node:
    """Whether there is a key for each query, ``[B, Nq]`` or ``[B, 1]``."""
    if mask.logits.allowed == sympy.true:
        if mask.causal:
            return graph.call_function(operator.gt, (graph.call_method("cumsum", (valid, 1)), 0))
        return graph.call_method("any", (valid, 1, True))
    ends = band_of(mask, a)
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
