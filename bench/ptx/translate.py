"""From instructions to Python: a function for each run of them that nothing leads into or out of.

A function is given ``R``, the registers; ``A``, which lanes take part (None: all); and the machine ``m``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import lanes
from .parse import Instruction, Kernel

TYPES = {
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
UNSIGNED = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
OF_REGISTERS = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64"}
SMALL = ("bf16", "f16", "bf16x2", "f16x2")
JUMPS = ("bra", "ret", "exit")
SPACES = {"global": "memory", "shared": "shared", "shared_cta": "shared"}
NOTHING = ("fence", "membar", "discard", "prefetch", "griddepcontrol")
SPECIAL = {
    f"%{name}.{axis}": f"m.{name}[{at}]" for name in ("tid", "ctaid", "ntid", "nctaid") for at, axis in enumerate("xyz")
} | {"%laneid": "m.laneid", "%warpid": "m.warpid"}


FLOATS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "fma": "L.fused({0}, {1}, {2})",
    "neg": "-{0}", "abs": "np.abs({0})", "copysign": "np.copysign({1}, {0})",
    "min": "np.fmin({0}, {1})", "max": "np.fmax({0}, {1})",
    "min.NaN": "np.minimum({0}, {1})", "max.NaN": "np.maximum({0}, {1})",
    "sqrt": "np.sqrt({0})", "rsqrt": "{kind}(1) / np.sqrt({0})", "rcp": "{kind}(1) / {0}",
    "ex2": "np.exp2({0})", "lg2": "np.log2({0})", "sin": "np.sin({0})", "cos": "np.cos({0})", "tanh": "np.tanh({0})",
}  # fmt: skip
"""What instructions make of their operands."""
INTEGERS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}",
    "div": "L.quotient({0}, {1})", "rem": "L.remainder({0}, {1})",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}",
    "neg": "({kind}(0) - {0})", "abs": "np.abs({0})", "min": "np.minimum({0}, {1})", "max": "np.maximum({0}, {1})",
    "brev": "L.reversed_bits({0})",
}  # fmt: skip
"""The same of integers; those that need more than their operands have methods."""


class Unknown(Exception):
    """An instruction that this machine does not have."""


@dataclass
class Block:
    """Instructions from ``first`` to before ``last``; the last of them may be a jump."""

    first: int
    last: int
    run: Callable[[list[Any], Any, Any], None]


@dataclass
class Translator:
    """Names of registers, and constants that the text refers to."""

    kernel: Kernel
    places: dict[str, int] = field(init=False)
    constants: list[Any] = field(default_factory=list)
    known: dict[tuple[str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places = {name: at for at, name in enumerate(self.kernel.registers)}

    def blocks(self) -> dict[int, Block]:
        """By the place of their first instruction."""
        code = self.kernel.instructions
        starts = {0, *self.kernel.labels.values()}
        starts |= {at + 1 for at, each in enumerate(code) if each.name[0] in JUMPS}
        ordered = sorted(start for start in starts if start < len(code))
        return {first: self._block(first, last) for first, last in zip(ordered, [*ordered[1:], len(code)], strict=True)}

    def _block(self, first: int, last: int) -> Block:
        lines = ["def run(R, A, m):", "    pass"]
        for each in self.kernel.instructions[first:last]:
            if each.name[0] not in JUMPS:
                try:
                    lines += [f"    {line}" for line in self.lines(each)]
                except (KeyError, ValueError, IndexError) as error:
                    raise Unknown(f"{'.'.join(each.name)} {', '.join(each.operands)}") from error
        text = "\n".join(lines)
        names: dict[str, Any] = {"np": np, "L": lanes, "C": self.constants, "W": _written, "B": _both}
        names |= {name: kind for name, kind in TYPES.items()}
        exec(compile(text, f"<block {first} of {self.kernel.name}>", "exec"), names)
        return Block(first, last, names["run"])

    # ---- operands

    def read(self, operand: str, kind: str) -> str:
        """An operand's numbers as ``kind``."""
        if operand in SPECIAL:
            return SPECIAL[operand]
        register = re.fullmatch(r"%(p|rs|r|rd)\d+", operand)
        if register:
            own = OF_REGISTERS[register[1]]
            text = f"R[{self.places[operand]}]"
            if kind == own or kind == own.replace("b", "u") or kind == "pred":
                return text
            if TYPES[kind]().itemsize < TYPES[own]().itemsize:
                text = f"{text}.astype({UNSIGNED[TYPES[kind]().itemsize]})"
            return f"{text}.view({kind})"
        return f"C[{self._constant(operand, kind)}]"

    def _constant(self, operand: str, kind: str) -> int:
        if (operand, kind) not in self.known:
            self.known[operand, kind] = len(self.constants)
            self.constants.append(_number(operand, TYPES[kind]))
        return self.known[operand, kind]

    def write(self, each: Instruction, operand: str, text: str, kind: str) -> list[str]:
        """``operand = text``, for lanes that take part."""
        if operand == "_":
            return []
        own = OF_REGISTERS[re.fullmatch(r"%(p|rs|r|rd)\d+", operand)[1]]  # type: ignore[index]
        have, want = TYPES[kind](), TYPES[own]()
        if own != "pred":
            if have.itemsize < want.itemsize:  # widened as its type says
                text = f"({text}).astype({'s' if have.dtype.kind == 'i' else 'u'}{8 * want.itemsize})"
                text += f".view({own})" if have.dtype.kind == "i" else ""
            elif have.dtype.kind != "u":
                text = f"({text}).view({own})"
        at = self.places[operand]
        return [f"R[{at}] = W({self.active(each)}, {text}, R[{at}])"]

    def active(self, each: Instruction) -> str:
        if not each.guard:
            return "A"
        guard = f"R[{self.places[each.guard]}]"
        return f"B(A, {'~' if each.negated else ''}{guard})"

    def address(self, operand: str, kind: str) -> tuple[str, str]:
        """Of ``[%rd1 + 16]``: a register's numbers, and the offset."""
        found = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not found:
            raise ValueError(operand)
        return self.read(found[1], kind), str(int(found[2] or "0", 0))

    # ---- instructions

    def lines(self, each: Instruction) -> list[str]:
        """Statements that do what an instruction does."""
        name = each.name[0]
        if name in NOTHING:
            return []
        if each.name[-1] in SMALL and name not in ("cvt", "mma", "setp", "wgmma"):
            return self._small(each)
        return list(getattr(self, f"_{name}", self._plain)(each))

    def _plain(self, each: Instruction) -> list[str]:
        """Operands and a result of one type."""
        kind, (to, *operands) = each.name[-1], each.operands
        text = self._arithmetic(each, kind, [self.read(operand, kind) for operand in operands])
        return self.write(each, to, f"L.flushed({text})" if "ftz" in each.name and kind == "f32" else text, kind)

    def _arithmetic(self, each: Instruction, kind: str, given: Sequence[str]) -> str:
        name = f"{each.name[0]}.NaN" if "NaN" in each.name else each.name[0]
        return (FLOATS if kind[0] == "f" else INTEGERS)[name].format(*given, kind=kind)

    def _small(self, each: Instruction) -> list[str]:
        """Arithmetic of one or two numbers of 16 bits: each result is rounded."""
        kind, (to, *operands) = each.name[-1], each.operands
        bits = "b32" if kind.endswith("x2") else "b16"
        widen, narrow = ("L.from_bf16", "L.to_bf16") if kind.startswith("bf16") else ("L.from_f16", "L.to_f16")
        given = [self.read(operand, bits) for operand in operands]
        if bits == "b16":
            wide = [f"{widen}({one})" for one in given]
            return self.write(each, to, f"{narrow}({self._arithmetic(each, 'f32', wide)})", bits)
        halves = [
            f"{narrow}({self._arithmetic(each, 'f32', [f'{widen}(L.{half}({one}))' for one in given])})"
            for half in ("low", "high")
        ]
        return self.write(each, to, f"L.pair({', '.join(halves)})", bits)

    def _mul(self, each: Instruction) -> list[str]:
        kind = each.name[-1]
        one, two = (self.read(operand, kind) for operand in each.operands[1:])
        if "hi" in each.name:
            return self.write(each, each.operands[0], f"L.upper_half({one}, {two})", kind)
        if "wide" in each.name:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            return self.write(each, each.operands[0], f"({one}).astype({wide}) * ({two}).astype({wide})", wide)
        return self._plain(each)

    def _mad(self, each: Instruction) -> list[str]:
        kind = each.name[-1]
        wide = f"{kind[0]}{2 * int(kind[1:])}" if "wide" in each.name else kind
        if "hi" in each.name:
            raise ValueError("hi")
        one, two = (f"({self.read(operand, kind)}).astype({wide})" for operand in each.operands[1:3])
        return self.write(each, each.operands[0], f"{one} * {two} + {self.read(each.operands[3], wide)}", wide)

    def _mov(self, each: Instruction) -> list[str]:
        kind, (to, what) = each.name[-1], each.operands
        if to.startswith("{"):
            parts = _members(to)
            bits = 8 * TYPES[kind]().itemsize // len(parts)
            whole = self.read(what, kind)
            lines = [f"t = {whole}"]
            for at, part in enumerate(parts):
                lines += self.write(each, part, f"(t >> {kind}({bits * at})).astype(u{bits})", f"u{bits}")
            return lines
        if what.startswith("{"):
            parts = _members(what)
            bits = 8 * TYPES[kind]().itemsize // len(parts)
            shifted = [
                f"({self.read(part, f'b{bits}')}.astype({kind}) << {kind}({bits * at}))"
                for at, part in enumerate(parts)
            ]
            return self.write(each, to, " | ".join(shifted), kind)
        if kind == "pred" and not what.startswith("%"):
            return self.write(each, to, f"np.bool_({bool(int(what))})", kind)
        return self.write(each, to, self.read(what, kind), kind)

    def _cvt(self, each: Instruction) -> list[str]:
        to, *operands = each.operands
        source, kind = each.name[-1], each.name[-2]
        if kind in ("bf16x2", "f16x2"):
            number = "L.to_bf16" if kind == "bf16x2" else "L.to_f16"
            upper, lower = (f"{number}({self.read(operand, source)})" for operand in operands)
            return self.write(each, to, f"L.pair({lower}, {upper})", "b32")
        if kind == "tf32":
            return self.write(each, to, f"L.to_tf32({self.read(operands[0], 'f32')})", "b32")
        if source == "bf16":
            given = f"L.from_bf16({self.read(operands[0], 'b16')})"
            source = "f32"
        else:
            given = self.read(operands[0], source)
        if kind == "bf16":
            return self.write(each, to, f"L.to_bf16({given}.astype(f32))", "b16")
        if source[0] == "f" and kind[0] != "f":
            if "rzi" not in each.name:
                raise ValueError("rounding")
            return self.write(each, to, f"L.to_integer({given}, {kind})", kind)
        if "sat" in each.name or {"rmi", "rpi", "rni", "rzi"} & set(each.name):
            rounding = dict(rmi="floor", rpi="ceil", rni="rint", rzi="trunc")
            named = [rounding[part] for part in each.name if part in rounding]
            if kind != source or "sat" in each.name or not named:
                raise ValueError("cvt")
            return self.write(each, to, f"np.{named[0]}({given})", kind)
        return self.write(each, to, f"({given}).astype({kind})", kind)

    def _setp(self, each: Instruction) -> list[str]:
        kind, (to, *operands) = each.name[-1], each.operands
        if len(each.name) != 3 or len(operands) != 2:
            raise ValueError("setp")
        if kind in SMALL:
            bits, widen = "b32" if kind.endswith("x2") else "b16", f"L.from_{kind.removesuffix('x2')}"
            given = [self.read(operand, bits) for operand in operands]
            if bits == "b32":
                lines = []
                for half, part in zip(("low", "high"), to.split("|"), strict=True):
                    one, two = (f"{widen}(L.{half}({one}))" for one in given)
                    lines += self.write(each, part, f"L.compared({each.name[1]!r}, {one}, {two})", "pred")
                return lines
            given = [f"{widen}({one})" for one in given]
        else:
            given = [self.read(operand, kind) for operand in operands]
        return self.write(each, to, f"L.compared({each.name[1]!r}, {', '.join(given)})", "pred")

    def _selp(self, each: Instruction) -> list[str]:
        kind, (to, one, two, which) = each.name[-1], each.operands
        text = f"np.where({self.read(which, 'pred')}, {self.read(one, kind)}, {self.read(two, kind)})"
        return self.write(each, to, text, kind)

    def _shl(self, each: Instruction) -> list[str]:
        kind, (to, what, by) = each.name[-1], each.operands
        text = f"L.shifted({each.name[0]!r}, {self.read(what, kind)}, {self.read(by, 'u32')})"
        return self.write(each, to, text, kind)

    _shr = _shl

    def _bfe(self, each: Instruction) -> list[str]:
        kind, (to, what, at, length) = each.name[-1], each.operands
        text = f"L.field({self.read(what, kind)}, {self.read(at, 'u32')}, {self.read(length, 'u32')})"
        return self.write(each, to, text, kind)

    def _bfi(self, each: Instruction) -> list[str]:
        if each.name[-1] != "b32":
            raise ValueError("bfi")
        to, *operands = each.operands
        return self.write(each, to, f"L.inserted({', '.join(self.read(o, 'u32') for o in operands)})", "b32")

    def _prmt(self, each: Instruction) -> list[str]:
        to, *operands = each.operands
        return self.write(each, to, f"L.permuted({', '.join(self.read(o, 'b32') for o in operands)})", "b32")

    def _lop3(self, each: Instruction) -> list[str]:
        to, one, two, three, table = each.operands
        given = ", ".join(self.read(operand, "b32") for operand in (one, two, three))
        return self.write(each, to, f"L.logic({given}, {int(table, 0)})", "b32")

    def _shf(self, each: Instruction) -> list[str]:
        to, *operands = each.operands
        given = ", ".join(self.read(operand, "u32") for operand in operands)
        return self.write(each, to, f"L.funnel({each.name[1]!r}, {given}, {'wrap' in each.name})", "b32")

    def _popc(self, each: Instruction) -> list[str]:
        text = f"np.bitwise_count({self.read(each.operands[1], each.name[-1])}).astype(u32)"
        return self.write(each, each.operands[0], text, "b32")

    def _clz(self, each: Instruction) -> list[str]:
        return self.write(
            each, each.operands[0], f"L.leading_zeros({self.read(each.operands[1], each.name[-1])})", "b32"
        )

    # ---- between lanes

    def _shfl(self, each: Instruction) -> list[str]:
        to, what, by, clamp, _ = each.operands
        to, _, inside = to.partition("|")
        given = ", ".join([self.read(what, "b32"), self.read(by, "u32"), self.read(clamp, "u32")])
        lines = [f"m.whole_warps({self.active(each)})", f"t, u = L.shuffled({each.name[2]!r}, {given}, m.lanes)"]
        lines += self.write(each, to, "t", "b32")
        return lines + (self.write(each, inside, "u", "pred") if inside else [])

    def _redux(self, each: Instruction) -> list[str]:
        to, what, _ = each.operands
        kind = each.name[-1]
        text = f"L.reduced({each.name[2]!r}, {self.read(what, kind)}, {self.active(each)}, m.lanes)"
        return self.write(each, to, text, kind)

    def _vote(self, each: Instruction) -> list[str]:
        to, what, _ = each.operands
        kind = each.name[-1]
        text = f"L.voted({each.name[2]!r}, {self.read(what, 'pred')}, {self.active(each)}, m.lanes)"
        return self.write(each, to, text, kind)

    def _bar(self, each: Instruction) -> list[str]:
        return [] if "warp" in each.name else [f"m.barrier({self.active(each)})"]

    _barrier = _bar

    # ---- memory

    def _ld(self, each: Instruction) -> list[str]:
        to, where = each.operands[:2]
        kind = each.name[-1]
        if "param" in each.name:
            at = int(re.search(r"_param_(\d+)", where)[1])  # type: ignore[index]
            return self.write(each, to, f"m.parameter({at}, {kind})", kind)
        parts = _members(to)
        space = _space(each)
        address, offset = self.address(where, "u64" if space == "memory" else "u32")
        size = TYPES[kind]().itemsize
        lines = [f"a = {self.active(each)}", f"t = m.{space}.load({address}, {offset}, {size}, {len(parts)}, a)"]
        for at, part in enumerate(parts):
            lines += self.write(each, part, f"t[{at}].view({kind})", kind)
        return lines

    def _st(self, each: Instruction) -> list[str]:
        where, what = each.operands[:2]
        kind = each.name[-1]
        space = _space(each)
        address, offset = self.address(where, "u64" if space == "memory" else "u32")
        size = TYPES[kind]().itemsize
        parts = ", ".join(self.read(part, f"b{8 * size}") for part in _members(what))
        return [f"m.{space}.store({address}, {offset}, {size}, [{parts}], {self.active(each)})"]

    def _cp(self, each: Instruction) -> list[str]:
        if "commit_group" in each.name or "wait_group" in each.name or "wait_all" in each.name:
            return []
        to, where, size, *given = each.operands
        shared, at = self.address(to, "u32")
        address, offset = self.address(where, "u64")
        read = self.read(given[0], "u32") if given else size
        return [f"m.copy({shared}, {at}, {address}, {offset}, {int(size, 0)}, {read}, {self.active(each)})"]

    def _ldmatrix(self, each: Instruction) -> list[str]:
        to, where = each.operands
        address, offset = self.address(where, "u32")
        parts = _members(to)
        lines = [f"t = m.matrices({address}, {offset}, {len(parts)}, {'trans' in each.name}, {self.active(each)})"]
        for at, part in enumerate(parts):
            lines += self.write(each, part, f"t[{at}]", "b32")
        return lines

    def _mma(self, each: Instruction) -> list[str]:
        to, *operands = each.operands
        left, right, sums = (
            "[" + ", ".join(self.read(part, "b32") for part in _members(operand)) + "]" for operand in operands
        )
        kind = each.name[-2]
        if each.name[-1] != "f32" or kind not in ("bf16", "f16", "tf32"):
            raise ValueError("mma")
        lines = [f"m.whole_warps({self.active(each)})", f"t = L.product({kind!r}, {left}, {right}, {sums}, m.lanes)"]
        for at, part in enumerate(_members(to)):
            lines += self.write(each, part, f"t[{at}]", "b32")
        return lines

    def _stmatrix(self, each: Instruction) -> list[str]:
        where, what = each.operands
        address, offset = self.address(where, "u32")
        parts = ", ".join(self.read(part, "b32") for part in _members(what))
        return [f"m.put_matrices({address}, {offset}, [{parts}], {'trans' in each.name}, {self.active(each)})"]

    def _wgmma(self, each: Instruction) -> list[str]:
        if each.name[1] != "mma_async":  # products are done at once: nothing to wait for
            return []
        to, left, right, adds, *signs = each.operands
        shape, kind = each.name[-4], each.name[-1]
        in_registers = left.startswith("{")
        across = [sign == "1" for sign in signs[2:]]
        across = [False] * (2 - len(across)) + across
        if signs[:2] != ["1", "1"] or each.name[-3] != "f32":
            raise ValueError("wgmma")
        sums = ", ".join(self.read(part, "b32") for part in _members(to))
        one = (
            f"[{', '.join(self.read(part, 'b32') for part in _members(left))}]"
            if in_registers
            else self.read(left, "b64")
        )
        two, keeps = self.read(right, "b64"), self.read(adds, "pred") if adds.startswith("%") else str(adds != "0")
        columns = int(re.fullmatch(r"m64n(\d+)k\d+", shape)[1])  # type: ignore[index]
        given = f"{kind!r}, {columns}, {one}, {two}, [{sums}], {keeps}, {tuple(across)}, {self.active(each)}"
        lines = [f"t = m.group_product({given})"]
        for at, part in enumerate(_members(to)):
            lines += self.write(each, part, f"t[{at}]", "b32")
        return lines


def _space(each: Instruction) -> str:
    for part in each.name:
        if part in SPACES:
            return SPACES[part]
    raise ValueError("memory")


def _members(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _number(operand: str, kind: type) -> Any:
    """A constant, or the place of shared memory, which is all that symbols name."""
    if operand.startswith("0f"):
        bits = np.uint32(int(operand[2:], 16))
        return bits.view(np.float32) if kind is np.float32 else bits.astype(kind)
    if operand.startswith("0d"):
        return np.uint64(int(operand[2:], 16)).view(np.float64)
    if operand == "global_smem":
        return kind(0)
    bits = 8 * kind().itemsize
    whole = int(operand.rstrip("U"), 0) & ((1 << bits) - 1)
    return np.array(whole, dtype=UNSIGNED[bits // 8].replace("u", "uint")).view(kind)[()]


def _written(active: Any, new: Any, old: Any) -> Any:
    return new if active is None else np.where(active, new, old)


def _both(active: Any, guard: Any) -> Any:
    return guard if active is None else active & guard
