"""Masks that are not understood, but are there: a tensor that a kernel reads as it comes."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import fx

from ..kernels.logits import Logits, settled
from .compat import gradient_wanted, guard_equal, value_of
from .masks import Mask, named
from .site import Add, Attention, Fill, Site

NUMBERS = (torch.float32, torch.bfloat16, torch.float16)


def as_it_comes(site: Site, mask: Mask) -> Mask | None:
    """``mask`` as what one tensor ``[B or 1, H or 1, Nq, Nk]``, in any order of axes, says of each pair, or adds.

    None: something else is done to the logits, or the tensor is no such one, or it is made from the logits, which are
    in memory then, or it is not the same any more when the site is computed.
    """
    a = site.attention
    found = _one_tensor(a) if a is not None else None
    if a is None or found is None:
        return None
    node, logits = found
    tensor = value_of(node)
    if logits.read is None or tensor.device != value_of(a.query.node).device or _made_from(node, a.query.node):
        return None
    if gradient_wanted(node):
        return None
    at_the_call = node in site.output.all_input_nodes
    if not at_the_call and site.memory.changes(node, site.output):
        return None
    sizes = {"b": a.size(*a.batch), "h": a.size(*a.heads), "q": a.size(a.q), "k": a.size(a.k), "0": 1}
    fits = all(guard_equal(size, sizes[str(at)]) for size, at in zip(tensor.shape, logits.read.axes, strict=True))
    return Mask(mask.text, logits=logits, loads=(node,)) if fits else None


def _one_tensor(a: Attention) -> tuple[fx.Node, Logits] | None:
    """The node that is all that the logits go through, and what it does there."""
    if len(a.terms) != 1:
        return None
    (term,) = a.terms
    if isinstance(term, Fill) and term.value == -math.inf and value_of(term.condition).dtype == torch.bool:
        says = sympy.Eq if term.where else sympy.Ne
        return term.condition, settled(Logits(named(says(_read(term.index), 0), a)))
    if not isinstance(term, Add) or not isinstance(term.what, fx.Node) or term.factor != 1:
        return None
    if a.sink_logit is not None or a.softcap or value_of(term.what).dtype not in NUMBERS:
        return None
    return term.what, settled(Logits(bias=named(_read(term.index), a)))


def _read(index: Any) -> Any:
    return sympy.Function("t00")(*index)


def _made_from(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``source`` is among what ``node`` is made from."""
    seen, todo = {node}, [node]
    while todo:
        fresh = set(todo.pop().all_input_nodes) - seen
        seen |= fresh
        todo.extend(fresh)
    return source in seen
