"""The docs say what the code says."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from prescore_compile import Config
from prescore_compile.passes import REASONS

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_every_reason_is_documented_in_its_own_words() -> None:
    text = (DOCS / "reasons.md").read_text()
    for code, meaning in REASONS.items():
        assert f"| `{code}` | {meaning} |" in text


def test_every_option_is_documented_with_its_default() -> None:
    lines = (DOCS / "options.md").read_text().splitlines()
    for field in fields(Config):
        if field.init:
            (line,) = [line for line in lines if line.startswith("| ") and f"`{field.name}`" in line.split("|")[1]]
            if not isinstance(field.default, tuple):
                assert str(field.default).strip("'\"") in line.split("|")[2], line
