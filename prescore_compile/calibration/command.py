"""The command ``prescore calibrate``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from ..inspection.command import DONE, TARGET_FAILED, WRONG_USAGE, option


def add_to(commands: Any) -> None:
    """Add the command to an ``argparse`` sub-parser action."""
    about = "a plan for each attention of a model, chosen by what it does to the model's output"
    parser = commands.add_parser("calibrate", help=about, description=f"Write {about}.")
    parser.add_argument("target", metavar="TARGET", help="file.py:function, where function() returns (model, inputs); "
                        "the model has its weights, and the inputs are data like those it will get")  # fmt: skip
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--budget", type=float, metavar="DENSITY", help="pairs attended / exact pairs, as in 0.2")
    goal.add_argument("--drift", type=float, metavar="MEAN", help="largest drift of the output, as in 0.01")
    parser.add_argument(
        "--measure", choices=("kl", "cosine"), help="what drift is (default: kl of logits, else cosine)"
    )
    parser.add_argument("--measured", type=Path, metavar="FILE", help="an earlier plan file of the same model and "
                        "inputs: what it tried is not run again")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the plan file to write")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", dest="options",
                        help="an option of the backend, as in --set chunk=64; can be repeated")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from ..inspection.target import TargetError, TargetFailed, load
    from .calibrate import calibrate

    try:
        with contextlib.redirect_stdout(sys.stderr):
            options = dict(option(text) for text in arguments.options)
            if Path(arguments.target).is_dir():
                raise TargetError(f"TARGET: got the folder {arguments.target!r}, which has no weights; allowed: "
                                  "file.py:function")  # fmt: skip
            target = load(arguments.target, 1)
            found = calibrate(
                target.model,
                [target.kwargs if target.kwargs and not target.args else target.args],
                budget=arguments.budget,
                drift=arguments.drift,
                options=options,
                measure=arguments.measure,
                measured=arguments.measured,
            )
        found.save(arguments.out)
    except (TargetError, ValueError, OSError) as error:
        print(f"prescore calibrate: {error}", file=sys.stderr)
        return WRONG_USAGE
    except TargetFailed as error:
        print(f"prescore calibrate: {error}", file=sys.stderr)
        return TARGET_FAILED
    print(found)
    return DONE
