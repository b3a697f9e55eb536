"""The torch.compile backend and ``explain``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo import lookup_backend
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from .kernels.plan import OptionError
from .passes import Config, Report, rewrite
from .passes.compat import many_recompiles
from .passes.dump import dump
from .passes.plans import absent_from
from .passes.stages import Log, listening

Compiled = Callable[..., Any]


def prescore(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """The backend behind ``torch.compile(model, backend="prescore", options={...})``.

    Args:
        gm, example_inputs: what Dynamo captured. options: see ``Config``.
        mode: an Inductor mode ("reduce-overhead", ...), for ``inner="inductor"``.

    Raises:
        OptionError: an option that does not exist or has a wrong type or value.
    """
    config = Config.from_options(options)
    folder = config.dump or os.environ.get("PRESCORE_DUMP")
    if folder:
        log = Log()
        with listening(log):
            gm, report = rewrite(gm, config)
        dump(log, folder)
    else:
        gm, report = rewrite(gm, config)
    _warn_of_a_foreign_plan(report)
    return compile_inner(gm, example_inputs, config, mode)


def _warn_of_a_foreign_plan(report: Report) -> None:
    """Where a graph's sites are not in the plan file, all of them run exact: say it once a graph."""
    unknown = [site.key for site in report.sites if site.reason == "not_in_plan"]
    if unknown:
        warnings.warn(
            f"prescore: {len(unknown)} of {len(report.sites)} attention sites are not in the plan file and run exact "
            f"(not_in_plan), {unknown[0]} first: calibrate what is compiled",
            stacklevel=2,
        )


def compile_inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, mode: str | None = None
) -> Compiled:
    """Compile a graph with ``config.inner``."""
    if mode not in (None, "default") and config.inner != "inductor":
        raise OptionError("mode", mode, f"only with inner='inductor', not {config.inner!r}")
    if callable(config.inner):
        compiled: Compiled = config.inner(gm, example_inputs)
        return compiled
    inner: Any = lookup_backend(config.inner)
    if mode in (None, "default"):
        return cast(Compiled, inner(gm, example_inputs))
    return cast(Compiled, inner(gm, example_inputs, config_patches=torch._inductor.list_mode_options(mode)))


class _Captured(Exception):
    """The graph is known: there is no need to run it."""


def explain(
    model: Callable[..., Any], *args: Any, config: Config | None = None, dynamic: bool | None = None, **kwargs: Any
) -> Report:
    """What ``backend="prescore"`` does to a call ``model(*args, **kwargs)``: which sites are rewritten, and why.

    A model that is one graph is only captured. One with graph breaks runs (exact, uncompiled), so
    that every graph is seen (what the model changes in itself, it changes), and Dynamo's caches are cleared afterwards.

    Args:
        model: module or function. config: default ``Config()``. dynamic: as in ``torch.compile``.
        *args, **kwargs: of the call.

    Returns:
        The report; ``print`` it for a table, ``.sites`` for the data, ``.to_json()``.
    """
    return stages(model, args, kwargs, config, dynamic).report


def stages(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    config: Config | None = None,
    dynamic: bool | None = None,
) -> Log:
    """The stages of every graph of a call, captured as ``explain`` says; each ends with the rewritten graph."""
    log = Log()

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        rewrite(gm, config)

        def stop(*_: Any) -> Any:
            raise _Captured

        return stop

    def capture_and_run(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        rewrite(gm, config)
        return gm.forward

    call = fresh()
    with listening(log):
        try:
            torch.compile(call, backend=capture, dynamic=dynamic, fullgraph=True)(model, args, kwargs)
        except _Captured:
            pass
        except (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode):
            log.clear()
            with many_recompiles():
                torch.compile(call, backend=capture_and_run, dynamic=dynamic)(model, args, kwargs)
            # The model's own code objects were compiled: give their recompiles back.
            torch._dynamo.reset()
    for graph in log.graphs:
        if graph.function.startswith(f"{_call.__name__} ("):
            graph.function = ""  # ours, which says nothing
    log.absent = absent_from(config.site_plans if config else None, log.report.sites)
    return log


def _call(self: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return self(*args, **kwargs)


def fresh() -> Compiled:
    """A copy of ``_call`` with a code object of its own: Dynamo counts recompiles by code object, and
    looking at a model must not use up the recompiles of its ``forward``."""
    return FunctionType(_call.__code__.replace(), globals(), _call.__name__)
