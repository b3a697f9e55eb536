"""The code that Inductor generates for rewritten models on a GPU, which is read and not run.

What would make CUDA graphs impossible shows in it: a wait for the device, tensors on the host, sizes that are known
only when the model runs.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, cudagraph_utils
from torch._inductor import config as inductor
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from prescore_compile.kernels import summary as summaries
from prescore_compile.kernels.plan import Plan

H100 = types.SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 << 30, L2_cache_size=50 << 20,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, gcnArchName="",
)  # fmt: skip
HEADS, KV_HEADS, DIM, LENGTH = 8, 2, 64, 1024


class Named:
    """Triton's driver, which only names the device."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class Seen(Exception):
    """The code is there: nothing is run."""


@contextlib.contextmanager
def machine(found: list[tuple[str, GraphLowering]], recorded: list[Any]) -> Iterator[None]:
    """What Dynamo and Inductor ask of a machine with a GPU; code is kept and not compiled.

    ``recorded``: what would become a CUDA graph.
    """

    def keep(graph: GraphLowering) -> Any:
        code, _ = graph.codegen()
        found.append((code.value, graph))

        def call(*_: Any) -> Any:
            raise Seen

        return types.SimpleNamespace(call=call, runner=None, value=None, key="", __file__="not kept")

    def record(model: Any, *_: Any, **__: Any) -> Any:
        recorded.append(model)
        return model

    answers = dict(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, synchronize=lambda *_: None,
        get_rng_state=lambda *_: torch.zeros(1), set_rng_state=lambda *_: None, _exchange_device=lambda _: 0,
        _maybe_exchange_device=lambda _: 0, get_device_properties=lambda *_: H100,
        get_device_capability=lambda *_: (9, 0),
    )  # fmt: skip
    with contextlib.ExitStack() as patches:
        for name, answer in answers.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, answer))
            if name in ("device_count", "current_device", "get_device_properties"):
                patches.enter_context(mock.patch.object(CudaInterface, name, staticmethod(answer)))
        patches.enter_context(mock.patch.object(torch.accelerator, "is_available", lambda: False))
        patches.enter_context(mock.patch.object(joint_graph, "lazy_init", lambda *_, **__: None))  # runs on the device
        patches.enter_context(mock.patch.object(GraphLowering, "compile_to_module", keep))
        allocator = "check_caching_allocator_for_cudagraphs"
        patches.enter_context(mock.patch.object(cudagraph_utils, allocator, lambda: None))
        patches.enter_context(mock.patch.object(compile_fx, "cudagraphify", record))
        patches.enter_context(mock.patch.object(driver, "_active", Named()))
        settings = {"triton.cudagraphs": True, "fx_graph_cache": False, "compile_threads": 1, "graph_partition": False}
        settings["joint_graph_constant_folding"] = False  # it computes on the device
        patches.enter_context(inductor.patch(settings))
        patches.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        yield


class Model(torch.nn.Module):
    """One attention as models have it: projections, heads side by side, a residual stream."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        for name, heads in ("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS):
            setattr(self, name, torch.nn.Linear(HEADS * DIM, heads * DIM, bias=False, dtype=torch.bfloat16))
        self.causal = causal

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (f(x).unflatten(2, (-1, DIM)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mask = None if valid is None else valid[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal, enable_gqa=True)
        return x + out.transpose(1, 2).flatten(2).sin()


def code_of(
    options: dict[str, Any], *, causal: bool = True, padded: bool = False, dynamic: bool = False, train: bool = False
) -> list[tuple[str, GraphLowering]]:
    """The code of each graph, with the graph that it was made of; the forward first."""
    torch._dynamo.reset()
    found: list[tuple[str, GraphLowering]] = []
    model = Model(causal)
    with FakeTensorMode():
        for module in model.children():
            (weight,) = module.parameters()
            moved = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
            module._parameters["weight"] = torch.nn.Parameter(moved, requires_grad=train)
        x = torch.empty(2, LENGTH, HEADS * DIM, dtype=torch.bfloat16, device="cuda")
        valid = torch.ones(2, LENGTH, dtype=torch.bool, device="cuda") if padded else None
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
        if valid is not None:
            torch._dynamo.mark_dynamic(valid, 1)
    options = options | {"only_if_faster": False, "min_seq_len": 0}
    recorded: list[Any] = []
    with machine(found, recorded), contextlib.suppress(Seen):
        compiled = torch.compile(model, backend="prescore", options=options, fullgraph=True)
        compiled(x, valid)
    assert len(recorded) == len(found), "Inductor would make no CUDA graph of it"
    return found


def launched(code: str) -> list[str]:
    """The kernels of ours that the wrapper launches, in order: Inductor's, where none depends on another."""
    return [name for name in re.findall(r"^\s+(\w+?)_\d+\.run\(", code, re.M) if not name.startswith("triton_")]


def check(code: str, graph: GraphLowering) -> None:
    """Nothing that a CUDA graph could not record."""
    call = code[code.index("def call(") : code.index("def get_args")]
    for wait in (".item()", ".cpu(", ".tolist(", "_local_scalar_dense", "nonzero", "empty_strided_cpu", "device='cpu'"):
        assert wait not in call, f"{wait} in\n{call}"
    assert not re.search(r"\bu\d+\b", call), "a size that only the run knows"
    assert graph.device_types == {"cuda"} and not graph.disable_cudagraphs_reason, graph.disable_cudagraphs_reason
    for name, value in graph.graph_inputs.items():
        assert not hasattr(value, "get_device") or value.get_device() in (None, torch.device("cuda", 0)), name


FORWARD = ["rows", "attend", "route", "mark", "union", "arrange", "attend"]
"""With a share: the first adds up window and sinks."""
SEGMENTS = ["segment_moments", "segment_assign_0", "segment_assign_1", "segment_rows"]
LISTS = ["mark", "union", "arrange"]
ROWS = ["rows_backward", "rows_backward"]
CASES: dict[str, tuple[dict[str, Any], dict[str, bool], list[list[str]]]] = {
    "default": ({}, {}, [["cluster", *FORWARD]]),
    "default, trained, dynamic": (
        {}, dict(train=True, dynamic=True),
        [["cluster", *FORWARD], [*LISTS, "d_query", "d_sinks", "d_window", *ROWS, "d_routes"]],
    ),
    "share, padded, dynamic": (
        {"share": 0.001, "residual": False}, dict(padded=True, causal=False, dynamic=True),
        [["cluster", *FORWARD]],
    ),
    "scored, trained": (
        {"method": "peak", "keep": 16}, dict(train=True),
        [["score", "cluster", "select", "select_segments", *FORWARD],
         [*LISTS, "d_query", "d_window", "d_sinks", "d_segments", *ROWS, "d_routes"]],
    ),
    "residual, padded, trained": (
        {}, dict(train=True, padded=True, causal=False),
        [["cluster", "rows", "route", *LISTS, "centroids", "attend"],
         [*LISTS, "centroids", "d_query", "d_residual", "d_routes", "d_sinks", *ROWS]],
    ),
    "centroids, padded, trained, dynamic": (
        {"method": "norm", "keep": 16, "centroids": 4, "routes": 0, "residual": False},
        dict(train=True, padded=True, causal=False, dynamic=True),
        [["score", "select", "select_segments", "rows", *SEGMENTS, "attend"],
         ["d_sinks", "d_segments", *ROWS, "d_query"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_code(name: str) -> None:
    options, form, want = CASES[name]
    found = code_of(options, **form)
    forward, *backward = [launched(code) for code, _ in found]
    assert forward == want[0]
    assert backward == want[1:]
    for code, graph in found:
        check(code, graph)


class OnTheDevice(TorchDispatchMode):
    """Raises where a tensor of the host, other than a number, meets the device: it would be copied while waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                raise AssertionError(f"{func} has a tensor on the host")
        return out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan(routes=0, keep=24, centroids=8), Plan(keep=16), Plan(chunk=512, cluster=32, routes=4)],
    ids=lambda plan: plan.text,
)
def test_torch_operations_of_a_summary_wait_for_nothing(plan: Plan, padded: bool) -> None:
    """They stay whole in the graph (``prescore::rows`` and its like): fake tensors raise where a value is asked for."""
    with FakeTensorMode():
        key = torch.empty(2, 3, 1500, 32, dtype=torch.bfloat16, device="cuda")
        valid = torch.ones(2, 1500, dtype=torch.bool, device="cuda") if padded else None
        scores = torch.empty(2, 3, 1500, device="cuda") if plan.keep else None
        with OnTheDevice():
            found = summaries.summarize(key, key, valid, scores, plan)
            grad = torch.empty_like(found.row_key, dtype=torch.float32)
            summaries.scatter_rows(grad, found.row_index, found.row_owner, 1500)
