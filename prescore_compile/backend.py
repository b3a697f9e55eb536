"""The torch.compile backend and ``explain``."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo import OptimizedModule, lookup_backend
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from .cachekey import tagged
from .kernels.plan import OptionError
from .passes import Config, Report, rewrite
from .passes.compat import guard_forward_mode, many_recompiles, no_history
from .passes.dump import dump
from .passes.plans import absent_from
from .passes.stages import Log, listening

Compiled = Callable[..., Any]
_LOG = logging.getLogger(__name__)


def prescore(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Config | None = None,
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
        try:
            dump(log, folder)
        except (OSError, ValueError) as error:
            raise OptionError("dump", folder, f"a folder that can be written ({error})") from error
    else:
        gm, report = rewrite(gm, config)
    if report.rewritten:  # the operators have no forward-mode derivative: sites are kept where it is asked for
        guard_forward_mode()
    _LOG.info("%s", report.line())
    _warn_of_a_foreign_plan(report)
    _warn_of_idle_globs(report, config)
    with tagged(config):
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


def _warn_of_idle_globs(report: Report, config: Config) -> None:
    """A pattern that matches no site may be misspelt, or of another graph: it is logged, which ends nothing."""
    idle = config.idle(site.module for site in report.sites)
    if idle and report.sites:
        modules = ", ".join(dict.fromkeys(site.module or "(no module)" for site in report.sites[:3]))
        more = ", ..." if len(report.sites) > 3 else ""
        _LOG.warning("%s: no attention site of this graph (%s%s) matches", ", ".join(idle), modules, more)


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

    Raises:
        OptionError: ``options=`` was given to a model without such a parameter.

    Returns:
        The report; ``print`` it for a table, ``.sites`` for the data, ``.to_json()``.
    """
    check_call(model, kwargs)
    return stages(model, args, kwargs, config, dynamic).report


def check_call(model: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Raise where ``options=`` is not of the model, whose ``**kwargs`` could swallow it in silence."""
    if "options" not in kwargs:
        return
    call = getattr(model, "_orig_mod", model)
    if "options" not in inspect.signature(getattr(call, "forward", call)).parameters:
        raise OptionError("options", kwargs["options"], "config=Config(**options); the model has no such parameter")


def stages(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    config: Config | None = None,
    dynamic: bool | None = None,
    device: str = "",
) -> Log:
    """The stages of every graph of a call, captured as ``explain`` says; each ends with the rewritten graph.

    ``device``: as for ``rewrite``.
    """
    config, log = Config.of(config), Log()

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        rewrite(gm, config, device=device)

        def stop(*_: Any) -> Any:
            raise _Captured

        return stop

    def capture_and_run(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        rewrite(gm, config, device=device)
        return gm.forward

    call, own_args, own_kwargs = fresh(model, args, kwargs)
    with listening(log), nullcontext() if dynamic else no_history():
        try:
            torch.compile(call, backend=capture, dynamic=dynamic, fullgraph=True)(*own_args, **own_kwargs)
        except _Captured:
            pass
        except (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode) as error:
            inner = getattr(error, "inner_exception", None)
            if isinstance(inner, OptionError):
                raise inner from None
            log.clear()
            try:
                with many_recompiles():
                    again = fresh(model, args, kwargs)[0]
                    torch.compile(again, backend=capture_and_run, dynamic=dynamic)(*own_args, **own_kwargs)
            finally:  # the model's own code objects were compiled: give their recompiles back
                torch._dynamo.reset()
    for graph in log.graphs:
        if graph.function.startswith(f"{_call.__name__} (") or len(log.graphs) == 1:
            graph.function = ""  # ours, or what was asked about
    log.absent = absent_from(config.site_plans, log.report.sites)
    log.idle = config.idle(site.module for site in log.report.sites)
    return log


def _call(self: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return self(*args, **kwargs)


def fresh(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Compiled, Sequence[Any], Mapping[str, Any]]:
    """What to compile, and to call with which arguments, to see what ``model(*args, **kwargs)`` does.

    It has a code object of its own: Dynamo counts recompiles by code object, and looking at a model must not use up
    the recompiles of its ``forward``. A function is copied, so that what it calls has the names that it has where the
    function is compiled.
    """
    while isinstance(model, functools.partial):
        args, kwargs = (*model.args, *args), {**model.keywords, **kwargs}
        model = model.func
    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    if isinstance(model, MethodType):
        return _copied(model.__func__), (model.__self__, *args), kwargs
    if isinstance(model, FunctionType):
        return _copied(model), args, kwargs
    return _copied(_call), (model, *args), kwargs


def _copied(function: Any) -> Compiled:
    if not isinstance(function, FunctionType):
        return cast(Compiled, function)
    code = function.__code__.replace()
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made
