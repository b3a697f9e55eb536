"""Work in a process of its own, which may crash or hang without harm to this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any


class EndedError(Exception):
    """The process died; the message says how."""


class HungError(EndedError):
    """It was silent for too long, and was killed."""


def apart(patience: Callable[[Any], float], work: Callable[..., Iterator[Any]], *given: Any) -> Iterator[Any]:
    """What the generator ``work(*given)`` gives, in a new process that is killed where it is silent for too long.

    Args:
        patience: the seconds that may follow a message; ``patience(None)``: those before the first.

    Raises:
        EndedError: the process died or, ``HungError``, was killed.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sending, work, given))
    process.start()
    sending.close()  # the process has the only other end: it is closed where that dies
    message = None
    try:
        while True:
            seconds = patience(message)
            if not receiving.poll(seconds):
                raise HungError(f"killed after {seconds:.0f} s without a result")
            try:
                message = receiving.recv()
            except (EOFError, OSError):
                break
            yield message
        process.join(10)
        if process.exitcode:
            raise EndedError(f"its process ended with {_said(process.exitcode)}")
    finally:
        process.kill()
        process.join(10)
        receiving.close()


def within(_: Callable[[Any], float], work: Callable[..., Iterator[Any]], *given: Any) -> Iterator[Any]:
    """``apart``, but in this process."""
    return work(*given)


def _said(exitcode: int) -> str:
    return signal.Signals(-exitcode).name if exitcode < 0 else f"exit status {exitcode}"


def _send(sending: Connection, work: Callable[..., Iterator[Any]], given: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for message in work(*given):
        sending.send(message)
    sending.close()  # the end is told at once: after a kernel's fault, a process may take long to end


def _end_with_parent() -> None:
    """A process whose kernel hangs would keep the device after its parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
