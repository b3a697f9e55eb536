"""What the source of an attention kernel depends on: equal specs, equal source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..plan import Plan

TARGETS = ("cuda", "hip")
"""Device kinds that source is written for; ``torch`` calls both "cuda"."""

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}

MOST_FEATURES = 256
"""Of a head, that kernels take."""


@dataclass(frozen=True)
class Lifted:
    """What a lifted mask adds to the source, as Triton text over b, h, q, k; see ``maths``.

    Attributes:
        allowed: bool expression, "" where every pair is allowed.
        bias: added to the logits, "" for none.
        loads: the tensors that the two read, and the axes of each.
        low, high: the ends of a band (``kernels.band``), over the query ``queried``; "" for none. only: they are all
            that is said.
        query_low, query_high: the first and the last query that may attend ``begin_key`` and ``last_key``.
    """

    allowed: str = ""
    bias: str = ""
    loads: tuple[tuple[str, int], ...] = ()
    low: str = ""
    high: str = ""
    query_low: str = ""
    query_high: str = ""
    only: bool = False


NOTHING = Lifted()


def parameter(name: str) -> str:
    """What a kernel calls a tensor that a lifted mask reads."""
    return f"mask_{name}"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How one program is cut: the kernel options of the table in ``options``.

    Attributes:
        rows: (query, head of the group) pairs of a tile, a power of two. keys: keys of one step.
        warps, stages: of the launch.
    """

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One attention kernel.

    Attributes:
        plan: its text. dtype: of query, key and value, a value of ``DTYPES``. target: of ``TARGETS``.
        dim, value_dim: features of query and key, and of value.
        group: query heads that share a KV head.
        causal: query ``i`` attends keys up to ``i + Nk - Nq``.
        valid: there is a tensor of valid keys. routes: queries have routes.
        lifted: the rest of the mask. softcap: ``c`` of ``c * tanh(logits / c)``; 0.0: none.
        sink_logit: there is a learned sink; the backward has it in the softmax's sums.
        splits: programs that share one tile's keys.
        tile: see ``Tile``.
    """

    plan: str
    dtype: str
    target: str
    dim: int
    value_dim: int
    group: int
    causal: bool
    valid: bool
    routes: bool
    lifted: Lifted = NOTHING
    softcap: float = 0.0
    sink_logit: bool = False
    splits: int = 1
    tile: Tile

    def __post_init__(self) -> None:
        check(self.target, self.dtype, self.dim, self.value_dim)

    @property
    def settings(self) -> Plan:
        return Plan.parse(self.plan)

    @property
    def windowed(self) -> bool:
        """There is a window with two ends, or none; not the whole sequence."""
        return self.settings.window is not None

    @property
    def aligned(self) -> bool:
        """A tile lies between two borders at which a causal window moves: its queries see one window."""
        return self.causal and self.windowed

    @property
    def head_parts(self) -> int:
        """Tiles that share the query heads of a KV head: more than one where a tile has fewer rows than heads."""
        return cdiv(self.group, self.tile.rows)

    @property
    def heads(self) -> int:
        """Query heads of a tile."""
        return cdiv(self.group, self.head_parts)

    @property
    def queries(self) -> int:
        """Queries of a tile. An aligned tile is an equal part of a chunk, or a little less."""
        most = self.tile.rows // self.heads
        if not self.aligned:
            return most
        chunk = self.settings.chunk
        return cdiv(chunk, cdiv(chunk, most))

    @property
    def rows(self) -> int:
        """Rows of a tile: ``queries`` times ``heads``, padded to a power of two that a tensor core takes."""
        return max(16, power_of_two(self.queries * self.heads))

    @property
    def tiles_a_chunk(self) -> int:
        """Of the same heads."""
        return cdiv(self.settings.chunk, self.queries)

    @property
    def together(self) -> int:
        """How many query heads route together; 0: each for itself."""
        heads = self.settings.together(self.group)
        return heads if heads > 1 else 0

    @property
    def choosers(self) -> int:
        """What has routes of its own in a tile: its rows, or its queries where their heads route together."""
        return self.queries if self.together else self.queries * self.heads

    @property
    def words(self) -> int:
        """32-bit words that hold one bit for each of the ``choosers``, as many as rows are padded to."""
        return cdiv(power_of_two(self.choosers), 32)

    def first_block(self, q_len: Any, k_len: Any) -> Any:
        """Of aligned tiles: the chunk that is the window's first one for the first query (negative: before all)."""
        return (k_len - q_len - (self.settings.window or 0)) // self.settings.chunk

    def tiles(self, q_len: Any, k_len: Any) -> Any:
        """Tiles of a KV head; lengths may be symbolic."""
        if not self.aligned:
            return cdiv(q_len, self.queries) * self.head_parts
        last = (k_len - 1 - (self.settings.window or 0)) // self.settings.chunk
        return (last - self.first_block(q_len, k_len) + 1) * (self.tiles_a_chunk * self.head_parts)


@dataclass(frozen=True, kw_only=True)
class SummarySpec:
    """A kernel of summarize that reads keys and values: their features, the plan, whether some keys are padding."""

    dim: int
    value_dim: int
    plan: str
    valid: bool

    @property
    def settings(self) -> Plan:
        return Plan.parse(self.plan)


def check(target: str, dtype: str, dim: int, value_dim: int) -> None:
    """Raise ``ValueError`` unless kernels are written for these, naming what was got and what is allowed."""
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}; allowed: one of {', '.join(TARGETS)}")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype: got {dtype!r}; allowed: one of {', '.join(DTYPES.values())}")
    for name, size in (("dim", dim), ("value_dim", value_dim)):
        if not 1 <= size <= MOST_FEATURES:
            raise ValueError(f"{name}: got {size}; allowed: 1 to {MOST_FEATURES}")


def cdiv(a: Any, b: int) -> Any:
    """``a / b``, rounded up."""
    return (a + b - 1) // b


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()
