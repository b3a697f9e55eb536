"""A plan for each site: what ``calibrate`` chose, checked against the sites that a graph has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from ..kernels.plan import OptionError, Plan
from .report import SiteReport, label

SHAPE_FIELDS = ("heads", "kv_heads", "head_dim", "value_dim", "causal")


@dataclass(frozen=True)
class SiteKey:
    """Which site: ``site`` is its module path and its place among that module's attentions in a graph, as in
    ``model.layers.3.self_attn#0``; the rest is what a plan was measured for.
    """

    site: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool

    @classmethod
    def of(cls, report: SiteReport) -> SiteKey:
        """The key of a reported site of known sizes."""
        sizes = {name: int(report.shape[name]) for name in ("heads", "kv_heads", "head_dim")}
        return cls(report.key, **sizes, value_dim=report.value_dim or 0, causal=report.causal)

    def shape(self) -> dict[str, Any]:
        """All but the name."""
        return {name: getattr(self, name) for name in SHAPE_FIELDS}


@dataclass(frozen=True)
class TriedPlan:
    """What a plan did to the model's output with this one site approximated: ``density`` is pairs attended / exact
    pairs of the site; ``drift`` as ``Calibration.measure`` has it.
    """

    plan: Plan
    density: float
    drift: float


@dataclass(frozen=True)
class SitePlan:
    """The plan of one site (None: exact), the trials it was chosen from, and why no plan could be tried, if so."""

    key: SiteKey
    plan: Plan | None
    trials: tuple[TriedPlan, ...] = ()
    reason: str = ""

    @property
    def chosen(self) -> TriedPlan | None:
        """The trial of the plan; None where exact."""
        return next((trial for trial in self.trials if trial.plan == self.plan), None)


@dataclass(frozen=True)
class Calibration:
    """A plan for each site of a model, as ``calibrate`` measured and chose them.

    Attributes:
        sites: in the order of the graphs.
        measure: what drift is: "kl" (mean nats a position), "cosine" (1 - cosine), or the name of the user's own.
        target: what was asked for, ``("budget", 0.2)`` or ``("drift", 0.01)``.
        density: pairs attended, routing counted in / exact pairs, over all sites; an exact one spends all of its own.
        predicted: sum of the sites' drifts, each measured alone. drift: measured with all plans in place.
        torch: the version that measured.
    """

    sites: tuple[SitePlan, ...]
    measure: str
    target: tuple[str, float]
    density: float
    predicted: float
    drift: float
    torch: str

    @property
    def plans(self) -> dict[str, Plan | None]:
        """The plan of each site by its name; None: exact."""
        return {site.key.site: site.plan for site in self.sites}

    def find(self, key: SiteKey) -> tuple[Plan | None, str]:
        """The plan of a site of a graph, or None and the reason why it is kept exact.

        Raises:
            OptionError: the site is known, but with other heads, sizes or causality; its plan reads nothing.
        """
        known = [site for site in self.sites if site.key.site == key.site]
        for site in known:
            if site.key == key:
                if site.plan:
                    site.plan.check_reads(key.causal)
                return site.plan, "" if site.plan else "plan_exact"
        if not known:
            return None, "not_in_plan"
        raise OptionError(
            "plan", key.shape(), f"at {key.site}: {known[0].key.shape()}, for which the plan was measured"
        )

    def absent(self, reports: Iterable[SiteReport]) -> list[str]:
        """The sites that the plan knows and no graph has."""
        there = {report.key for report in reports}
        return list(dict.fromkeys(site.key.site for site in self.sites if site.key.site not in there))

    def save(self, path: str | Any) -> None:
        """Write the file that ``options={"plan": path}`` takes.

        Raises:
            OSError: it cannot be written.
        """
        from .planfile import write

        write(self, path)

    def table(self) -> str:
        """The sites, their plans and what was measured, as text."""
        body = tabulate([_row(site) for site in self.sites], headers="keys", disable_numparse=True)
        exact = sum(site.plan is None for site in self.sites)
        name, value = self.target
        head = [
            f"{len(self.sites)} sites: {exact} of them exact; asked for {name} {value:g}",
            f"density {100 * self.density:.1f}%; drift ({self.measure}) {self.drift:.3g} with all plans in place, "
            f"{self.predicted:.3g} as the sum of the sites'",
        ]
        return "\n".join([*head, "", str(body)])

    def __str__(self) -> str:
        return self.table()


def plans_only(plans: Mapping[SiteKey, Plan]) -> Calibration:
    """These plans, of which nothing is measured yet; all other sites are exact."""
    return Calibration(tuple(SitePlan(key, plan) for key, plan in plans.items()), "", ("", 0.0), 0.0, 0.0, 0.0, "")


def absent_from(plan: Calibration | None, reports: Sequence[SiteReport]) -> list[str]:
    """``plan.absent(reports)``; nothing where there is no plan."""
    return plan.absent(reports) if plan else []


def _row(site: SitePlan) -> dict[str, str]:
    chosen = site.chosen
    return {
        "site": site.key.site,
        "plan": label(site.plan) if site.plan else "exact",
        "density": f"{100 * (chosen.density if chosen else 1.0):.1f}%",
        "drift": f"{chosen.drift if chosen else 0.0:.3g}",
        "tried": ", ".join(f"{100 * t.density:.0f}%: {t.drift:.2g}" for t in site.trials) or "-",
        "reason": site.reason or "-",
    }
