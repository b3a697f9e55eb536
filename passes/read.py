"""Masks that are not understood, but are there: a bool tensor that a kernel reads as it comes."""

from __future__ import annotations

import math

import sympy
import torch
from torch import fx

from ..kernels.logits import Logits, settled
from .compat import known_equal, value_of
from .masks import Mask, named
from .site import Fill, Site


def as_it_comes(site: Site, mask: Mask) -> Mask | None:
    """``mask`` as what one tensor ``[B or 1, H or 1, Nq, Nk]``, in any order of axes, says of each pair.

    None: something else is done to the logits, or the tensor is no such one, or it is made from the logits, which are
    in memory then, or it is not the same any more when the site is computed.
    """
    a = site.attention
    fill = a.terms[0] if a is not None and len(a.terms) == 1 else None
    if a is None or not isinstance(fill, Fill) or fill.value != -math.inf:
        return None
    node, says = fill.condition, sympy.Eq if fill.where else sympy.Ne
    tensor = value_of(node)
    if tensor.dtype != torch.bool or tensor.device != value_of(a.query.node).device:
        return None
    logits = settled(Logits(named(says(sympy.Function("t00")(*fill.index), 0), a)))
    at_the_call = node in site.output.all_input_nodes
    if logits.read is None or not (at_the_call or not site.memory.changes(node, site.output)):
        return None
    if _made_from(node, a.query.node):
        return None
    sizes = {"b": a.size(*a.batch), "h": a.size(*a.heads), "q": a.size(a.q), "k": a.size(a.k), "0": 1}
    fits = all(known_equal(size, sizes[str(at)]) for size, at in zip(tensor.shape, logits.read.axes, strict=True))
    return Mask(mask.text, logits=logits, loads=(node,)) if fits else None


def _made_from(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``source`` is among what ``node`` is made from."""
    seen, todo = {node}, [node]
    while todo:
        fresh = set(todo.pop().all_input_nodes) - seen
        seen |= fresh
        todo.extend(fresh)
    return source in seen
