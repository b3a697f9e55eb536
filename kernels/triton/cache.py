"""From source text to a kernel: the text is kept as a file, so that it can be read and debugged.

Files lie in ``$TORCHINDUCTOR_CACHE_DIR/prescore/triton`` and are named by a hash of the text and of
Triton's version. What runs is always the text that was just rendered, never what a file holds, so
a file that is old, half written or edited is replaced and can do no harm. The compiled binaries are
Triton's to keep, in ``$TRITON_CACHE_DIR``.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import os
import tempfile
import types
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..library import cache_dir


@functools.cache
def load(text: str, name: str) -> Any:
    """The ``triton.JITFunction`` called ``name`` that the module ``text`` defines.

    Under ``TRITON_INTERPRET=1`` it is Triton's interpreted function. One object for each text.
    """
    import triton

    digest = hashlib.sha256(f"{triton.__version__}\0{text}".encode()).hexdigest()[:20]
    path = _keep(text, f"{name}_{digest}.py")
    module = types.ModuleType(f"prescore_{name}_{digest}")
    module.__file__ = path
    exec(compile(text, path, "exec"), module.__dict__)
    return getattr(module, name)


def launch(kernel: Any, grid: tuple[Any, ...], values: Mapping[str, Any], *, warps: int, stages: int) -> None:
    """Launch with those of ``values`` that the kernel has parameters for.

    Where a graph is traced, the launch becomes a node of it (``torch.library.wrap_triton``). Otherwise it is on the
    tensors' device, which need not be the current one: a model's layers may lie on several GPUs.
    """
    given = {name: values[name] for name in kernel.arg_names}
    with _device_of(given.values()):
        if _interpreted(kernel):
            kernel[grid](**given)
            return
        from torch.library import wrap_triton

        wrap_triton(kernel)[grid](**given, num_warps=warps, num_stages=stages)


def strides(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """``name_b``, ``name_h`` and ``name_n`` of a ``[B, H, N, D]`` or ``[B, H, N]`` tensor, as launches name them."""
    return {f"{name}_{axis}": tensor.stride(at) for at, axis in enumerate("bhn")}


def features_last(tensor: torch.Tensor) -> torch.Tensor:
    """Kernels read features one after the other."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _device_of(values: Iterable[Any]) -> AbstractContextManager[Any]:
    """The first tensor's GPU becomes the current one: Triton launches on that."""
    if not torch.cuda.is_initialized():  # also where tensors are fake, on a machine without a GPU
        return nullcontext()
    return torch.cuda.device_of(next(value for value in values if isinstance(value, torch.Tensor)))


def _interpreted(kernel: Any) -> bool:
    from triton.runtime.jit import JITFunction

    return not isinstance(kernel, JITFunction)


def _keep(text: str, name: str) -> str:
    """Write the text to its file; the path. Where that cannot be, a name. Python finds the text under either.

    Also when the file is gone: Inductor asks for a kernel's text each time that it compiles a graph with it.
    """
    folder = cache_dir() / "triton"
    path = folder / name
    known = str(path)
    try:
        if not path.is_file() or path.read_bytes() != text.encode():
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, text)
    except OSError as error:
        _warn_once(str(folder), str(error))
        known = f"<prescore {name}>"
    linecache.cache[known] = (len(text), None, text.splitlines(keepends=True), known)
    return known


def _write(path: Path, text: str) -> None:
    """All at once: processes that write the same file each rename their own; all are equal."""
    handle, scratch = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


@functools.cache
def _warn_once(folder: str, error: str) -> None:
    warnings.warn(f"prescore: {folder} cannot be used ({error}); kernels are compiled in memory", stacklevel=4)
