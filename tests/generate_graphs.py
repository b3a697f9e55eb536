"""Graphs of every kind, rewritten: the one place that knows how each is captured and what ``rewrite`` wants of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from prescore_compile import Config
from prescore_compile.passes import rewrite
from prescore_compile.passes.report import SiteReport

KINDS = ("symbolic", "dynamo", "export", "decomposed")
EXACT = Config.exact()


def rewritten(
    module: nn.Module, runs: Sequence[tuple[Tensor, ...]], kind: str, dynamic: str = "", axes: Sequence[Any] = ()
) -> tuple[list[Any], list[list[SiteReport]]]:
    """Capture with the first run's inputs, rewrite with the plan that keeps everything, and run them all.

    Args:
        module: what is captured. runs: inputs; they are cloned, since a program may write to them.
        dynamic: "", "all" or "length". axes: for each input the axes that are a length, where that is dynamic.

    Returns:
        The outputs of the runs, and the sites of each graph that was rewritten.
    """
    reports: list[list[SiteReport]] = []

    def rewrite_graph(gm: fx.GraphModule, *inputs: Tensor) -> Callable[..., Any]:
        new, report = rewrite(gm, EXACT, *inputs)
        reports.append(report.sites)
        return new

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        run = captured(module, cloned(runs[0]), kind, dynamic, axes, rewrite_graph)
        outs = [seeded(run, cloned(inputs), dynamic == "length" and kind == "dynamo", axes) for inputs in runs]
    return outs, reports


def captured(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    kind: str,
    dynamic: str,
    axes: Sequence[Any],
    then: Callable[..., Any],
) -> Callable[..., Any]:
    if kind == "symbolic":
        return then(fx.symbolic_trace(module), *inputs)
    if kind == "dynamo":
        torch._dynamo.reset()
        module = fx.symbolic_trace(module)  # straight code, which Dynamo is much faster with
        backend = lambda gm, _: then(gm).forward  # noqa: E731
        return torch.compile(module, backend=backend, fullgraph=True, dynamic=True if dynamic == "all" else None)
    shapes = None
    if dynamic:
        shapes = tuple({axis: torch.export.Dim.DYNAMIC for axis in at} for at in axes)
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    if kind == "decomposed":
        program = program.run_decompositions()
    return then(program.module())


def seeded(run: Callable[..., Any], inputs: tuple[Tensor, ...], mark: bool = False, axes: Sequence[Any] = ()) -> Any:
    """Run it with the global generator in a known state."""
    if mark:
        for x, at in zip(inputs, axes, strict=True):
            for axis in at:
                torch._dynamo.mark_dynamic(x, axis)
    torch.manual_seed(0)
    return run(*inputs)


def cloned(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.clone() for x in inputs)
