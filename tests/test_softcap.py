"""Softcaps in the compiled CPU kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import PLANS, ROUTED, check_budget, in_double, operands, routes_of, rows_in_double, summary_of
from torch import Tensor

from prescore_compile import Config
from prescore_compile.kernels import banded, cpu, library, ops, reference
from prescore_compile.kernels.band import K, Q
from prescore_compile.kernels.logits import Logits
from prescore_compile.kernels.plan import WHOLE
from prescore_compile.passes import rewrite
from prescore_compile.passes.cost import ALONE_FROM

N = 150
CAPPED = [name for name, plan in PLANS.items() if not plan.residual]


@pytest.mark.parametrize("softcap", [0.5, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAPPED)
def test_attend_meets_the_reference(name: str, dtype: torch.dtype, softcap: float) -> None:
    plan, logits = PLANS[name], Logits(softcap=softcap)
    site = operands(N, padded=True, dim=24, value_dim=40, dtype=dtype)
    site = site._replace(query=8 * site.query)  # logits that the cap is felt by
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan)
    true = reference.attend(in_double(site), rows_in_double(summary), routes, plan, logits)
    got = cpu.attend(site, summary, routes, plan, softcap=softcap)
    assert got.dtype == dtype
    check_budget(got, reference.attend(site, summary, routes, plan, logits), true)
    assert (got - cpu.attend(site, summary, routes, plan)).abs().max() > 1e-2


@pytest.mark.parametrize("softcap", [1e4, 1e6])
def test_logits_far_below_the_cap(softcap: float) -> None:
    """Nothing of them is lost, as it is where tanh is a difference of numbers near 1."""
    site, routes = operands(N), torch.empty(2, 4, N, 0, dtype=torch.int32)
    plain = cpu.attend(site, summary_of(site, WHOLE), routes, WHOLE)
    got = cpu.attend(site, summary_of(site, WHOLE), routes, WHOLE, softcap=softcap)
    torch.testing.assert_close(got, plain, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in ROUTED if name in CAPPED])
def test_routing_and_attending_as_one(name: str) -> None:
    plan, logits = PLANS[name], Logits(softcap=1.0)
    site = operands(N, padded=True)
    summary = summary_of(site, plan)
    near = cpu.mass(site, summary, plan, 1.0)
    torch.testing.assert_close(near, reference.mass(site, summary, plan, logits), atol=1e-5, rtol=1e-5)
    routes = cpu.route(site.query, summary, plan, True, N, site.scale, near if plan.needs_mass else None)
    as_one = cpu.route_attend(site, summary, plan, softcap=1.0)
    assert torch.equal(as_one, cpu.attend(site, summary, routes, plan, softcap=1.0))
    assert torch.equal(as_one, ops.prescored(site, plan, logits))


@pytest.mark.parametrize("name", ["share", "together"])
def test_the_operators(name: str) -> None:
    """Gradients of the one operator are those of the three."""
    plan, logits = PLANS[name], Logits(softcap=1.0)
    site = operands(N)
    parts = [part.detach() for part in summary_of(site, plan)]
    leaves = [tensor.requires_grad_() for tensor in (*site[:3], *parts[6:8])]
    rows = [*parts[4:6], *leaves[3:], parts[8]]
    more = (plan.text, site.causal, site.scale)
    as_one = (*leaves[:3], None, *parts[:4], *rows, *more, None, 1.0)
    torch.library.opcheck(ops.route_attend, as_one)
    near = ops.mass(*leaves[:2], None, *rows, *more, logits.text, [])
    routes = ops.route(leaves[0], *parts[:4], plan.text, True, N, site.scale, logits.text, [], near)
    three = ops.attend(*leaves[:3], None, parts[0], routes, *rows, *more, logits.text, [])
    one, grad = ops.route_attend(*as_one), torch.randn(2, 4, N, 16)
    assert torch.equal(one, three)
    found, same = (torch.autograd.grad(out, leaves, grad) for out in (one, three))
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


def test_bands() -> None:
    """As in the local layers of Gemma 2."""
    logits = Logits(K >= Q - 20, softcap=1.0)
    site = operands(300, padded=True)
    got, grad = ops.prescored(site, WHOLE, logits), torch.randn(2, 4, 300, 16)
    summary, routes = summary_of(site, WHOLE), torch.empty(2, 4, 300, 0, dtype=torch.int32)
    given = (in_double(site), summary, routes, WHOLE, logits)
    check_budget(got, reference.attend(site, *given[1:]), reference.attend(*given))
    found = cpu.attend_backward(grad, site, summary, routes, WHOLE, 1.0, banded.ends(logits.band(), 300, 300, True))
    for g, w in zip(found, reference.attend_backward(grad.double(), *given), strict=True):
        torch.testing.assert_close(g.double(), w.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("logit", [float("inf"), float("nan"), 1e30])
def test_what_is_not_finite(logit: float) -> None:
    """As torch's tanh: inf is the cap, NaN is NaN for all later queries and no earlier one."""
    site = operands(N)
    base = ops.prescored(site, WHOLE, Logits(softcap=1.0))
    site.key[:, :, 70] = logit
    site = site._replace(query=site.query.abs())
    out = ops.prescored(site, WHOLE, Logits(softcap=1.0))
    want = reference.attend(
        site, summary_of(site, WHOLE), torch.empty(2, 4, N, 0, dtype=torch.int32), WHOLE, Logits(softcap=1.0)
    )
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert out[:, :, 70:].isnan().all() if logit != logit else out.isfinite().all()
    assert base.isfinite().all() and out[:, :, :70].isfinite().all()


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = 5.0 * torch.tanh(q @ k.mT * 0.25 / 5.0)
    at = torch.arange(k.shape[2])
    return (logits + torch.where(at <= at[:, None], 0.0, torch.finfo(q.dtype).min)).softmax(-1) @ v


@pytest.mark.parametrize(
    ("length", "options", "exact", "decision"),
    [
        (ALONE_FROM, {}, "alone", "rewrite"),
        (ALONE_FROM - 1, {}, "", "keep"),
        (2048, {"only_if_faster": False}, "", "rewrite"),
    ],
)
def test_sites(length: int, options: dict[str, Any], exact: str, decision: str) -> None:
    inputs, found = [torch.randn(1, 2, length, 16) for _ in range(3)], []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        new, report = rewrite(gm, Config(**options))
        found.append((report.sites[0], [node.name for node in new.graph.nodes]))
        return new.forward

    torch._dynamo.reset()
    out = torch.compile(capped, backend=backend)(*inputs)
    ((site, names),) = found
    assert (site.decision, site.exact) == (decision, exact), site.reason
    assert site.mask == "k <= q; softcap 5"
    assert ("prescore_route_attend" in names) == (decision == "rewrite" and not exact)
    if exact:
        torch.testing.assert_close(out, capped(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scaled", ["divided", "multiplied", "as it is"])
def test_a_cap_that_is_a_number_of_the_run_time(scaled: str) -> None:
    """With ``dynamic=True`` floats are numbers of the run time: a softcap is compiled, and compiled anew."""
    inputs, found = [torch.randn(1, 2, 70, 16) for _ in range(3)], []

    def fn(q: Tensor, k: Tensor, v: Tensor, cap: float, scale: float) -> Tensor:
        logits = q @ k.mT
        logits = logits / scale if scaled == "divided" else logits * scale if scaled == "multiplied" else logits
        return (torch.tanh(logits / cap) * cap).softmax(-1) @ v

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        new, report = rewrite(gm, Config.exact())
        found.extend(report.sites)
        return new.forward

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend, dynamic=True)
    for cap in (2.0, 5.0):
        torch.testing.assert_close(compiled(*inputs, cap, 3.0), fn(*inputs, cap, 3.0), atol=1e-5, rtol=1e-5)
        assert found[-1].decision == "rewrite" and found[-1].mask == f"true; softcap {cap:g}", found[-1].reason
    assert len(found) == 2


@pytest.mark.parametrize("unit", [True, False])
def test_sixteen_bits_without_products_of_them(unit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's products are then so slow that one kernel is faster on short sequences, too."""
    monkeypatch.setattr(library, "multiplies", lambda dtype: unit)
    monkeypatch.setattr(library, "tiles", lambda: False)
    inputs = [torch.randn(1, 2, 200, 16, dtype=torch.bfloat16) for _ in range(3)]
    module = torch.nn.Module()
    module.forward = lambda q, k, v: (5.0 * torch.tanh(q @ k.mT * 0.25 / 5.0)).softmax(-1) @ v
    _, report = rewrite(torch.export.export(module, tuple(inputs)).module(), Config())
    assert report.sites[0].exact == ("" if unit else "alone"), report.sites[0].reason


def test_what_a_processor_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "flags\t\t: fpu avx2 f16c": (False, False), "flags\t\t: fpu avx2 avx512f": (True, True), "x86_64": (True, True),
        "Features\t: fp asimd bf16": (True, False), "Features\t: fp asimd fphp asimdhp": (False, True),
    }  # fmt: skip
    for machine, expected in known.items():
        monkeypatch.setattr(library, "_machine", lambda machine=machine: machine)
        assert tuple(library.multiplies.__wrapped__(name) for name in ("bfloat16", "float16")) == expected, machine
