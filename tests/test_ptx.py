"""The machine that runs PTX: instructions against what they are said to do, and what no GPU would stand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bench.ptx import lanes
from bench.ptx.machine import Fault, Global, Machine, translated
from bench.ptx.parse import parse
from bench.ptx.translate import Unknown

MODULE = """
.version 8.7
.target sm_80
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid {threads}
{{
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r2, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r9, %ctaid.x;
	mad.lo.s32 	%r10, %r9, {threads}, %r1;
	mad.wide.u32 	%rd2, %r10, 4, %rd1;
	ld.global.b32 	%r3, [%rd2];
{body}
	st.global.b32 	[%rd2], %r4;
	ret;
}}
"""


def run(body: str, given: torch.Tensor, number: int = 0, threads: int = 32) -> Machine:
    """A program for each ``threads`` numbers: each lane's is ``%r3``, and becomes ``%r4``."""
    kernel = parse(MODULE.format(body=body, threads=threads))
    machine = Machine(kernel, translated(kernel), threads, 4096, [given.data_ptr(), number], Global([given]))
    programs = given.numel() // threads
    machine.run((programs, 1, 1), np.arange(programs))
    return machine


def numbers(body: str, *given: int, **more: Any) -> list[int]:
    """What 32 lanes make of these numbers and of 0 in the others."""
    tensor = torch.zeros(32, dtype=torch.int32)
    tensor[: len(given)] = torch.tensor(given, dtype=torch.int32)
    run(body, tensor, **more)
    return tensor.tolist()


@pytest.mark.parametrize(
    ("body", "given", "want"),
    [
        ("shl.b32 %r4, %r3, 32;", 5, 0),
        ("shr.s32 %r4, %r3, 40;", -5, -1),
        ("div.s32 %r4, %r3, 2;", -7, -3),
        ("rem.s32 %r4, %r3, 2;", -7, -1),
        ("bfe.s32 %r4, %r3, 1, 3;", 0b1110, -1),
        ("bfe.u32 %r4, %r3, 1, 3;", 0b1110, 7),
        ("bfi.b32 %r4, %r3, 255, 4, 2;", 0b01, 0xDF),
        ("prmt.b32 %r4, %r3, 0, 0x3012U;", 0x11223344, 0x11443322),
        ("mul.hi.u32 %r4, %r3, -1;", 3, 2),
        ("cvt.u16.u32 %rs1, %r3;\nmul.hi.u16 %rs2, %rs1, 21846;\ncvt.u32.u16 %r4, %rs2;", 10, 3),
        ("popc.b32 %r4, %r3;", -1, 32),
        ("clz.b32 %r4, %r3;", 1, 31),
        ("brev.b32 %r4, %r3;", 2, 1 << 30),
        ("shf.l.wrap.b32 %r4, %r3, 1, 33;", -(1 << 31), 3),
        ("lop3.b32 %r4, %r3, 12, 10, 0xE8;", 0b0111, 0b1110),
        ("cvt.s64.s32 %rd3, %r3;\nshr.u64 %rd3, %rd3, 60;\ncvt.u32.u64 %r4, %rd3;", -1, 15),
        ("mov.b32 {%rs1, %rs2}, %r3;\nmov.b32 %r4, {%rs2, %rs1};", 0x10002, 0x20001),
        ("cvt.rn.f32.s32 %r5, %r3;\ncvt.rzi.s32.f32 %r4, %r5;", -3, -3),
        ("max.f32 %r4, %r3, 0f7FC00000;", 0x3F800000, 0x3F800000),
        ("cvt.rn.bf16x2.f32 %r4, 0f3F808000, %r3;", 0x3F818000, 0x3F803F82),
        ("setp.neu.f32 %p1, %r3, 0f7FC00000;\nselp.b32 %r4, 1, 0, %p1;", 0, 1),
        ("mov.b32 %r4, 3;\nsetp.ne.b32 %p1, %r3, 7;\n@%p1 mov.b32 %r4, 4;", 7, 3),
    ],
)
def test_instructions(body: str, given: int, want: int) -> None:
    assert numbers(body, given)[0] == want


def test_the_upper_half_of_64_bits() -> None:
    one, two = -(2**62) - 12345, 2**61 + 987654321
    for kind, mask in ((np.int64, None), (np.uint64, 2**64 - 1)):
        a, b = (value if mask is None else value & mask for value in (one, two))
        assert int(lanes.upper_half(np.array([a], dtype=kind), np.array([b], dtype=kind))[0]) == a * b >> 64


def test_lanes_of_a_warp() -> None:
    given = list(range(32))
    assert numbers("shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;", *given)[:4] == [1, 0, 3, 2]
    assert numbers("shfl.sync.up.b32 %r4, %r3, 2, 0, -1;", *given)[:4] == [0, 1, 0, 1]
    assert numbers("shfl.sync.idx.b32 %r4, %r3, 3, 31, -1;", *given) == [3] * 32
    assert numbers("redux.sync.add.s32 %r4, %r3, -1;", *given) == [496] * 32
    ballot = "setp.gt.s32 %p1, %r3, 29;\nvote.sync.ballot.b32 %r4, %p1, -1;"
    assert numbers(ballot, *given)[0] == -(2**30)


def test_lanes_part_and_meet_again() -> None:
    """Each adds as often as its number says; then all shuffle."""
    body = """
	mov.b32 %r4, 0;
$L_again:
	setp.ge.s32 %p1, %r4, %r3;
	@%p1 bra $L_out;
	add.s32 %r4, %r4, 1;
	bra.uni $L_again;
$L_out:
	shfl.sync.idx.b32 %r4, %r4, 5, 31, -1;
"""
    assert numbers(body, *range(32)) == [5] * 32


def test_shared_memory_is_a_programs_own_and_undefined_at_first() -> None:
    body = """
	shl.b32 %r5, %r1, 2;
	@%p9 st.shared.b32 [%r5], %r3;
	bar.sync 0;
	xor.b32 %r6, %r5, 4;
	ld.shared.b32 %r4, [%r6];
"""
    given = torch.arange(128, dtype=torch.int32)
    run("setp.ne.b32 %p9, %r3, 65;" + body, given, threads=64)
    want = torch.arange(128).view(-1, 2).flip(1).flatten().int()
    want[64] = -1
    assert torch.equal(given, want)


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_products(kind: str) -> None:
    """Fragments are laid out as the manual says: number by number."""
    depth, packed = (8, 1) if kind == "tf32" else (16, 2)
    left, right = np.random.rand(16, depth), np.random.rand(depth, 8)
    left, right = (np.round(each * 16).astype(np.float32) for each in (left, right))
    to = {"bf16": lanes.to_bf16, "f16": lanes.to_f16, "tf32": lambda x: x.view(np.uint32)}[kind]

    def registers(count: int, place: Any) -> list[Any]:
        out = []
        for register in range(count):
            bits = [
                [int(to(place(lane // 4, lane % 4 * packed + one, register))) for one in range(packed)]
                for lane in range(32)
            ]
            out.append(np.array([sum(b << 16 * at for at, b in enumerate(each)) for each in bits], dtype=np.uint32))
        return out

    step = depth // 2
    a = registers(4, lambda row, column, r: left[row + 8 * (r % 2), column + step * (r // 2)])
    b = registers(2, lambda column, row, r: right[row + step * r, column])
    ones = [np.full(32, np.float32(1)).view(np.uint32)] * 4
    got = [each.view(np.float32) for each in lanes.product(kind, a, b, ones, 32)]
    want = left @ right + 1
    for lane in range(32):
        for at in range(4):
            assert got[at][lane] == want[lane // 4 + 8 * (at // 2), lane % 4 * 2 + at % 2]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("ld.global.b32 %r4, [%rd2 + 4];", "in no tensor"),
        ("mov.b32 %r4, 1;\nst.global.b32 [%rd2 + -4], %r4;", "in no tensor"),
        ("ld.global.b32 %r4, [%rd9];", "in no tensor"),
        ("setp.lt.s32 %p1, %r1, 16;\n@%p1 ld.global.b64 %rd4, [%rd2];\nmov.b32 %r4, 0;", "no multiple"),
        ("ld.shared.b32 %r4, [%r1 + 4096];", "beyond its 4096"),
        ("mov.b32 %r5, 2;\nld.shared.b32 %r4, [%r5];", "no multiple"),
        ("setp.lt.s32 %p1, %r1, 16;\n@%p1 bra $L_x;\nbar.sync 0;\n$L_x:\nmov.b32 %r4, 0;", "a part of a program"),
        ("setp.lt.s32 %p1, %r1, 16;\n@%p1 shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;", "whole warp"),
    ],
)
def test_what_a_gpu_would_not_stand(body: str, what: str) -> None:
    with pytest.raises(Fault, match=what):
        numbers(body, *range(32))


def test_an_instruction_that_is_not_there_is_named() -> None:
    with pytest.raises(Unknown, match=r"tcgen05\.mma"):
        numbers("tcgen05.mma %r4, %r3;")


def test_counts_are_of_warps_and_of_what_ran() -> None:
    body = "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra $L_x;\nadd.s32 %r3, %r3, 1;\n$L_x:\nmov.b32 %r4, %r3;"
    given = torch.zeros(128, dtype=torch.int32)
    machine = run(body, given, threads=64)
    found = {name: count for (name, _), count in machine.counts().items()}
    assert (found["setp.lt.s32"], found["add.s32"]) == (4, 2)
    assert given.tolist() == ([0] * 32 + [1] * 32) * 2
