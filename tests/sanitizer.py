"""What Triton's interpreter lets pass and a GPU does not: memory outside of tensors, races, lanes without a value.

The interpreter runs programs one after the other on a process's memory, so that a kernel may read past a tensor, or
what another program wrote, and give the right result. ``watching`` looks at each load and store of a launch, as
NVIDIA's compute-sanitizer does on a device (its tools memcheck and racecheck):

- an address that is in none of the launch's tensors;
- an element written by two programs, or written by one and read by another: programs run in any order, at once;
- an element read by the program that wrote it, or written by one that read it, with no barrier between: the threads
  that do so may not be the same, and nothing waits (but a tile that is read and written where it was is an update);
- an element written twice, with two values, by one store;
- a sum, a difference or a product of 32-bit integers that overflows, but where ``sanitize_overflow=False`` says that it
  may; a shift by more bits than there are; a division by zero; a float that has no integer of the type that it becomes;
- a masked load without ``other``: its masked lanes, 0 in the interpreter and undefined on a GPU, become NaN, or an
  integer far out of place.

And ``tl.maximum`` and ``tl.minimum`` of a number and NaN are the number, as on a GPU; the interpreter gives NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from bench.ptx.machine import spans

SHIFTS = ("create_shl", "create_lshr", "create_ashr")
DIVISIONS = ("create_sdiv", "create_srem")
MANY = -1
"""Read by more than one program."""


class Fault(Exception):
    """What a kernel did that a GPU would not stand."""


class Launch:
    """Who wrote and who read each element of a launch's tensors."""

    def __init__(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        self.name, self.program = name, 0
        self.first, self.last = spans(tensors)
        sizes = self.last - self.first
        self.offset = np.concatenate([[0], np.cumsum(sizes)])
        self.writer = np.zeros(self.offset[-1], dtype=np.int32)
        self.reader = np.zeros(self.offset[-1], dtype=np.int32)
        self.barriers = 0
        # How many barriers were behind when the program wrote and read.
        self.written = np.full(self.offset[-1], -1, dtype=np.int32)
        self.read = np.full(self.offset[-1], -1, dtype=np.int32)
        self.loads: set[int] = set()

    def load(self, addresses: np.ndarray, size: int) -> None:
        """Elements of ``size`` bytes are read."""
        places = self._places(addresses, size, "read")
        writer = self.writer[places]
        self.check("read by a program and written by another", (writer != 0) & (writer != self.program))
        self.check("read by the program that wrote it", self.written[places] == self.barriers)
        reader = self.reader[places]
        self.reader[places] = np.where((reader == 0) | (reader == self.program), self.program, MANY)
        self.read[places] = self.barriers
        self.loads.add(hash(places.tobytes()))

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Elements are written."""
        places = self._places(addresses, values.itemsize, "written")
        for what, who in (("written", self.writer[places]), ("read", self.reader[places])):
            self.check(f"written by a program and {what} by another", (who != 0) & (who != self.program))
        if hash(places.tobytes()) not in self.loads:
            self.check("written by the program that read it", self.read[places] == self.barriers)
        self.writer[places] = self.program
        self.written[places] = self.barriers
        order = np.argsort(places, kind="stable")
        twice = np.diff(places[order]) == 0
        bits = values.reshape(-1)[order].view(f"u{values.itemsize}")
        self.check("written twice by one store", twice & (bits[1:] != bits[:-1]))

    def barrier(self) -> None:
        """What was read and written before is behind all threads of the program; or it is another program's turn."""
        self.barriers += 1
        self.loads.clear()

    def _places(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        span = np.searchsorted(self.first, addresses, side="right") - 1
        inside = (span >= 0) & (addresses + size <= np.append(self.last, 0)[span])
        self.check(f"{what} outside of every tensor", ~inside)
        return self.offset[span] + addresses - self.first[span]

    def check(self, what: str, wrong: np.ndarray) -> None:
        if wrong.any():
            raise Fault(f"{self.name}, program {self.program - 1}: {int(wrong.sum())} of {wrong.size} elements {what}")


@contextmanager
def watching() -> Iterator[None]:
    """Launches inside are looked at; a fault is raised inside the kernel, as Triton's ``InterpreterError``."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    begin, program = executor._init_args_hst, builder.set_grid_idx
    load, store = builder.create_masked_load, builder.create_masked_store
    patch_language = interpreter._patch_lang
    launch = Launch("", [])
    patched: set[frozenset[str]] = set()

    def patch_once(function: Any) -> Any:
        """Triton looks through its language at each call of a function inside a kernel: a third of all time."""
        languages = frozenset(name for name, of in function.__globals__.items() if of is tl or of is tl.core)
        if languages in patched:
            return None
        patched.add(languages)
        return patch_language(function)

    def begun(self: Any, arguments: Any, named: Any) -> Any:
        nonlocal launch
        patched.clear()
        found = begin(self, arguments, named)
        launch = Launch(self.fn.__name__, [a for a in [*found[0], *found[1].values()] if isinstance(a, torch.Tensor)])
        return found

    def next_program(self: Any, *place: int) -> None:
        launch.program += 1
        launch.barrier()
        program(self, *place)

    def waited(self: Any) -> None:
        launch.barrier()

    def loaded(self: Any, pointers: Any, mask: Any, other: Any, *how: Any) -> Any:
        addresses, active = _accessed(pointers, mask)
        kind = interpreter._get_np_dtype(pointers.get_element_ty())
        launch.load(addresses[active], np.dtype(kind).itemsize)
        found = load(self, pointers, mask, other, *how)
        if other is None and not active.all():
            byte = 0xFF if pointers.get_element_ty().is_floating() else 0x5A
            found.data[~active] = np.full(np.dtype(kind).itemsize, byte, np.uint8).view(kind)
        return found

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *how: Any) -> Any:
        addresses, active = _accessed(pointers, mask)
        launch.store(addresses[active], np.broadcast_to(value.data, addresses.shape)[active])
        return store(self, pointers, value, mask, *how)

    def asserted(self: Any, condition: Any, message: str) -> None:
        launch.check(message, ~np.asarray(condition.data, dtype=bool))

    def operation(name: str, what: str, wrong: Any) -> Any:
        compute = getattr(builder, name)

        def computed(self: Any, one: Any, other: Any) -> Any:
            launch.check(what, wrong(np.asarray(one.data), np.asarray(other.data)))
            return compute(self, one, other)

        return computed

    def too_far(number: np.ndarray, by: np.ndarray) -> np.ndarray:
        return (by.astype(np.int64) < 0) | (by.astype(np.int64) >= 8 * number.itemsize)

    def rounded(self: Any, number: Any, kind: Any) -> Any:
        bounds = np.iinfo(interpreter._get_np_dtype(kind))
        inside = (number.data > float(bounds.min) - 1) & (number.data < float(bounds.max) + 1)
        launch.check(f"without a value as {kind.scalar}", ~inside)
        return self.cast_impl(number, kind)

    of_results = interpreter.ReduceScanOpInterface.to_tensor

    def wrapped(self: Any, ret: Any, dtype: Any) -> Any:
        """NumPy sums 32 bits in 64, and then refuses what a GPU's sum of integers wraps."""
        return of_results(
            self, ret.astype(interpreter._get_np_dtype(dtype)) if isinstance(ret, np.integer) else ret, dtype
        )

    options = replace(interpreter.interpreter_builder.options, debug=True)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(interpreter.interpreter_builder, "options", options))
        patches.enter_context(mock.patch.object(interpreter, "_patch_lang", patch_once))
        patches.enter_context(mock.patch.object(executor, "_init_args_hst", begun))
        patches.enter_context(mock.patch.object(interpreter.ReduceScanOpInterface, "to_tensor", wrapped))
        for name, new in {
            "set_grid_idx": next_program,
            "create_masked_load": loaded,
            "create_masked_store": stored,
            "create_assert": asserted,
            "create_barrier": waited,
            "create_fp_to_si": rounded,
            "create_maxnumf": lambda self, one, other: self.binary_op(one, other, np.fmax),
            "create_minnumf": lambda self, one, other: self.binary_op(one, other, np.fmin),
            **{name: operation(name, "shifted too far", too_far) for name in SHIFTS},
            **{name: operation(name, "divided by zero", lambda _, by: by == 0) for name in DIVISIONS},
        }.items():
            patches.enter_context(mock.patch.object(builder, name, new))
        yield


def _accessed(pointers: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Addresses, and of which of them a load or a store is."""
    return pointers.data.astype(np.int64), np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
