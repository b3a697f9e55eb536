"""What a compiler sees of the generated kernels, without a GPU: fake tensors, and a driver that only names one."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import PLANS, operands, routes_of, summary_of
from torch import fx
from torch._functorch.aot_autograd import aot_function
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from prescore_compile.kernels import ops
from prescore_compile.kernels.logits import parse
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.summary import Summary
from prescore_compile.kernels.triton import device
from prescore_compile.passes import Config, rewrite

pytest.importorskip("triton")


class Named:
    """A Triton driver without a device: enough to lower a kernel far enough to see what it writes."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def _driver() -> Iterator[None]:
    from triton.runtime import driver

    before = driver._active
    driver.set_active(Named())
    yield
    driver._active = before


class Seen(Exception):
    pass


def graph_of(function: Any, *args: Any, dynamic: bool = False) -> fx.Graph:
    """The graph that a compiler would get of a call with fake tensors."""
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        raise Seen

    with pytest.raises(Seen):
        aot_function(function, fw_compiler=keep, dynamic=dynamic)(*args)
    return found[0].graph


def _launches(graph: fx.Graph) -> list[tuple[str, set[str]]]:
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            found.append((getattr(kernel, "fn", kernel).__name__, set(node.kwargs["tensors_to_clone"])))
    return found


def launched(graph: fx.Graph) -> list[str]:
    """The kernels that are launched, in order."""
    return [name for name, _ in _launches(graph)]


def kernels(graph: fx.Graph) -> dict[str, set[str]]:
    """The same, none of them twice, and the arguments that each writes."""
    assert len(set(launched(graph))) == len(launched(graph)), "a kernel is launched twice"
    return dict(_launches(graph))


def arguments(plan: Plan) -> tuple[Any, ...]:
    site = operands(200, dtype=torch.bfloat16)
    summary = summary_of(site, plan)
    routes = routes_of(site, summary, plan) if plan.routes else None
    return (*site[:3], None, summary.order, routes, *summary[4:])


def fakes(tensors: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    return tuple(None if t is None else torch.empty(t.shape, dtype=t.dtype, device=device) for t in tensors)


def prefixed(plan: Plan) -> list[str]:
    return ["mark", "union", "arrange"] * bool(plan.routes) + ["centroids"] * plan.residual


@pytest.mark.parametrize("name", PLANS)
def test_forward_on_a_gpu(name: str) -> None:
    plan = PLANS[name]
    real = arguments(plan)
    with FakeTensorMode():
        tensors = fakes(real, "cuda")
        seen = kernels(graph_of(lambda *t: ops.attend(*t, plan.text, True, 0.25, "", []), *tensors))
        out = ops.attend(*tensors, plan.text, True, 0.25, "", [])
    assert list(seen) == [*prefixed(plan), "attend"]
    assert seen["attend"] == {"out", "log_sums"}
    assert out.device.type == "cuda" and out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", PLANS)
def test_backward_on_a_gpu(name: str) -> None:
    plan = PLANS[name]
    real = arguments(plan)
    with FakeTensorMode():
        tensors = fakes(real, "cuda")
        out = torch.empty_like(tensors[0])
        sums = torch.empty(out.shape[:3], device="cuda")
        seen = kernels(
            graph_of(lambda *t: ops.attend_backward(*t, plan.text, True, 0.25, "", []), out, out, sums, *tensors)
        )
    rows = ["d_sinks"] + ["d_segments"] * bool(plan.rows_per_segment)
    routed = ["d_residual"] * plan.residual + ["d_routes"] * bool(plan.routes)
    assert list(seen) == [*prefixed(plan), "d_query", "d_window", *routed, *rows]
    for kernel, written in seen.items():
        if kernel.startswith("d_"):
            assert written <= {"d_query", "d_key", "d_value"}, f"{kernel} writes {written}"


@pytest.mark.parametrize("dynamic", [False, True])
def test_autograd_and_dynamic_lengths(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, as autograd asks for the device itself: one graph for all lengths."""
    monkeypatch.setattr(ops.dispatch, "generated", lambda *given: True)
    plan = PLANS["keep and routes"]
    tensors = arguments(plan)
    for tensor in (*tensors[:3], *tensors[8:10]):
        tensor.requires_grad_()
    graph = graph_of(lambda *t: ops.attend(*t, plan.text, True, 0.25, "", []), *tensors, dynamic=dynamic)
    assert list(kernels(graph)) == ["mark", "union", "arrange", "attend"]
    sizes = [node for node in graph.nodes if isinstance(node.meta.get("val"), torch.SymInt)]
    assert bool(sizes) == dynamic


@pytest.mark.parametrize("name", ["together", "residual", "centroids"])
def test_every_size_a_symbol(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all stages, forward and backward; a kernel is specialised to plain integers."""
    monkeypatch.setattr(ops.dispatch, "generated", lambda *given: True)
    plan = PLANS[name]
    site = operands(200, dtype=torch.bfloat16)

    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        q, k, v = tensors
        scores = ops.score(q, k, None, plan.text, True, 0.25) if plan.keep else None
        found = Summary(*ops.summarize(k, v, None, scores, plan.text))
        moved = site._replace(query=q, key=k, value=v)
        routes = ops.routes_of(moved, found, plan.text) if plan.routes else None
        return ops.attend(q, k, v, None, found.order, routes, *found[4:], plan.text, True, 0.25, "", [])

    expected = {"attend"} | ({"cluster", "route"} if plan.routes else {"rows"})
    assert expected <= set(launched(graph_of(forward, *site[:3], dynamic=True)))
    out, sums = site.query, site.query.new_empty(site.query.shape[:3], dtype=torch.float32)
    real = arguments(plan)

    def backward(*tensors: torch.Tensor) -> Any:
        rest = iter(tensors[3:])
        filled = [None if t is None else next(rest) for t in real]
        return ops.attend_backward(*tensors[:3], *filled, plan.text, True, 0.25, "", [])

    graph = graph_of(backward, out, out, sums, *(t for t in real if t is not None), dynamic=True)
    assert "d_query" in launched(graph)


def test_sites_on_a_gpu_are_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = fx.symbolic_trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    with FakeTensorMode() as mode:
        q = torch.empty(1, 32, 32768, 64, device="cuda", dtype=torch.bfloat16)
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(q, q, q)
    new, report = rewrite(gm)
    assert [site.decision for site in report.sites] == ["rewrite"]
    assert torch.ops.prescore.attend.default in [node.target for node in new.graph.nodes]
    with FakeTensorMode() as mode:
        few = torch.empty(1, 4, 2048, 64, device="cuda", dtype=torch.bfloat16)
    short = fx.symbolic_trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    FakeTensorProp(short, mode).propagate_dont_convert_inputs(few, few, few)
    assert rewrite(short)[1].sites[0].reason.startswith("not_faster: breaks even at ")
    monkeypatch.setattr(device, "_installed", lambda: False)
    _, report = rewrite(gm)
    assert report.sites[0].reason == "unsupported_device: cuda, where Triton is not installed"


def test_a_bias_with_a_logarithm_is_rewritten() -> None:
    def kerple(q: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        scores = q @ q.mT / 8 - slope.view(-1, 1, 1) * torch.log(1 + (at.unsqueeze(1) - at).abs())
        return torch.softmax(scores.masked_fill(at.unsqueeze(1) < at, -torch.inf), -1) @ q

    with FakeTensorMode() as mode:
        given = torch.empty(1, 32, 32768, 64, device="cuda"), torch.empty(32, device="cuda")
        gm = make_fx(kerple)(*given)
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*given)
    new, report = rewrite(gm)
    assert [site.decision for site in report.sites] == ["rewrite"]
    (text,) = {a for node in new.graph.nodes for a in node.args if isinstance(a, str) and a.startswith("softcap")}
    bias = parse(text).lifted.bias
    assert "tl.log(tl.cast(" in bias and compile(bias, "bias", "eval")


def test_a_gpu_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert device.why_not(torch.device("cuda")) == "cuda of compute capability 7.5, below 8.0"
    assert device.why_not(torch.device("meta")) == "meta"


@pytest.mark.parametrize(("name", "told"), [("gfx942:sramecc+:xnack-", ""), ("gfx90a", ""), ("gfx1100", "gfx1100")])
def test_amds_gpus(name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    why = device.why_not(torch.device("cuda"))
    assert told in why and bool(why) == bool(told)
    assert not device.is_small(torch.device("cuda"))


@pytest.mark.parametrize(("shared", "small"), [(101_376, True), (166_912, False), (232_448, False)])
def test_a_gpu_with_less_shared_memory(shared: int, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not device.is_small(torch.device("cuda")) and not device.is_small(torch.device("cpu"))
    found = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert device.is_small(torch.device("cuda")) == small


@pytest.mark.parametrize("small", [False, True])
def test_what_it_scores(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "is_small", lambda device: small)
    for method, launches in {"peak": 1, "leverage": 2}.items():
        plan = Plan(keep=16, method=method)
        with FakeTensorMode():
            q = torch.empty(1, 2, 512, 128, device="cuda", dtype=torch.bfloat16)
            graph = graph_of(lambda q, k, p=plan: ops.score(q, k, None, p.text, True, 0.1), q, q)
        assert launched(graph) == ["score"] * launches


def test_on_a_cpu_the_compiled_kernel_stays() -> None:
    plan = PLANS["routes"]
    real = arguments(plan)
    with FakeTensorMode():
        graph = graph_of(lambda *t: ops.attend(*t, plan.text, True, 0.25, "", []), *fakes(real, "cpu"))
    assert [n.target for n in graph.nodes if "prescore" in str(n.target)] == [torch.ops.prescore.attend_eager.default]


def test_a_residual_is_taken_on_a_gpu() -> None:
    gm = fx.symbolic_trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))
    with FakeTensorMode() as mode:
        q = torch.empty(1, 32, 32768, 64, device="cuda", dtype=torch.bfloat16)
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(q, q, q)
    _, report = rewrite(gm, Config(residual=True, window=0, cluster=32, routes=12))
    assert [site.decision for site in report.sites] == ["rewrite"], report.sites[0].reason


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_learned_sink_is_read_and_never_written(dynamic: bool) -> None:
    """Its gradient is what torch operations make of the softmax's sums: no kernel of its own."""
    plan = PLANS["together"]
    real = arguments(plan)
    with FakeTensorMode():
        tensors = fakes(real, "cuda")
        batch, heads, length, _ = tensors[0].shape
        sinks, out = torch.empty(heads, device="cuda"), torch.empty_like(tensors[0])
        sums = torch.empty(batch, heads, length, device="cuda")

        def forward(sinks: torch.Tensor, *t: torch.Tensor) -> torch.Tensor:
            return ops.attend(*t, plan.text, True, 0.25, "", [], sinks.view(1, -1, 1).expand(t[0].shape[:3]))

        def backward(sinks: torch.Tensor, *t: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = sinks.view(1, -1, 1).expand(t[0].shape[:3])
            return ops.attend_backward(t[0], t[0], t[1], *t[2:], plan.text, True, 0.25, "", [], given)

        ahead = kernels(graph_of(forward, sinks, *tensors, dynamic=dynamic))
        back = kernels(graph_of(backward, sinks, out, sums, *tensors, dynamic=dynamic))
        d_sink = backward(sinks, out, sums, *tensors)[5]
    assert list(ahead) == [*prefixed(plan), "attend"] and ahead["attend"] == {"out", "log_sums"}
    assert list(back) == [*prefixed(plan), "d_query", "d_window", "d_routes", "d_sinks"]
    assert d_sink.shape == sums.shape
