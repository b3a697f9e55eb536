"""Which rule recognised a site, and where in the user's code its first condition failed."""

from __future__ import annotations

from torch import fx

from .calls import call_of
from .provenance import source_line
from .site import Add, Fill, Site

RULES = {
    "fused_call": "a call of F.scaled_dot_product_attention (or an operator behind it); its operands' axes are proved",
    "softmax_between_products": "a softmax whose logits are a product of queries and keys, and whose output meets "
    "values in a second product; the axes are proved",
    "expanded_call": "a multi-head attention call, looked inside, where one of the rules above holds",
    "whole_call": "a call that contains an attention, not looked inside",
}
"""How a site is recognised."""
_NEAR = 400
"""How many nodes around a site are looked at for what a reason names."""
_MASK_REASONS = ("opaque_mask", "unsupported_mask", "additive_mask")


def rule_of(site: Site, kind: str) -> str:
    """The rule that recognised the site, a key of ``RULES``; ``kind``: what the report calls it."""
    if kind == "flex_attention" or (site.attention is None and kind not in ("sdpa", "hand-written")):
        return "whole_call"
    if kind != site.kind:
        return "expanded_call"
    return "fused_call" if kind == "sdpa" else "softmax_between_products"


def failed_at(site: Site, reason: str) -> str:
    """``file:line: code`` of what the reason is about: a mask's own line, that of the node that the matcher missed at
    or of an operator that the reason names, else the attention's."""
    code, _, detail = reason.partition(": ")
    if code in _MASK_REASONS:
        about = _masks(site)
    elif site.missed is not None and reason == site.reason:
        about = [site.missed]
    else:
        about = _named(site.output, detail) if detail else []
    places = [source_line(node) for node in about]
    found = next((place for place in places if place[0]), (site.source, site.code))
    return ": ".join(found) if found[0] else ""


def _masks(site: Site) -> list[fx.Node]:
    """The nodes of the site's masks, the last applied first."""
    terms = [term for term in site.attention.terms if isinstance(term, (Add, Fill))] if site.attention else []
    made = [term.what if isinstance(term, Add) else term.condition for term in reversed(terms)]
    return [node for node in made if isinstance(node, fx.Node)]


def _named(output: fx.Node, name: str) -> list[fx.Node]:
    """The nearest node around ``output`` that has this name or calls this operator."""
    near, seen = [output], {output}
    while near and len(seen) < _NEAR:
        for node in near:
            if node.name == name or call_of(node).spelled == name:
                return [node]
        reached = [other for node in near for other in (*node.all_input_nodes, *node.users) if other not in seen]
        near = list(dict.fromkeys(reached))
        seen.update(near)
    return []
