"""Runs ``named/``, where Inductor generates code for a GPU that only has a name, in a process of its own.

A small library registers the name (``named/device.cpp``) before torch is imported: with it, tensors without memory
on a "cuda" device go through Dynamo, autograd and Inductor as they would on a GPU.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prescore_compile.kernels import library

HERE = Path(__file__).resolve().parent
START = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); import pytest; sys.exit(pytest.main(sys.argv[2:]))"


@pytest.fixture(scope="module")
def named_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = library.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    root, out = Path(torch.__file__).parent, tmp_path_factory.mktemp("named") / "device.so"
    command = [compiler, "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}"]
    command += [str(HERE / "named" / "device.cpp"), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    command += [f"-Wl,-rpath,{root / 'lib'}", "-o", str(out)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="what it replaces is that of torch 2.13")
@pytest.mark.skipif(torch.cuda.is_available() or torch.version.cuda is not None, reason="torch knows real GPUs")
def test_named(named_device: Path) -> None:
    pytest.importorskip("triton")
    faulthandler.cancel_dump_traceback_later()  # pytest's, after 300 s: this may take longer
    command = [sys.executable, "-c", START, str(named_device), "-q", "-x", "tests/named"]
    done = subprocess.run(
        command, cwd=HERE.parent, env=os.environ | {"PRESCORE_NAMED": "1"}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
