"""Compiles all kernels of the cases into Triton's cache, many at a time: one after another they take ten minutes."""

from __future__ import annotations

import multiprocessing
import os
import time

from prescore_compile.kernels.plan import Plan

from .machine import Case, Machine, told
from .ways import SCORES, Ways

Task = tuple[Case, Plan, bool]
"""A case, its plan, and whether its scorers are measured."""


def warm_up(tasks: list[Task], machine: Machine, seconds: float) -> int:
    """Run, in new processes, one of those cases that have the same kernels; how many were done in time."""
    found: dict[object, Task] = {}
    for case, plan, scoring in tasks:
        # Triton compiles sizes that 16 divides for themselves: numbers of chunks are the smallest.
        kernels = (case.causal, case.dim, case.group, plan.text, case.n // plan.chunk % 16 == 0)
        found.setdefault(kernels, (case, plan, scoring))
    end = time.monotonic() + seconds
    done = 0
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:  # none runs on beside the measurement
        for result in [pool.apply_async(compile_all, (*task, machine)) for task in found.values()]:
            result.wait(max(0.0, end - time.monotonic()))
            done += result.ready() and result.successful()
    return done


def compile_all(case: Case, plan: Plan, scoring: bool, machine: Machine) -> list[str]:
    """Run every way that has kernels of ours once; the names of those that ran. What fails is the measurement's."""
    ways = Ways(case, plan, machine)
    failed: dict[str, str] = {}
    ways.prepare(failed)
    names = [] if failed else [*ways.stages, "total, backward"]
    if scoring:
        names += [*SCORES, "centroids, backward"]
    for name in names:
        with told(failed, name):
            ways.all[name]()
            machine.synchronize()
    return [name for name in names if name not in failed]
