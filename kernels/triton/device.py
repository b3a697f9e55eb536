"""Where the generated kernels run."""

from __future__ import annotations

import functools
import importlib.util

import torch

LEAST = (8, 0)
"""Compute capability of the oldest NVIDIA GPU that kernels are written for (Ampere)."""


def why_not(device: torch.device) -> str:
    """Why there are no kernels for this device; "" where there are.

    A device that this machine has not, as of a fake tensor, is taken to be new enough.
    """
    if device.type != "cuda":  # AMD's GPUs go by this name too
        return device.type
    if not _installed():
        return f"{device.type}, where Triton is not installed"
    if torch.version.hip is None and torch.cuda.is_available():
        have = torch.cuda.get_device_capability(device)
        if have < LEAST:
            return f"{device.type} of compute capability {have[0]}.{have[1]}, below {LEAST[0]}.{LEAST[1]}"
    return ""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
