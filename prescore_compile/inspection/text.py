"""Inspections as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from ..passes import REASONS, SiteReport
from ..passes.diff import GraphDiff, Region, unified
from ..passes.dump import described
from ..passes.printing import in_short
from ..passes.rules import RULES

if TYPE_CHECKING:
    from .inspection import Inspection

Key = TypeVar("Key")
Value = TypeVar("Value")
NOTHING = (
    "no graph was captured: torch.compile runs this call without compiling it, as it does where a graph break is "
    "inside a loop (TORCH_LOGS=graph_breaks says where)"
)
_COLOURS = {"-": "31", "+": "32", "~": "33", ">": "36", "#": "2", "@": "36;1"}


def explain(inspection: Inspection) -> str:
    """The report's table, then for each kind of decision the rule or the first condition that failed."""
    if not inspection.log.graphs:
        return NOTHING
    report = inspection.report
    lines = [*_titles(inspection), str(report)]
    for heading, groups in (("rewritten", _rules(report.rewritten)), ("kept exact", _misses(report.kept))):
        if groups:
            lines += ["", f"{heading}:", *(f"  {line}" for line in groups)]
    return "\n".join(lines)


def _titles(inspection: Inspection) -> list[str]:
    """Where there are several graphs: which, and why."""
    graphs = inspection.log.graphs
    return [*(graph.title for graph in graphs), ""] if len(graphs) > 1 else []


def _rules(sites: Iterable[SiteReport]) -> list[str]:
    lines: list[str] = []
    for rule, where in _grouped((site.rule, _place(site)) for site in sites):
        lines += [f"{rule}: {RULES.get(rule, '')}", *(f"  {place}" for place in where)]
    return lines


def _misses(sites: Iterable[SiteReport]) -> list[str]:
    lines: list[str] = []
    for (reason, failed), modules in _grouped(((site.reason, site.failed), site.module or "-") for site in sites):
        lines.append(reason)
        lines += textwrap.wrap(REASONS.get(reason.partition(":")[0], ""), 100, initial_indent="  ",
                               subsequent_indent="  ")  # fmt: skip
        lines += [f"  at {failed}" if failed else "  (where in the source is not recorded)", f"  {in_short(modules)}"]
    return lines


def _place(site: SiteReport) -> str:
    return f"{site.source}: {site.code}" if site.source else "(where in the source is not recorded)"


def _grouped(pairs: Iterable[tuple[Key, Value]]) -> list[tuple[Key, list[Value]]]:
    found: dict[Key, dict[Value, None]] = {}
    for key, value in pairs:
        found.setdefault(key, {})[value] = None
    return [(key, list(values)) for key, values in found.items()]


def diff(inspection: Inspection) -> str:
    """A unified diff of every graph, after what each region is."""
    lines: list[str] = []
    for graph, difference in zip(inspection.log.graphs, inspection.diffs, strict=True):
        lines += [graph.title, difference.summary(), *_regions(difference), "", *unified(difference), ""]
    return "\n".join(lines).rstrip() or NOTHING


def _regions(difference: GraphDiff) -> list[str]:
    lines = []
    for (rule, what, where), modules in _grouped(
        ((_rule(region), _counts(region), f"{region.source}: {region.code}" if region.source else ""), region.module)
        for region in difference.regions
    ):
        lines.append(f"  {what}  {rule} in {in_short(m or '-' for m in modules)}")
        if where:
            lines.append(f"    {where}")
    return lines


def _rule(region: Region) -> str:
    if region.rule:
        return f"by {region.rule}"
    return "by a rule that left no record" if region.added or region.rewired else "nothing reads it any more"


def _counts(region: Region) -> str:
    return f"-{len(region.removed)} +{len(region.added)} ~{len(region.rewired)}"


def kernels(inspection: Inspection) -> str:
    """Every kernel once, below who runs it and with what."""
    if not inspection.sources:
        return "no site is rewritten, so no kernel runs (prescore explain says why)"
    lines: list[str] = []
    for (name, body), users in _grouped(((s.name, s.text), "\n".join(described(s))) for s in inspection.sources):
        lines += [f"@@ {name}", *(f"# {line}" for user in users for line in user.splitlines()), "", body]
    return "\n".join(lines).rstrip()


def coloured(text: str) -> str:
    """The lines of a diff in colour."""
    return "\n".join(_coloured(line) for line in text.split("\n"))


def _coloured(line: str) -> str:
    colour = _COLOURS.get(line[:1]) if line[1:2] in (" ", "@") else None
    return f"\x1b[{colour}m{line}\x1b[0m" if colour else line
