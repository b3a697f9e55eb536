"""The plan file: a ``Calibration`` as JSON to read, to keep beside a model, and to check."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..kernels.plan import PLAN_FIELDS, OptionError, Plan
from .plans import SHAPE_FIELDS, Calibration, SiteKey, SitePlan, TriedPlan
from .report import label

FORMAT = 1
EXACT = "exact"
_FILE = ("format", "torch", "measure", "target", "density", "predicted_drift", "drift", "plans", "sites")
_SITE = ("site", *SHAPE_FIELDS, "plan", "tried", "reason")


def write(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Write the file."""
    Path(path).write_text(text(calibration), encoding="utf-8")


def text(calibration: Calibration) -> str:
    """The file: a line for each plan and each site, the same for the same calibration."""
    found = data(calibration)
    plans = [f"    {json.dumps(name)}: {json.dumps(plan)}" for name, plan in found.pop("plans").items()]
    sites = [f"    {json.dumps(site)}" for site in found.pop("sites")]
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    lines += ['  "plans": {\n' + ",\n".join(plans) + "\n  }", '  "sites": [\n' + ",\n".join(sites) + "\n  ]"]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def data(calibration: Calibration) -> dict[str, Any]:
    """The file's content as plain data."""
    c = calibration
    tried = sorted((t.density, label(t.plan), t.plan.settings()) for s in c.sites for t in s.trials)
    plans = {name: settings for _, name, settings in tried}
    plans |= {label(s.plan): s.plan.settings() for s in c.sites if s.plan}
    return {
        "format": FORMAT,
        "torch": c.torch,
        "measure": c.measure,
        "target": {c.target[0]: c.target[1]},
        "density": c.density,
        "predicted_drift": _finite(c.predicted),
        "drift": _finite(c.drift),
        "plans": plans,
        "sites": [_site_data(site) for site in c.sites],
    }


def _finite(drift: float) -> float | None:
    """JSON has no number for a drift without an end."""
    return drift if math.isfinite(drift) else None


def _site_data(site: SitePlan) -> dict[str, Any]:
    tried = {label(t.plan): {"density": t.density, "drift": _finite(t.drift)} for t in site.trials}
    found = {"site": site.key.site, **site.key.shape(), "plan": label(site.plan) if site.plan else EXACT}
    return found | {"tried": tried} | ({"reason": site.reason} if site.reason else {})


def load(source: object) -> Calibration:
    """The calibration in a file, in the data of one, or as it is.

    Raises:
        OptionError: it is none of these, or something in it is wrong; says where, what was got and what is allowed.
    """
    if isinstance(source, Calibration):
        return source
    if isinstance(source, Mapping):
        return _calibration(_Part(source, "plan"))
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise OptionError("plan", source, "a plan file's path, its data as a dict, a Calibration, or None")
    path = os.fspath(source)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError("plan", source, f"a file that calibrate wrote ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; of JSON in JSON in JSON
        raise OptionError("plan", source, f"a file that calibrate wrote, which is JSON ({error})") from error
    return _calibration(_Part(found, f"plan: {path}"))


class _Part:
    """A value of the file and where it stands."""

    def __init__(self, value: Any, where: str) -> None:
        self.value, self.where = value, where

    def wrong(self, allowed: str) -> OptionError:
        return OptionError(self.where, self.value, allowed)

    def object(self, needed: tuple[str, ...] = (), others: tuple[str, ...] | None = None) -> dict[str, _Part]:
        """Its members; ``others`` may be there, too (None: any)."""
        if not isinstance(self.value, Mapping) or not all(isinstance(key, str) for key in self.value):
            raise self.wrong("an object" + (f" with {', '.join(needed)}" if needed else ""))
        for name in needed:
            if name not in self.value:
                raise self.wrong(f"an object with {', '.join(needed)}; {name!r} is missing")
        for name in self.value:
            if others is not None and name not in (*needed, *others):
                allowed = f"no such key; the keys are {', '.join((*needed, *others))}"
                raise OptionError(f"{self.where}: {name}", self.value[name], allowed)
        return {name: _Part(value, f"{self.where}: {name}") for name, value in self.value.items()}

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.wrong("a string")
        return self.value

    def number(self) -> float:
        known = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        try:
            if known and self.value >= 0:
                return float(self.value)
        except OverflowError:  # an int of hundreds of digits
            pass
        raise self.wrong("a number >= 0")

    def size(self) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < 1:
            raise self.wrong("an int >= 1")
        return self.value

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.wrong("a bool")
        return self.value

    def items(self) -> list[_Part]:
        if not isinstance(self.value, (list, tuple)):
            raise self.wrong("a list")
        return [_Part(value, f"{self.where}[{at}]") for at, value in enumerate(self.value)]


def _drift(part: _Part) -> float:
    return math.inf if part.value is None else part.number()


def _calibration(whole: _Part) -> Calibration:
    if not isinstance(whole.value, Mapping) or "format" not in whole.value:
        raise whole.wrong("what a plan file that calibrate wrote holds; it has no 'format'")
    version = whole.object()["format"]
    if isinstance(version.value, bool) or version.value != FORMAT:
        raise version.wrong(f"{FORMAT}, the format that this version reads")
    parts = whole.object(_FILE, ())
    plans = {name: _plan(part) for name, part in parts["plans"].object().items()}
    sites = tuple(_site(part, plans) for part in parts["sites"].items())
    seen: set[SiteKey] = set()
    for site, part in zip(sites, parts["sites"].items(), strict=True):
        if site.key in seen:
            raise part.wrong("each site once")
        seen.add(site.key)
    target = parts["target"].object()
    if len(target) != 1 or set(target) - {"budget", "drift"}:
        raise parts["target"].wrong('{"budget": a number} or {"drift": a number}')
    ((name, value),) = target.items()
    return Calibration(
        sites,
        measure=parts["measure"].text(),
        target=(name, value.number()),
        density=parts["density"].number(),
        predicted=_drift(parts["predicted_drift"]),
        drift=_drift(parts["drift"]),
        torch=parts["torch"].text(),
    )


def _plan(part: _Part) -> Plan:
    settings = part.object((), PLAN_FIELDS)
    try:
        return Plan(**{name: setting.value for name, setting in settings.items()})
    except OptionError as error:
        raise OptionError(f"{part.where}: {error.key}", error.got, error.allowed) from None


def _site(part: _Part, plans: Mapping[str, Plan]) -> SitePlan:
    parts = part.object(_SITE[:-2], _SITE[-2:])
    sizes = {name: parts[name].size() for name in SHAPE_FIELDS if name != "causal"}
    key = SiteKey(parts["site"].text(), **sizes, causal=parts["causal"].flag())
    trials = []
    for name, trial in parts["tried"].object().items() if "tried" in parts else ():
        found = trial.object(("density", "drift"), ())
        trials.append(
            TriedPlan(_named(_Part(name, trial.where), plans), found["density"].number(), _drift(found["drift"]))
        )
    chosen = None if parts["plan"].value == EXACT else _named(parts["plan"], plans)
    return SitePlan(key, chosen, tuple(trials), parts["reason"].text() if "reason" in parts else "")


def _named(name: _Part, plans: Mapping[str, Plan]) -> Plan:
    if not isinstance(name.value, str) or name.value not in plans:
        raise name.wrong(f"{EXACT!r} or the name of a plan: {', '.join(plans)}")
    return plans[name.value]
