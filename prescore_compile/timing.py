"""Times of several ways to do the same, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleaved(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    tell: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each way by ``clock``, run in turn so that a machine's moods meet all of them."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, work in ways.items():
            begin = clock()
            work()
            times[name].append(clock() - begin)
            if tell:
                tell(f"  {turn + 1}/{rounds}, {name}: {times[name][-1]:.2f} s")
    return {name: statistics.median(found) for name, found in times.items()}
