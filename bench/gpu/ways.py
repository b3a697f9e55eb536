"""The functions that are timed for one case."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.operands import counted, smooth
from prescore_compile.kernels import ops
from prescore_compile.kernels.band import K, Q
from prescore_compile.kernels.logits import Logits
from prescore_compile.kernels.plan import WHOLE, Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary

from .machine import Case, Machine

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
STAGES = ("summarize", "mass", "route", "attend")
SCORED = ("kmeans", "kmedian", "leverage", "peak")
"""Methods whose scores are timed."""
SCORES = tuple(f"score {method}" for method in SCORED)
SELECTING = (*SCORES, "centroids", "centroids, backward")
"""The ways of plans that select keys."""
WHOLLY = ("band", "band, backward", "sink", "sink, backward")
"""The ways of sites that are attended whole: a sliding window, and a learned sink."""
MASKED = "sdpa efficient, masked"
"""That window by SDPA."""
WINDOW = 1024
BLOCK = 128
"""Queries, and keys, of a block of FlexAttention."""
SCORED_CHUNK = 128
"""Keys of a chunk where keys are scored and selected: what those kernels and their prices are made for."""


class Ways:
    """Each way is called without arguments, and gives what its check takes."""

    taken: float | None = None
    """Routes of a query, once they were counted."""

    def __init__(self, case: Case, plan: Plan, machine: Machine) -> None:
        self.case, self.plan, self.machine = case, plan, machine
        self.site = smooth(case.n, case.heads, case.group, case.dim, case.causal, machine.dtype, machine.device)
        self.grad = torch.randn_like(self.site.query)

    @functools.cached_property
    def all(self) -> dict[str, Callable[[], Any]]:
        """Every way but FlexAttention, which must be compiled first, by its name."""
        found: dict[str, Callable[[], Any]] = {name: getattr(self, name) for name in STAGES}
        found["total"] = self.total
        found["total, backward"] = lambda: self.backward(lambda site: ops.prescored(site, self.plan), self.site)
        for name, backend in BACKENDS.items():
            found[f"sdpa {name}"] = functools.partial(self.sdpa, backend)
            found[f"sdpa {name}, backward"] = functools.partial(self.sdpa_backward, backend)
        found |= {name: functools.partial(self.score, of) for name, of in zip(SCORES, SCORED, strict=True)}
        found |= {MASKED: self.masked, "band": self.band, "sink": self.sink}
        for name in ("band", "sink"):
            found[f"{name}, backward"] = functools.partial(self.backward, found[name], self.site)
        return found | {"centroids": self.centroids, "centroids, backward": self.centroids_backward}

    @functools.cached_property
    def summary(self) -> Summary:
        return self.summarize()

    @functools.cached_property
    def near(self) -> torch.Tensor | None:
        """What ``mass`` finds, where the plan needs it."""
        return self.mass() if self.plan.needs_mass else None

    @functools.cached_property
    def routes(self) -> torch.Tensor:
        return self.route()

    def count(self) -> float:
        """Routes that a query takes."""
        return float((self.routes >= 0).sum(3).float().mean())

    def summarize(self) -> Summary:
        return Summary(*ops.summarize(self.site.key, self.site.value, None, None, self.plan.text))

    @property
    def rows(self) -> tuple[torch.Tensor, ...]:
        s = self.summary
        return s.row_index, s.row_owner, s.row_key, s.row_value, s.row_bias

    def mass(self) -> torch.Tensor:
        site = self.site
        return ops.mass(site.query, site.key, None, *self.rows, self.plan.text, site.causal, site.scale, "", [])

    def route(self) -> torch.Tensor:
        site = self.site
        more = (self.plan.text, site.causal, site.key.shape[2], site.scale, "", [], self.near)
        return ops.route(site.query, *self.summary[:4], *more)

    def attend(self) -> torch.Tensor:
        site, order = self.site, self.summary.order
        return ops.attend(*site[:4], order, self.routes, *self.rows, self.plan.text, site.causal, site.scale, "", [])

    def total(self) -> torch.Tensor:
        return ops.prescored(self.site, self.plan)

    def score(self, method: str) -> torch.Tensor:
        site = self.site
        return ops.score(site.query, site.key, None, scored(self.plan, method).text, site.causal, site.scale)

    @functools.cached_property
    def norms(self) -> torch.Tensor:
        """Scores by which the keys of ``centroids`` are selected."""
        return ops.score(*self.site[:2], None, selected(self.plan).text, self.site.causal, self.site.scale)

    def centroids(self, site: Operands | None = None) -> Summary:
        """A summary of selected keys and centroids, as plans without routes have it."""
        key, value = (site or self.site)[1:3]
        return Summary(*ops.summarize(key, value, None, self.norms, selected(self.plan).text))

    def centroids_backward(self) -> tuple[Summary, tuple[torch.Tensor, ...]]:
        """Such a summary, and the gradients of its rows' sum in keys and values."""
        leaves = [t.detach().requires_grad_() for t in self.site[1:3]]
        found = self.centroids(self.site._replace(key=leaves[0], value=leaves[1]))
        return found, torch.autograd.grad(found[6:8], leaves, [torch.ones_like(t) for t in found[6:8]])

    @property
    def window(self) -> int:
        """Keys of a sliding window, the query's own counted in."""
        return min(WINDOW, self.case.n // 4)

    def band(self, site: Operands | None = None) -> torch.Tensor:
        return ops.prescored(site or self.site, WHOLE, Logits(Q - self.window < K))

    @functools.cached_property
    def sink_logit(self) -> torch.Tensor:
        """Of each head, as of each query."""
        heads = torch.linspace(-2, 2, self.case.heads, device=self.machine.device)
        return heads.view(1, -1, 1).expand(*self.site.query.shape[:3])

    def sink(self, site: Operands | None = None) -> torch.Tensor:
        return ops.prescored((site or self.site)._replace(sink_logit=self.sink_logit), WHOLE)

    @functools.cached_property
    def window_mask(self) -> torch.Tensor:
        """``[n, n]`` bool, as models pass it to SDPA."""
        at = torch.arange(self.case.n, device=self.machine.device)
        return (at <= at[:, None]) & (at > at[:, None] - self.window)

    def masked(self) -> torch.Tensor:
        site = self.expanded
        with sdpa_kernel(BACKENDS["efficient"]):
            return F.scaled_dot_product_attention(*site[:3], attn_mask=self.window_mask, scale=site.scale)

    @functools.cached_property
    def expanded(self) -> Operands:
        """Keys and values once a query head, for backends that know no groups."""
        site, group = self.site, self.case.group
        return site._replace(key=site.key.repeat_interleave(group, 1), value=site.value.repeat_interleave(group, 1))

    def sdpa(self, backend: SDPBackend, site: Operands | None = None) -> torch.Tensor:
        site = site or self.expanded
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*site[:3], is_causal=site.causal, scale=site.scale)

    def sdpa_backward(self, backend: SDPBackend) -> tuple[torch.Tensor, ...]:
        return self.backward(functools.partial(self.sdpa, backend), self.expanded)

    def backward(self, forward: Callable[[Operands], torch.Tensor], site: Operands) -> tuple[torch.Tensor, ...]:
        """Forward and backward of a function of a site: the gradients in query, key and value."""
        leaves = [t.detach().requires_grad_() for t in site[:3]]
        given = site._replace(query=leaves[0], key=leaves[1], value=leaves[2])
        return torch.autograd.grad(forward(given), leaves, self.grad)

    @functools.cached_property
    def mask_mod(self) -> Callable[[Any, Any, Any, Any], Any]:
        """What FlexAttention attends: the window, the sinks and, in place of routes, random blocks of as many keys."""
        case, plan = self.case, counted(self.plan, self.taken)
        blocks = -(-case.n // BLOCK)
        reachable = blocks / 2 if case.causal else blocks
        generator = torch.Generator(self.machine.device).manual_seed(1)
        drawn = torch.rand(blocks, blocks, generator=generator, device=self.machine.device)
        drawn = drawn < plan.routes * plan.cluster / BLOCK / reachable
        reach, sinks = (plan.window or 0) + BLOCK, plan.sinks

        def attended(batch: Any, head: Any, query: Any, key: Any) -> Any:
            near = (query - key).abs() <= reach
            kept = near | (key < sinks) | drawn[query // BLOCK, key // BLOCK]
            return kept & (query >= key) if case.causal else kept

        return attended

    def flex(self) -> Callable[[], torch.Tensor]:
        """FlexAttention with that mask, compiled."""
        from torch.nn.attention.flex_attention import flex_attention

        site, block_mask = self.site, self.block_mask()
        torch._dynamo.reset()  # a shape is compiled for itself
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        return lambda: compiled(*site[:3], block_mask=block_mask, scale=site.scale, enable_gqa=self.case.group > 1)

    def block_mask(self) -> Any:
        """What ``create_block_mask`` gives, a row of blocks at a time.

        Compiled, it sorts hundreds of blocks a row in one kernel, which some versions of torch take minutes to compile
        (pytorch/pytorch#182060); as it is, it needs memory for all pairs.
        """
        from torch.nn.attention.flex_attention import BlockMask

        n, keys = self.case.n, torch.arange(self.case.n, device=self.machine.device)
        some, every = [], []
        for queries in keys.split(BLOCK):
            kept = self.mask_mod(None, None, queries.unsqueeze(1), keys)
            blocks = F.pad(kept, (0, -n % BLOCK, 0, BLOCK - len(queries))).unflatten(1, (-1, BLOCK))
            some.append(blocks.any(2).any(0))
            every.append(blocks.all(2).all(0))
        full = torch.stack(every)[None, None]
        part = torch.stack(some)[None, None] & ~full

        def listed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return mask.sum(3, dtype=torch.int32), mask.int().argsort(dim=3, descending=True, stable=True).int()

        return BlockMask.from_kv_blocks(*listed(part), *listed(full), BLOCK, self.mask_mod, (n, n))


def stages_of(plan: Plan) -> list[str]:
    """Those of ``STAGES`` that the plan has."""
    return [name for name in STAGES if name != "mass" or plan.needs_mass]


def scored(plan: Plan, method: str) -> Plan:
    """The plan beside a site's that selects keys by this method."""
    chunk = min(SCORED_CHUNK, plan.chunk)
    return Plan(method=method, keep=min(32, chunk), chunk=chunk, routes=0)


def selected(plan: Plan) -> Plan:
    """The plan beside a site's that has selected keys and centroids, and no routes."""
    return Plan(method="norm", keep=8, centroids=8, chunk=min(SCORED_CHUNK, plan.chunk), routes=0)
