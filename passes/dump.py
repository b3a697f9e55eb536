"""Write the stages of every graph to a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .printing import in_short, printed
from .report import Report
from .sources import Source, sources_of
from .stages import Log

GENERATED = "generated source"
"""The last stage: kernels, not a graph."""


def dump(log: Log, folder: str | Path) -> list[Path]:
    """Write each graph's stages into a folder of its own inside ``folder``, which is made.

    ``graph_0_1/3_decided.py`` is graph 0, its first recompile; where that folder is already there,
    ``graph_0_1_2``: nothing is overwritten. ``index.txt`` has a line for each graph, with why it was recompiled.

    Returns:
        What was written, the index last.

    Raises:
        OSError: the folder cannot be written.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    lines: list[str] = []
    for graph in log.graphs:
        home = _fresh(root, _file_name(graph.name))
        for at, stage in enumerate(graph.stages):
            written.append(home / f"{at}_{_file_name(stage.name)}.py")
            written[-1].write_text(printed(graph, stage), encoding="utf-8", errors="backslashreplace")
        sources = sources_of(Report(graph.sites))
        if sources:
            written += _kernels(home / f"{len(graph.stages)}_{_file_name(GENERATED)}", sources)
        lines.append(f"{home.name}: {graph.title}\n")
    index = root / "index.txt"
    with index.open("a", encoding="utf-8") as file:
        file.writelines(lines)
    return [*written, index]


def _kernels(home: Path, sources: Sequence[Source]) -> list[Path]:
    """One file a text; which geometries run it stands above it."""
    home.mkdir()
    texts: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        texts.setdefault((source.name, source.text), []).append(source)
    written: list[Path] = []
    for at, ((name, text), users) in enumerate(texts.items()):
        sign = "//" if users[0].language == "c++" else "#"
        written.append(home / (name if len(texts) == 1 else f"{at}_{name}"))
        head = [f"{sign} {line}\n" for user in users for line in described(user)]
        written[-1].write_text("".join(head) + "\n" + text, encoding="utf-8")
    return written


def described(source: Source) -> list[str]:
    """Who runs a kernel, and with what."""
    geometry = " ".join(f"{key}={value}" for key, value in source.geometry.items())
    count = f"{len(source.sites)} site{'' if len(source.sites) == 1 else 's'}"
    return [f"{count}: {in_short(source.sites)}", f"  {geometry}"]


def _fresh(root: Path, name: str) -> Path:
    at = 1
    while True:
        home = root / (name if at == 1 else f"{name}_{at}")
        try:
            home.mkdir()
        except FileExistsError:  # also another process's
            at += 1
        else:
            return home


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.")[:80] or "graph"
