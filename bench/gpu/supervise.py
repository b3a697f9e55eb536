"""Measures in other processes, one at a time: a kernel that hangs, or takes the device, ends only its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .apart import EndedError, HungError
from .machine import CASE, Case, Machine
from .measure import Found, Task, measure

LOSSES = 5
"""Processes that a way may end, each of which takes a new one ten seconds to replace."""

Messages = Iterator[tuple[str | None, Found]]


def work(tasks: Sequence[Task], machine: Machine, founds: dict[Case, Found]) -> Messages:
    """Measure the tasks, until time is up or the device is lost."""
    for task in tasks:
        if machine.over():
            return
        name: str | None = CASE
        for name, found in measure(task, machine, founds.setdefault(task.case, Found())):
            yield name, found
        if name is not None:
            return


def supervised(
    tasks: Sequence[Task],
    machine: Machine,
    founds: dict[Case, Found],
    worker: Callable[..., Messages],
    process: Callable[..., Messages],
) -> Iterator[tuple[Task, str | None]]:
    """Each task that is done; and, where a way ended its process, its task and that way's name.

    ``founds`` has what was found. A new process goes on with the next way. A way that ended its process is not tried
    again with the same kernels; nor at all, where it hung, or ended ``LOSSES`` of them.

    Args:
        worker: as ``work``. process: ``apart``, or ``within``.
    """

    def patience(message: tuple[str | None, Found] | None) -> float:
        return machine.patience(None if message is None else message[0])

    ended: dict[str, int] = {}
    left = list(tasks)
    while left and not machine.over():
        name, hung, reason = CASE, False, ""
        try:
            for way, found in process(patience, worker, tuple(left), machine, founds):
                founds[left[0].case] = found
                name = way or CASE
                if way is None:
                    yield left.pop(0), None
        except EndedError as problem:
            hung, reason = isinstance(problem, HungError), str(problem)
        if not left:
            return
        failed = founds.setdefault(left[0].case, Found()).failed
        if not reason and name not in failed:
            return  # time is up
        reason = failed.setdefault(name, reason)
        ended[name] = ended.get(name, 0) + 1
        give_up(name, f"left out: with {left[0].case}, {reason}", left, founds, hung or ended[name] == LOSSES)
        yield left[0], name


def give_up(name: str, reason: str, tasks: Sequence[Task], founds: dict[Case, Found], everywhere: bool) -> None:
    """Leave a way out of all tasks, or of those with the kernels of the first."""
    for task in tasks:
        if everywhere or (name != CASE and task.kernels == tasks[0].kernels):
            found = founds.setdefault(task.case, Found())
            if name not in found.times:
                found.failed.setdefault(name, reason)
