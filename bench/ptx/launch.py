"""In place of ``kernels.triton.cache.launch``: compile for a GPU that is not here, and run what came out."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch

from .. import aot
from .machine import Global, Machine, translated
from .parse import parse

LANES = 1 << 16
"""How many run side by side."""


@functools.cache
def _code(text: str) -> Any:
    kernel = parse(text)
    return kernel, translated(kernel)


def run(
    kernel: Any, grid: tuple[Any, ...], values: Mapping[str, Any], *, warps: int, stages: int, target: str = "sm_80"
) -> Counter[tuple[str, int]]:
    """Run a launch; the instructions that it executed, a warp each."""
    given = {name: values[name] for name in kernel.arg_names}
    launch = aot.Launch(kernel.fn.__name__, kernel, given, warps, stages)
    binary = aot.compiled(launch, target)
    code, blocks = _code(binary.asm["ptx"])
    source = aot.source_of(launch)
    parameters: list[Any] = []
    tensors = []
    for name, value in given.items():
        if source.signature[name] == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            value = value.data_ptr()
        parameters.append(value)
    parameters += [0] * (code.parameters - len(parameters))
    full = (*(int(size) for size in grid), 1, 1)[:3]
    programs = full[0] * full[1] * full[2]
    machine = Machine(code, blocks, 32 * warps, int(binary.metadata.shared), parameters, Global(tensors))
    step = max(1, LANES // (32 * warps))
    for first in range(0, programs, step):
        machine.run(full, np.arange(first, min(first + step, programs)))
    return machine.counts()


@contextlib.contextmanager
def compiled_launches(target: str = "sm_80") -> Iterator[dict[str, Counter[tuple[str, int]]]]:
    """The operators' kernels are compiled and run here; by kernel, the instructions that were executed."""
    executed: dict[str, Counter[tuple[str, int]]] = {}

    def launch(kernel: Any, grid: Any, values: Any, *, warps: int, stages: int) -> None:
        found = run(kernel, grid, values, warps=warps, stages=stages, target=target)
        executed.setdefault(kernel.fn.__name__, Counter()).update(found)

    with contextlib.ExitStack() as patches:
        for module in aot.MODULES:
            patches.enter_context(mock.patch.object(module, "launch", launch))
        yield executed
