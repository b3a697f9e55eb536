"""From the text of a PTX module to the instructions of its one kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass

GUARD = re.compile(r"@(!?)(%p\d+)\s+(.*)", re.DOTALL)
PLACE = re.compile(r"\.py:(\d+):")
"""In a ``.loc``: the lines that were inlined into each other, the kernel's own last."""
LABEL = re.compile(r"(\$?\w+):$")
MEMBERS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


@dataclass(frozen=True)
class Instruction:
    """``@guard name operands``; ``name`` in its parts: ``("add", "s32")``; ``line``: of the kernel's own source."""

    name: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str = ""
    negated: bool = False
    line: int = 0


@dataclass(frozen=True)
class Kernel:
    """Instructions in order; ``labels``: where each leads to; ``registers``: their names."""

    name: str
    parameters: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: tuple[str, ...]


def parse(text: str) -> Kernel:
    """The kernel of a module that has one."""
    text = re.sub(r"//(?! \S+\.py:)[^\n]*", "", text)
    head, body = text.split(".entry", 1)[1].split("\n{", 1)
    body = body.split("\n}", 1)[0]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    at = 0
    for line in (line.strip() for line in body.splitlines()):
        if line.startswith(".loc"):
            at = int((PLACE.findall(line) or [at])[-1])
            continue
        label = LABEL.match(line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        for statement in (part.strip() for part in line.split(";")):
            if statement and statement[0] not in ".{}":
                instructions.append(_instruction(statement, at))
    used = {name for each in instructions for name in re.findall(r"%(?:p|rs|r|rd)\d+", " ".join(_words(each)))}
    return Kernel(head.split("(")[0].strip(), head.count(".param"), tuple(instructions), labels, tuple(sorted(used)))


def _words(each: Instruction) -> tuple[str, ...]:
    return (*each.operands, each.guard)


def _instruction(statement: str, line: int) -> Instruction:
    guard = GUARD.match(statement)
    negated, register, rest = (bool(guard[1]), guard[2], guard[3]) if guard else (False, "", statement)
    name, *operands = rest.split(None, 1)
    found = MEMBERS.findall(operands[0]) if operands else []
    return Instruction(tuple(name.replace("::", "_").split(".")), tuple(found), register, negated, line)
