"""The source of the kernels that rewritten sites run."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from ..kernels import library, triton
from ..kernels.logits import parse
from .report import Report, SiteReport, label

DEVICES = ("cpu", "cuda", "hip")


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
    """The kernels of a report's rewritten sites, one for each geometry and device, in the order of the sites."""
    places: dict[tuple[str, tuple[tuple[str, str], ...]], list[SiteReport]] = {}
    for site in report.rewritten:
        key = (site.device, tuple(_geometry(site).items()))
        places.setdefault(key, []).append(site)
    found: list[Source] = []
    for (where, geometry), sites in places.items():
        names = tuple(dict.fromkeys(site.module or site.source for site in sites))
        for name, language, text in _cpu() if where == "cpu" else _triton(sites[0], where):
            found.append(Source(name, language, text, dict(geometry), names))
    return found


@functools.cache
def _cpu() -> tuple[tuple[str, str, str], ...]:
    """The compiled kernels and the headers that they include, as one text."""
    parts = [library.SOURCE.read_text(encoding="utf-8")]
    parts += [f"// {path.parent.name}/{path.name}\n{path.read_text(encoding='utf-8')}" for path in library.HEADERS]
    return ((library.SOURCE.name, "c++", "\n".join(parts)),)


def _triton(site: SiteReport, target: str) -> Iterable[tuple[str, str, str]]:
    shape = dict(site.kernel)
    given = parse(shape.pop("logits"))
    shape |= dict(target=target, lifted=given.lifted, reach=given.reach, softcap=given.softcap)
    for name, text in triton.sources(site.plan, **shape).items():
        yield f"{name}.py", "python", text


def _geometry(site: SiteReport) -> dict[str, str]:
    plan = site.plan.settings() if site.plan else {}
    # The shape has the first; what is said of pairs is shown where there is any.
    given = {name: str(value) for name, value in site.kernel.items() if name != "dim" and value != ""}
    given |= {f"where its mask is {name}": label(found) for name, found in site.recognized.items()}
    return site.shape | {name: str(value) for name, value in plan.items()} | given
