"""The sanitizer finds what it is there for, and nothing else."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def add_one(x, y, n, SIZE: tl.constexpr, AHEAD: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at + AHEAD, mask=at < n, other=0.0) + 1.0, mask=at < n)


@triton.jit
def without_other(x, y, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at, mask=at < n))


@triton.jit
def shift(x, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(x + at + SIZE, tl.load(x + at))


@triton.jit
def total(x, y):
    tl.store(y, tl.load(x + tl.program_id(0)))


@triton.jit
def through_memory(x, y, SIZE: tl.constexpr, BARRIERS: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at))
    if BARRIERS:
        tl.debug_barrier()
    tl.store(x + at, tl.load(y + SIZE - 1 - at))


@triton.jit
def in_place(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(x + at, tl.load(x + SIZE - 1 - at))


@triton.jit
def scatter(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at // 2, tl.load(x + at))


@triton.jit
def far(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    meant = tl.add(at * 134217727, 2147483600, sanitize_overflow=False)
    tl.store(y + at, tl.load(x + ((at + 1) * 134217728 + meant) * 0))


@triton.jit
def shifted(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, (1 << (at + 17)).to(tl.float32))


@triton.jit
def divided(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, (100 // at).to(tl.float32))


@triton.jit
def as_integer(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, (tl.load(x + at) * 2.0**28).to(tl.int32).to(tl.float32))


def test_what_is_well_passes() -> None:
    x, y = torch.arange(20.0), torch.empty(20)
    add_one[(2,)](x, y, 20, SIZE=16, AHEAD=0)
    assert torch.equal(y, x + 1)
    x, y = torch.arange(16.0), torch.empty(16)
    through_memory[(1,)](x, y, SIZE=16, BARRIERS=True)
    assert torch.equal(x, torch.arange(15.0, -1, -1))


@pytest.mark.parametrize(
    ("kernel", "grid", "named", "fault"),
    [
        (add_one, 2, {"n": 20, "SIZE": 16, "AHEAD": 1}, "program 1: 1 of 4 elements read outside"),
        (add_one, 2, {"n": 21, "SIZE": 16, "AHEAD": -1}, "program 0: 1 of 16 elements read outside"),
        (shift, 1, {"SIZE": 16}, "program 0: 12 of 16 elements written outside"),
        (shift, 2, {"SIZE": 8}, "program 1: 8 of 8 elements read by a program and written by another"),
        (total, 2, {}, "program 1: 1 of 1 elements written by a program and written by another"),
        (through_memory, 1, {"SIZE": 16, "BARRIERS": False}, "elements read by the program that wrote it"),
        (in_place, 1, {"SIZE": 16}, "elements written by the program that read it"),
        (scatter, 1, {"SIZE": 16}, "8 of 15 elements written twice by one store"),
        (far, 1, {"SIZE": 16}, "1 of 16 elements int32 overflow detected for operation mul"),
        (shifted, 1, {"SIZE": 16}, "1 of 16 elements shifted too far"),
        (divided, 1, {"SIZE": 16}, "1 of 16 elements divided by zero"),
        (as_integer, 1, {"SIZE": 16}, "8 of 16 elements without a value as int32"),
    ],
)
def test_faults(kernel: object, grid: int, named: dict[str, int], fault: str) -> None:
    tensors = {"x": torch.arange(20.0)} | ({} if kernel is shift else {"y": torch.zeros(20)})
    with pytest.raises(Exception, match=fault):
        kernel[(grid,)](**tensors, **named)  # type: ignore[index]


def test_a_program_that_reads_later_is_found_as_well() -> None:
    @triton.jit
    def back(x, SIZE: tl.constexpr):
        at = (1 - tl.program_id(0)) * SIZE + tl.arange(0, SIZE)
        tl.store(x + at, tl.load(x + at + SIZE * tl.program_id(0)))

    with pytest.raises(Exception, match="program 1: 8 of 8 elements read by a program and written by another"):
        back[(2,)](torch.arange(16.0), SIZE=8)


def test_lanes_without_a_value() -> None:
    y = torch.zeros(16)
    without_other[(1,)](torch.arange(10.0), y, 10, SIZE=16)
    assert torch.equal(y[:10], torch.arange(10.0)) and y[10:].isnan().all()


def test_the_greater_of_a_number_and_nan_is_the_number() -> None:
    @triton.jit
    def greater(x, y, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        number = tl.load(x + at)
        tl.store(y + at, tl.maximum(number, 1.0) + tl.minimum(number, 1.0))

    x, y = torch.tensor([float("nan"), 0.0, 2.0, float("inf")]), torch.empty(4)
    greater[(1,)](x, y, SIZE=4)
    assert y.tolist() == [2.0, 1.0, 3.0, float("inf")]
