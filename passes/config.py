"""The settings of a compile: a plan for its sites and what decides which sites get it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..kernels.plan import PLAN_FIELDS, WHOLE, OptionError, Plan, check_int
from .defaults import default_plan
from .planfile import load
from .plans import Calibration

SCORING = ("method", "threshold")
"""Settings without effect where no key is selected."""
ROUTING = ("spread", "share", "group_routes", "residual", "coarse")
"""Settings without effect where no cluster is routed to; most are errors of a ``Plan`` there."""
NEEDED_BY = {"keep": SCORING, "routes": ROUTING}
INNER = ("inductor", "aot_eager", "eager")
OF_GRAPHS = ("plan", "include", "exclude", "inner", "dump")
"""Options that say nothing where there is no graph: ``attention`` refuses them."""


@dataclass(frozen=True, kw_only=True)
class Config(Plan):
    """Everything ``torch.compile(..., backend="prescore", options={...})`` takes.

    The settings of a ``Plan``: what is given replaces that setting of each site's default (``passes.defaults``), see
    ``plan_for``. And:

    Attributes:
        min_seq_len: sites with fewer keys than this run exact (reason ``too_short``).
        inner: compiles the rewritten graph: "inductor", "aot_eager", "eager", or a callable
            ``(GraphModule, example_inputs) -> callable``.
        include: globs over module paths; a site whose path matches none runs exact.
        exclude: globs over module paths; a site whose path matches one runs exact.
        only_if_faster: keep sites exact where the cost model expects no gain.
        plan: a plan for each site, as ``calibrate`` makes it: a file's path, its data, or a ``Calibration``. Sites
            that it does not know run exact; not together with settings of a ``Plan``.
        dump: folder to write every stage of every graph to, as Python; also ``PRESCORE_DUMP=folder``.

    Raises:
        OptionError: naming the setting, what was got and what is allowed.
    """

    min_seq_len: int = 2048
    inner: str | Callable[..., Any] = "inductor"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    only_if_faster: bool = True
    plan: Calibration | str | os.PathLike[str] | Mapping[str, Any] | None = None
    dump: str | None = None
    given: tuple[str, ...] = field(init=False, repr=False, default=())
    """The plan's settings that were given, whatever their values."""

    def __new__(cls, **settings: Any) -> Config:
        known = [field.name for field in fields(cls) if field.init]
        for key, value in settings.items():
            if key not in known:
                near = get_close_matches(key, known, 1)
                meant = f"did you mean {near[0]!r}? " if near else ""
                raise OptionError(key, value, f"no such option; {meant}the options are {', '.join(known)}")
        if len(settings) == len(known):  # each would count as given
            raise TypeError(
                "Config: got every option at once, as dataclasses.replace passes them, and each would replace the "
                "defaults of sites; allowed: config.changed(...) to change a config, or only the options that are meant"
            )
        config = super().__new__(cls)
        object.__setattr__(config, "given", tuple(name for name in PLAN_FIELDS if name in settings))
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("min_seq_len", self.min_seq_len, 0)
        if not callable(self.inner) and self.inner not in INNER:
            raise OptionError("inner", self.inner, "one of " + ", ".join(INNER) + ", or a callable")
        if not isinstance(self.only_if_faster, bool):
            raise OptionError("only_if_faster", self.only_if_faster, "a bool")
        if isinstance(self.dump, os.PathLike):
            object.__setattr__(self, "dump", os.fspath(self.dump))
        if self.dump is not None and (not isinstance(self.dump, str) or not self.dump):
            raise OptionError("dump", self.dump, "a folder's path, or None")
        for key in ("include", "exclude"):
            value = getattr(self, key)
            if not isinstance(value, (list, tuple)) or not all(isinstance(glob, str) for glob in value):
                raise OptionError(key, value, "a list or tuple of glob strings")
            object.__setattr__(self, key, tuple(value))
        for key in SCORING:
            if key in self.given and not self.keep and getattr(self, key) != getattr(Plan(), key):
                raise OptionError(key, getattr(self, key), "beside keep of 1 or more: without it no key is scored")
        if "spread" in self.given and not self.routes and self.spread != Plan().spread:
            raise OptionError("spread", self.spread, "beside routes of 1 or more: without them no cluster is ranked")
        if self.plan is not None:
            object.__setattr__(self, "plan", load(self.plan))
            if self.given:
                given = ", ".join(f"{key}={value!r}" for key, value in self.own_settings().items())
                raise OptionError("plan", "a plan file", f"not together with {given}: it says what each site runs with")

    @classmethod
    def exact(cls, **options: Any) -> Config:
        """The plan that keeps everything: sites are rewritten at any length and attend every key."""
        everything: dict[str, Any] = dict(
            window=None, sinks=0, keep=0, centroids=0, routes=0, min_seq_len=0, only_if_faster=False
        )
        scoring = {key: options.pop(key) for key in SCORING if key in options}
        Plan(keep=1, **scoring)  # without effect, but never a wrong name
        return cls.from_options(everything | options)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | Config | None) -> Config:
        """Build from the ``options`` of ``torch.compile``, a dict or a ``Config``; unknown keys are errors."""
        if isinstance(options, Config):
            return options
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise OptionError("options", options, "a dict of options, or a Config")
        return cls(**{str(key): value for key, value in options.items()})

    @classmethod
    def of(cls, config: object) -> Config:
        """A ``config`` argument: itself, or the default for None."""
        if config is not None and not isinstance(config, Config):
            raise OptionError("config", config, "a Config, or None; of a dict of options, Config(**options)")
        return config or cls()

    def plan_for(self, causal: bool, device: str, length: int | torch.SymInt, pairs: bool = False) -> Plan:
        """The plan of a rewritten site, where ``plan`` gives none: the default of its kind with the given settings.

        Where these do not go with that default, selected keys with a residual say, they are settings of ``Plan()``.
        ``device``: "cpu", "cuda"; ``length``: of keys; ``pairs``: see ``default_plan``.
        """
        if "window" in self.given and self.window is None:
            return WHOLE
        try:
            plan = replace(default_plan(causal, device, length, pairs), **self.own_settings())
        except OptionError:
            plan = Plan(**self.own_settings())
        plan.check_reads(causal)
        return plan

    def changed(self, **settings: Any) -> Config:
        """With other settings; a ``plan`` takes the place of a plan's settings, and ``keep=0`` or ``routes=0`` of what
        has no effect without."""
        kept = [field.name for field in fields(self) if field.init and field.name not in PLAN_FIELDS]
        idle = {name for key, names in NEEDED_BY.items() if settings.get(key) == 0 for name in names}
        if settings.get("plan") is None:
            kept += [name for name in self.given if name not in idle]
        return Config(**{name: getattr(self, name) for name in kept} | settings)

    def __repr__(self) -> str:
        """What was given and what is no default: the settings of a plan that were not are chosen for each site."""
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in PLAN_FIELDS}
        told = self.own_settings() | {key: value for key, value in others.items() if value != getattr(Config, key)}
        return f"Config({', '.join(f'{key}={value!r}' for key, value in told.items())})"

    def own_settings(self) -> dict[str, Any]:
        """The plan's settings that were given."""
        return {name: getattr(self, name) for name in self.given}

    def of_graphs(self) -> list[str]:
        """The options, other than by default, that are for a graph or its sites."""
        return [name for name in OF_GRAPHS if getattr(self, name) != getattr(Config, name)]

    @property
    def site_plans(self) -> Calibration | None:
        """What ``plan`` holds."""
        return self.plan if isinstance(self.plan, Calibration) else None

    def covers(self, module: str) -> bool:
        """Whether ``include`` and ``exclude`` let a site of this module path be rewritten."""
        included = any(fnmatchcase(module, glob) for glob in self.include)
        return included and not any(fnmatchcase(module, glob) for glob in self.exclude)

    def idle(self, modules: Iterable[str]) -> list[str]:
        """Globs of ``include`` and ``exclude`` that match none of these paths, with the end of one that would."""
        paths, globs = list(modules), dict(include=self.include, exclude=self.exclude)

        def matches(glob: str) -> bool:
            return any(fnmatchcase(path, glob) for path in paths)

        found = []
        for name, glob in ((name, glob) for name, some in globs.items() for glob in some):
            if glob != "*" and not matches(glob):
                ends = (glob.split(".", cut)[-1] for cut in range(1, glob.count(".") + 1))
                near = next(filter(matches, ends), None)
                found.append(f"{name} {glob!r}" + (f" (did you mean {near!r}?)" if near else ""))
        return found
