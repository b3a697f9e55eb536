"""The command ``prescore calibrate``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..batches import Call
from ..inspection.command import guarded, on_weights, say
from ..passes import Calibration


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
    return guarded(arguments.command, lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    from .calibrate import calibrate

    def work(model: Callable[..., Any], batches: list[Call], options: dict[str, Any]) -> Calibration:
        return calibrate(
            model,
            batches,
            budget=arguments.budget,
            drift=arguments.drift,
            options=options,
            measure=arguments.measure,
            measured=arguments.measured,
        )

    found = on_weights(arguments, "out", work)
    try:
        found.save(arguments.out)
    finally:  # a file that cannot be written does not lose it, nor who reads this and is gone the file
        say(str(found))
