"""The command ``prescore trial``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..inspection.command import guarded, may_be_written, option, say

DO_NOT_ADOPT = 1


def add_to(commands: Any) -> None:
    """Add the command to an ``argparse`` sub-parser action."""
    about = "whether to adopt the backend for a model, by four stages of evidence"
    parser = commands.add_parser(
        "trial", help=about, description=f"Say {about}. The exit code is 0 to adopt it, 1 not to."
    )
    parser.add_argument("target", metavar="TARGET", help="file.py:function, where function() returns (model, inputs): "
                        "the model with its weights, and one batch like those it will get")  # fmt: skip
    parser.add_argument("--drift", type=float, metavar="MEAN", help="largest drift of the output (default: 0.05 nats "
                        "a position of logits, else 0.01)")  # fmt: skip
    parser.add_argument("--faster", type=float, default=1.1, metavar="TIMES", help="how many times as fast it must be "
                        "(default: 1.1)")  # fmt: skip
    parser.add_argument("--measure", choices=("kl", "cosine"), help="what drift is (default: kl of logits, or cosine)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="in which time is measured (default: 5)")
    parser.add_argument("--all", action="store_true", help="go on after a stage that failed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the evidence to FILE")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", dest="options",
                        help="an option of the backend, as in --set share=0.0005; can be repeated")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    adopt: list[bool] = []  # nothing: there is no verdict
    code = guarded(arguments.command, lambda: _run(arguments, adopt.append))
    return code if code or adopt == [True] else DO_NOT_ADOPT


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # who reads it may be gone, which ends no trial
        print(line, file=sys.stderr, flush=True)


def _run(arguments: argparse.Namespace, decide: Callable[[bool], None]) -> None:
    from ..batches import Call
    from ..inspection.target import TargetError, TargetFailed, load, told
    from .trial import trial

    if arguments.json is not None and not may_be_written(arguments.json):
        raise TargetError(f"--json: got {str(arguments.json)!r}; allowed: a file in a folder that exists")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            options = dict(option(text) for text in arguments.options)
            if Path(arguments.target).is_dir():
                raise TargetError(f"TARGET: got the folder {arguments.target!r}, which has no weights; allowed: "
                                  "file.py:function")  # fmt: skip
            target = load(arguments.target, 1)
            found = trial(
                target.model,
                [Call(tuple(target.args), target.kwargs)],
                drift=arguments.drift,
                faster=arguments.faster,
                options=options,
                measure=arguments.measure,
                rounds=arguments.rounds,
                every_stage=arguments.all,
                progress=_tell,
            )
    except (TargetError, TargetFailed, ValueError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise TargetFailed(f"{arguments.target}: the model raised {told(error)}") from error
    decide(found.adopt)  # before anything is written, which may fail
    if arguments.json is not None:
        arguments.json.write_text(found.to_json() + "\n")
    say(str(found))
