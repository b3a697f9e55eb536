"""Lift masks: from what a site's logits go through to what it says about (b, h, q, k)."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import sympy
from sympy.core.function import AppliedUndef
from torch import fx

from ..kernels.band import B, Band, H, K, Q
from ..kernels.logits import NOTHING, Logits, settled
from ..kernels.masked import lowest_of
from .compat import guard_equal, symbolic, value_of
from .elements import Elements, NotClosedForm
from .extent import TOO_LARGE
from .indices import divide, ranges
from .keys import Keys, only_of_keys
from .maths import plain
from .memory import Memory
from .site import Add, Attention, Fill, Site, Term, Times

ABSORBS = -1e30
"""Beside less, no float32 logit shows, nor what is added to it."""


@dataclass(frozen=True)
class Mask:
    """What a site's queries may attend.

    Attributes:
        text: the mask in plain maths. causal: key ``k`` only for ``k <= q + Nk - Nq``.
        keys: which keys are valid. None: every key is.
        mean: a query that may attend no key gets the mean of all values (a finite number forbids).
        logits: what it says of pairs beyond that, which only generated kernels take; ``loads`` are the nodes that
            it reads, in the order of their names. needs: the reason where those do not run.
        reason: why it cannot be used, a code of ``reasons.REASONS`` perhaps with detail; "" if it can.
        producers: the nodes that built the mask, which nothing may need any more.
    """

    text: str
    causal: bool = False
    keys: Keys | None = None
    mean: bool = False
    logits: Logits = NOTHING
    loads: tuple[fx.Node, ...] = ()
    needs: str = ""
    reason: str = ""
    producers: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class _Meaning:
    """Where a key is allowed, what is added to its logit, and the finite numbers that forbid it.

    ``uniform``: to forbid every key of a query makes its logits all the same number.
    """

    allowed: Any = sympy.true
    bias: Any = sympy.S.Zero
    finite: frozenset[Any] = frozenset()
    uniform: bool = True


class _Opaque(Exception):
    """A term without a closed form, and why."""


Lifted = dict[Hashable, tuple[Mask, _Meaning]]
"""What is known of a graph's masks, by all that they depend on: layers that share a mask are asked once."""


def lift(site: Site, known: Lifted | None = None) -> Mask:
    """Read the producer graphs of the site's terms.

    ``known``: of the same graph; what is read is added.
    """
    attention = site.attention
    assert attention is not None
    q_len, k_len = attention.size(attention.q), attention.size(attention.k)
    if attention.is_causal:
        if attention.terms:
            return Mask("?", reason="invalid_call")
        if not guard_equal(q_len, k_len):
            return Mask("k <= q", reason="causal_misaligned")
        return Mask("k <= q", causal=True)
    known = {} if known is None else known
    key = _question(attention)
    if key not in known:
        known[key] = _answer(attention, site.memory)
    mask, meaning = known[key]
    shift = symbolic(k_len) - symbolic(q_len)
    nodes = [*mask.loads, *(mask.keys.nodes if mask.keys is not None else ())]
    if any(site.memory.changes(node, site.output) for node in nodes):
        return Mask(mask.text, reason="opaque_mask: modified in place")
    # A query without keys gives 0 under -inf (where torch's softmax gives NaN), but the mean of all
    # values under a finite number, where gradients are asked for with some in its logits; 0 again where a learned
    # sink, of no such number, has all the weight.
    always_a_key = mask.keys is None and shift.is_nonnegative
    if (
        mask.reason
        or not meaning.finite
        or attention.sink_logit is not None
        or (always_a_key and _every_query(mask.logits.allowed, shift))
    ):
        return mask
    told = not mask.needs or (mask.keys is not None and mask.logits.only_band)
    if len(meaning.finite) == 1 and meaning.uniform and told and (not mask.causal or shift == 0):
        return replace(mask, mean=True)
    return Mask(mask.text, reason="additive_mask: finite numbers where padded queries have no key")


def _question(a: Attention) -> Hashable:
    """All of an attention that its mask depends on."""
    return a.terms, a.batch, a.heads, a.q, a.k, ranges(a.sizes), value_of(a.query.node).dtype


def _answer(attention: Attention, memory: Memory) -> tuple[Mask, _Meaning]:
    """The mask, as far as it does not depend on the site, and what it is made from."""
    elements = Elements(memory, attention.sizes)
    try:
        meaning = _meaning(attention, elements)
    except _Opaque as why:
        elements = Elements(memory, attention.sizes, near=True)
        try:
            meaning = _meaning(attention, elements)
        except _Opaque:
            return _unread(attention, memory, str(why))
        if meaning.bias == 0:
            return _unread(attention, memory, str(why))
    bias = named(meaning.bias, attention)
    if bias != 0 and _opaque_atoms(bias):
        text = _told(meaning, attention)
        return Mask(text, reason=f"opaque_mask: {text}"), meaning
    shift = symbolic(attention.size(attention.k)) - symbolic(attention.size(attention.q))
    mask = _classify(attention, named(meaning.allowed, attention), elements, shift)
    if bias != 0:
        text = _told(meaning, attention)
        mask = (
            Mask(text, reason=mask.reason)
            if mask.reason
            else replace(mask, text=text, needs=f"unsupported_mask: {text}")
        )
    return _of_pairs(mask, bias, elements), meaning


def _unread(attention: Attention, memory: Memory, why: str) -> tuple[Mask, _Meaning]:
    """A mask that cannot be used, as a reader understands it."""
    try:
        told = _meaning(attention, Elements(memory, attention.sizes, rounded=True))
    except _Opaque:
        return Mask(_name(attention.terms), reason=f"opaque_mask: {why}"), _Meaning()
    text = _told(told, attention)
    closed = told.bias != 0 and not _opaque_atoms(named(told.bias, attention))
    return Mask(text, reason=f"unsupported_mask: {text}" if closed else f"opaque_mask: {why}"), told


def band_of(mask: Mask, attention: Attention) -> Band:
    """The run of keys that causality and the rest of the mask leave each query."""
    shift = symbolic(attention.size(attention.k)) - symbolic(attention.size(attention.q))
    return mask.logits.band(mask.causal, shift)


@functools.cache
def attends_itself(allowed: Any, shift: Any) -> bool:
    """Whether what is said of pairs lets each query attend the key at its own position, ``q + shift``.

    What is said of a query alone does not count: where it says no, the query has no key at all.
    """
    of_keys = sympy.And(*(term for term in sympy.And.make_args(allowed) if term.has(K)))
    return bool(sympy.simplify(of_keys.subs(K, Q + shift)) == sympy.true)


def _every_query(allowed: Any, shift: Any) -> bool:
    """Whether each query may attend a key."""
    return allowed == sympy.true or (
        all(term.has(K) for term in sympy.And.make_args(allowed)) and shift == 0 and attends_itself(allowed, shift)
    )


def named(expr: Any, attention: Attention) -> Any:
    """The expression over b, h, q and k instead of the site's coordinates."""
    found: dict[sympy.Symbol, Any] = {}
    for symbol, merged in ((B, attention.batch), (H, attention.heads)):
        rest: Any = symbol
        for at, c in enumerate(merged):
            minor = sympy.prod([symbolic(attention.sizes[x]) for x in merged[at + 1 :]])
            found[c], rest = divide(rest, minor, {}) if at + 1 < len(merged) else (rest, rest)
    found |= {c: symbol for c, symbol in ((attention.q, Q), (attention.k, K)) if c is not None}
    return _tidy(sympy.sympify(expr).xreplace(found))  # ``subs`` gives the same, and takes seven times as long


def _tidy(expr: Any) -> Any:
    """Comparisons of integers solved for k: ``k <= q + 3``, not ``-3 - q < -k + 1``."""

    def solved(relation: Any) -> Any:
        difference = sympy.expand(relation.lhs - relation.rhs)
        c = difference.coeff(K)
        if abs(c) != 1 or difference.has(sympy.floor) or not difference.is_integer:
            return relation
        rest = sympy.expand(K - difference / c)
        if rest.has(K):
            return relation
        below = isinstance(relation, (sympy.Le, sympy.Lt)) == bool(c == 1)
        strict = int(isinstance(relation, (sympy.Lt, sympy.Gt)))
        return sympy.Le(K, rest - strict) if below else sympy.Ge(K, rest + strict)

    orders = [r for r in expr.atoms(sympy.core.relational.Relational) if not isinstance(r, (sympy.Eq, sympy.Ne))]
    return expr.xreplace({relation: solved(relation) for relation in orders})


def _told(meaning: _Meaning, attention: Attention) -> str:
    parts = [] if meaning.allowed == sympy.true else [plain(named(meaning.allowed, attention))]
    if meaning.bias != 0:
        parts.append(f"+ {plain(named(meaning.bias, attention))}")
    return " ".join(parts) or "true"


def _name(terms: tuple[Term, ...]) -> str:
    nodes = [t.what if isinstance(t, Add) else t.condition for t in terms if not isinstance(t, Times)]
    return " and ".join(f"{getattr(node, 'name', node)}[b, h, q, k]" for node in nodes)


def _meaning(attention: Attention, elements: Elements) -> _Meaning:
    """The terms, one after the other.

    Raises:
        _Opaque: one that has no closed form.
    """
    found = _Meaning()
    lowest = lowest_of(value_of(attention.query.node).dtype)
    for term in attention.terms:
        try:
            found = _after(found, term, elements, lowest)
            if elements.too_large(found.allowed, found.bias):
                raise NotClosedForm(TOO_LARGE)
        except NotClosedForm as error:
            raise _Opaque(str(error)) from None
        except _Opaque:
            raise
        except Exception as error:  # an unforeseen spelling must cost the speed, never the model
            raise _Opaque(f"a spelling that is not understood ({type(error).__name__}: {error})") from None
    return found


def _after(before: _Meaning, term: Term, elements: Elements, lowest: float) -> _Meaning:
    if isinstance(term, Times):
        if term.factor <= 0 or (before.finite and term.factor < 0.01):
            raise _Opaque(f"masked logits times {term.factor}")
        return replace(before, bias=before.bias * term.factor)
    if isinstance(term, Add):
        added = sympy.sympify(elements.at(term.what, term.index))
        factor = sympy.sympify(int(term.factor) if term.factor == int(term.factor) else term.factor)
        return _both(before, _split(sympy.piecewise_fold(added * factor) if factor != 1 else added, lowest))
    condition = elements.at(term.condition, term.index)
    filled = condition if term.where else sympy.Not(condition)
    value = hidden_with(term, elements, lowest)
    finite = frozenset({value} if value.is_finite else ())
    # What replaces the logits is the same for all; what was forbidden before must not be another number.
    return _both(before, _Meaning(sympy.Not(filled), finite=finite))


def hidden_with(term: Fill, elements: Elements, lowest: float) -> Any:
    """The number that a fill hides with.

    Raises:
        NotClosedForm: it is no number, or none that leaves no weight.
    """
    value = sympy.sympify(elements.at(term.value, term.value_index))
    if not value.is_number or not (value == -sympy.oo or value <= lowest):
        raise NotClosedForm(f"logits replaced by {plain(value)}")
    return value


def _both(a: _Meaning, b: _Meaning) -> _Meaning:
    """One mask after the other."""
    alone = a.allowed == sympy.true or b.allowed == sympy.true
    finite = a.finite | b.finite
    return _Meaning(
        sympy.And(a.allowed, b.allowed), a.bias + b.bias, finite, a.uniform and b.uniform and (alone or not finite)
    )


def _split(added: Any, lowest: float) -> _Meaning:
    """What is added to logits, as the places where it forbids a key and a bias elsewhere."""
    if added.is_number:
        if added == -sympy.oo or added <= lowest:
            return _Meaning(sympy.false, finite=frozenset({added} - {-sympy.oo}), uniform=bool(added < ABSORBS))
        return _Meaning(bias=sympy.Integer(0) if added.is_zero else added)
    if isinstance(added, sympy.Add):
        numbers = [part for part in added.args if part.is_number]
        pieces = [part for part in added.args if part.has(sympy.Piecewise)]
        if numbers and len(pieces) == 1:  # 1 - mask, times a number
            rest = [part for part in added.args if part not in (*numbers, *pieces)]
            added = sympy.Add(sympy.piecewise_fold(sympy.Add(*numbers, *pieces)), *rest, evaluate=bool(not rest))
        elif numbers and not pieces:
            return _Meaning(bias=sympy.factor_terms(added))
    if isinstance(added, sympy.Add):
        found = _Meaning()
        for part in added.args:
            found = _both(found, _split(part, lowest))
        return found
    if isinstance(added, sympy.Mul) and added.has(sympy.Piecewise):
        folded = sympy.piecewise_fold(added)
        return _split(folded, lowest) if isinstance(folded, sympy.Piecewise) else _Meaning(bias=added)
    if not isinstance(added, sympy.Piecewise):
        return _Meaning(bias=added)
    parts = [(_split(sympy.sympify(value), lowest), condition) for value, condition in added.args]
    allowed, before = sympy.false, sympy.false
    for part, condition in parts:
        allowed = sympy.Or(allowed, sympy.And(condition, sympy.Not(before), part.allowed))
        before = sympy.Or(before, condition)
    biased = any(part.bias != 0 for part, _ in parts)
    bias = sympy.Piecewise(*((part.bias, condition) for part, condition in parts)) if biased else sympy.S.Zero
    return _Meaning(
        allowed, bias, frozenset().union(*(part.finite for part, _ in parts)), all(part.uniform for part, _ in parts)
    )


def _classify(attention: Attention, meaning: Any, elements: Elements, shift: sympy.Expr) -> Mask:
    text = plain(meaning)
    causal, keys, pairs = False, [], []
    for term in _conjuncts(meaning):
        if _is_causal(term, shift) or (_is_causal(term, sympy.S.Zero) and _self_attention(attention)):
            causal = True
        elif only_of_keys(term):
            keys.append(term)
        elif _opaque_atoms(term):
            return Mask(text, reason=f"opaque_mask: {plain(term)}")
        else:
            pairs.append(term)
    valid = Keys(sympy.And(*keys), elements.loads) if keys else None
    needs = f"unsupported_mask: {plain(pairs[0])}" if pairs else ""
    return Mask(text, causal, valid, logits=Logits(sympy.And(*pairs)), needs=needs, producers=tuple(elements.seen))


def _of_pairs(mask: Mask, bias: Any, elements: Elements) -> Mask:
    """With the bias, and what is read by short names, so that layers share their kernels."""
    found = (mask.logits.allowed, sympy.sympify(bias))
    names = sorted({atom.func.__name__ for expr in found for atom in expr.atoms(AppliedUndef)})
    short = {name: sympy.Function(f"t{at:02}") for at, name in enumerate(names)}

    def renamed(expr: Any) -> Any:
        return expr.replace(lambda e: isinstance(e, AppliedUndef), lambda e: short[e.func.__name__](*e.args))

    logits = settled(Logits(*map(renamed, found)))
    loads = tuple(elements.loads[names[int(name[1:])]] for name in logits.tensors)
    return replace(mask, logits=logits, loads=loads)


def _conjuncts(meaning: Any) -> Iterable[Any]:
    if meaning == sympy.true:
        return ()
    meaning = _tidy(sympy.to_nnf(meaning, simplify=False))
    return meaning.args if isinstance(meaning, sympy.And) else (meaning,)


def _self_attention(attention: Attention) -> bool:
    """As many queries as keys, which becomes a guard where both are dynamic."""
    return guard_equal(attention.size(attention.q), attention.size(attention.k))


def _is_causal(term: Any, shift: sympy.Expr) -> bool:
    """Whether ``term`` is ``k <= q + shift`` in any spelling."""
    if isinstance(term, (sympy.Ge, sympy.Gt)):
        term = term.reversed
    if not isinstance(term, (sympy.Le, sympy.Lt)):
        return False
    strict = 1 if isinstance(term, sympy.Lt) else 0
    return bool(sympy.expand(term.lhs - term.rhs + strict - (K - Q - shift)) == 0)


def _opaque_atoms(expr: Any) -> bool:
    """Whether it reads a tensor of the run time that has an element for each pair of query and key."""
    return any(atom.has(Q) and atom.has(K) for atom in sympy.sympify(expr).atoms(AppliedUndef))
