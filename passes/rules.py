"""Which rule recognised a site, and where in the user's code its first condition failed."""

from __future__ import annotations

from .compat import source_line
from .site import Add, Fill, Site

RULES = {
    "fused_call": "a call of F.scaled_dot_product_attention (or an operator behind it); its operands' axes are proved",
    "softmax_between_products": "a softmax whose logits are a product of queries and keys, and whose output meets "
    "values in a second product; the axes are proved",
    "expanded_call": "a multi-head attention call, looked inside, where one of the rules above holds",
    "whole_call": "a call that contains an attention, not looked inside",
}
"""How a site is recognised."""
_MASK_REASONS = ("opaque_mask", "unsupported_mask", "additive_mask")


def rule_of(site: Site, kind: str) -> str:
    """The rule that recognised the site, a key of ``RULES``; ``kind``: what the report calls it."""
    if kind == "flex_attention" or (site.attention is None and kind not in ("sdpa", "hand-written")):
        return "whole_call"
    if kind != site.kind:
        return "expanded_call"
    return "fused_call" if kind == "sdpa" else "softmax_between_products"


def failed_at(site: Site, reason: str) -> str:
    """``file:line: code`` of what the reason is about: a mask's own line, else the attention's."""
    source, code = site.source, site.code
    if reason.partition(":")[0] in _MASK_REASONS and site.attention is not None:
        terms = [term for term in site.attention.terms if isinstance(term, (Add, Fill))]
        nodes = [term.what if isinstance(term, Add) else term.condition for term in terms]
        for node in nodes:
            found = source_line(node) if hasattr(node, "meta") else ("", "")
            source, code = found if found[0] else (source, code)
    return f"{source}: {code}" if source else ""
