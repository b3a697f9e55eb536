"""The wheel holds the three folders as one package, and the repository root is a safe place to start Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOMES = {
    "prescore_compile": "prescore_compile",
    "passes": "prescore_compile/passes",
    "kernels": "prescore_compile/kernels",
}

# Run in an environment with the wheel, outside the repository.
INSTALLED = """
import importlib.metadata, importlib.util, pathlib, sys
import prescore_compile, prescore_compile.kernels, prescore_compile.passes
import torch._dynamo

for module in prescore_compile, prescore_compile.kernels, prescore_compile.passes:
    assert pathlib.Path(module.__file__).is_relative_to(sys.prefix), module.__file__
    assert len(module.__path__) == 1, module.__path__
assert importlib.util.find_spec("passes") is None
assert "prescore" in torch._dynamo.list_backends()
for group in "torch_dynamo_backends", "console_scripts":
    (entry,) = importlib.metadata.entry_points(group=group, name="prescore")
    assert callable(entry.load())
"""

# Run in the root, where `import kernels`, which transformers tries, finds a folder of ours.
AT_ROOT = """
import pathlib
import torch, transformers
import prescore_compile.kernels, prescore_compile.passes
import kernels

for module in prescore_compile.kernels, prescore_compile.passes, kernels:
    assert pathlib.Path(module.__file__).parent.parent == pathlib.Path.cwd(), module.__file__
assert not transformers.utils.is_kernels_available()
config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
)
model = transformers.LlamaForCausalLM(config).eval()
assert model(torch.arange(8)[None]).logits.isfinite().all()
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run without what could make another folder importable; on failure show the output."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no old ``build/`` leaks into it."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in HOMES:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    dist = tree / "dist"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", dist]
    run(sys.executable, "-m", "pip", "wheel", *options, tree, cwd=tree)
    (found,) = dist.glob("*.whl")
    return found


def test_wheel_contents(wheel: Path) -> None:
    expected = {
        f"{home}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, home in HOMES.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".html", ".css", ".js")
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == expected
    assert any(name.endswith("/LICENSE") for name in metadata)


def test_wheel_installed(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # torch and the rest come from this environment: appended, so the wheel is found first.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "parent.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    run(python, "-c", INSTALLED, cwd=tmp_path)
    assert "usage" in run(python.with_name("prescore"), "--help", cwd=tmp_path).lower()


def test_started_from_the_root() -> None:
    pytest.importorskip("transformers")
    run(sys.executable, "-c", AT_ROOT, cwd=ROOT)
