"""The softmax's sum over window and sinks on a GPU: ``attend`` with values of few features, of which only its sums
are wanted."""

from __future__ import annotations

from typing import Any

import torch

from ..plan import Plan
from ..reference import Operands
from ..summary import Summary
from .attend import attend
from .spec import NOTHING, Lifted

FEATURES = 16
"""Of the values: the least that a product on tensor cores takes."""


def mass(site: Operands, summary: Summary, plan: Plan, lifted: Lifted = NOTHING, **more: Any) -> torch.Tensor:
    """``reference.mass``; ``lifted`` and ``more`` as for ``attend``."""
    key = summary.row_key  # its first rows are the sinks, and no other is read
    features = min(FEATURES, key.shape[3])
    rows = summary._replace(row_value=key.new_zeros((*key.shape[:3], features)))
    routes = site.query.new_empty((*site.query.shape[:3], 0), dtype=torch.int32)
    few = site._replace(value=site.key.narrow(3, 0, features))  # any that is there: no copy is made
    sums = attend(few, rows, routes, plan.near, lifted, **more)[1]
    return sums.masked_fill(sums == float("inf"), float("-inf"))
