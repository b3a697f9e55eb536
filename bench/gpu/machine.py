"""What is measured, where, and how it is timed."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench import model

SECONDS = 0.3
"""What one way is timed for, at least ``rounds`` times."""
CYCLES = 2e9
"""Of a device in a second, about."""
LENGTHS = (1024, 4096, 16384, 32768, 65536, 131072)
PATIENCE, FLEX_PATIENCE = 60.0, 120.0
"""Seconds after which a way hangs, whose kernels may not be compiled yet; and FlexAttention, or a new process."""
GRACE = 45.0
"""Seconds after the deadline in which what was begun before it may end."""
CASE = "case"
"""The name of what comes before the ways of a case: its process begins, its inputs are made."""


@dataclass(frozen=True)
class Case:
    """One measured shape, batch 1: ``heads`` query heads on ``heads / group`` KV heads."""

    n: int
    causal: bool
    dim: int
    group: int
    heads: int = 16

    def __str__(self) -> str:
        return f"n={self.n} {'causal' if self.causal else 'two-sided'} D={self.dim} group={self.group}"


def cases(lengths: tuple[int, ...] = LENGTHS, heads: int = 16) -> list[Case]:
    """The most telling first: where time runs out, the rest is left out and named."""
    shapes = [(True, 128, 4), (True, 64, 1), (False, 64, 1), (False, 128, 4), (True, 64, 4), (True, 128, 1)]
    shapes += [(False, 64, 4), (False, 128, 1)]
    return [Case(n, causal, dim, group, heads) for causal, dim, group in shapes for n in lengths]


@dataclass(frozen=True)
class Machine:
    """Where it runs and how it is timed."""

    device: str
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 3
    deadline: float = math.inf
    """When, by ``time.monotonic``, nothing more is begun; all processes of a machine have one such clock."""
    name: str = ""
    """Of the device, known beforehand: a device that was lost no longer says it."""

    def patience(self, way: str | None) -> float:
        """Seconds that a way may take; None: a process before its first case."""
        most = FLEX_PATIENCE if way == "flex" or way is None else PATIENCE
        return min(most, max(0.0, self.deadline + GRACE - time.monotonic()))

    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def synchronize(self) -> None:
        """Wait for what was launched; its faults are raised here."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def lost(self) -> bool:
        """Whether a kernel's fault has left the device of no use to this process, as a wrong address does."""
        try:
            self.synchronize()
        except Exception:
            return True
        return False

    def seconds(self, work: Callable[[], Any]) -> float:
        """Median seconds of ``work`` on the device, which its check has warmed up."""
        once = self._on_gpu(work) if self.device == "cuda" else _on_cpu(work)
        found: list[float] = []
        while len(found) < self.rounds or (self.rounds > 1 and sum(found) < SECONDS and len(found) < 50):
            found.append(once())
        return statistics.median(found)

    def _on_gpu(self, work: Callable[[], Any]) -> Callable[[], float]:
        begin = time.perf_counter()
        work()
        launched = time.perf_counter() - begin

        def once() -> float:
            begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            # What Python does before a launch is not the device's time: the device waits until all is launched.
            torch.cuda._sleep(int(2 * launched * CYCLES))
            begin_event.record()
            work()
            end_event.record()
            torch.cuda.synchronize()
            return begin_event.elapsed_time(end_event) / 1e3

        return once

    @property
    def model(self) -> model.Device:
        """The device of the cost table that this one is most like."""
        return next((found for key, found in model.DEVICES.items() if key in self.name), model.DEVICES["H100"])


def _on_cpu(work: Callable[[], Any]) -> Callable[[], float]:
    def once() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return once


def device_name() -> Iterator[str]:
    yield torch.cuda.get_device_name()


@contextlib.contextmanager
def told(failed: dict[str, str], name: str) -> Iterator[None]:
    """What a way raises is its reason for having no time: a backend that is missing, too little memory."""
    try:
        yield
    except Exception as problem:
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        # A compiler's reason is in its last line.
        failed[name] = lines[0][:200] if len(lines) == 1 else f"{lines[0][:200]} ... {lines[-1][:200]}"
        with contextlib.suppress(Exception):  # after a fault of a kernel, nothing works any more
            torch.cuda.empty_cache()
