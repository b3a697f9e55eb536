"""The docs say what the code says."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from prescore_compile import Config
from prescore_compile.cli import main
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


def test_the_example_of_inspection_prints_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "inspect.md").read_text()
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    said = text.split("$ prescore explain toy.py:make\n", 1)[1].split("\nrewritten:", 1)[0]
    (tmp_path / "try").mkdir()
    (tmp_path / "try" / "toy.py").write_text(code)
    assert main(["explain", f"{tmp_path}/try/toy.py:make"]) == 0
    assert capsys.readouterr().out.split("\nrewritten:", 1)[0] == said
