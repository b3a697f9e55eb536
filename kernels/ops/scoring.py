"""``score``: how much each key deserves to be kept."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import summary as summaries
from ..plan import Plan
from ..triton import device
from . import dispatch


@torch.library.triton_op("prescore::score", mutates_args=())
def score(query: Tensor, key: Tensor, valid: Tensor | None, plan: str, causal: bool, scale: float) -> Tensor:
    """Scores ``[B, Hkv, Nk]`` float32; see ``kernels.summary.score``. Not differentiable."""
    settings = Plan.parse(plan)
    if not dispatch.generated(key):
        return score_eager(query, key, valid, plan, causal, scale)
    from ..triton.scores import kernel as generated

    dtype = str(key.dtype).removeprefix("torch.")
    if not generated.fits(settings, key.shape[3], dtype, device.is_small(key.device)):
        return score_eager(query, key, valid, plan, causal, scale)
    return generated.scores(query, key, valid, settings, causal, scale)


@torch.library.custom_op("prescore::score_eager", mutates_args=(), tags=dispatch.MAY_WAIT)
def score_eager(query: Tensor, key: Tensor, valid: Tensor | None, plan: str, causal: bool, scale: float) -> Tensor:
    """``score`` in torch operations."""
    with dispatch.as_they_are(key):
        return summaries.score(query, key, valid, Plan.parse(plan), causal, scale)


@score.register_fake
@score_eager.register_fake
def _(query, key, valid, plan, causal, scale):  # type: ignore[no-untyped-def]
    return key.new_empty(key.shape[:3], dtype=torch.float32)


score.register_autograd(dispatch.constant_backward, setup_context=dispatch.constant_setup)
