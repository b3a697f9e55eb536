"""Templates of kernels: text that says what is kept, and how it is filled.

A template is Triton source with two additions, chosen so that it still reads as source:

  - a line that ends in ``#? name`` stays only where ``name`` is true of the names given; ``not
    name`` and ``a and not b`` do what they say;
  - ``$name`` stands for a value. Alone on its line it stands for a block of lines, indented as
    it is, and is dropped where the block is empty.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping

_CONDITION = re.compile(r"\s*#\? (.+)$")
_BLOCK = re.compile(r"( *)\$(\w+)$")
_VALUE = re.compile(r"\$(\w+)")
WIDTH = 100
"""Of the comments at the head of a source."""
SIZES = {
    "blocks", "chunks", "clusters", "first_block", "k_len", "kv_heads", "list_size", "parts", "places", "q_len",
    "route_count", "row_count", "size", "tiles",
}  # fmt: skip
"""Parameters that are below 2^31, always."""
NARROWED = "# Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type."


def fill(template: str, names: Mapping[str, object]) -> str:
    """The template with its conditions decided and its values and blocks put in.

    Raises:
        KeyError: a name that the template uses is not in ``names``.
    """
    lines: list[str] = []
    for line in textwrap.dedent(template).strip("\n").split("\n"):
        condition = _CONDITION.search(line)
        if condition:
            if not _holds(condition[1], names):
                continue
            line = line[: condition.start()]
        block = _BLOCK.match(line)
        if block:
            text = str(names[block[2]]).strip("\n")
            lines += textwrap.indent(text, block[1]).split("\n") if text else []
        else:
            lines.append(_VALUE.sub(lambda found: str(names[found[1]]), line))
    return _plain("\n".join(lines))


def widened(dtype: str) -> str:
    """What is appended to a product's operand: Triton's interpreter would multiply the bits of a bfloat16."""
    return ".to(tl.float32)" if dtype != "float32" and os.environ.get("TRITON_INTERPRET") == "1" else ""


def source(name: str, about: Mapping[str, object], kernel: str) -> str:
    """A module of one kernel: a comment that says where it comes from, the imports, the function.

    Args:
        name: of the kernel. about: what to say of it, a line each.
        kernel: its ``def``; a parameter that it does not use is dropped.
    """
    kernel = _used(name, kernel)
    said = [f"# {name}: written by prescore_compile.kernels.triton; do not edit."]
    for what, text in about.items():
        wrapped = textwrap.wrap(f"{what}: {text}", WIDTH - 4, break_long_words=False)
        said += [f"#   {line}" if at else f"# {line}" for at, line in enumerate(wrapped)]
    head = "\n".join(said)
    return f"{head}\n\nimport triton\nimport triton.language as tl\n\n\n@triton.jit\n{kernel}\n"


def arguments(names: list[str]) -> str:
    """Parameter names, as many a line as fit: the block for ``$arguments``."""
    return textwrap.fill(", ".join(names) + ",", WIDTH - 4, break_long_words=False)


def _used(name: str, kernel: str) -> str:
    head = re.search(rf"def {name}\(([\w\s,]*)\):\n", kernel)
    assert head is not None, f"{name} is not defined"
    body = set(re.findall(r"\w+", re.sub("#.*", "", kernel[head.end() :])))
    kept = [given for given in re.findall(r"\w+", head[1]) if given in body]
    parameters = textwrap.indent(arguments(kept), " " * 4)
    narrowed = [f"{given} = tl.cast({given}, tl.int32)" for given in kept if given in SIZES]
    first = textwrap.indent("\n".join([NARROWED, *narrowed, ""]) if narrowed else "", " " * 4)
    return f"{kernel[: head.start()]}def {name}(\n{parameters}\n):\n{first}{kernel[head.end() :]}"


def _holds(condition: str, names: Mapping[str, object]) -> bool:
    for part in condition.split(" and "):
        wanted = not part.startswith("not ")
        if bool(names[part.removeprefix("not ").strip()]) != wanted:
            return False
    return True


def _plain(text: str) -> str:
    """Without blank lines that an empty section left behind."""
    return re.sub(r"\n{3,}", "\n\n", text)
