"""Attention on a GPU, stage by stage, against every backend of SDPA and against FlexAttention.

`python -m bench.attention --device cuda` runs it; `--dry-run` takes the same path on a CPU with
Triton's interpreter and tiny sizes, and its times mean nothing. Each way's result is compared with a
float32 reference on some queries before it is timed; a way that fails the check, or that the machine
has not, gets no time and says why. What a case's time does not suffice for is left out, the least telling last.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import model
from prescore_compile.kernels import coarse, ops, reference
from prescore_compile.kernels import summary as summaries
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary
from prescore_compile.passes import cost

CHECKED = 32
"""Queries that are compared with the reference: the last of a causal site, the first of any other."""
LIMIT = 3e-2
"""The largest error of an output of unit variance in bfloat16, as on a CPU."""
SECONDS = 0.3
"""What one way is timed for, at least ``rounds`` times."""
CYCLES = 2e9
"""Of a device in a second, about."""
PEAKED = 4.0
"""Scale of queries, so that some keys matter more than others, as on a CPU."""
LENGTHS = (1024, 4096, 16384, 32768, 65536, 131072)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
MATH_UP_TO = 4096
SCORED = ("kmeans", "kmedian", "leverage", "peak")
"""Methods whose scores are timed."""
OVER = "left out, as time was up"


@dataclass(frozen=True)
class Case:
    """One measured shape, batch 1: ``heads`` query heads on ``heads / group`` KV heads."""

    n: int
    causal: bool
    dim: int
    group: int
    heads: int = 16


def cases(lengths: tuple[int, ...] = LENGTHS, heads: int = 16) -> list[Case]:
    """The most telling first: where time runs out, the rest is left out and named."""
    shapes = [(True, 128, 4), (True, 64, 1), (False, 64, 1), (False, 128, 4), (True, 64, 4), (True, 128, 1)]
    shapes += [(False, 64, 4), (False, 128, 1)]
    return [Case(n, causal, dim, group, heads) for causal, dim, group in shapes for n in lengths]


@dataclass(frozen=True)
class Machine:
    """Where it runs and how it is timed."""

    device: str
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 3
    deadline: float = math.inf
    """When, by ``time.monotonic``, nothing more is begun."""

    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def lost(self) -> bool:
        """Whether a kernel's fault has left the device of no use to this process, as a wrong address does."""
        if self.device != "cuda":
            return False
        try:
            torch.cuda.synchronize()
        except Exception:
            return True
        return False

    def seconds(self, work: Callable[[], Any]) -> float:
        """Median seconds of ``work`` on the device, which its check has warmed up."""
        begin = time.perf_counter()
        work()
        launched = time.perf_counter() - begin
        found: list[float] = []
        while len(found) < self.rounds or (self.rounds > 1 and sum(found) < SECONDS and len(found) < 50):
            found.append(self._once(work, launched))
        return statistics.median(found)

    def _once(self, work: Callable[[], Any], launched: float) -> float:
        if self.device == "cpu":
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # What Python does before a launch is not the device's time: the device waits until all is launched.
        torch.cuda._sleep(int(2 * launched * CYCLES))
        begin_event.record()
        work()
        end_event.record()
        torch.cuda.synchronize()
        return begin_event.elapsed_time(end_event) / 1e3

    @property
    def model(self) -> model.Device:
        """The device of the cost table that this one is most like."""
        name = torch.cuda.get_device_name() if self.device == "cuda" else ""
        return next((found for key, found in model.DEVICES.items() if key in name), model.DEVICES["H100"])


def inputs(case: Case, machine: Machine) -> Operands:
    """Smooth along the sequence, as real queries and keys are; of unit variance, with queries ``PEAKED`` times that."""
    generator = torch.Generator(machine.device).manual_seed(0)

    def smooth(heads: int) -> torch.Tensor:
        def draw(length: int) -> torch.Tensor:
            return torch.randn(1, heads, length, case.dim, generator=generator, device=machine.device)

        steps = draw(case.n // 64 + 1).repeat_interleave(64, 2)[:, :, : case.n]
        return (draw(case.n) * 0.5 + steps * 0.75**0.5).to(machine.dtype)

    kv_heads = case.heads // case.group
    return Operands(PEAKED * smooth(case.heads), smooth(kv_heads), smooth(kv_heads), None, case.causal, case.dim**-0.5)


def some(tensor: torch.Tensor, causal: bool) -> torch.Tensor:
    """The queries that are checked, of ``[B, H, Nq, D]``."""
    return tensor[:, :, -CHECKED:] if causal else tensor[:, :, :CHECKED]


def fewer(site: Operands) -> Operands:
    """The site with only the queries that are checked, in float32."""
    few = site._replace(query=some(site.query, site.causal))
    return few._replace(query=few.query.float(), key=site.key.float(), value=site.value.float())


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, relative to 1 or to the largest expected number; NaN counts as infinite."""
    difference = (got.float() - want).abs().max() / want.abs().max().clamp(min=1)
    return float(difference.nan_to_num(nan=float("inf")))


def check_routes(
    site: Operands, summary: Summary, routes: torch.Tensor, plan: Plan, near: torch.Tensor | None = None
) -> float:
    """How much score the chosen clusters lose against the best ones, of the largest total.

    With a share, rounding may decide whether a cluster has it: a few routes may be more or less. On two levels, it may
    decide which chunk is looked into, too.
    """
    query = some(site.query, site.causal)
    scores = reference.routing_scores(query.float(), summary, site.scale)
    group = query.shape[1] // site.key.shape[1]
    mass = None if near is None else near[:, :, -CHECKED:] if site.causal else near[:, :, :CHECKED]
    best = coarse.route(query, summary, plan, site.causal, site.key.shape[2], site.scale, mass=mass)
    chosen = some(routes, site.causal)
    taken, wanted = ((routes >= 0).sum(3) for routes in (chosen, best))
    allowed = 0.0 if not plan.share else 0.03 if plan.coarse else 0.01
    if (taken - wanted).abs().sum() > allowed * wanted.sum():
        return float("inf")
    same = taken == wanted
    if plan.together(group) > 1:  # all heads of a group have the same routes, chosen by what they gain together
        assert mass is not None
        scores = reference.together(scores, mass.float(), group)[0]
        chosen, best, same = chosen[:, ::group], best[:, ::group], same[:, ::group]
    got, want = (scores.gather(3, r.long().clamp(min=0)).masked_fill(r < 0, 0).sum(3) for r in (chosen, best))
    return float(((want - got).abs() / want.abs().clamp(min=1))[same].max())


class Ways:
    """The functions that are timed for one case, and what each should give."""

    def __init__(self, case: Case, plan: Plan, machine: Machine) -> None:
        self.case, self.plan, self.machine = case, plan, machine
        self.site = inputs(case, machine)
        self.grad = torch.randn_like(self.site.query)

    def prepare(self, failed: dict[str, str]) -> None:
        """What each stage gives to the next; ``failed`` says which one could not run, and no later one is tried."""
        self.near = None
        with told(failed, "summarize"):
            self.summary = self.summarize()
        if self.plan.needs_mass and not failed:
            with told(failed, "mass"):
                self.near = self.mass()
        if not failed:
            with told(failed, "route"):
                self.routes = self.route()

    def summarize(self) -> Summary:
        return Summary(*ops.summarize(self.site.key, self.site.value, None, None, self.plan.text))

    def scored(self, method: str) -> Plan:
        """The plan that selects keys by this method."""
        return Plan(method=method, keep=min(32, self.plan.chunk), chunk=self.plan.chunk, routes=0)

    def score(self, method: str) -> torch.Tensor:
        site = self.site
        return ops.score(site.query, site.key, None, self.scored(method).text, site.causal, site.scale)

    @functools.cached_property
    def norms(self) -> torch.Tensor:
        """Scores by which the keys of ``centroids`` are selected."""
        return ops.score(*self.site[:2], None, selected(self.plan).text, self.site.causal, self.site.scale)

    def centroids(self, site: Operands | None = None) -> Summary:
        """A summary of selected keys and centroids, as plans without routes have it."""
        key, value = (site or self.site)[1:3]
        return Summary(*ops.summarize(key, value, None, self.norms, selected(self.plan).text))

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

    def expanded(self) -> Operands:
        """Keys and values once a query head, for backends that know no groups."""
        site, group = self.site, self.case.group
        return site._replace(key=site.key.repeat_interleave(group, 1), value=site.value.repeat_interleave(group, 1))

    def sdpa(self, backend: SDPBackend, site: Operands) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*site[:3], is_causal=site.causal, scale=site.scale)

    def flex(self) -> Callable[[], torch.Tensor]:
        """Compiled FlexAttention with the window, the sinks and as many random blocks as routes have keys."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        site, plan, n = self.site, self.plan, self.case.n
        window = plan.window or 0
        blocks = max(1, n // 128)
        generator = torch.Generator(self.machine.device).manual_seed(1)
        share = min(1.0, plan.routes * plan.cluster / 128 / blocks)
        drawn = torch.rand(blocks, blocks, generator=generator, device=self.machine.device) < share

        def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
            near = (q - k).abs() <= window + 128
            kept = near | (k < plan.sinks) | drawn[q // 128, k // 128]
            return kept & (q >= k) if site.causal else kept

        block_mask = create_block_mask(mask, None, None, n, n, device=self.machine.device, _compile=True)
        compiled = torch.compile(flex_attention)
        return lambda: compiled(*site[:3], block_mask=block_mask, scale=site.scale, enable_gqa=self.case.group > 1)

    def backward(self, forward: Callable[[Operands], torch.Tensor], site: Operands) -> Callable[[], Any]:
        """Forward and backward of a function of a site."""
        leaves = [t.detach().requires_grad_() for t in site[:3]]
        given = site._replace(query=leaves[0], key=leaves[1], value=leaves[2])
        return lambda: torch.autograd.grad(forward(given), leaves, self.grad)


def measure(case: Case, plan: Plan, machine: Machine, flex: bool, scored: bool = True) -> dict[str, Any]:
    """Times in seconds of every way that passed its check, and what there is to say of the others.

    ``flex``, ``scored``: whether FlexAttention and the scorers are among them.
    """
    ways = Ways(case, plan, machine)
    site = ways.site
    few = fewer(site)
    exact = reference.exact(few)
    failed: dict[str, str] = {}
    times: dict[str, float] = {}

    def way(name: str, work: Callable[[], Any], wrong: Callable[[Any], float], limit: float = LIMIT) -> None:
        """One that runs, is checked (``wrong``: the error of what it gave) and timed; else its reason is kept."""
        if machine.over():
            failed[name] = OVER
            return
        with told(failed, name):
            off = wrong(work())
            if not off <= limit:
                failed[name] = f"wrong result: off by {off:.2g}, {limit:.2g} allowed"
                return
            times[name] = machine.seconds(work)

    def like(want: torch.Tensor) -> Callable[[torch.Tensor], float]:
        return lambda got: error(some(got, site.causal), want)

    def way_back(name: str, forward: Callable[[Operands], torch.Tensor], given: Operands, *of: Any) -> None:
        with told(failed, name):
            want = gradient(few, *(of or (None, None)), plan, ways.grad)
            way(name, ways.backward(forward, given), lambda got: error(some(got[0], site.causal), want))

    ways.prepare(failed)
    if not failed:
        part = some(ways.routes, site.causal)
        wide = ways.summary._replace(row_key=ways.summary.row_key.float(), row_value=ways.summary.row_value.float())
        attended = reference.attend(few, wide, part, plan)
        way("summarize", ways.summarize, lambda got: reference_clusters(ways))
        if plan.needs_mass:
            near = reference.mass(few, wide, plan).unsqueeze(3)
            way("mass", ways.mass, lambda got: error(some(got.unsqueeze(3), site.causal), near))
        limit = 3e-2 if plan.coarse else 1e-2
        way("route", ways.route, lambda got: check_routes(site, ways.summary, got, plan, ways.near), limit)
        way("attend", ways.attend, like(attended))
    if not failed:
        way("total", ways.total, like(attended))
    large = ways.expanded()
    backends = {name: functools.partial(ways.sdpa, backend) for name, backend in BACKENDS.items()}
    if case.n > MATH_UP_TO:
        del backends["math"]
    for name, forward in backends.items():
        way(f"sdpa {name}", functools.partial(forward, large), like(exact))
    if "total" in times:
        way_back("total, backward", lambda s: ops.prescored(s, plan), site, wide, part)
    for name, forward in backends.items():
        if f"sdpa {name}" in times:
            way_back(f"sdpa {name}, backward", forward, large)
    if scored:
        for method in SCORED:
            work = functools.partial(ways.score, method)
            way(f"score {method}", work, functools.partial(check_scores, ways, method))
        way("centroids", ways.centroids, functools.partial(check_centroids, ways))
        if "centroids" in times:
            way(
                "centroids, backward",
                lambda: centroids_backward(ways),
                functools.partial(check_centroids_backward, ways),
            )
    if flex and not machine.over():
        with told(failed, "flex"):
            way("flex", ways.flex(), lambda got: 0.0)
    taken = float((ways.routes >= 0).sum(3).float().mean()) if hasattr(ways, "routes") else None
    return row(case, plan, machine, times, failed, taken)


def check_scores(ways: Ways, method: str, scores: torch.Tensor) -> float:
    """Largest error of the scores of the first chunk, which no other key takes part in."""
    plan, site = ways.scored(method), ways.site
    query, key = (tensor[:, :, : plan.chunk].float() for tensor in (site.query, site.key))
    want = summaries.score(query, key, None, plan, site.causal, site.scale)
    return error(scores[:, :, : plan.chunk], want)


def selected(plan: Plan) -> Plan:
    """The plan beside a site's that has selected keys and centroids, and no routes."""
    return Plan(method="norm", keep=8, centroids=8, chunk=plan.chunk, routes=0)


def check_centroids(ways: Ways, got: Summary) -> float:
    """Largest error of the rows of the first chunks, of which no other key is part; their owners too."""
    plan = selected(ways.plan)
    length = min(4 * plan.chunk, ways.case.n)
    key, value = (tensor[:, :, :length] for tensor in ways.site[1:3])
    want = summaries.summarize(key, value, None, ways.norms[:, :, :length], plan)
    rows = want.row_index.shape[2]
    if not torch.equal(got.row_index[:, :, :rows], want.row_index):
        return math.inf
    # Two keys may be as near to one centre as to another.
    if (got.row_owner[:3, ..., :length] != want.row_owner[:3]).float().mean() > 1e-3:
        return math.inf
    return max(error(g[:, :, :rows], w.float()) for g, w in zip(got[6:8], want[6:8], strict=True))


def centroids_backward(ways: Ways) -> tuple[Summary, tuple[torch.Tensor, ...]]:
    """Such a summary, and the gradients of its rows' sum in keys and values."""
    leaves = [t.detach().requires_grad_() for t in ways.site[1:3]]
    found = ways.centroids(ways.site._replace(key=leaves[0], value=leaves[1]))
    return found, torch.autograd.grad(found[6:8], leaves, [torch.ones_like(t) for t in found[6:8]])


def check_centroids_backward(ways: Ways, got: tuple[Summary, tuple[torch.Tensor, ...]]) -> float:
    """Largest error of the gradients, for the rows that were found."""
    found, grads = got
    ones = torch.ones_like(found.row_key, dtype=torch.float32)
    want = summaries.scatter_rows(ones, found.row_index, found.row_owner, ways.case.n)
    return max(error(grad[..., : want.shape[3]], want) for grad in grads)


def reference_clusters(ways: Ways) -> float:
    """Largest error of a mean of a cluster of the last chunks, against the keys that stand in it."""
    plan, site, summary = ways.plan, ways.site, ways.summary
    if not plan.routes:
        return 0.0
    order = summary.order.unflatten(2, (-1, plan.cluster))[:, :, -64:].long()
    held = (order >= 0).unsqueeze(4)
    index = order.clamp(min=0).flatten(2).unsqueeze(3).expand(-1, -1, -1, site.key.shape[3])
    keys = site.key.float().gather(2, index).unflatten(2, order.shape[2:]) * held
    mean = keys.sum(3) / held.sum(3).clamp(min=1)
    return error(summary.mean[:, :, -64:], mean)


def gradient(few: Operands, summary: Summary | None, routes: Any, plan: Plan, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of the checked queries: that of the others does not reach it."""
    given = some(grad, few.causal).float()
    if summary is None:
        plan = Plan(window=None, sinks=0, routes=0)
        none = few.query.new_empty(*few.key.shape[:2], 0)
        wide = none.unsqueeze(3).expand(-1, -1, -1, few.query.shape[3])
        summary = Summary(none.int(), wide, wide, none, none.int(), none.int(), wide, wide, none)
        routes = few.query.new_empty(*few.query.shape[:3], 0, dtype=torch.int32)
    return reference.attend_backward(given, few, summary, routes, plan)[0]


@contextlib.contextmanager
def told(failed: dict[str, str], name: str) -> Iterator[None]:
    """What a way raises is its reason for having no time: a backend that is missing, too little memory."""
    try:
        yield
    except Exception as problem:
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        # A compiler's reason is in its last line.
        failed[name] = lines[0][:200] if len(lines) == 1 else f"{lines[0][:200]} ... {lines[-1][:200]}"
        with contextlib.suppress(Exception):  # after a fault of a kernel, nothing works any more
            torch.cuda.empty_cache()


def row(
    case: Case,
    plan: Plan,
    machine: Machine,
    times: dict[str, float],
    failed: dict[str, str],
    taken: float | None = None,
) -> dict[str, Any]:
    """One case as data: times, rates on the pairs attended, shares, and the predicted times.

    ``taken``: routes of a query, counted.
    """
    shape = cost.Shape(1, case.heads, case.heads // case.group, case.dim, case.dim, case.causal)
    flops = 4 * case.dim * case.heads
    exact_flops = flops * cost.at(cost.exact_pairs(case.causal), case.n)
    counted = replace(plan, share=0.0, routes=round(taken)) if plan.share and taken else plan
    attended_flops = flops * cost.at(cost.attended_pairs(counted, case.causal), case.n)
    backends = {name: times[f"sdpa {name}"] for name in BACKENDS if f"sdpa {name}" in times}
    best = min(backends, key=backends.__getitem__) if backends else None
    found: dict[str, Any] = asdict(case) | {"stages": times, "failed": failed, "routes": taken}
    found["predicted"] = model.stages(model.Site(shape, case.n, plan), machine.model)
    for method in SCORED:
        if f"score {method}" not in times:
            continue
        kept = model.Site(shape, case.n, Plan(method=method, keep=min(32, plan.chunk), chunk=plan.chunk, routes=0))
        found["predicted"][f"score {method}"] = model.score(kept).seconds(machine.model)
    if "centroids" in times:
        kept = model.Site(shape, case.n, selected(plan))
        found["predicted"]["centroids"] = sum(
            work(kept).seconds(machine.model) for work in (model.select, model.summarize)
        )
    if best is not None:
        found["stages"] = times | {"exact": backends[best]}
        found |= {"best": best, "exact_tflops": exact_flops / backends[best] / 1e12}
    if "attend" in times:
        found["attend_tflops"] = attended_flops / times["attend"] / 1e12
        if best is not None:
            found["attend_share_of_best"] = found["attend_tflops"] / found["exact_tflops"]
    if "total" in times:
        chosen = times["summarize"] + times["route"] + times.get("mass", 0.0)
        found["scoring_and_routing_share"] = chosen / times["total"]
        if best is not None:
            found["faster"] = backends[best] / times["total"]
    backward = [times[f"sdpa {name}, backward"] for name in BACKENDS if f"sdpa {name}, backward" in times]
    if backward and "total, backward" in times:
        found["faster_backward"] = min(backward) / times["total, backward"]
    found["off_the_prediction"] = model.parts(found["stages"], found["predicted"])
    return found
