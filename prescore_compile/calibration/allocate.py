"""Choose one plan a site: the least drift for the pairs that may be spent. Pure functions.

Drifts of sites are taken to add up. What is chosen is measured with all plans in place afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

Key = TypeVar("Key")
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Option(Generic[Choice]):
    """One thing that a site can run, the pairs it attends and the drift that it alone makes."""

    choice: Choice
    pairs: float
    drift: float


@dataclass(frozen=True)
class _Step(Generic[Key, Choice]):
    gain: float
    """Drift that goes away for one more pair."""
    key: Key
    at: int
    option: Option[Choice]
    pairs: float


def hull(options: Sequence[Option[Choice]]) -> list[Option[Choice]]:
    """The options worth having, cheapest first: each step up takes away less drift a pair than the one before."""
    found: list[Option[Choice]] = []
    for option in sorted(options, key=lambda o: (o.pairs, o.drift)):
        if found and option.drift >= found[-1].drift:
            continue
        while len(found) > 1 and _gain(found[-2], found[-1]) <= _gain(found[-1], option):
            found.pop()
        if found and option.pairs == found[-1].pairs:
            found.pop()
        found.append(option)
    return found


def cheapest(sites: Mapping[Key, Sequence[Option[Choice]]]) -> float:
    """The fewest pairs that can be spent."""
    return sum(min(option.pairs for option in options) for options in sites.values())


def within(sites: Mapping[Key, Sequence[Option[Choice]]], pairs: float) -> dict[Key, Option[Choice]]:
    """The steps that take away most drift a pair, as long as they fit into ``pairs``, from the cheapest options on.

    Not the optimum, but no further from it than one step of one site.
    """
    hulls = {key: hull(options) for key, options in sites.items()}
    at = dict.fromkeys(hulls, 0)
    spent = sum(found[0].pairs for found in hulls.values())
    for step in _steps(hulls):
        if at[step.key] == step.at - 1 and spent + step.pairs <= pairs:
            at[step.key] = step.at
            spent += step.pairs
    return {key: found[at[key]] for key, found in hulls.items()}


def path(sites: Mapping[Key, Sequence[Option[Choice]]]) -> list[dict[Key, Option[Choice]]]:
    """From the cheapest options, step by step, to those with the least drift."""
    hulls = {key: hull(options) for key, options in sites.items()}
    found = [{key: options[0] for key, options in hulls.items()}]
    for step in _steps(hulls):
        found.append(found[-1] | {step.key: step.option})
    return found


def _steps(hulls: Mapping[Key, Sequence[Option[Choice]]]) -> list[_Step[Key, Choice]]:
    """All steps up, the most drift a pair first; those of one site are in order."""
    steps = [
        _Step(_gain(low, high), key, at, high, high.pairs - low.pairs)
        for key, options in hulls.items()
        for at, (low, high) in enumerate(pairwise(options), 1)
    ]
    return sorted(steps, key=lambda step: -step.gain)


def _gain(low: Option[Choice], high: Option[Choice]) -> float:
    return (low.drift - high.drift) / max(high.pairs - low.pairs, 1e-9)
