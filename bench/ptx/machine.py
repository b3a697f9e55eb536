"""Memory, and which instruction is next for whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from ctypes import c_uint8
from typing import Any

import numpy as np
import torch

from . import lanes, warpgroup
from .parse import Kernel
from .translate import Block, Translator

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
POISON = {"p": np.False_, "rs": np.uint16(0x7FED), "r": np.uint32(0x7FEDBEEF), "rd": np.uint64(0x7FFDDEADBEEFBEEF)}
"""What registers hold that nobody wrote: as a float it is NaN, as an address it is nowhere."""
DONE = np.iinfo(np.int64).max


class Fault(Exception):
    """What a GPU would not do, or do with another result."""


def spans(tensors: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The first bytes of tensors' elements, ascending, and those after the last; tensors that touch are one."""
    found: list[list[int]] = []
    for first, last in sorted(_span(tensor) for tensor in tensors if tensor.numel()):
        if found and first <= found[-1][1]:
            found[-1][1] = max(found[-1][1], last)
        else:
            found.append([first, last])
    both = np.array(found, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class Global:
    """The memory of a launch's tensors, at the addresses that they have."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.first, self.last = spans(tensors)
        self.base = int(self.first.min()) // 16 * 16
        size = (int(self.last.max()) - self.base + 15) // 16 * 16
        # From the first tensor to the last, whatever lies between them: only what ``places`` lets through is touched.
        whole = np.frombuffer((c_uint8 * size).from_address(self.base), np.uint8)
        self.views = {each: whole.view(kind) for each, kind in UNSIGNED.items()}

    def places(self, address: Any, offset: int, size: int, count: int) -> Any:
        """Which numbers of ``size`` bytes; the first of ``count``."""
        at = np.asarray(address).view(np.int64) + offset
        span = np.searchsorted(self.first, at, side="right") - 1
        bad = (span < 0) | (at + size * count > self.last[span])
        if bad.any():
            raise Fault(f"{int(bad.sum())} lanes address memory that is in no tensor of the launch")
        if (at % (size * count)).any():
            raise Fault(f"{size * count} bytes at an address that is no multiple of them")
        return (at - self.base) // size

    def load(self, address: Any, offset: int, size: int, count: int, active: Any) -> list[Any]:
        view = self.views[size]
        if active is None:
            places = self.places(address, offset, size, count)
            return [view[places + at] for at in range(count)]
        address, active = np.broadcast_arrays(address, active)
        out = [np.zeros(active.shape, UNSIGNED[size]) for _ in range(count)]
        if active.any():
            places = self.places(address[active], offset, size, count)
            for at in range(count):
                out[at][active] = view[places + at]
        return out

    def store(self, address: Any, offset: int, size: int, values: Sequence[Any], active: Any) -> None:
        view = self.views[size]
        for at, value in enumerate(values):
            if active is None:
                view[self.places(address, offset, size, len(values)) + at] = value
                continue
            where, taking, what = np.broadcast_arrays(address, active, value)
            if taking.any():
                view[self.places(where[taking], offset, size, len(values)) + at] = what[taking]


class Shared(Global):
    """Each program's own; bits that nobody wrote are those of NaN."""

    def __init__(self, programs: int, threads: int, size: int) -> None:
        self.size = -(-size // 16) * 16
        self.start = np.repeat(np.arange(programs, dtype=np.int64) * self.size, threads)
        whole = np.full(programs * self.size, 0xFF, np.uint8)
        self.views = {each: whole.view(kind) for each, kind in UNSIGNED.items()}

    def load(self, address: Any, offset: int, size: int, count: int, active: Any) -> list[Any]:
        return super().load(self.own(address), offset, size, count, active)

    def store(self, address: Any, offset: int, size: int, values: Sequence[Any], active: Any) -> None:
        super().store(self.own(address), offset, size, values, active)

    def own(self, address: Any) -> Any:
        """Addresses among all programs' memory: the program in the upper 32 bits."""
        return np.asarray(address).astype(np.int64) + (self.start << 32)

    def places(self, address: Any, offset: int, size: int, count: int) -> Any:
        start, at = address >> 32, (address & 0xFFFFFFFF) + offset
        if ((at < 0) | (at + size * count > self.size)).any():
            raise Fault(f"shared memory beyond its {self.size} bytes")
        if (at % (size * count)).any():
            raise Fault(f"{size * count} bytes of shared memory at an address that is no multiple of them")
        return (start + at) // size


class Machine:
    """Programs of a launch, side by side."""

    def __init__(
        self,
        kernel: Kernel,
        blocks: dict[int, Block],
        threads: int,
        shared: int,
        parameters: Sequence[Any],
        memory: Global,
    ) -> None:
        self.kernel, self.blocks, self.threads = kernel, blocks, threads
        self.size, self.parameters = shared, parameters
        self.memory = memory
        self.executed: Counter[int] = Counter()

    def run(self, grid: tuple[int, int, int], programs: np.ndarray) -> None:
        """Run these programs (their flat indices) to their ends."""
        count, threads = len(programs), self.threads
        self.lanes = count * threads
        thread = np.tile(np.arange(threads, dtype=np.uint32), count)
        program = np.repeat(programs.astype(np.uint32), threads)
        self.tid = (thread, np.uint32(0), np.uint32(0))
        x, y = np.uint32(grid[0]), np.uint32(grid[1])
        self.ctaid = (program % x, program // x % y, program // (x * y))
        self.ntid = (np.uint32(threads), np.uint32(1), np.uint32(1))
        self.nctaid = tuple(np.uint32(size) for size in grid)
        self.laneid, self.warpid = thread % np.uint32(32), thread // np.uint32(32)
        self.shared = Shared(count, threads, self.size)
        registers: list[Any] = [POISON[name.strip("%0123456789")] for name in self.kernel.registers]
        at = np.zeros(self.lanes, dtype=np.int64)
        with np.errstate(all="ignore"):
            while (current := int(at.min())) != DONE:
                self._step(current, at, registers)

    def _step(self, current: int, at: np.ndarray, registers: list[Any]) -> None:
        """A block, for the lanes that are the furthest behind; the others wait for them."""
        block = self.blocks[current]
        here = at == current
        everybody = bool(here.all())
        self.executed[current] += int(here.reshape(-1, lanes.WARP).any(1).sum())
        block.run(registers, None if everybody else here, self)
        jump = self.kernel.instructions[block.last - 1]
        following = block.last if block.last < len(self.kernel.instructions) else DONE
        if jump.name[0] not in ("bra", "ret", "exit"):
            at[here] = following
            return
        target = DONE if jump.name[0] != "bra" else self.kernel.labels[jump.operands[0]]
        if target >= len(self.kernel.instructions):
            target = DONE
        if not jump.guard:
            at[here] = target
            return
        guard = np.broadcast_to(registers[self.kernel.registers.index(jump.guard)], self.lanes) != jump.negated
        at[here] = np.where(guard[here], target, following)

    # ---- what blocks call

    def parameter(self, at: int, kind: Any) -> Any:
        """A launch's argument: a tensor's address, or a number."""
        value = self.parameters[at]
        if isinstance(value, float):
            value = int(np.float32(value).view(np.uint32))
        bits = 8 * kind().itemsize
        return np.array(int(value) & ((1 << bits) - 1), dtype=f"uint{bits}").view(kind)[()]

    def whole_warps(self, active: Any) -> None:
        """Instructions of a warp need all of its lanes."""
        self._together(active, lanes.WARP, "an instruction of a whole warp, where some of its lanes are elsewhere")

    def barrier(self, active: Any) -> None:
        """All of a program's lanes meet here."""
        self._together(active, self.threads, "a barrier that a part of a program's lanes reach")

    def _together(self, active: Any, count: int, fault: str) -> None:
        """Each ``count`` lanes take part, or none of them."""
        if active is not None:
            taking = np.broadcast_to(active, self.lanes).reshape(-1, count)
            if (taking.any(1) & ~taking.all(1)).any():
                raise Fault(fault)

    def copy(self, to: Any, at: int, address: Any, offset: int, size: int, read: Any, active: Any) -> None:
        """``cp.async``: ``read`` of ``size`` bytes, then zeros."""
        read = np.broadcast_to(read, self.lanes)
        active = np.ones(self.lanes, dtype=bool) if active is None else np.broadcast_to(active, self.lanes)
        taking = active & (read != 0)
        if ((read != 0) & (read != size) & active).any():
            raise Fault("a part of an asynchronous copy")
        unit = min(size, 4)
        values = self.memory.load(address, offset, unit, size // unit, taking)
        self.shared.store(to, at, unit, values, active)

    def matrices(self, address: Any, offset: int, count: int, transposed: bool, active: Any) -> list[Any]:
        """``ldmatrix``: lane ``8 i + j`` of a warp says where row ``j`` of matrix ``i`` lies."""
        index, words = self._rows(address, offset, count, active), self.shared.views[2]
        return [lanes.fragments(words[index[:, 8 * at : 8 * at + 8]], transposed) for at in range(count)]

    def put_matrices(self, address: Any, offset: int, registers: list[Any], transposed: bool, active: Any) -> None:
        """``stmatrix``."""
        index, words = self._rows(address, offset, len(registers), active), self.shared.views[2]
        warps = slice(None) if active is None else lanes.by_warp(active, self.lanes)[:, 0]
        for at, register in enumerate(registers):
            rows = lanes.rows_from(register, transposed, self.lanes)
            words[index[warps, 8 * at : 8 * at + 8]] = rows[warps]

    def _rows(self, address: Any, offset: int, count: int, active: Any) -> Any:
        """(warps, 8 count, 8): the eight numbers that each lane's address leads to; any in warps that are elsewhere."""
        self.whole_warps(active)
        own = self.shared.own(np.broadcast_to(address, self.lanes)) + offset
        if active is not None:
            own = np.where(active, own, 0)
        first = self.shared.places(lanes.by_warp(own, self.lanes)[:, : 8 * count], 0, 2, 8)
        return first[..., None] + np.arange(8)

    def group_product(
        self,
        kind: str,
        columns: int,
        left: Any,
        right: Any,
        sums: list[Any],
        adds: Any,
        across: tuple[bool, bool],
        active: Any,
    ) -> list[Any]:
        """``wgmma``: ``left`` is a descriptor or registers, ``across`` whether the factors are transposed."""
        self.whole_warps(active)
        depth, size = (8, 4) if kind == "tf32" else (16, 2)
        if isinstance(left, list):
            rows = warpgroup.rows_of(left, kind, self.lanes)
        else:
            rows = self._described(left, kind, size, 64, depth, across[0], active)
        other = self._described(right, kind, size, columns, depth, across[1], active)
        return warpgroup.product(rows, other, sums, adds, self.lanes)

    def _described(
        self, descriptor: Any, kind: str, size: int, count: int, depth: int, transposed: bool, active: Any
    ) -> Any:
        first = np.broadcast_to(descriptor, self.lanes).reshape(-1, warpgroup.GROUP)
        self._together(active, warpgroup.GROUP, "a product of four warps, of which some lanes are elsewhere")
        taking = np.broadcast_to(True if active is None else active, self.lanes).reshape(first.shape)
        if ((first != first[:, :1]) & taking).any():
            raise Fault("a product of four warps, of which some lanes have another matrix")
        first = np.where(taking, first, first[taking.argmax() // warpgroup.GROUP, 0])
        at = warpgroup.places(first[:, 0], size, count, depth, transposed)
        start = self.shared.start[:: warpgroup.GROUP, None, None] << 32
        return lanes.as_floats(self.shared.views[size][self.shared.places(start + at, 0, size, 1)], kind)

    def counts(self) -> Counter[tuple[str, int]]:
        """Instructions that were executed, a warp each: by name and line of the source."""
        found: Counter[tuple[str, int]] = Counter()
        for first, times in self.executed.items():
            for each in self.kernel.instructions[first : self.blocks[first].last]:
                found[".".join(each.name), each.line] += times
        return found


def translated(kernel: Kernel) -> dict[int, Block]:
    return Translator(kernel).blocks()
