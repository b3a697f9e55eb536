"""Lift masks: from the mask tensor of a site to what it says about (b, h, q, k)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from .compat import guard_equal, known_equal, symbolic, value_of
from .elements import Elements, NotClosedForm
from .find import Site

LOWEST = -1e9
"""A logit that this is added to has no weight, in float32, beside one that nothing is added to."""

B, H, Q, K = sympy.symbols("b h q k", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Mask:
    """What a site's queries may attend.

    Attributes:
        text: the mask in plain maths. causal: key ``k`` only for ``k <= q + Nk - Nq``.
        valid: node ``[B, Nk]``; 0 or False where a key is padding. None: every key is valid.
        reason: why it cannot be used, a code of ``reasons.REASONS`` perhaps with detail; "" if it can.
        producers: the nodes that built the mask, which nothing may need any more.
    """

    text: str
    causal: bool = False
    valid: fx.Node | None = None
    reason: str = ""
    producers: tuple[fx.Node, ...] = ()


def lift(site: Site) -> Mask:
    """Read the producer graph of the site's mask."""
    q_len, k_len = value_of(site.query).shape[2], value_of(site.key).shape[2]
    if site.mask is None:
        if site.is_causal and not known_equal(q_len, k_len):
            return Mask("k <= q", reason="causal_misaligned")
        return Mask("k <= q" if site.is_causal else "true", causal=site.is_causal)
    if site.is_causal:
        return Mask("?", reason="invalid_call")
    mask = value_of(site.mask)
    elements = Elements(site.modified)
    index = tuple(
        sympy.Integer(0) if isinstance(size, int) and size == 1 else axis
        for axis, size in zip((B, H, Q, K)[4 - mask.dim() :], mask.shape, strict=True)
    )
    try:
        meaning = elements.at(site.mask, index)
        if mask.dtype != torch.bool:
            return _additive(site, meaning, elements, symbolic(k_len) - symbolic(q_len))
    except NotClosedForm as error:
        return _opaque(site.mask, str(error))
    except Exception as error:  # an unforeseen spelling must cost the speed, never the model
        return _opaque(site.mask, f"a spelling that is not understood ({type(error).__name__}: {error})")
    return _classify(site, sympy.sympify(meaning), elements, symbolic(k_len) - symbolic(q_len))


def _additive(site: Site, added: Any, elements: Elements, shift: sympy.Expr) -> Mask:
    """A float mask that adds 0 where a key is allowed and -inf, or nearly, where it is not."""
    try:
        allowed = _adds_nothing(sympy.sympify(added))
    except NotClosedForm as error:
        return Mask(f"+ {_plain(added)}", reason=f"additive_mask: {error}")
    mask = _classify(site, allowed, elements, shift)
    # A query without keys gives 0 under -inf, but the mean of all values under a finite number:
    # only where every query has its own key is the difference of no account.
    always_a_key = mask.causal and mask.valid is None and shift == 0
    finite = any(number.is_finite and number <= LOWEST for number in sympy.sympify(added).atoms(sympy.Number))
    if not mask.reason and finite and not always_a_key:
        return Mask(mask.text, reason="additive_mask: a finite number where padded queries have no key")
    return mask


def _adds_nothing(added: Any) -> Any:
    """Where the expression is 0; everywhere else it must be so low that a weight is 0."""
    if added.is_number:
        if added.is_zero:
            return sympy.true
        if added == -sympy.oo or added <= LOWEST:
            return sympy.false
        raise NotClosedForm(f"it adds {added} to logits")
    if isinstance(added, sympy.Add):
        return sympy.And(*(_adds_nothing(part) for part in added.args))
    if not isinstance(added, sympy.Piecewise):
        raise NotClosedForm(f"it adds {_plain(added)} to logits")
    found, before = sympy.false, sympy.false
    for value, condition in added.args:
        found = sympy.Or(found, sympy.And(condition, sympy.Not(before), _adds_nothing(value)))
        before = sympy.Or(before, condition)
    return found


def _opaque(mask: fx.Node, why: str) -> Mask:
    return Mask(f"{mask.name}[b, h, q, k]", reason=f"opaque_mask: {why}")


def _classify(site: Site, meaning: Any, elements: Elements, shift: sympy.Expr) -> Mask:
    text = _plain(meaning)
    causal, valid = False, None
    for term in _conjuncts(meaning):
        if _is_causal(term, shift):
            causal = True
            continue
        keys = _key_validity(term, elements, site)
        if keys is not None and valid is None:
            valid = keys
            continue
        opaque = any(_reads_pairs(atom) for atom in term.atoms(sympy.core.function.AppliedUndef))
        return Mask(text, reason="opaque_mask" if opaque else f"unsupported_mask: {_plain(term)}")
    return Mask(text, causal, valid, producers=tuple(elements.seen))


def _conjuncts(meaning: Any) -> Iterable[Any]:
    if meaning == sympy.true:
        return ()
    return meaning.args if isinstance(meaning, sympy.And) else (meaning,)


def _is_causal(term: Any, shift: sympy.Expr) -> bool:
    """Whether ``term`` is ``k <= q + shift`` in any spelling."""
    if isinstance(term, (sympy.Ge, sympy.Gt)):
        term = term.reversed
    if not isinstance(term, (sympy.Le, sympy.Lt)):
        return False
    strict = 1 if isinstance(term, sympy.Lt) else 0
    return bool(sympy.expand(term.lhs - term.rhs + strict - (K - Q - shift)) == 0)


def _key_validity(term: Any, elements: Elements, site: Site) -> fx.Node | None:
    """The node ``[B, Nk]`` whose element (b, k) is not 0 exactly where ``term`` holds."""
    if not isinstance(term, sympy.Ne) or term.rhs != 0:
        return None
    atom = term.lhs
    if not isinstance(atom, sympy.core.function.AppliedUndef):
        return None
    node = elements.loads[atom.func.__name__]
    shape, key = value_of(node).shape, value_of(site.key).shape
    if len(shape) != 2 or atom.args[1] != K or not guard_equal(shape[1], key[2]):
        return None
    one_row = isinstance(shape[0], int) and shape[0] == 1
    if one_row:
        return node if atom.args[0] in (B, 0) else None
    return node if atom.args[0] == B and guard_equal(shape[0], key[0]) else None


def _reads_pairs(atom: Any) -> bool:
    return bool(atom.has(Q) and atom.has(K))


def _plain(expr: Any) -> str:
    """The expression as a reader would write it."""
    if isinstance(expr, sympy.And):
        return " and ".join(sorted(f"({_plain(a)})" if isinstance(a, sympy.Or) else _plain(a) for a in expr.args))
    if isinstance(expr, sympy.Or):
        return " or ".join(sorted(f"({_plain(a)})" if isinstance(a, sympy.And) else _plain(a) for a in expr.args))
    if isinstance(expr, sympy.Ne) and expr.rhs == 0:
        return _plain(expr.lhs)
    if isinstance(expr, (sympy.Ge, sympy.Gt)):
        return _plain(expr.reversed)
    if isinstance(expr, sympy.core.function.AppliedUndef):
        return f"{expr.func.__name__}[{', '.join(str(a) for a in expr.args)}]"
    return str(expr).replace("True", "true").replace("False", "false")
