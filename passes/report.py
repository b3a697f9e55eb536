"""What was decided for each site, and what it costs: data only."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from ..kernels.plan import Plan

EXACT = {
    "band": "every key that the mask allows is attended, and what lies outside of its band is skipped",
    "alone": "every key that the mask allows is attended, in one kernel: SDPA takes no learned sink and no softcap",
    "few": "every key that the mask allows is attended: queries are few, and keys and values are read once, where they "
    "lie, for all the query heads that share them",
    "mask": "every key that the mask allows is attended: it is read as it comes, and keys that it hides from all of a "
    "tile of queries are skipped",
}
"""What ``SiteReport.exact`` means."""

RECOGNIZED = {
    "causal": "it is no more than causality and which keys are valid",
    "every key": "it is no more than which keys are valid",
}
"""What ``SiteReport.recognized`` says of a mask that only the run time knows."""


@dataclass(frozen=True)
class SiteReport:
    """One attention found in a graph.

    Attributes:
        module: path as in ``model.named_modules()``; "" outside any module.
        source: ``file:line`` of the call in the user's code. code: that line.
        kind: "sdpa", "hand-written", "flex_attention", or the composite call that it is in.
        decision: "rewrite" or "keep". reason: a code of docs/reasons.md, perhaps followed by
            ``: detail``; "" where rewritten, but for why nothing is approximated where ``exact`` is "alone" or "few".
        plan: the settings it runs with; None where kept.
        mask: what the site's mask means, in plain maths over b, h, q, k; then its softcap and learned sink, if any.
        shape: batch, heads, kv_heads, q_len, k_len, head_dim as ints or symbols.
        exact_cost, prescored_cost: multiply-adds at the sizes compiled for; the latter includes
            scoring and routing, and is None where no plan applies.
        density: attended pairs, routing counted in / exact pairs; None where kept, and where only the run time
            knows the mask (``exact`` is "mask", or there are ``recognized`` plans).
        gain: time of exact attention / that of all stages, as the cost model expects it; None where kept, where it
            does not know what computes the site now, and where it does not know the mask.
        rule: how it was recognised (rules.RULES). failed: ``file:line: code`` of the first condition that
            failed, where kept: the mask's line for a mask.
        exact: why a rewritten site attends every key that its mask allows, whatever the plans, a key of ``EXACT``;
            "": it does not.
        recognized: the plans of a site whose mask only the run time knows, by what it may turn out to be, keys of
            ``RECOGNIZED``; where it is something else, every key that it allows is attended, as where ``exact`` is
            "mask".
        key: the site's name in a plan file. value_dim, causal: what else a plan file checks.
        device: "cpu" or "cuda", or the one that was asked about; "" where nothing is proved. kernel: what its
            generated kernels are specialised with beside the plan, as ``kernels.triton.sources`` takes it, and the
            text of its ``kernels.logits.Logits``.
    """

    module: str
    source: str
    code: str
    kind: str
    decision: str
    reason: str
    plan: Plan | None
    mask: str
    shape: dict[str, str]
    exact_cost: int | None = None
    prescored_cost: int | None = None
    density: float | None = None
    gain: float | None = None
    rule: str = ""
    failed: str = ""
    key: str = ""
    value_dim: int | None = None
    causal: bool = False
    exact: str = ""
    recognized: dict[str, Plan] = field(default_factory=dict)
    device: str = ""
    kernel: dict[str, Any] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        recognized = {name: plan.settings() for name, plan in self.recognized.items()}
        return vars(self) | {"plan": self.plan and self.plan.settings(), "recognized": recognized}


@dataclass
class Report:
    """The sites of every graph of a compile, in the order of the graphs.

    ``absent``: sites of the plan file that no graph has. ``idle``: patterns of ``include`` and ``exclude`` that match
    none.
    """

    sites: list[SiteReport] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)

    @property
    def rewritten(self) -> list[SiteReport]:
        return [site for site in self.sites if site.decision == "rewrite"]

    @property
    def kept(self) -> list[SiteReport]:
        return [site for site in self.sites if site.decision == "keep"]

    def to_json(self) -> str:
        """The report as a JSON object: ``{"sites": [...]}``."""
        return json.dumps({"sites": [site.data() for site in self.sites]}, indent=2)

    def __str__(self) -> str:
        if not self.sites:
            return "no attention found"
        told = any(site.exact or site.recognized for site in self.rewritten)
        several = told or len({site.plan for site in self.rewritten}) > 1
        rows = [_row(site) | ({"plan": _plan(site)} if several else {}) for site in self.sites]
        table = tabulate(rows, headers="keys", disable_numparse=True)
        notes = [*_devices(self.sites), *_plans(self.rewritten), *_absent(self.absent), *_idle(self.idle)]
        return "\n".join([self.head, "", str(table), *notes])

    @property
    def head(self) -> str:
        """How many sites there are, and how many of them are rewritten."""
        exact = sum(bool(site.exact) for site in self.rewritten)
        which = f" ({exact} of them exact)" if exact else ""
        return f"{len(self.sites)} sites: {len(self.rewritten)} rewritten{which}, {len(self.kept)} kept exact"

    def line(self) -> str:
        """All in a line: ``head``, and how often each reason is why."""
        reasons = Counter(site.reason.split(":")[0] for site in self.kept)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        return f"{self.head} ({why})" if why else self.head


def _row(site: SiteReport) -> dict[str, Any]:
    shape = site.shape
    return {
        "module": _tail(site.module) or "-",
        "source": "/".join(site.source.rsplit("/", 2)[-2:]),
        "decision": site.decision,
        "reason": site.reason or "-",
        "mask": site.mask,
        "heads": f"{shape.get('heads', '?')}/{shape.get('kv_heads', '?')}",
        "keys": shape.get("k_len", "?"),
        "exact": _giga(site.exact_cost),
        "prescored": _giga(site.prescored_cost),
        "density": "-" if site.density is None else f"{100 * site.density:.1f}%",
        "expected": "-" if site.gain is None else f"{site.gain:.1f}x",
    }


def _plan(site: SiteReport) -> str:
    if site.exact:
        return "exact"
    if site.recognized:
        return "by its mask"
    return label(site.plan) if site.plan else "-"


def _tail(path: str) -> str:
    """A path of any length as one cell of a table."""
    line = " ".join(path.split())
    return line if len(line) <= 80 else "..." + line[-77:]


def _giga(cost: int | None) -> str:
    return "-" if cost is None else f"{cost / 1e9:.3g} GMAC"


def label(plan: Plan) -> str:
    """A short name: the settings that differ from the default plan's."""
    usual = Plan().settings()
    return " ".join(f"{k}={v}" for k, v in plan.settings().items() if v != usual[k]) or "default"


def _absent(names: list[str]) -> list[str]:
    return ["", "in the plan file, but in no graph: " + ", ".join(names)] if names else []


def _idle(globs: list[str]) -> list[str]:
    return ["", "matches no site: " + ", ".join(globs)] if globs else []


def _devices(sites: list[SiteReport]) -> list[str]:
    devices = dict.fromkeys(site.device for site in sites if site.device)
    return ["", f"device: {', '.join(devices)}"] if devices else []


def _plans(sites: list[SiteReport]) -> list[str]:
    plans = {str(site.plan.settings()) for site in sites if site.plan and not site.exact and not site.recognized}
    exact = [f"exact: {EXACT[why]}" for why in sorted({site.exact for site in sites if site.exact})]
    by_mask = {f"{name}: {plan.settings()}" for site in sites for name, plan in site.recognized.items()}
    found = [f"by its mask, where that turns out to be {one}" for one in sorted(by_mask)]
    other = [f"by its mask, else: {EXACT['mask']}"] if found else []
    return [*(f"plan: {plan}" for plan in sorted(plans)), *exact, *found, *other]
