"""Where a node comes from: the module, the user's line, the nodes that it was made from."""

from __future__ import annotations

import ast
import inspect
import re

from torch import fx
from torch.fx.traceback import NodeSource, NodeSourceAction

_VARIABLE = re.compile(r"([LG])\['(\w+)'\]((?:\[\d+\])?)")
_STEP = re.compile(
    r"\.slice\([^)]*\)|\.__closure__\[\d+\]|\.cell_contents|(?:\._modules)?\[('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")\]"
    r"|\[(\d+)\]|\.(\w+)"
)


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose forward made the node, as in ``model.named_modules()``.

    Of a compiled function that calls models, it begins with the name that the function has for the model.
    """
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    if not paths:
        return ""
    variable = _VARIABLE.match(paths[-1])
    if variable is None:
        return ".".join(_steps("." + paths[-1])) if paths[-1] else ""
    kind, name, index = variable.groups()
    called, steps = paths[0] == variable.group(), _steps(paths[-1][variable.end() :])
    if (kind, name) == ("L", "fn") and paths[0].startswith("L['fn']"):  # what torch calls a module by that it compiles
        steps = steps[len(_steps(paths[0][variable.end() :])) :]
    elif (kind, name) != ("L", "self") and not name.startswith("__import_") and (kind == "G" or called):
        steps = [name, *re.findall(r"\d+", index), *steps]
    return ".".join(steps)


def _steps(path: str) -> list[str]:
    """The names and numbers of a path that Dynamo says as code: ``.layers[0]._modules['a b']``."""
    found: list[str] = []
    at = 0
    while at < len(path):
        step = _STEP.match(path, at)
        if step is None:  # said otherwise: the rest as it is
            return [*found, path[at:].strip(".")]
        quoted, number, name = step.groups()
        if quoted or number or name:
            found.append(ast.literal_eval(quoted) if quoted else number or name)
        at = step.end()
    return found


_EXPLAINS = re.compile(r"prescore_compile[/\\]backend\.py$")
"""The file of the function that ``explain`` puts around a model."""


def source_line(node: fx.Node) -> tuple[str, str]:
    """``("file:line", "the code there")`` of the user's innermost frame; empty when not recorded.

    Dynamo leaves torch's own frames out. Where it has no other, as in a compiled ``nn.TransformerDecoderLayer``,
    it is the ``forward`` of the innermost module.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]*)', node.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if not _EXPLAINS.search(frame[0])]
    if not frames:
        return _forward(node) if node.op.startswith("call_") else ("", "")
    file, line, code = frames[-1]
    return f"{file}:{line}", code.strip()


def _forward(node: fx.Node) -> tuple[str, str]:
    stack = node.meta.get("nn_module_stack") or {}
    cls = list(stack.values())[-1][1] if stack else None
    if not isinstance(cls, type) or "forward" not in dir(cls):
        return "", ""
    try:
        lines, first = inspect.getsourcelines(cls.forward)  # type: ignore[attr-defined]
        return f"{inspect.getsourcefile(cls.forward)}:{first}", lines[0].strip()  # type: ignore[attr-defined]
    except (OSError, TypeError):  # its source is not there
        return "", ""


def origins(node: fx.Node) -> tuple[str, ...]:
    """What a node was made from, nearest first: ``name (by rule)``, from FX's ``from_node``."""
    found: list[str] = []
    sources = node.meta.get("from_node") or []
    while sources and len(found) < 8:
        source = sources[-1]
        by = f" (by {source.pass_name})" if source.pass_name else ""
        found.append(f"{source.name}{by}")
        sources = source.from_node
    return tuple(found)


def same_place(node: fx.Node, origin: fx.Node) -> None:
    """Note that ``node`` stands where ``origin`` does: in the same module, on the same line of the user's."""
    for kind in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if kind in origin.meta:
            node.meta[kind] = origin.meta[kind]


def made_from(node: fx.Node, origin: fx.Node, rule: str) -> None:
    """Note that ``rule`` made ``node`` from ``origin``, as FX's own passes do."""
    node.meta["from_node"] = [NodeSource(origin, rule, NodeSourceAction.CREATE)]
