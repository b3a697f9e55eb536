"""Traps: calls that look like a liftable site and are not. Whatever is decided, the result is the original's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F

from prescore_compile import Config, explain
from prescore_compile.kernels.reference import Operands
from prescore_compile.passes import rewrite

N = 40
S = F.scaled_dot_product_attention


def run(fn: Callable[..., torch.Tensor], *args: torch.Tensor) -> str:
    """Compare with the original under the plan that keeps everything; returns the decision's reason."""
    reports: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        new, report = rewrite(gm, Config.exact())
        reports.extend(report.sites)
        return new.forward

    want = fn(*(a.clone() for a in args))
    got = torch.compile(fn, backend=backend)(*(a.clone() for a in args))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    return reports[0].reason


def tensors(n: int = N, heads: int = 4) -> list[torch.Tensor]:
    return [torch.randn(2, heads, n, 8) for _ in range(3)]


def ar(n: int = N) -> torch.Tensor:
    return torch.arange(n)


def changed(how: Callable[[torch.Tensor], Any]) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        mask = ar() <= ar()[:, None]
        how(mask)
        return mask

    return make


def moved(how: Callable[[torch.Tensor], Any]) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        position = ar().float() - 10
        how(position)
        return ar() - 10 <= position[:, None]

    return make


def running_int8() -> torch.Tensor:
    position = torch.ones(300, dtype=torch.long).cumsum(0, dtype=torch.int8)
    return position <= position[:, None]


MASKS: dict[str, tuple[Callable[[], torch.Tensor], int]] = {
    "Tensor.where": (lambda: torch.zeros(N, N).bool().where(ar() > ar()[:, None], torch.ones(N, N).bool()), N),
    "bool alias": (changed(lambda m: m.bool()[:, :3].fill_(False)), N),
    "ravel": (changed(lambda m: m.ravel()[5:200].fill_(True)), N),
    "data": (changed(lambda m: m.data[:3].fill_(True)), N),
    "tensor_split": (changed(lambda m: m.tensor_split(2, 0)[0].fill_(True)), N),
    "__ior__": (changed(lambda m: m.__ior__(ar()[:, None] < 4)), N),
    "relu in place": (moved(lambda p: F.relu(p, inplace=True)), N),
    "foreach": (moved(lambda p: torch._foreach_add_([p], 3.0)), N),
    "alpha": (lambda: ar() <= torch.add(ar()[:, None] - 5, 5, alpha=2), N),
    "arange with end by name": (lambda: torch.arange(5, end=N + 5) <= ar()[:, None], N),
    "arange in bfloat16": (lambda: torch.arange(300, dtype=torch.bfloat16) <= ar(300)[:, None], 300),
    "cumsum in int8": (running_int8, 300),
    "seen as another dtype": (lambda: ar().float().view(torch.int32) <= ar()[:, None], N),
    "meshgrid": (lambda: torch.meshgrid(ar(), ar(), indexing="ij")[1] <= ar()[:, None], N),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_traps(name: str) -> None:
    make, n = MASKS[name]
    run(lambda q, k, v: S(q, k, v, attn_mask=make()), *tensors(n))


@pytest.mark.parametrize("shape", [(2, 120), (2, 200), (5, N), (1, 60), (2, N)])
def test_a_padding_mask_larger_than_the_site(shape: tuple[int, int]) -> None:
    """The usual preallocated mask, cut to the batch and length at hand."""
    mask = torch.rand(shape) > 0.4
    reason = run(lambda q, k, v, m: S(q, k, v, attn_mask=m[:2, None, None, : k.shape[2]]), *tensors(), mask)
    assert reason == ""


def test_keys_written_to_after_repeat_kv() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        k[:, 1] = 0
        return S(q, k, v, is_causal=True)

    q, k, v = tensors()
    run(fn, q, k[:, :2], v[:, :2])


def test_floats_of_the_run_time_do_not_obey_algebra() -> None:
    x = torch.ones(2, N)
    x[:, ::3] = math.nan
    for test in (lambda x: x == x, lambda x: (x - x) == 0, lambda x: (x * 0) == 0):
        run(lambda q, k, v, x, test=test: S(q, k, v, attn_mask=test(x)[:, None, None]), *tensors(), x)


def test_integers_of_the_run_time_that_are_narrowed() -> None:
    wide = (torch.rand(2, N) > 0.4) * 2**32
    run(lambda q, k, v, x: S(q, k, v, attn_mask=x.int().bool()[:, None, None]), *tensors(), wide)


def test_function_transforms_keep_the_site() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda q: S(q, k, v, is_causal=True).sum())(q)

    assert run(fn, *tensors()) == "function_transform"


@pytest.mark.parametrize("inside", [True, False])
def test_forward_mode_keeps_the_site(inside: bool) -> None:
    """The level is opened in the graph, or around it."""

    def tangent(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        dual = fw.make_dual(q, torch.ones_like(q))
        return fw.unpack_dual((dual @ k.mT * 0.3).softmax(-1) @ v).tangent

    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with fw.dual_level():
            return tangent(q, k, v)

    if inside:
        assert run(fn, *tensors()) == "function_transform"
    else:
        with fw.dual_level():
            assert run(tangent, *tensors()) == "function_transform"


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_forward_mode_later_is_compiled_anew(inner: str) -> None:
    """What was compiled without a level would lose the tangents."""
    q, k, v = tensors()
    options = dict(inner=inner, only_if_faster=False, min_seq_len=0)

    def fn(q: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * 0.3).softmax(-1) @ v

    compiled = torch.compile(fn, backend="prescore", options=options)
    compiled(q)
    with fw.dual_level():
        got, want = (fw.unpack_dual(f(fw.make_dual(q, torch.ones_like(q)))).tangent for f in (compiled, fn))
    torch.testing.assert_close(got, want)


def additive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    hides = (1.0 - padding[:, None, None].to(q.dtype)) * torch.finfo(q.dtype).min
    return (q @ k.mT * 0.25 + hides).softmax(-1) @ v


def additive_and_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() & padding[:, None, None]
    return (q @ k.mT * 0.25 + torch.where(causal, 0.0, torch.finfo(q.dtype).min)).softmax(-1) @ v


def of_groups(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return additive(q, k[:, :1].expand(-1, 2, -1, -1), v[:, :1].expand(-1, 2, -1, -1), padding)


def halved(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    hides = (1.0 - padding[:, None, None].to(q.dtype)) * torch.finfo(q.dtype).min
    return ((q @ k.mT + hides) * 0.5).softmax(-1) @ v


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() & padding[:, None, None]
    logits = 2.0 * torch.tanh(q @ k.mT * 0.25 / 2.0)
    return (logits + torch.where(causal, 0.0, torch.finfo(q.dtype).min)).softmax(-1) @ v


def banded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    at = torch.arange(k.shape[2])
    near = (at <= at[:, None]) & (at > at[:, None] - 9) & padding[:, None, None]
    logits = 2.0 * torch.tanh(q @ k.mT * 0.25 / 2.0)
    return (logits + torch.where(near, 0.0, torch.finfo(q.dtype).min)).softmax(-1) @ v


@pytest.mark.parametrize("fn", [additive, additive_and_causal, of_groups, halved, capped, banded])
def test_gradients_of_queries_whose_keys_are_all_hidden_by_a_sum(fn: Any) -> None:
    """Their weights are all the same, but what is added to logits hides no gradient."""
    padding = torch.ones(2, 70, dtype=torch.bool)
    padding[0] = False
    padding[1, :9] = False
    leaves = [torch.randn(2, 2, 70, 16, requires_grad=True) for _ in range(3)]
    options = dict(window=None, min_seq_len=0, only_if_faster=False, inner="aot_eager")
    compiled, grad = torch.compile(fn, backend="prescore", options=options), torch.randn(2, 2, 70, 16)
    (site,) = explain(fn, *leaves, padding, config=Config(**options)).sites
    assert site.decision == "rewrite", site.reason
    got, want = ([out := f(*leaves, padding), *torch.autograd.grad(out, leaves, grad)] for f in (compiled, fn))
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    assert got[1][0].abs().max() > 0.01


def test_causal_attention_of_inputs_whose_lengths_change() -> None:
    """Dynamo has a symbol for the length of each."""
    found = []
    compiled = torch.compile(
        lambda q, k, v: S(q, k, v, is_causal=True),
        backend=lambda gm, _: found.append(rewrite(gm, Config.exact())[1].sites[0].reason) or gm,
    )
    for length in (70, 90, 110):
        compiled(*[torch.randn(1, 2, length, 16) for _ in range(3)])
    assert set(found) == {""} and len(found) == 2


def test_a_function_transform_elsewhere_does_not() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return S(torch.vmap(lambda x: x * 2)(q), k, v, is_causal=True)

    assert run(fn, *tensors()) == ""


def test_queries_that_are_not_finite_or_huge_route_nowhere_else() -> None:
    """Padding lanes and empty clusters must not win because their score is NaN."""
    from conftest import summary_of

    from prescore_compile.kernels import cpu, routing
    from prescore_compile.kernels.plan import Plan

    plan = Plan(window=0, sinks=0, routes=4)
    for value in (math.nan, math.inf, 1e20):
        query, key, val = (torch.randn(1, 2, 300, 16) for _ in range(3))
        query[:, :, 5] = value
        site = Operands(query, key, val, None, False, 0.25)
        summary = summary_of(site, plan)
        empty = (summary.bias == -math.inf)[0, 0].nonzero().flatten()
        for implementation in (cpu.route, routing.route):
            routes = implementation(query, summary, plan, False, 300, 0.25)
            assert routes.max() < summary.mean.shape[2] and not torch.isin(routes, empty.int()).any()


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7F800001, 0x7FC00155, 0x7FFFFFFF, -1])
def test_nan_of_any_kind_is_not_hidden(bits: int) -> None:
    from prescore_compile import attention

    q, k, v = (torch.randn(1, 2, N, 8) for _ in range(3))
    k.view(torch.int32)[0, 0, 3, :] = bits
    assert attention(q, k, v, config=Config.exact())[0, 0].isnan().all()


def test_scores_of_a_chunk_do_not_depend_on_the_length() -> None:
    from prescore_compile.kernels.plan import METHODS, Plan
    from prescore_compile.kernels.summary import score

    q, k, _ = (torch.randn(1, 4, 333, 16) for _ in range(3))
    for method in METHODS:
        plan = Plan(method=method, chunk=32, keep=4)
        whole, part = (score(q[:, :, :n], k[:, :, :n], None, plan, True, 0.25) for n in (333, 160))
        # The next chunk's queries look back into this one, and are met before anybody reads its rows.
        told = 128 if method == "window_peak" else 160
        torch.testing.assert_close(whole[:, :, :told], part[:, :, :told])


def test_sharded_tensors_keep_the_site(tmp_path: Path) -> None:
    """The operators have no sharding rules, so that a rewrite would end in an error."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("no process group of its own")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = [distribute_tensor(x, mesh, [Shard(1)]) for x in tensors()]
        assert run(lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v, *sharded) == "sharded"
    finally:
        dist.destroy_process_group()


ROUNDS = {
    "seconds": lambda: le(ar(300) + 1.7e9),
    "fractions": lambda: ((ar(300) + 0.1)[None] - (ar(300) + 0.1)[:, None]).abs() <= 7,
    "a fraction on one side": lambda: ar(300) - (ar(300) + 0.1)[:, None] <= -0.1,
    "a sum of sums": lambda: le(ar(300).float() + 9_000_000 + 9_000_000),
    "tenths": lambda: (ar(300) * 0.1 * 10)[None] <= ar(300)[:, None],
    "a running sum": lambda: torch.full((300,), 0.1).cumsum(0)[None] * 10 <= (ar(300) + 1)[:, None],
    "a choice": lambda: torch.where(ar(300) > 5, ar(300) + 0.1, ar(300).float())[None] - 0.1 <= ar(300)[:, None],
    "int32 wraps": lambda: le(ar(300).int() * 20_000_000),
    "int64 wraps": lambda: le(ar(300) * 2**58),
    "float64": lambda: le(ar(300).double() + 2.0**54),
    "promoted": lambda: (ar(300) + 2**25)[None] <= (ar(300).float() + 0.0)[:, None] + 2**24 - 512 + 2**23,
}


def le(at: torch.Tensor) -> torch.Tensor:
    return at[None] <= at[:, None]


@pytest.mark.parametrize("name", ROUNDS)
def test_arithmetic_on_indices_that_is_not_that_of_integers(name: str) -> None:
    q, k, v = tensors(300)
    assert run(lambda q, k, v: S(q, k, v, ROUNDS[name]()), q.requires_grad_(), k, v).startswith("opaque_mask")


def test_halves_and_small_sums_are_exact() -> None:
    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        at, squared = (ar(300).float() + 9_000_000) * 0.5, ar(300).int() * ar(300).int()
        return S(q, k, v, le(at + at) & (squared[:, None] >= 0))

    q, k, v = tensors(300)
    assert run(program, q.requires_grad_(), k, v) == ""


def test_integers_of_the_run_time_compared_as_floats() -> None:
    """Two documents whose numbers are one in float32; one number beside an index is on the same side of it."""

    def documents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        of = of.float()
        return S(q, k, v, (of[:, None] == of[:, :, None])[:, None])

    def prefix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return S(q, k, v, (ar(300).float() < length.float()[:, None])[:, None, None])

    q, k, v = tensors(300)
    of = torch.arange(300).expand(2, 300) + 2**30
    assert run(documents, q.requires_grad_(), k, v, of).startswith("opaque_mask: eq: integers of the run time")
    assert run(prefix, q, k, v, torch.tensor([7, 2**40])) == ""
