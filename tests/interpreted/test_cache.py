"""From a template to a kernel that runs, and a cache folder that cannot be used."""

from __future__ import annotations

import contextlib
import inspect
import linecache
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prescore_compile.kernels.triton import cache
from prescore_compile.kernels.triton.render import fill, source

TEMPLATE = """
def times(out, source, length):
    SIZE: tl.constexpr = $size
    at = tl.arange(0, SIZE)
    number = tl.load(source + at, mask=at < length, other=0.0)
    number *= 2  #? twice
    number *= 3  #? not twice and thrice
    $more
    tl.store(out + at, number, mask=at < length)
"""


def text(**names: Any) -> str:
    return source("times", {"about": "a test"}, fill(TEMPLATE, {"size": 16, "twice": False, "more": ""} | names))


def run(kernel: Any) -> torch.Tensor:
    out = torch.full((10,), float("nan"))
    cache.launch(kernel, (1,), {"out": out, "source": torch.arange(10.0), "length": 10}, warps=1, stages=1)
    return out


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    for function in (cache.load, cache._warn_once):
        function.cache_clear()
    yield
    for function in (cache.load, cache._warn_once):
        function.cache_clear()


def test_what_is_not_wanted_is_not_in_the_source() -> None:
    assert "*=" not in text(thrice=False)
    found = text(twice=True, thrice=True, more="if True:\n    number += 1")
    assert "number *= 2\n    if True:\n        number += 1\n" in found and "3" not in found
    with pytest.raises(KeyError, match="thrice"):
        text()


def test_a_kernel_runs_and_its_source_can_be_read(tmp_path: Path) -> None:
    kernel = cache.load(text(thrice=True), "times")
    assert torch.equal(run(kernel), torch.arange(10.0) * 3)
    (file,) = (tmp_path / "cache" / "prescore" / "triton").iterdir()
    assert file.read_text() == text(thrice=True) and inspect.getsourcefile(kernel.fn) == str(file)
    assert cache.load(text(thrice=True), "times") is kernel
    file.unlink()
    linecache.checkcache()
    assert "number *= 3" in inspect.getsource(kernel.fn)


def test_a_corrupted_file_is_replaced(tmp_path: Path) -> None:
    cache.load(text(thrice=False), "times")
    (file,) = (tmp_path / "cache" / "prescore" / "triton").iterdir()
    file.write_bytes(b"\xff half a kern")
    cache.load.cache_clear()
    assert torch.equal(run(cache.load(text(thrice=False), "times")), torch.arange(10.0))
    assert file.read_text() == text(thrice=False)


@pytest.mark.parametrize("trouble", ["no folder", "full"])
def test_a_folder_that_cannot_be_used_is_told_once(trouble: str, monkeypatch: Any, tmp_path: Path) -> None:
    if trouble == "no folder":
        (tmp_path / "cache").write_text("a file")
    else:

        def full(*_: Any, **__: Any) -> Any:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache.os, "fdopen", full)
    with pytest.warns(UserWarning, match="cannot be used"):
        assert torch.equal(run(cache.load(text(twice=True), "times")), torch.arange(10.0) * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(cache.load(text(thrice=True), "times")), torch.arange(10.0) * 3)


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        events.append(tensor)
        yield
        events.append("left")

    class Kernel:
        arg_names = ("length", "out")

        def __getitem__(self, grid: object) -> Any:
            return lambda **given: events.append("launched")

    out = torch.empty(1)
    given = {"length": 1, "out": out, "not read": torch.empty(2)}
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    cache.launch(Kernel(), (1,), given, warps=1, stages=1)
    assert events == ["launched"]  # no GPU, no device
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    cache.launch(Kernel(), (1,), given, warps=1, stages=1)
    assert events[1] is out and events[2:] == ["launched", "left"]
