"""``calibrate``: a plan for each site of a model, chosen on the user's own data."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from ..batches import Call, Tell, calls_of, check_model, teller, to_stderr
from ..drift import Drift, Measure, Reference, check_repeats, resolve
from ..kernels.plan import PLAN_FIELDS, OptionError, Plan
from ..passes import Calibration, Config, SitePlan
from ..passes.planfile import load
from ..passes.plans import SiteKey, TriedPlan
from ..passes.report import label
from . import allocate
from .allocate import Option
from .candidates import ladder
from .switch import Plans, Spent, Switch

Choices = dict[SiteKey, Option[Plan | None]]


def calibrate(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    budget: float | None = None,
    drift: float | None = None,
    options: Mapping[str, Any] | Config | None = None,
    candidates: Sequence[Plan] | None = None,
    measure: str | Measure | None = None,
    measured: Calibration | str | os.PathLike[str] | None = None,
    progress: Tell | None = to_stderr,
) -> Calibration:
    """Measure what each plan at each site does to the model's output, and give each site its plan.

    For each site and candidate plan the model runs with that one site approximated and all others exact. The
    drifts are taken to add up, the plans that take away most drift for a pair are chosen, and the model runs with
    all of them in place for the drift that is reported.

    Cost: ``batches * (1 + sites * candidates)`` forwards, uncompiled, and then ``2 * batches`` for each check:
    one with ``budget``, about ``log2(sites * candidates)`` with ``drift``. With the default ladder of six to eight
    plans that is some 200 forwards for a model of 30 layers. Memory: two outputs.

    Args:
        model: a module in eval mode, or a function; what is compiled later must be the same one. Its output must
            depend on its input alone.
        batches: what it is called with: each a tensor, a tuple of positional or a dict of keyword arguments. Take
            the lengths that will be run: what a plan costs and does depends on them. Each run is given a copy.
        budget: the density that may be spent: pairs attended, routing counted in / exact pairs, over all sites
            that could be rewritten (one that is left exact spends all of its own).
        drift: the largest allowed drift; the cheapest plans found within it are taken, if only exact ones.
        options: as for ``torch.compile``: ``include`` and ``exclude`` say which sites are calibrated, settings of
            a plan (chunk, cluster, sinks ...) are those of the default candidates. Lengths and inner compilers
            have no effect here.
        candidates: the plans to try, beside exact; default: a ladder of densities for each site.
        measure: what drift is. "kl": mean KL divergence of the output distribution from the exact model's, in nats
            a position. "cosine": mean of 1 - cosine of the output's rows. Default: "kl" of ``output.logits`` where
            the output has that, else "cosine". Positions that the batch's ``attention_mask`` pads do not count.
            Or a function ``(exact output, output) -> drift``, whose mean over batches is taken.
        measured: an earlier calibration of this model on these batches, or its file: its trials are not run again, so
            that another budget costs one check.
        progress: told a line at a time what goes on; None: silent.

    Returns:
        Print it for a table; ``save(path)`` writes what ``options={"plan": path}`` takes.

    Raises:
        OptionError: an argument that does not hold what is allowed, a budget that no candidates meet.
        ValueError: no site can be rewritten; the message says why. The exact model's output is not a number, or differs
            from run to run.
    """
    tell = teller(progress)
    target = _target(budget, drift)
    config = _config(options)
    check_model(model)
    calls = calls_of(batches)
    tried = _candidates(candidates)
    earlier = _measured(measured)
    switch = Switch(model, config)
    try:
        search = _Search(switch, calls, measure, tell)
        search.check_exact()
        plans = search.candidates(tried, config)
        search.sweep(plans, earlier)
        chosen = search.within(target[1]) if target[0] == "budget" else search.below(target[1])
        return search.result(chosen, target)
    finally:
        switch.close()


class _Search:
    """Trials of one model on some calls."""

    def __init__(self, switch: Switch, calls: Sequence[Call], measure: str | Measure | None, tell: Tell) -> None:
        self.switch, self.calls, self.tell = switch, calls, tell
        self.start = time.perf_counter()
        tell("capturing the model, and its exact outputs")
        self.exact = Spent()
        output: Any = None
        for call in calls:
            output, spent = switch.run(call, {})
            self.exact.add(spent)
        self.measure = resolve(measure, output)
        if not switch.sites:
            kept = "; ".join(f"{site}: {reason}" for site, reason in switch.kept.items())
            raise ValueError(f"no attention site can be given a plan: {kept or 'no attention was found in a graph'}")
        self.trials: dict[SiteKey, list[Option[Plan]]] = {key: [] for key in switch.sites}
        self.reasons: dict[SiteKey, str] = {}
        self._reference: tuple[int, Reference] | None = (
            len(calls) - 1,
            Reference(output, calls[-1].kwargs, self.measure),
        )
        self._checked: dict[tuple[tuple[SiteKey, Plan], ...], tuple[float, float]] = {}

    @property
    def measure_name(self) -> str:
        return self.measure if isinstance(self.measure, str) else getattr(self.measure, "__name__", "own")

    def check_exact(self) -> None:
        """Raise ``ValueError`` where the exact model does not repeat itself."""
        output, _ = self.switch.run(self.calls[-1], {})
        check_repeats(self._exact(len(self.calls) - 1), output, self.tell)

    def candidates(self, given: Sequence[Plan] | None, config: Config) -> dict[SiteKey, list[Plan]]:
        """The plans to try at each site: those that it can run."""
        lengths = {key: int(site.shape["k_len"]) for key, site in self.switch.sites.items()}
        wanted = {
            key: ladder(lengths[key], site.causal, config.plan_for(site.causal, site.device, lengths[key]))
            if given is None
            else list(given)
            for key, site in self.switch.sites.items()
        }
        refusals = {plan: self.switch.refusals(plan) for plan in dict.fromkeys(chain(*wanted.values()))}
        found: dict[SiteKey, list[Plan]] = {}
        for key, plans in wanted.items():
            found[key] = [plan for plan in plans if not refusals[plan][key]]
            if not found[key]:
                reasons = (refusals[plan][key] for plan in plans)
                self.reasons[key] = next(reasons, "no plan of the default ladder fits so few keys")
        return found

    def sweep(self, plans: Mapping[SiteKey, Sequence[Plan]], measured: Calibration | None) -> None:
        """Run every plan at every site, alone, but for what is measured."""
        if measured and measured.measure != self.measure_name:
            raise OptionError("measured", measured.measure, f"a calibration by {self.measure_name!r}, as this one is")
        known = {(site.key, trial.plan): trial for site in measured.sites for trial in site.trials} if measured else {}
        wanted = [(key, plan) for key, some in plans.items() for plan in some]
        found = self._tried([pair for pair in wanted if pair not in known])
        for key, plan in wanted:
            if (key, plan) in known:
                trial = known[key, plan]
                found[key, plan] = Option(plan, trial.density * self.exact.exact[key], trial.drift)
            self.trials[key].append(found[key, plan])

    def _tried(self, pairs: Sequence[tuple[SiteKey, Plan]]) -> dict[tuple[SiteKey, Plan], Option[Plan]]:
        drifts = dict.fromkeys(pairs, Drift())
        attended = dict.fromkeys(pairs, 0)
        count = len(pairs) * len(self.calls)
        begin, done = time.perf_counter(), 0
        for at, call in enumerate(self.calls if pairs else ()):
            reference = self._exact(at)
            for key, plan in pairs:
                output, spent = self.switch.run(call, {key: plan})
                drifts[key, plan] += reference.drift(output)
                attended[key, plan] += spent.attended[key]
                done += 1
                left = (time.perf_counter() - begin) / done * (count - done)
                now = f"drift {drifts[key, plan].mean:.3g} at {100 * spent.attended[key] / spent.exact[key]:.0f}%"
                self.tell(f"[{done}/{count}, {left:.0f} s left] {key.site}: {label(plan)}: {now}")
        return {(key, plan): Option(plan, attended[key, plan], drifts[key, plan].mean) for key, plan in pairs}

    def within(self, budget: float) -> Choices:
        """The least drift for a density."""
        options = self._options()
        total = self.exact.exact.total()
        least = allocate.cheapest(options) / total
        if least > budget:
            allowed = (
                f"{math.ceil(1000 * least) / 1000:g} or more, which the cheapest candidates spend on these batches"
            )
            raise OptionError("budget", budget, allowed)
        return allocate.within(options, budget * total)

    def below(self, bound: float) -> Choices:
        """The fewest pairs whose drift, all plans in place, is within the bound: bisected along the path of steps."""
        options = self._options()
        exact: Choices = {key: some[-1] for key, some in options.items()}
        path = [*allocate.path(options), exact]
        low, high = 0, len(path) - 1
        while low < high:
            middle = (low + high) // 2
            if self.check(path[middle])[0] <= bound:
                high = middle
            else:
                low = middle + 1
        return path[high]

    def check(self, chosen: Choices) -> tuple[float, float]:
        """Drift and density with all plans in place."""
        plans: Plans = {key: option.choice for key, option in chosen.items() if option.choice is not None}
        known = tuple(plans.items())
        if not plans:
            return 0.0, 1.0
        if known not in self._checked:
            found, spent = Drift(), Spent()
            for at, call in enumerate(self.calls):
                reference = self._exact(at)
                output, now = self.switch.run(call, plans)
                found += reference.drift(output)
                spent.add(now)
            self._checked[known] = found.mean, spent.density
            self.tell(f"{len(plans)} sites with their plans together: drift {found.mean:.3g} at {spent.density:.1%}")
        return self._checked[known]

    def result(self, chosen: Choices, target: tuple[str, float]) -> Calibration:
        """What was chosen, with what was measured."""
        measured, density = self.check(chosen)
        sites = [
            SitePlan(
                key,
                chosen[key].choice,
                tuple(TriedPlan(o.choice, _short(o.pairs / self.exact.exact[key]), _short(o.drift)) for o in trials),
                self.reasons.get(key, ""),
            )
            for key, trials in self.trials.items()
        ]
        if target[0] == "drift" and all(site.plan is None for site in sites):
            self.tell(f"no plan keeps the drift within {target[1]:g}: every site stays exact")
        self.tell(f"done in {time.perf_counter() - self.start:.0f} s")
        return Calibration(
            tuple(sites),
            measure=self.measure_name,
            target=target,
            density=_short(density),
            predicted=_short(sum(option.drift for option in chosen.values())),
            drift=_short(measured),
            torch=str(torch.__version__),
        )

    def _options(self) -> dict[SiteKey, list[Option[Plan | None]]]:
        """What each site can run; exact is the last one."""
        found: dict[SiteKey, list[Option[Plan | None]]] = {}
        for key, trials in self.trials.items():
            found[key] = [Option(o.choice, o.pairs, o.drift) for o in trials]
            found[key].append(Option(None, self.exact.exact[key], 0.0))
        return found

    def _exact(self, at: int) -> Reference:
        """The exact output of a call; only the last one is kept."""
        if self._reference is None or self._reference[0] != at:
            self._reference = None
            output, _ = self.switch.run(self.calls[at], {})
            self._reference = at, Reference(output, self.calls[at].kwargs, self.measure)
        return self._reference[1]


def _short(value: float) -> float:
    """Six digits: more say nothing."""
    return float(f"{value:.6g}")


def _target(budget: object, drift: object) -> tuple[str, float]:
    if (budget is None) == (drift is None):
        got = "neither" if budget is None else f"budget={budget!r} and drift={drift!r}"
        raise OptionError("budget, drift", got, "exactly one of the two")
    name, value = ("budget", budget) if drift is None else ("drift", drift)
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "budget" and not (known and 0 < value <= 1):  # type: ignore[operator]
        raise OptionError(name, value, "a number above 0, up to 1")
    if not (known and 0 <= value < math.inf):  # type: ignore[operator]
        raise OptionError(name, value, "a number, 0 or more")
    return name, float(value)  # type: ignore[arg-type]


def _config(options: Mapping[str, Any] | Config | None) -> Config:
    given = {"plan": options.plan} if isinstance(options, Config) and options.plan is not None else options
    if isinstance(given, Mapping) and "plan" in given:  # before what it names is read
        raise OptionError("plan", given["plan"], "not when calibrating: that makes one")
    return Config.from_options(options)


def _measured(source: Calibration | str | os.PathLike[str] | None) -> Calibration | None:
    try:
        return None if source is None else load(source)
    except OptionError as error:
        raise OptionError("measured", error.got, error.allowed) if error.key == "plan" else error from None


def _candidates(candidates: object) -> list[Plan] | None:
    if candidates is None:
        return None
    if not isinstance(candidates, (list, tuple)) or not candidates:
        raise OptionError("candidates", candidates, "a list of one Plan or more, or None")
    for plan in candidates:
        if not isinstance(plan, Plan):
            raise OptionError("candidates", plan, "Plan objects only")
    # A Config is a Plan, too, but only its settings are tried.
    plans = [Plan(**{name: getattr(plan, name) for name in PLAN_FIELDS}) for plan in candidates]
    return list(dict.fromkeys(plans))
