"""Builds ``attend.cpp`` at run time.

The library is compiled once for a machine and compiler and kept beside Inductor's own artifacts.
Everything crosses the border as plain pointers, so the build needs no torch headers (seconds, not
a minute) and one library serves every torch version.
"""

from __future__ import annotations

import ctypes
import functools
import getpass
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

SOURCE = Path(__file__).with_name("attend.cpp")
HEADERS = sorted(SOURCE.with_name("native").glob("*.h"))
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")

UNITS = {"bfloat16": {"avx512f", "bf16", "svebf16"}, "float16": {"avx512f", "fphp"}}
"""Linux' names of what PyTorch multiplies numbers of 16 bits with: AVX-512 alone widens them in registers."""


def cache_dir() -> Path:
    """``$TORCHINDUCTOR_CACHE_DIR/prescore``, or Inductor's default folder for this user."""
    root = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not root:
        root = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    return Path(root) / "prescore"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled kernels, or None (warned once) where there is no working C++ compiler."""
    found = compiler()
    if found is None:
        warnings.warn("prescore: no C++ compiler ($CXX, c++, g++ or clang++) was found", stacklevel=2)
        return None
    try:
        return ctypes.CDLL(str(build(found)))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(f"prescore: the CPU kernels did not build with {found}: {detail}", stacklevel=2)
        return None


def available() -> bool:
    """Whether this machine can build and load the compiled kernels."""
    return load() is not None


@functools.cache
def tiles() -> bool:
    """Whether this processor multiplies tiles of bfloat16 (AMX), which then stand for its products in float32."""
    found = load()
    return found is not None and bool(found.prescore_tiles())


@functools.cache
def multiplies(dtype: str) -> bool:
    """Whether PyTorch's products of "bfloat16" or "float16" are fast on this processor; also where nobody knows."""
    words = set(_machine().split())
    return words.isdisjoint(("flags", "Features")) or not UNITS[dtype].isdisjoint(words)


def needed() -> ctypes.CDLL:
    """The compiled kernels, where they are ``available``."""
    found = load()
    assert found is not None, "callers check available() first"
    return found


def compiler() -> str | None:
    """The path of a C++ compiler."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build(compiler: str) -> Path:
    """The shared library that it makes, from the cache where it has made it before."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = (path.read_text() for path in (SOURCE, *HEADERS))
    parts = (*sources, version, " ".join(FLAGS), _machine())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20] + ".so"
    try:
        return _compile(compiler, cache_dir() / name)
    except OSError as error:
        # A cache that cannot be written must not stop the model.
        warnings.warn(f"prescore: {cache_dir()} cannot be used ({error}); compiling elsewhere", stacklevel=3)
        return _compile(compiler, Path(tempfile.mkdtemp(prefix="prescore_")) / name)


def _compile(compiler: str, target: Path) -> Path:
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Processes that build at once each write their own file; the last rename wins, all are equal.
    handle, scratch = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", scratch], capture_output=True, text=True, check=True)
        os.replace(scratch, target)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return target


def _machine() -> str:
    """What ``-march=native`` means here, so that a shared cache never mixes processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
