"""What torch.compile's caches on disk have to know of a graph besides the graph.

Their keys are made of the graph, the inputs and torch's own settings. A rewritten graph has operators whose Triton
kernels are rendered as they are compiled, so that no key has their text; and lengths that were compared with
``min_seq_len`` and a break-even have become guards, which a cached graph brings with it. Without more, a kernel that
was changed stays as it was compiled first, and one model's guards meet another's lengths.
"""

from __future__ import annotations

import functools
import hashlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch.compiler.config

from . import kernels, passes
from .passes import Config


def tagged(config: Config) -> AbstractContextManager[object]:
    """Inside, what is compiled is kept under a key of its own for each version of this package and each config."""
    tag = hashlib.sha256(f"{_sources()} {config}".encode()).hexdigest()[:16]
    settings: Any = torch.compiler.config
    found: AbstractContextManager[object] = settings.patch(
        cache_key_tag=f"{settings.cache_key_tag} prescore-{tag}".strip()
    )
    return found


@functools.cache
def _sources() -> str:
    """A digest of all that decides, rewrites and renders."""
    found = hashlib.sha256()
    for package in (kernels, passes):
        for file in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()
