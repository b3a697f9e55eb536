"""Published ways of attending to part of the keys, for comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from prescore_compile.kernels import cpu
from prescore_compile.kernels import summary as summaries
from prescore_compile.kernels.layout import spans
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands

TILE = 256

Attend = Callable[[Operands, int], Tensor]
"""(a causal site with its queries from position 0 on, first) -> the output of queries ``first`` and later."""


class Router(Protocol):
    def __call__(self, query: Tensor, low: Tensor, high: Tensor, mean: Tensor) -> Tensor:
        """Scores ``[B, H, T, runs]`` from queries and the runs' elementwise bounds and means ``[B, H, runs, D]``."""


def _by_runs(plan: Plan, score: Router) -> Attend:
    """Routes to runs of consecutive keys, chosen by ``score``; window and sinks as the plan."""

    def attend(site: Operands, first: int) -> Tensor:
        query, key, value, _, causal, scale = site[:6]
        length, size = key.shape[2], plan.cluster
        summary = summaries.summarize(key, value, None, None, replace(plan, clustering="contiguous"))
        group = query.shape[1] // key.shape[1]
        count = summary.mean.shape[2]
        runs = _rows(key, summary.order.long().clamp(min=0)).unflatten(2, (count, size))
        inside = (summary.order >= 0).unflatten(2, (count, size)).unsqueeze(4)
        low, high = runs.where(inside, math.inf).amin(3), runs.where(inside, -math.inf).amax(3)
        low, high, mean = (t.repeat_interleave(group, 1) for t in (low, high, summary.mean))
        empty = summary.bias.repeat_interleave(group, 1) == -math.inf
        asked = query[:, :, first:]
        want = min(plan.routes, count)
        routes = torch.full((*asked.shape[:3], want), -1, dtype=torch.int32)
        at = torch.arange(count) * size // plan.chunk * plan.chunk
        for span in spans(plan, causal, asked.shape[2], length, TILE):
            scores = score(asked[:, :, span.begin : span.end] * scale, low, high, mean)
            scores = scores.masked_fill((at >= span.low) | empty.unsqueeze(2), -math.inf)
            best = scores.topk(want, 3)
            chosen = best.indices.where(best.values > -math.inf, count).sort(3).values
            routes[:, :, span.begin : span.end] = chosen.where(chosen < count, -1).int()
        return cpu.attend(site._replace(query=asked), summary, routes, plan)

    return attend


def moba(plan: Plan) -> Attend:
    """Runs by their mean key (MoBA, Lu et al. 2025, arXiv 2502.13189), at the plan's run size."""
    return _by_runs(plan, lambda query, low, high, mean: query @ mean.transpose(2, 3))


def quest(plan: Plan) -> Attend:
    """Runs by an upper bound of their logits (Quest, Tang et al. 2024, arXiv 2406.10774, algorithm 1):
    ``sum_i max(q_i low_i, q_i high_i)``, with low and high the elementwise bounds of the run's keys.
    """

    def bound(query: Tensor, low: Tensor, high: Tensor, mean: Tensor) -> Tensor:
        return query.clamp(min=0) @ high.transpose(2, 3) + query.clamp(max=0) @ low.transpose(2, 3)

    return _by_runs(plan, bound)


def oracle(plan: Plan, keys: int) -> Attend:
    """Window and sinks of the plan, and each query's own ``keys`` best keys of the rest (found by exact search)."""

    def attend(site: Operands, first: int) -> Tensor:
        query, key, value, _, _, scale = site[:6]
        group, length = query.shape[1] // key.shape[1], key.shape[2]
        k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        asked = query[:, :, first:]
        out = torch.empty(*asked.shape[:3], value.shape[3])
        for span in spans(plan, True, asked.shape[2], length, TILE):
            end = first + span.end
            logits = asked[:, :, span.begin : span.end] @ k[:, :, :end].transpose(2, 3) * scale
            seen = torch.arange(end) <= torch.arange(first + span.begin, end).unsqueeze(1)
            logits = logits.masked_fill(~seen, -math.inf)
            far = logits[..., plan.sinks : span.low]
            if far.shape[3] > keys:
                bar = far.topk(keys, 3, sorted=False).values.amin(3, keepdim=True)
                far.masked_fill_(far < bar, -math.inf)
            out[:, :, span.begin : span.end] = torch.softmax(logits, 3) @ v[:, :, :end]
        return out

    return attend


@dataclass(frozen=True)
class Hyper:
    """HyperAttention (Han et al. 2023, arXiv 2310.05869): sorted LSH blocks and uniformly sampled keys.

    Causal by halves (its algorithm 3's use in section 3.2): queries of the second half meet keys of
    the first without a mask, and each half is split again down to ``base`` tokens, which are exact.
    Inside one such unmasked piece keys and queries are sorted by hash together, so that later
    queries of the piece move the blocks of earlier ones: it is not strictly causal.

    ``scoring`` couples it with pre-scoring (arXiv 2505.11040): "drop" leaves the half of a piece's
    keys with the lowest k-means score out, "zero" sets them to zero and attends them all the same,
    as the paper's public code does.
    """

    block: int
    sample: int
    base: int
    scoring: Literal["drop", "zero"] | None
    projections: int = 7
    seed: int = 0

    @staticmethod
    def at(target: float, scoring: str | None) -> Hyper:
        """The settings nearest to a density of 10, 20 or 35 % at 8192 tokens."""
        block, base = (64, 256) if target < 0.15 else (128, 512) if target < 0.28 else (256, 1024)
        return Hyper(block, block, base, scoring)  # type: ignore[arg-type]

    def density(self, length: int) -> float:
        total, size, pieces = 0.0, length, 1
        while size > self.base:
            total += pieces * (size // 2) * (self.block + self.sample)
            size, pieces = size // 2, 2 * pieces
        return (total + pieces * size * (size + 1) / 2) / (length * (length + 1) / 2)

    def __call__(self, site: Operands, first: int) -> Tensor:
        group = site.query.shape[1] // site.key.shape[1]
        k, v = site.key.repeat_interleave(group, 1), site.value.repeat_interleave(group, 1)
        query = site.query[:, :, first:] * site.scale
        out, sums = self._causal(query, k[:, :, first:], v[:, :, first:])
        if first:
            out, _ = _merge((out, sums), self._piece(query, k[:, :, :first], v[:, :, :first]))
        return out

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        length = query.shape[2]
        if length <= self.base:
            logits = query @ key.transpose(2, 3)
            logits = logits.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf)
            return torch.softmax(logits, 3) @ value, logits.logsumexp(3, keepdim=True)
        half = length // 2
        early = self._causal(query[:, :, :half], key[:, :, :half], value[:, :, :half])
        late = _merge(
            self._causal(query[:, :, half:], key[:, :, half:], value[:, :, half:]),
            self._piece(query[:, :, half:], key[:, :, :half], value[:, :, :half]),
        )
        return torch.cat([early[0], late[0]], 2), torch.cat([early[1], late[1]], 2)

    def _piece(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Every query against every key, by sorted blocks and a sample."""
        if self.scoring:
            plan = Plan(method="kmeans")
            scores = summaries.score(query[:, :, :0], key, None, plan, False, 1.0)
            best = scores.topk(key.shape[2] // 2, 2).indices.sort(2).values
            if self.scoring == "drop":
                key, value = (t.gather(2, best.unsqueeze(3).expand(-1, -1, -1, t.shape[3])) for t in (key, value))
            else:
                chosen = torch.zeros(scores.shape, dtype=torch.bool).scatter(2, best, True)
                key = key.where(chosen.unsqueeze(3), 0)
        generator = torch.Generator().manual_seed(self.seed)
        planes = torch.randn(query.shape[3], self.projections, generator=generator)
        keys = key.shape[2]
        blocks = max(1, min(keys // self.block, query.shape[2] // self.block))
        used = keys // blocks * blocks
        by_query = self._hash(query @ planes).argsort(dim=2, stable=True)
        by_key = self._hash(key @ planes).argsort(dim=2, stable=True)[:, :, :used]
        rows = math.ceil(query.shape[2] / blocks) * blocks
        q = torch.nn.functional.pad(_rows(query, by_query), (0, 0, 0, rows - query.shape[2]))
        q, k, v = (t.unflatten(2, (blocks, -1)) for t in (q, _rows(key, by_key), _rows(value, by_key)))
        logits = q @ k.transpose(3, 4)
        near, near_sum = (torch.softmax(logits, 4) @ v).flatten(2, 3), logits.logsumexp(4, keepdim=True).flatten(2, 3)
        back = by_query.argsort(2)
        near, near_sum = _rows(near, back), _rows(near_sum, back)
        chosen = torch.randint(keys, (self.sample,), generator=generator)
        # A sampled key that lies in the query's own block is already there.
        place = torch.full((*by_key.shape[:2], keys), -1).scatter(
            2, by_key, torch.arange(used).expand_as(by_key) // (used // blocks)
        )[:, :, chosen]
        mine = back // (rows // blocks)
        logits = query @ key[:, :, chosen].transpose(2, 3) + math.log(keys / self.sample)
        logits = logits.masked_fill(place.unsqueeze(2) == mine.unsqueeze(3), -math.inf)
        sums = logits.logsumexp(3, keepdim=True)
        far = torch.exp(logits - sums.clamp(min=-1e30)) @ value[:, :, chosen]
        return _merge((near, near_sum), (far, sums))

    @staticmethod
    def _hash(projected: Tensor) -> Tensor:
        """The bits' rank in Gray code order, so that neighbouring buckets differ by one plane."""
        gray = (projected > 0).long()
        code = torch.zeros(gray.shape[:3], dtype=torch.long)
        bit = torch.zeros(gray.shape[:3], dtype=torch.long)
        for plane in gray.unbind(3):
            bit = bit ^ plane
            code = 2 * code + bit
        return code


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.gather(2, index.unsqueeze(3).expand(-1, -1, -1, tensor.shape[3]))


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two softmaxes over disjoint keys as one, from their outputs and log sums."""
    total = torch.logaddexp(a[1], b[1])
    return a[0] * torch.exp(a[1] - total) + b[0] * torch.exp(b[1] - total), total
