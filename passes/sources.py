"""The source of the kernels that rewritten sites run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..kernels import cpu
from .report import Report, SiteReport


@dataclass(frozen=True)
class Source:
    """One kernel as one geometry runs it.

    Attributes:
        name: file name. language: "c++" or "python". text: the source.
        geometry: what it is specialised with or called with: sizes and plan.
        sites: module paths of the sites that run it.
    """

    name: str
    language: str
    text: str
    geometry: dict[str, str]
    sites: tuple[str, ...]


def sources_of(report: Report) -> list[Source]:
    """The kernels of a report's rewritten sites, one for each geometry, in the order of the sites.

    Generated kernels (Triton) belong here too, once there are some.
    """
    places: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for site in report.rewritten:
        places.setdefault(tuple(_geometry(site).items()), []).append(site.module or site.source)
    text = cpu.SOURCE.read_text(encoding="utf-8") if places else ""
    return [
        Source(cpu.SOURCE.name, "c++", text, dict(geometry), _unique(modules)) for geometry, modules in places.items()
    ]


def _geometry(site: SiteReport) -> dict[str, str]:
    plan = site.plan.settings() if site.plan else {}
    return site.shape | {name: str(value) for name, value in plan.items()}


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
