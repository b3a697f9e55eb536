"""Texts that Python or an installed package carries, and synthetic long-range tasks over them."""

from __future__ import annotations

import importlib.util
import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prescore_compile import smollm

CHOSEN_ON = ("code", "manual")
HELD_OUT = ("news", "glossary")
"""Never looked at while a plan was chosen."""


def _code() -> str:
    return (_stdlib() / "argparse.py").read_text()


def _news() -> str:
    return (_stdlib() / "idlelib" / "NEWS.txt").read_text()


def _glossary() -> str:
    """ImageNet's class definitions (from WordNet): short independent entries."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("timm carries the glossary: pip install --no-deps timm")
    lines = (Path(spec.origin).parent / "data" / "_info" / "imagenet_synset_to_definition.txt").read_text()
    return "\n".join(line.split("\t", 1)[1] for line in lines.splitlines()[2000:6000] if "\t" in line)


TEXTS: dict[str, Callable[[], str]] = {"code": _code, "manual": smollm.topics, "news": _news, "glossary": _glossary}
"""Source code (argparse), a manual (help()'s topics), release notes (IDLE) and a dictionary."""


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@dataclass(frozen=True)
class Recall:
    """A context that is read exactly, and a tail that needs what lies far back in it.

    Attributes:
        ids: ``[1, n]`` int64, context and tail. first: where the tail begins.
        scored: ``[n]`` bool, the tokens whose prediction is scored.
    """

    ids: torch.Tensor
    first: int
    scored: torch.Tensor


PASSAGE, PRELUDE = 256, 32
FACTS = 24
NAMES = (
    "Mira Tom Ada Leo Nina Omar Ruth Ivan Elsa Hugo Vera Paul Jana Karl Lena Otto Zoe Finn Iris Max Olga Ben Rosa Emil"
).split()
PLACES = "Oslo Lima Cairo Paris Kyoto Delhi Rome Quito".split()


def copied(tokenizer: Any, name: str, length: int, draw: int = 0) -> Recall:
    """Two passages of 256 tokens, from about 6/7 and 2/5 of the context ago, come again at the end.

    Each further ``draw``, of at most 5, takes those that lie a sixteenth of the context later.
    Scored from the 33rd token of a passage on: before that the reader cannot know what is copied.
    """
    tail = 2 * PASSAGE + 2
    context = smollm.token_ids(tokenizer, TEXTS[name](), length - tail)[0]
    newline = tokenizer("\n", return_tensors="pt").input_ids[0, -1:]
    parts, scored = [context], [torch.zeros(len(context), dtype=torch.bool)]
    for depth in (1 / 7, 3 / 5):
        begin = int((depth + draw / 16) * len(context))
        parts += [newline, context[begin : begin + PASSAGE]]
        here = torch.zeros(PASSAGE + 1, dtype=torch.bool)
        here[1 + PRELUDE :] = True
        scored.append(here)
    return Recall(torch.cat(parts)[None], len(context), torch.cat(scored))


def planted(tokenizer: Any, name: str, length: int, seed: int) -> Recall:
    """24 sentences "The access code of NAME from PLACE is 12345." spread over the context, asked for at the end.

    Scored: the digits of the answers, in an order drawn from ``seed`` as the facts are.
    """
    draw = random.Random(seed)
    people = [f"{person} from {draw.choice(PLACES)}" for person in draw.sample(NAMES, FACTS)]
    codes = [str(draw.randrange(10000, 100000)) for _ in people]
    facts = [f"\nThe access code of {who} is {code}.\n" for who, code in zip(people, codes, strict=True)]
    questions = list(zip(people, codes, strict=True))
    draw.shuffle(questions)
    tail: list[int] = []
    scored: list[bool] = []
    for who, code in questions:
        ask, answer = (tokenizer(part).input_ids for part in (f"\nThe access code of {who} is", f" {code}"))
        digits = [any(c.isdigit() for c in tokenizer.decode([token])) for token in answer]
        stop = tokenizer(".").input_ids
        tail += ask + answer + stop
        scored += [False] * len(ask) + digits + [False] * len(stop)
    needles = [tokenizer(fact).input_ids for fact in facts]
    room = length - len(tail) - sum(map(len, needles))
    filler = smollm.token_ids(tokenizer, TEXTS[name](), room)[0].tolist()
    context: list[int] = []
    for at, needle in enumerate(needles):
        context += filler[at * room // FACTS : (at + 1) * room // FACTS] + needle
    ids = torch.tensor(context + tail)[None]
    return Recall(ids, len(context), torch.tensor([False] * len(context) + scored))
