"""Everything there is to see of one call of a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..backend import check_call, stages
from ..passes import Config, GraphDiff, Report
from ..passes.sources import Source, sources_of
from ..passes.stages import Log
from . import text


@dataclass(frozen=True)
class Inspection:
    """The graphs of a call, or of what ``observe`` recorded: ``Inspection("my passes", log)``.

    Attributes:
        title: what was looked at. log: every graph with its stages.
    """

    title: str
    log: Log

    @property
    def report(self) -> Report:
        """The sites and what was decided."""
        return self.log.report

    @cached_property
    def diffs(self) -> list[GraphDiff]:
        """For each graph of the log: what changed from the first to the last stage."""
        return [graph.diff for graph in self.log.graphs]

    def json(self) -> str:
        """Sites, graphs and their differences."""
        from . import data

        return json.dumps(data.diff(self), indent=2)

    @cached_property
    def sources(self) -> list[Source]:
        """The kernels that the rewritten sites run."""
        return sources_of(self.report)

    def __str__(self) -> str:
        return text.diff(self)

    def html(self) -> str:
        """One self-contained page; it loads nothing."""
        from . import html

        return html.page(self)


def graph_diff(
    model: Callable[..., Any], *args: Any, config: Config | None = None, dynamic: bool | None = None, **kwargs: Any
) -> Inspection:
    """What ``backend="prescore"`` changes in the graphs of a call ``model(*args, **kwargs)``, node by node.

    The model is captured as ``explain`` does it.

    Args:
        model: module or function. config: default ``Config()``. dynamic: as in ``torch.compile``.
        *args, **kwargs: of the call.

    Returns:
        ``print`` it for a unified diff with the user's lines and the rules that fired; ``.diffs`` is
        the data, ``.html()`` a page to send to somebody.
    """
    check_call(model, kwargs)
    title = type(model).__name__ if hasattr(model, "forward") else getattr(model, "__name__", type(model).__name__)
    return Inspection(title, stages(model, args, kwargs, config, dynamic))
