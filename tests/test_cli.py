from __future__ import annotations

import pytest

from prescore_compile.cli import main


def test_help_and_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0 and "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["demo", "--seq-len", "many"])
    assert done.value.code == 2
    assert main(["demo", "--seq-len", "1"]) == 2
    assert "got 1; allowed: 2 or more" in capsys.readouterr().err
    assert main(["demo", "--json", "no/such/folder/x.json"]) == 2
    assert "allowed: a file in a folder that exists" in capsys.readouterr().err
