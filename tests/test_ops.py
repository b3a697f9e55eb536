"""The operators as torch sees them: schema, fake tensors, autograd, Inductor, dynamic shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import PLANS, ROUTED, operands
from torch._subclasses.fake_tensor import FakeTensorMode

from prescore_compile.kernels import library, ops
from prescore_compile.kernels.ops import dispatch, uniform
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.triton.spec import MOST_FEATURES


@pytest.mark.parametrize("name", PLANS)
def test_opcheck(name: str) -> None:
    plan = PLANS[name]
    q, k, v, valid, causal, scale = operands(150, padded=True)[:6]
    settings = plan.text
    score_args = (q, k, valid, settings, causal, scale)
    torch.library.opcheck(ops.score, score_args)
    scores = ops.score(*score_args) if plan.keep else None
    for tensor in (q, k, v):
        tensor.requires_grad_()
    # The AOT test of opcheck adds outputs of all dtypes up, which it cannot do with int32 first.
    tests: Any = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.summarize, (k, v, valid, scores, settings), test_utils=tests)
    parts = [part.detach() for part in ops.summarize(k, v, valid, scores, settings)]
    torch.library.opcheck(ops.rows_backward, (torch.randn_like(parts[6]), *parts[4:6], parts[8], 150, settings))
    routes = None
    if plan.routes:
        near = ops.mass(q, k, valid, *parts[4:], settings, causal, scale, "", []).detach() if plan.needs_mass else None
        route_args = (q.detach(), *parts[:4], settings, causal, 150, scale, "", [], near)
        torch.library.opcheck(ops.route, route_args)
        routes = ops.route(*route_args)
    rows = [parts[6].requires_grad_(), parts[7].requires_grad_(), parts[8]]
    more = (*parts[4:6], *rows, settings, causal, scale)
    torch.library.opcheck(ops.attend, (q, k, v, valid, parts[0], routes, *more, "", []))
    if plan.routes:
        torch.library.opcheck(ops.route_attend, (q, k, v, valid, *parts[:4], *more, None, 0.0))


@pytest.mark.parametrize("plan", [*PLANS.values(), Plan(keep=80, routes=64, share=0.01, group_routes=True, coarse=8)])
def test_rows_are_those_of_the_summary(plan: Plan) -> None:
    q, k, v, valid, causal, scale = operands(300, padded=True)[:6]
    scores = ops.score(q, k, valid, plan.text, causal, scale) if plan.keep else None
    found = ops.rows(k, v, valid, None, scores, plan.text)
    for got, want in zip(found, ops.summarize(k, v, valid, scores, plan.text)[4:], strict=True):
        assert torch.equal(got, want)


def test_more_features_than_kernels_are_written_for_run_the_reference() -> None:
    with FakeTensorMode():
        many, few = (torch.empty(1, 1, 1, size, device="cuda") for size in (MOST_FEATURES + 1, MOST_FEATURES))
        assert dispatch.generated(few) and dispatch.generated(few, few)
        assert not dispatch.generated(many) and not dispatch.generated(few, many)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ROUTED)
def test_routing_and_attending_as_one_has_the_gradients_of_the_three(
    name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``compiled``: by the kernels, or by the reference."""
    if not compiled:
        monkeypatch.setattr(library, "available", lambda: False)
    plan = PLANS[name]
    q, k, v, valid, causal, scale = operands(150, padded=True)[:6]
    settings, more = plan.text, (plan.text, causal, scale)
    parts = ops.summarize(k, v, valid, ops.score(q, k, valid, *more) if plan.keep else None, settings)
    order, mean, spread, bias, index, owner, *rows = (part.detach() for part in parts)
    leaves = [t.requires_grad_() for t in (q, k, v, rows[0], rows[1])]
    rows = [index, owner, *leaves[3:], rows[2]]
    near = ops.mass(q, k, valid, *rows, *more, "", []) if plan.needs_mass else None
    routes = ops.route(q, order, mean, spread, bias, settings, causal, 150, scale, "", [], near)
    three = ops.attend(q, k, v, valid, order, routes, *rows, *more, "", [])
    one = ops.route_attend(q, k, v, valid, order, mean, spread, bias, *rows, *more, None, 0.0)
    assert torch.equal(one, three)
    grad = torch.randn_like(one)
    for got, want in zip(torch.autograd.grad(one, leaves, grad), torch.autograd.grad(three, leaves, grad), strict=True):
        assert torch.equal(got, want)


def test_a_share_needs_a_mass() -> None:
    site = operands(100)
    for name in ("share", "together"):
        plan = PLANS[name]
        clusters = ops.summarize(site.key, site.value, None, None, plan.text)[:4]
        with pytest.raises(ValueError, match="mass: got None"):
            ops.route(site.query, *clusters, plan.text, True, 100, site.scale, "", [])


# Between them every operator; compiling one forward and backward takes some 20 s.
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("together", False), ("share", True), ("keep and routes", True), ("residual", False), ("centroids", True)],
)
def test_inductor_forward_and_backward(name: str, dynamic: bool) -> None:
    plan = PLANS[name]

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # A plain chain of elementwise work around the operators gives Inductor something to fuse.
        site = site_like._replace(query=q * 1.5, key=k.tanh(), value=v + 1)
        return ops.prescored(site, plan).sin().square().sum()

    for length in (100, 131) if dynamic else (100,):
        site_like = operands(length)
        leaves = [t.clone().requires_grad_() for t in site_like[:3]]
        want = torch.autograd.grad(loss(*leaves), leaves)
        got = torch.autograd.grad(torch.compile(loss, dynamic=dynamic, fullgraph=True)(*leaves), leaves)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)


def test_plans_travel_as_text() -> None:
    for plan in (*PLANS.values(), Plan(window=None, seed=5, method="kmeans"), Plan(window=0)):
        assert Plan.parse(plan.text) == plan


def test_without_a_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, site = PLANS["keep and routes"], operands(200)
    want = ops.prescored(site, plan)
    monkeypatch.setattr(library, "available", lambda: False)
    torch.testing.assert_close(ops.prescored(site, plan), want, atol=1e-5, rtol=1e-5)


def test_a_compiler_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(library, "FLAGS", ("--no-such-flag",))
    library.load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="did not build"):
            assert not library.available()
        assert not library.available()
    finally:
        library.load.cache_clear()


def test_a_cache_that_cannot_be_written_does_not_stop_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(blocked))
    library.load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="cannot be used"):
            assert library.available()
    finally:
        library.load.cache_clear()


@pytest.mark.parametrize("settings", [{"clustering": "leverage"}, {"keep": 4, "method": "leverage"}])
def test_scores_and_clusters_are_the_same_under_autocast(settings: dict[str, Any]) -> None:
    q, k, v, _, causal, scale = operands(150, dtype=torch.bfloat16)[:6]
    plan = Plan(chunk=32, routes=3, **settings)

    def found() -> list[torch.Tensor]:
        scores = ops.score(q, k, None, plan.text, causal, scale) if plan.keep else None
        return [*([] if scores is None else [scores]), *ops.summarize(k, v, None, scores, plan.text)]

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        got = found()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["keep and routes", "streaming"])
def test_the_reference_is_the_same_under_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "compiled", lambda query: False)
    site = operands(150)
    leaves = [tensor.requires_grad_() for tensor in site[:3]]

    def found() -> list[torch.Tensor]:
        out = ops.prescored(site, PLANS[name])
        return [out, *torch.autograd.grad(out, leaves, out.detach())]

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        got = found()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_what_may_wait_for_the_device_stays_out_of_cuda_graphs() -> None:
    """A user's scorer may; so do clusters of k-means, until no key moves."""
    for operator in (torch.ops.prescore.score_eager, torch.ops.prescore.summarize_eager):
        assert torch.Tag.cudagraph_unsafe in operator.default.tags


@pytest.mark.parametrize("plan", [Plan(chunk=32, window=16, routes=2), Plan(chunk=32, window=16, routes=0, keep=4)])
def test_a_second_derivative_is_a_clear_error(plan: Plan) -> None:
    q, k, v = (torch.randn(1, 2, 100, 8, requires_grad=True) for _ in range(3))
    out = ops.prescored(Operands(q, k, v, None, True, 0.25), plan)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_uniform_attention_has_the_gradients_of_hidden_logits(
    softcap: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uniform, "AT_ONCE", 2 * 4 * 50 * 7)  # in parts
    shapes = (2, 4, 40, 8), (2, 2, 50, 8), (2, 2, 50, 6)
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    grad = torch.randn(2, 4, 40, 6, dtype=dtype)
    grad[:, :, 20:] = 0
    grad[0, :, 11] = 0

    def hidden(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        logits = q @ k.mT * 0.5
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        return (logits + torch.finfo(logits.dtype).min).softmax(-1) @ v

    def of(fn: Any, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
        out = fn(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    got = of(lambda *given: ops.attend_uniform(*given, 0.5, softcap), leaves, grad)
    want = of(hidden, [leaf.detach().double().requires_grad_() for leaf in leaves], grad.double())
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, atol=bound, rtol=bound)
    assert not got[1][:, :, 20:].any() and got[1][:, :, :20].any()
    if dtype == torch.float32:
        torch.library.opcheck(ops.attend_uniform, (*leaves, 0.5, softcap))
        by_token = [leaf.detach().transpose(1, 2).contiguous().transpose(1, 2) for leaf in leaves]
        torch.library.opcheck(ops.attend_uniform_backward, (grad, *by_token, 0.5, softcap))
        assert not any(found.any() for found in ops.attend_uniform_backward(0 * grad, *leaves, 0.5, softcap))
        with torch.autocast("cpu", torch.bfloat16):
            same = of(lambda *given: ops.attend_uniform(*given, 0.5, softcap), leaves, grad)
        assert all(map(torch.equal, got, same))
