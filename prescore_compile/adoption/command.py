"""The command ``prescore trial``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..batches import Call
from ..inspection.command import guarded, on_weights, say

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
    parser.add_argument("--train", action="store_true", help="try a training step, forward and backward, of the loss "
                        "that the model's output has")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="go on after a stage that failed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the evidence to FILE")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", dest="options",
                        help="an option of the backend, as in --set share=0.0005; can be repeated")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    adopt: list[bool] = []  # nothing: there is no verdict
    code = guarded(arguments.command, lambda: _run(arguments, adopt.append))
    return code if code or adopt == [True] else DO_NOT_ADOPT


def _run(arguments: argparse.Namespace, decide: Callable[[bool], None]) -> None:
    from .step import own_loss
    from .trial import trial
    from .verdict import Verdict

    def work(model: Callable[..., Any], batches: list[Call], options: dict[str, Any]) -> Verdict:
        return trial(
            model,
            batches,
            drift=arguments.drift,
            faster=arguments.faster,
            options=options,
            measure=arguments.measure,
            rounds=arguments.rounds,
            every_stage=arguments.all,
            loss=own_loss if arguments.train else None,
        )

    found = on_weights(arguments, "json", work)
    decide(found.adopt)  # before anything is written, which may fail
    if arguments.json is not None:
        arguments.json.write_text(found.to_json() + "\n")
    say(str(found))
