"""Masks that are not understood, but are there: tensors that a kernel reads as they come."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import fx

from ..kernels.logits import Logits, settled
from ..kernels.masked import lowest_of
from ..kernels.reads import HIDDEN, digits, hides, reads_of
from .compat import gradient_wanted, guard_equal, value_of
from .elements import Elements, NotClosedForm
from .masks import ABSORBS, Mask, hidden_with, named
from .site import Add, Attention, Fill, Site

NUMBERS = (torch.float32, torch.bfloat16, torch.float16)

MOST = 99
"""Tensors that names of two digits keep in order."""


def as_it_comes(site: Site, mask: Mask, few: bool = False) -> Mask | None:
    """``mask`` as what tensors ``[B or 1, H or 1, Nq or 1, Nk or 1]``, in any order of axes, say of each pair, or add.

    None: something else is done to the logits, or a tensor is no such one, or it is made from the logits, which are
    in memory then, or it is not the same any more when the site is computed.

    ``few``: for ``kernels.few``, which has numbers beside a softcap and a learned sink, too.
    """
    a = site.attention
    found = _tensors(a, site, few) if a is not None else None
    if a is None or found is None:
        return None
    nodes, logits = found
    reads = reads_of(logits)
    if reads is None or len(logits.tensors) != len(nodes) or len(nodes) > MOST:
        return None
    if not all(_there(site, node) and not _of_the_logits(node, a) for node in nodes):
        return None
    by_name = dict(zip(logits.tensors, nodes, strict=True))
    fits = all(
        _fits(size, axis, a)
        for read in reads
        for size, axis in zip(value_of(by_name[read.name]).shape, read.axes, strict=True)
    )
    return Mask(mask.text, logits=logits, loads=nodes) if fits else None


def _fits(size: Any, axis: Any, a: Attention) -> bool:
    """Whether an axis of this size holds all values of its coordinates, and nothing else."""
    sizes = {"b": a.size(*a.batch), "h": a.size(*a.heads), "q": a.size(a.q), "k": a.size(a.k)}
    merged = digits(axis) or []
    whole: Any = 1
    for at, count in merged:
        whole = whole * sizes[str(at)]
        if count != -1 and not guard_equal(count, sizes[str(at)]):
            return False
    return guard_equal(size, whole)


def _tensors(a: Attention, site: Site, few: bool) -> tuple[tuple[fx.Node, ...], Logits] | None:
    """The nodes that are read, in the order of their names, and all that the logits go through."""
    nodes: dict[fx.Node, str] = {}

    def read(node: fx.Node, index: Any) -> Any:
        name = nodes.setdefault(node, f"t{len(nodes):02}")
        return named(sympy.Function(name)(*index), a)

    allowed, bias = sympy.true, sympy.S.Zero
    for at, term in enumerate(a.terms):
        if isinstance(term, Fill) and value_of(term.condition).dtype == torch.bool:
            atom = read(term.condition, term.index)
            says = sympy.Eq(atom, 0) if term.where else sympy.Ne(atom, 0)
            number = _number(term, a, site)
            if number == -math.inf:
                allowed = sympy.And(allowed, says)
            elif number is not None and at == 0 and (len(a.terms) == 1 or number < ABSORBS):
                # Where others hide, too, a query without keys attends what has the highest number.
                bias += hides(says, HIDDEN if len(a.terms) == 1 else number)
            else:
                return None
        elif isinstance(term, Add) and isinstance(term.what, fx.Node) and value_of(term.what).dtype in NUMBERS:
            factor = sympy.Integer(1) if term.factor == 1 else sympy.Float(term.factor)
            bias += factor * read(term.what, term.index)
        else:
            return None
    if bias != 0 and not few and (a.sink_logit is not None or a.softcap):
        return None
    return tuple(nodes), settled(Logits(allowed, bias))


def _number(term: Fill, a: Attention, site: Site) -> float | None:
    """What a fill hides with; None: it is no such number."""
    try:
        lowest = lowest_of(value_of(a.query.node).dtype)
        return float(hidden_with(term, Elements(site.memory, a.sizes), lowest))
    except NotClosedForm:
        return None


def _there(site: Site, node: fx.Node) -> bool:
    """Whether a tensor can be read where the site is computed, and has no gradient."""
    assert site.attention is not None
    if value_of(node).device != value_of(site.attention.query.node).device or gradient_wanted(node):
        return False
    return node in site.output.all_input_nodes or not site.memory.changes(node, site.output)


def _of_the_logits(node: fx.Node, a: Attention) -> bool:
    """Whether a tensor may be made from this attention's own logits: it is made from queries and keys."""
    seen, todo = {node}, [node]
    while todo:
        fresh = set(todo.pop().all_input_nodes) - seen
        seen |= fresh
        todo.extend(fresh)
    return {a.query.node, a.key.node} <= seen
