"""The commands ``prescore explain``, ``diff`` and ``kernels``."""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..batches import Call, tensors_in
from ..kernels.plan import OptionError
from ..passes import Config
from ..passes.compat import quiet_fakes
from ..passes.sources import DEVICES

Found = TypeVar("Found")
DONE, WRONG_USAGE, TARGET_FAILED = 0, 2, 3
LONGEST = 2**31
"""Tokens that no model is asked about: torch counts what is as large as length times length."""
FORMATS = {
    "explain": ("text", "json", "html", "dot", "model-explorer"),
    "diff": ("text", "json", "html", "dot", "model-explorer"),
    "kernels": ("text", "json", "html"),
}
_HELP = {
    "explain": "which attentions of a model are rewritten, and why the others are not",
    "diff": "what is changed in the graph, node by node",
    "kernels": "the source of the kernels that run",
}
_CODES = "exit codes: 0 done; 2 wrong usage or TARGET is not there; 3 TARGET's own code raised"


def add_to(commands: Any) -> None:
    """Add the three commands to an ``argparse`` sub-parser action."""
    from .target import FORMS

    for name, told in _HELP.items():
        parser = commands.add_parser(name, help=told, description=f"Print {told}.", epilog=_CODES)
        parser.add_argument("target", metavar="TARGET", help=FORMS)
        parser.add_argument("--format", choices=FORMATS[name], default="text", help="default: text")
        parser.add_argument("--out", type=Path, metavar="PATH", help="write there, not to standard output; "
                            "model-explorer writes a folder and needs it")  # fmt: skip
        parser.add_argument("--seq-len", type=int, metavar="N",
                            help="tokens, for a Hugging Face config (default: 4096)")  # fmt: skip
        parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", dest="options",
                            help="an option of the backend, as in --set min_seq_len=0; can be repeated")  # fmt: skip
        parser.add_argument("--device", choices=DEVICES, default="",
                            help="what to decide for; it need not be there (default: the model's)")  # fmt: skip
        parser.add_argument("--dynamic", action="store_true", help="capture with dynamic shapes")
        parser.add_argument("--color", choices=("auto", "always", "never"), default="auto",
                            help="colour in text: on a terminal, unless NO_COLOR is set (default: auto)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run one of the commands; returns the exit code."""
    return guarded(arguments.command, lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    # What the target prints must not end up inside JSON.
    with contextlib.redirect_stdout(sys.stderr):
        target, config = _target(arguments)
    with uncollected():
        with contextlib.redirect_stdout(sys.stderr):
            inspection = _inspect(arguments, target, config)
        _write(arguments, inspection)


def guarded(command: str, work: Callable[[], None]) -> int:
    """The exit code of a command's work; what went wrong is a line on standard error."""
    from .target import TargetError, TargetFailed

    try:
        with quiet_fakes():
            work()
    except BrokenPipeError:  # `prescore diff ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (TargetError, ValueError, OSError) as error:
        print(f"prescore {command}: {error}", file=sys.stderr)
        return WRONG_USAGE
    except TargetFailed as error:
        print(f"prescore {command}: {error}", file=sys.stderr)
        return TARGET_FAILED
    return DONE


def may_be_written(path: Path) -> bool:
    """Whether it names a file, there or not, in a folder that exists: asked before work that takes minutes."""
    return not path.is_dir() and path.absolute().parent.is_dir()


def on_weights(
    arguments: argparse.Namespace, out: str, work: Callable[[Callable[..., Any], list[Call], dict[str, Any]], Found]
) -> Found:
    """What ``work`` finds about TARGET's model: it gets the model, its batch and the options of ``--set``.

    ``out``: the option that names a file to write, which is asked about first.
    """
    from .target import TargetError, TargetFailed, error_text, load

    file = getattr(arguments, out)
    if file is not None and not may_be_written(file):
        raise TargetError(f"--{out}: got {str(file)!r}; allowed: a file in a folder that exists")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            options = dict(option(text) for text in arguments.options)
            if Path(arguments.target).is_dir():
                raise TargetError(f"TARGET: got the folder {arguments.target!r}, which has no weights; allowed: "
                                  "file.py:function")  # fmt: skip
            target = load(arguments.target, 1)
            return work(target.model, [Call(tuple(target.args), target.kwargs)], options)
    except (TargetError, TargetFailed, ValueError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise TargetFailed(f"{arguments.target}: the model raised {error_text(error)}") from error


def say(text: str, page: bool = False) -> None:
    """Print to standard output, if there is one: what its encoding lacks as escapes, but a ``page`` says UTF-8."""
    if sys.stdout is None:  # closed by the shell: `>&-`
        return
    if page and hasattr(sys.stdout, "buffer"):
        sys.stdout.buffer.write((text + "\n").encode("utf-8", "backslashreplace"))
        sys.stdout.flush()
        return
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    print(text, flush=True)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python's cyclic garbage collector does not run.

    A walk over the million objects that are torch's and transformers' modules takes as long as all passes over
    a graph of 30 layers; what it would free meanwhile is a twentieth of the process.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _target(arguments: argparse.Namespace) -> tuple[Any, Config]:
    from .target import load

    if arguments.format == "model-explorer" and arguments.out is None:
        raise ValueError("--format model-explorer: got no --out; allowed: a folder, for two graphs and their mapping")
    seq_len = arguments.seq_len
    wrong = seq_len is not None and not 1 <= seq_len < LONGEST
    if wrong or (seq_len is not None and not Path(arguments.target).is_dir()):
        allowed = (
            f"1 to {LONGEST - 1}" if wrong else "with the folder of a Hugging Face config; a function says its inputs"
        )
        raise ValueError(f"--seq-len: got {seq_len}; allowed: {allowed}")
    config = Config.from_options(dict(option(text) for text in arguments.options))
    if config.dump is not None:
        raise OptionError(
            "dump", config.dump, "for torch.compile, which writes every stage there; here --out says where"
        )
    return load(arguments.target, seq_len or 4096), config


def _trained(target: Any) -> bool:
    """Whether gradients are asked for: of a model in training mode, or in its inputs; else it is inference."""
    tensors = tensors_in((target.args, dict(target.kwargs)))
    return bool(getattr(target.model, "training", False)) or any(tensor.requires_grad for tensor in tensors)


def _inspect(arguments: argparse.Namespace, target: Any, config: Config) -> Any:
    from ..backend import stages
    from .inspection import Inspection
    from .target import TargetFailed, error_text

    try:
        with torch.set_grad_enabled(_trained(target)):
            log = stages(target.model, target.args, target.kwargs, config, arguments.dynamic or None, arguments.device)
    except OptionError:
        raise
    except (Exception, SystemExit) as error:
        raise TargetFailed(f"{arguments.target}: the model raised {error_text(error)}") from error
    return Inspection(target.title, log)


def option(text: str) -> tuple[str, Any]:
    """``OPTION=VALUE`` of the command line."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set: got {text!r}; allowed: OPTION=VALUE, as in min_seq_len=0")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _write(arguments: argparse.Namespace, inspection: Any) -> None:
    if arguments.format == "model-explorer":
        from . import explorer

        say("\n".join(str(path) for path in explorer.write(inspection, arguments.out)))
        return
    found = _formatted(arguments, inspection)
    if arguments.out is not None:
        arguments.out.write_text(found + "\n", encoding="utf-8", errors="backslashreplace")
        return
    if arguments.format == "text" and wants_colour(arguments.color):
        from .text import coloured

        found = coloured(found)
    say(found, page=arguments.format == "html")


def _formatted(arguments: argparse.Namespace, inspection: Any) -> str:
    from . import data, dot, html, text

    command = arguments.command
    texts: dict[str, Callable[[Any], str]] = {"explain": text.explain, "diff": text.diff, "kernels": text.kernels}
    datas: dict[str, Callable[[Any], Any]] = {"explain": data.explain, "diff": data.diff, "kernels": data.kernels}
    if arguments.format == "json":
        return json.dumps(datas[command](inspection), indent=2)
    if arguments.format == "html":
        return html.page(inspection, {"explain": "decisions"}.get(command, command))
    return dot.dot(inspection) if arguments.format == "dot" else texts[command](inspection)


def wants_colour(choice: str) -> bool:
    """Whether text is coloured: ``auto`` is on a terminal, unless NO_COLOR is set (no-color.org)."""
    if choice != "auto":
        return choice == "always"
    return (
        sys.stdout is not None
        and sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") != "dumb"
    )
