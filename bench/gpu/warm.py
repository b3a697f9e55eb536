"""Compiles all kernels of the cases into Triton's cache, many at a time: one after another they take ten minutes."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from .apart import EndedError, apart
from .machine import CASE, Machine
from .measure import OVER, Found, Task, measure

MOST = 12
"""Processes at a time: each has a context of the device, and memory of its own."""


def warm_up(tasks: list[Task], machine: Machine, seconds: float) -> dict[Task, dict[str, str]]:
    """Run, each in a new process, one of those tasks that have the same kernels; what failed in them, and why.

    None runs on beside the measurement.
    """
    kinds: dict[object, Task] = {}
    for task in tasks:
        kinds.setdefault(task.kernels, task)
    machine = replace(machine, deadline=time.monotonic() + seconds)
    # A thread only waits for its process: one that a kernel's fault or a hang ends takes no other with it.
    with ThreadPoolExecutor(min(len(kinds), len(os.sched_getaffinity(0)), MOST) or 1) as threads:
        found = threads.map(lambda task: compile_all(task, machine), kinds.values())
        return dict(zip(kinds.values(), found, strict=True))


def compile_all(task: Task, machine: Machine) -> dict[str, str]:
    """Run every way of the task once; the reasons of those that could not."""
    if machine.over():
        return {CASE: OVER}
    name, found = CASE, Found()
    messages = apart(lambda _: max(0.0, machine.deadline - time.monotonic()), measure, task, machine, found, False)
    try:
        for way, known in messages:
            name, found = way or name, known
    except EndedError as problem:
        found.failed.setdefault(name, str(problem))
    return found.failed
