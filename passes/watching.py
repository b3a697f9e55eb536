"""Every graph that is made or changed, as it is: what ``observe`` looks at."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from . import compat

_WATCHING = threading.RLock()


@contextmanager
def watch_graphs(seen: Callable[[fx.GraphModule, str], None]) -> Iterator[None]:
    """Call ``seen(gm, made_by)`` whenever a graph's code is asked for, as a pass must do after it changed
    a graph, and as happens to every new graph. ``made_by``: ``function (file:line)``; "" for Dynamo's capture.
    """
    if not _WATCHING.acquire(blocking=False):
        raise RuntimeError("graphs are observed by another thread; one can at a time")
    eager, lazy = fx.GraphModule.recompile, _LazyGraphModule.__dict__["recompile"]

    def recompile(self: fx.GraphModule) -> Any:
        code = eager(self)
        if not isinstance(self, _LazyGraphModule):  # one of these is made when it is needed, and was seen before
            seen(self, _maker())
        return code

    def recompile_lazily(self: fx.GraphModule) -> None:
        lazy.__func__(type(self))
        seen(self, _maker())

    try:
        fx.GraphModule.recompile = recompile  # type: ignore[method-assign]
        _LazyGraphModule.recompile = recompile_lazily  # type: ignore[method-assign,assignment]
        yield
    finally:
        fx.GraphModule.recompile = eager  # type: ignore[method-assign]
        _LazyGraphModule.recompile = lazy  # type: ignore[method-assign]
        _WATCHING.release()


_PLUMBING = (
    "torch.fx",
    "torch.nn",
    "torch._dynamo.eval_frame",
    "torch._compile",
    "torch.utils",
    "contextlib",
    __name__,
    compat.__name__,
)


def _maker() -> str:
    """The function outside of torch's plumbing that asked for a graph's code."""
    frame = sys._getframe(2)
    while frame.f_back is not None and _is_plumbing(frame):
        frame = frame.f_back
    if frame.f_globals.get("__name__") == "torch._dynamo.output_graph":
        return ""
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"


def _is_plumbing(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    return module.startswith(_PLUMBING) or frame.f_code.co_name in ("<lambda>", "inner", "wrapper")
