"""Hand-written attention: from a softmax back to ``q . k`` and forward to ``weights . v``.

Nothing is compared with a list of subgraphs. Backward, each operator either changes the logits in
a way that is understood (scale, mask, softcap, cast, view) or ends the match; every axis of every
tensor on the way is followed as an index expression, and at the end these prove which axes are
batch, head, query, key and feature.
"""

from .match import match

__all__ = ["match"]
