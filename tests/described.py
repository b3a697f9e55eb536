"""Triton describes each tensor that an operation makes anew, a third of the interpreter's time: here once a shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


@contextmanager
def once() -> Iterator[None]:
    """Inside, equal shapes are one object, and a dtype's NumPy dtype is looked up once."""
    begin_block = core.block_type.__init__

    @functools.cache
    def of_block(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
        found = core.block_type.__new__(core.block_type)
        begin_block(found, tl.int32, list(sizes))
        return found.shape, found.numel, f"<{found.shape}, "

    @functools.cache
    def of_tensor(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(s.value if isinstance(s, core.constexpr) else s for s in shape)
        if not sizes:
            return begin_block(self, element_ty, shape)
        self.element_ty = element_ty
        self.shape, self.numel, start = of_block(sizes)
        self.name = f"{start}{element_ty}>"

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensor(tuple(type.shape) if type.is_block() else ())

    kind = functools.cache(interpreter._get_np_dtype)
    pointer = kind(tl.uint64)

    def numpy_dtype(of: Any) -> Any:
        scalar = of.element_ty if isinstance(of, core.block_type) else of
        return pointer if isinstance(scalar, core.pointer_type) else kind(scalar)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(core.block_type, "__init__", block))
        stack.enter_context(mock.patch.object(core.tensor, "__init__", tensor))
        stack.enter_context(mock.patch.object(interpreter, "_get_np_dtype", numpy_dtype))
        yield
