"""Where the generated kernels run."""

from __future__ import annotations

import functools
import importlib.util

import torch

LEAST = (8, 0)
"""Compute capability of the oldest NVIDIA GPU that kernels are written for (Ampere)."""
INSTINCT = ("gfx908", "gfx90a", "gfx94", "gfx95")
"""AMD's GPUs that kernels are written for (MI100 to MI350); with half the lanes a wave, others' registers spill."""
SHARED = 163_840
"""Bytes of shared memory a program that kernels may take: NVIDIA's of compute capability 8.0, 9.0 and 10.0 have them.

AMD's have 64 KiB, but keep in registers what NVIDIA's multiply out of shared memory.
"""


def why_not(device: torch.device) -> str:
    """Why there are no kernels for this device; "" where there are.

    A device that this machine has not, as of a fake tensor, is taken to be new enough.
    """
    if device.type != "cuda":  # AMD's GPUs go by this name too
        return device.type
    if not _installed():
        return f"{device.type}, where Triton is not installed"
    if not torch.cuda.is_available():
        return ""
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return "" if name.startswith(INSTINCT) else f"{device.type} of architecture {name}, which is none of Instinct's"
    have = torch.cuda.get_device_capability(device)
    if have < LEAST:
        return f"{device.type} of compute capability {have[0]}.{have[1]}, below {LEAST[0]}.{LEAST[1]}"
    return ""


def target() -> str:
    """Of ``spec.TARGETS``: what ``torch`` was built for."""
    return "hip" if torch.version.hip else "cuda"


def is_small(device: torch.device) -> bool:
    """Whether a program has less shared memory than ``SHARED``: 99 KiB on NVIDIA's of capability 8.6, 8.9 and 12."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return bool(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SHARED) < SHARED)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
