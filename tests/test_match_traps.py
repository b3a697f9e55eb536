"""Traps for the matcher: programs that nearly are what they look like. Whatever is decided, nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prescore_compile import Config
from prescore_compile.passes import rewrite

B, H, N, D = 3, 2, 11, 6
S = F.scaled_dot_product_attention


def qkv(**settings: Any) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(B, H, N, D, generator=generator, **settings) for _ in range(3))


def compiled(fn: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    sites: list[Any] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        new, report = rewrite(gm, Config.exact())
        sites.extend(report.sites)
        return new.forward

    return torch.compile(fn, backend=backend), sites


def unchanged(fn: Callable[..., Any], *args: Tensor) -> list[Any]:
    call, sites = compiled(fn)
    ours, theirs = [a.clone() for a in args], [a.clone() for a in args]
    got, want = call(*ours), fn(*theirs)
    torch.testing.assert_close((got, ours), (want, theirs), atol=1e-5, rtol=1e-5)
    return sites


def written(weigh: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: weigh(q @ k.mT) @ v


EXPANDED: dict[str, Callable[..., Tensor]] = {
    "key along its length": lambda q, k, v: S(q, k[:, :, :1].expand(-1, -1, N, -1), v),
    "key, repeated": lambda q, k, v: S(q, k[:, :, :1].repeat_interleave(N, 2), v),
    "value along its length": lambda q, k, v: (q @ k.mT).softmax(-1) @ v[:, :, :1].expand(-1, -1, N, -1),
    "key along its features": lambda q, k, v: S(q, k[..., :1].expand(-1, -1, -1, D), v),
    "value along its features": lambda q, k, v: S(q, k, v[..., :1].expand(-1, -1, -1, D)),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_only_heads_are_unexpanded(name: str) -> None:
    assert unchanged(EXPANDED[name], *qkv())[0].decision == "rewrite"


def under_no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        weights = (q @ k.mT).softmax(-1)
    return weights @ v


STOPPED: dict[str, Callable[..., Tensor]] = {
    "no_grad": under_no_grad,
    "logits": lambda q, k, v: (q @ k.mT).detach().softmax(-1) @ v,
    "weights": lambda q, k, v: (q @ k.mT).softmax(-1).detach() @ v,
    "repeated keys": lambda q, k, v: S(q, k[:, :1].expand(B, H, N, D).detach(), v),
}


@pytest.mark.parametrize("name", STOPPED)
def test_stopped_gradients_stay_stopped(name: str) -> None:
    call, _ = compiled(STOPPED[name])
    got, want = (
        torch.autograd.grad(fn(*inputs).square().sum(), inputs, allow_unused=True)
        for fn, inputs in ((f, qkv(requires_grad=True)) for f in (call, STOPPED[name]))
    )
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)


def test_a_list_is_one_index() -> None:
    mask = torch.rand(4, N, N) > 0.3
    unchanged(lambda q, k, v, m: S(q, k, v, m[[2, 0, 1]][:, None]), *qkv(), mask)
    unchanged(lambda q, k, v, m: S(q, k, v, m[[1]][:, None]), *qkv(), mask)


def test_what_is_written_out_is_written() -> None:
    buffer = torch.zeros(B, H, N, N)
    unchanged(lambda q, k, v, b: torch.matmul(q, k.mT, out=b).softmax(-1) @ v, *qkv(), buffer)
    unchanged(lambda q, k, v, b: torch.softmax(q @ k.mT, -1, out=b) @ v + b.sum(), *qkv(), buffer)
    unchanged(
        lambda q, k, v, b: torch.matmul((q @ k.mT).softmax(-1), v, out=b) * 1 + b, *qkv(), torch.zeros(B, H, N, D)
    )


@torch.library.custom_op("prescore_tests::softmax", mutates_args=())
def softmax(x: Tensor, dim: int) -> Tensor:
    """Off by one."""
    e = (x - x.amax(dim, True)).exp()
    return e / (1 + e.sum(dim, keepdim=True))


@softmax.register_fake
def _(x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x)


def test_operators_of_others_are_not_those_of_torch() -> None:
    assert not unchanged(written(lambda s: torch.ops.prescore_tests.softmax(s, -1)), *qkv())


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a row bias": lambda s: s + ((torch.arange(N) % 2) * torch.finfo(s.dtype).min)[:, None].clone(),
    "a large number": lambda s: s - 1e9,
    "alpha, as it was written once": lambda s: torch.add(s, 0.5, torch.arange(N).float()),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.filterwarnings("ignore:This overload")
def test_what_is_added_to_logits_counts(name: str) -> None:
    unchanged(written(lambda s: ROWS[name](s).softmax(-1)), *qkv())


def test_two_dropouts_are_not_the_last_one() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(F.dropout((q @ k.mT).softmax(-1), 0.9, True), 0.0, True) @ v

    call, sites = compiled(twice)
    call(*qkv())
    assert sites[0].reason == "dropout: more than one"


def test_caches_of_keys_and_values_that_grow() -> None:
    """Their lengths are two symbols: as the call takes no others, they are one."""

    def step(q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return S(q, torch.cat([k, key], 2), torch.cat([v, value], 2))

    call, sites = compiled(step)
    q, k, v = (x[:, :, :1] for x in qkv())
    for length in (N - 2, N - 1, N):
        args = (q, *(x[:, :, :length] for x in qkv()[1:]), k, v)
        torch.testing.assert_close(call(*args), step(*args), atol=1e-5, rtol=1e-5)
    assert [site.reason for site in sites] == ["", ""], "of one length, and of any"


class Dropping(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        drop = partial(F.dropout, p=self.p, training=self.training)
        return S(q, k, v, dropout_p=self.p) + drop(drop(drop(q @ k.mT).softmax(-1))) @ v


def test_a_dropout_that_is_a_float_of_the_run_time() -> None:
    """As an attribute is in dynamic graphs: off is off, by a guard, from the first length on."""
    reports: list[Any] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        new, report = rewrite(gm, Config.exact())
        reports.append([site.reason for site in report.sites])
        return new.forward

    model = Dropping(0.0)
    call = torch.compile(model, backend=backend, dynamic=True)
    for length in (N, N - 2):
        args = [x[:, :, :length] for x in qkv()]
        torch.testing.assert_close(call(*args), model(*args), atol=1e-5, rtol=1e-5)
    assert reports and all(reasons == ["", ""] for reasons in reports)
    reports.clear()
    model.p = 0.5
    call(*qkv())
    assert reports and all(reason.startswith("dropout") for reason in reports[-1])


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "seconds since 1970": lambda at: (at + 1_700_000_000).float() <= (at + 1_700_000_000).float()[:, None],
    "int32 that wraps": lambda at: (at.int() + (2**31 - 6)) <= (at.int() + (2**31 - 6))[:, None],
    "truth or a number": lambda at: (torch.where(at % 2 == 0, True, 2) == 1).expand(N, N),
    "a fraction in integers": lambda at: torch.zeros(N, dtype=torch.int64).masked_fill(at > 3, 1.7).eq(1).expand(N, N),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_those_of_their_dtype(name: str) -> None:
    unchanged(lambda q, k, v: S(q, k, v, NUMBERS[name](torch.arange(N))), *qkv())


def test_scales_are_those_of_their_dtype() -> None:
    for scale in (
        lambda: torch.tensor(255, dtype=torch.uint8) + 2,
        lambda: torch.full((), 2.7).int(),
        lambda: torch.tensor(0.3, dtype=torch.bfloat16).float() * 20,
    ):
        unchanged(written(lambda s, scale=scale: (s * scale()).softmax(-1)), *qkv())


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.softmax(q @ k.mT) @ v


def test_hooks_are_called() -> None:
    model, seen = Hooked(), []
    model.softmax.register_forward_hook(lambda *_: seen.append(1))
    new, _ = rewrite(fx.symbolic_trace(model), Config.exact(), *qkv())
    seen.clear()
    new(*qkv())
    assert seen == [1]


def test_a_flag_of_the_run_time() -> None:
    gm = fx.symbolic_trace(lambda q, k, v: S(q, k, v, is_causal=q.shape[2] > 100))
    new, _ = rewrite(gm, Config.exact(), *qkv())
    torch.testing.assert_close(new(*qkv()), gm(*qkv()))


def test_lengths_that_are_equal_by_chance_when_exported() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return S(q, k, v, torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None])

    nq, nk = torch.export.Dim("nq", min=2, max=64), torch.export.Dim("nk", min=2, max=64)
    program = torch.export.export(Model(), qkv(), dynamic_shapes=({2: nq}, {2: nk}, {2: nk}))
    new, _ = rewrite(program.module(), Config.exact())
    q, k, v = qkv()
    for call in (new, program.module()):
        torch.testing.assert_close(call(q[:, :, :7], k, v), Model()(q[:, :, :7], k, v))


def test_lengths_of_the_run_time_do_not_stop_the_model() -> None:
    def some(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        at = keep.nonzero().flatten()
        torch._check(at.shape[0] > 0)
        return S(q[:, :, at], k[:, :, at], v[:, :, at])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (site,) = unchanged(some, *qkv(), torch.arange(N) % 3 != 0)
    assert site.decision == "keep"


@pytest.mark.parametrize("step", ["where", "xor", "square"])
def test_masks_that_grow_with_each_step_are_given_up(step: str) -> None:
    """What algebra on them takes would double: forty steps would never end."""
    places = torch.arange(N)

    def grown(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        distance = places.unsqueeze(1) - places
        for at in range(40):
            if step == "where":
                mask = torch.where(places == at, mask & True, mask)
            elif step == "xor":
                mask = mask ^ (distance == at)
            else:
                distance = distance * distance + distance
        return S(q, k, v, mask if step in ("where", "xor") else distance > 0)

    (site,) = unchanged(grown, *qkv(requires_grad=True), torch.rand(N, N) > 0.3)
    assert site.reason.startswith("opaque_mask: ") and "operations, written out" in site.reason


def test_many_steps_that_only_add_up_are_read() -> None:
    """Forty documents, by their numbers."""
    places = torch.arange(N)

    def documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
        mask = places.unsqueeze(1) >= places
        for at in range(40):
            mask = mask & ((document == at).unsqueeze(1) == (document == at))
        return S(q, k, v, mask)

    (site,) = unchanged(documents, *qkv(requires_grad=True), torch.randint(0, 40, (N,)))
    assert site.reason.startswith("unsupported_mask: ")
