"""``attend_few``: few queries over every key, as where a sequence is continued."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu, few
from ..layout import by_query
from ..reference import Operands
from . import dispatch
from .attending import like_output


@torch.library.custom_op("prescore::attend_few", mutates_args=())
def attend_few(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    added: Tensor | None,
    scale: float,
    softcap: float,
    sink_logit: Tensor | None,
) -> Tensor:
    """Attention of at most ``few.MOST`` queries over every key that a mask in memory allows; see ``few.reference``.

    On a CPU keys and values are read once, where they lie. Without gradients.

    Args:
        allowed, added: ``[B or 1, H or 1, Nq or 1, Nk or 1]``. sink_logit: as for ``mass``.

    Returns:
        ``[B, H, Nq, Dv]``, laid out ``[B, Nq, H, Dv]`` in memory.
    """
    site = Operands(query, key, value, None, False, scale, sink_logit)
    if dispatch.compiled(query):
        return cpu.attend_few(site, allowed, added, softcap)
    with dispatch.as_they_are(query):
        out = few.reference(site, allowed, added, softcap)  # a graph that was made for a CPU and moved, say
    return by_query(out)


attend_few.register_fake(like_output)
attend_few.register_autograd(dispatch.no_gradient("attend_few"), setup_context=dispatch.no_setup)
