"""What a trial found: data only."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

STAGES = {
    "sites": "is any attention rewritten?",
    "same": "with every key kept, does the rewritten model compute what the model does?",
    "quality": "how far is its output from the model's?",
    "speed": "how much faster is it, from end to end?",
}
"""The stages of a trial, in order, and what each asks."""


@dataclass(frozen=True)
class Stage:
    """One question, answered by measurement.

    Attributes:
        name: a key of ``STAGES``. passed: whether the answer is good enough. found: the answer in words.
        evidence: what was measured, as plain data. advice: where it did not pass, what to do.
    """

    name: str
    passed: bool
    found: str
    evidence: dict[str, Any] = field(default_factory=dict)
    advice: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether to adopt ``backend="prescore"`` for a model, with the evidence.

    Attributes:
        stages: those that ran, in order: a trial ends with the first one that fails, unless all were asked for.
        options: of the backend, other than by default. about: torch, device and threads.
    """

    stages: tuple[Stage, ...]
    options: str
    about: dict[str, Any]

    @property
    def adopt(self) -> bool:
        """Every stage passed."""
        return len(self.stages) == len(STAGES) and all(stage.passed for stage in self.stages)

    @property
    def failed(self) -> Stage | None:
        """The first stage that did not pass."""
        return next((stage for stage in self.stages if not stage.passed), None)

    def data(self) -> dict[str, Any]:
        """Plain data; numbers that JSON does not have are None."""
        body = {
            "adopt": self.adopt,
            "stages": [asdict(stage) for stage in self.stages],
            "options": self.options,
            "about": self.about,
        }
        found: dict[str, Any] = _finite(body)
        return found

    def to_json(self) -> str:
        """``data()`` as a JSON object."""
        return json.dumps(self.data(), indent=2)

    def __str__(self) -> str:
        ran = {stage.name: stage for stage in self.stages}
        rows = []
        for name, question in STAGES.items():
            answer = ("passed" if ran[name].passed else "failed") if name in ran else "not run"
            rows.append([name, answer, "\n".join(_wrapped(ran[name].found if name in ran else question))])
        about = ", ".join(f"{key} {value}" for key, value in self.about.items())
        lines = [f"do not adopt: {self.failed.name} failed" if self.failed else "adopt", ""]
        lines += [tabulate(rows, headers=["stage", "", "found"]), "", f"{about}; {self.options}"]
        for stage in self.stages:
            if stage.advice:
                lines += ["", *textwrap.wrap(f"{stage.name}: {stage.advice}", 120)]
        return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, 80) or [""]]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
