"""Every generated kernel of a fixed set, compiled for GPUs that this machine need not have.

    python -m bench.aot            # compile all of them, write bench/results/triton-aot.json
    python -m bench.aot --check    # compile all of them, compare with that file
    python -m bench.aot --only "default 64" --targets sm_90
    python -m bench.aot --kernel route

The launches are those that the operators make: they run on tensors without memory (fake ones, on a
"cuda" device) and each launch is compiled where it would have run. Registers and stack are read from
the binaries (NVIDIA's by `cuobjdump`, which Triton brings; AMD's from the notes in its assembly).
What spills lies on the stack. The whole set takes half an hour on an idle core and more.
With `--only` the other variants' figures stay as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from prescore_compile.kernels.band import B, H, K, Q
from prescore_compile.kernels.logits import NOTHING, Logits, by_chunk
from prescore_compile.kernels.ops import summarizing
from prescore_compile.kernels.plan import WHOLE, Plan
from prescore_compile.kernels.reference import Operands
from prescore_compile.kernels.summary import Summary
from prescore_compile.kernels.triton import (
    attend,
    attend_backward,
    clusters,
    device,
    mass,
    residual,
    route,
    rows,
    rows_backward,
    segments,
    union,
)
from prescore_compile.kernels.triton.scores import kernel as scores
from prescore_compile.kernels.triton.scores import select
from prescore_compile.kernels.triton.spec import DTYPES
from prescore_compile.passes.defaults import CAUSAL, CAUSAL_ON_A_GPU, LONG_ON_A_GPU, TWO_SIDED_ON_A_GPU

RESULTS = Path(__file__).parent / "results" / "triton-aot.json"
MODULES = (attend, attend_backward, clusters, residual, route, rows, rows_backward, scores, segments, select, union)

SHARED = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
"""Bytes of shared memory that one program may have."""
CHOSEN_FOR = ("sm_80", "sm_90", "gfx942")
"""Targets that tiles were chosen for: default plans spill nothing. The others have figures of ``WIDELY`` alone."""
MILD = 192
"""Bytes a lane that default plans may spill on the others."""
TWO_PIECES = 288
"""The same of ``cluster`` where keys are float16, on any target: they are two numbers each there."""
PRODUCTS = {
    "sm_80": r"\bmma\.sync", "sm_89": r"\bmma\.sync", "sm_90": r"\bwgmma\.mma_async|\bmma\.sync",
    "sm_100": r"\btcgen05\.mma|\bmma\.sync", "sm_120": r"\bmma\.sync", "gfx942": r"\bv_mfma",
}  # fmt: skip
"""Tensor-core instructions in the assembly."""
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One site whose kernels are compiled; ``default``: nothing may spill; ``scores``: those of scores alone.

    ``value_dim``: 0: as many as ``dim``. ``sunk``: with a learned sink.
    """

    plan: Plan = CAUSAL_ON_A_GPU
    dim: int = 64
    value_dim: int = 0
    group: int = 1
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    padded: bool = False
    queries: int = 4096
    backward: bool = True
    default: bool = False
    scores: bool = False
    logits: Logits = NOTHING
    read: torch.dtype = torch.int64
    sunk: bool = False


DOCUMENT = sympy.Function("t00")
IN_DOCUMENTS = Logits(sympy.And(sympy.Eq(DOCUMENT(B, Q), DOCUMENT(B, K)), K >= Q - 2000), softcap=50.0)
"""Packed documents with a sliding window and a softcap, as the graph pass says it."""
SLIDING = Logits(K >= Q - 1023)
NEAR = Logits(sympy.Abs(Q - K) <= 64)
SLOPED = Logits(bias=DOCUMENT(B, H) * (K - Q))
CURVED = Logits(bias=sympy.exp(-sympy.Abs(Q - K)) - sympy.log(1 + sympy.Abs(Q - K)) / 2)

ROUTED = Plan(spread=1.4)
"""Fixed routes beside a window."""


def scored(method: str, dim: int, default: bool = True, **settings: Any) -> Variant:
    """A site whose keys are scored and selected."""
    plan = Plan(method=method, keep=32, routes=0, chunk=settings.pop("chunk", 128))
    return Variant(plan=plan, dim=dim, default=default, scores=True, **settings)


VARIANTS = {
    "default 64": Variant(default=True),
    "default 128": Variant(dim=128, group=4, default=True),
    "long 64": Variant(plan=LONG_ON_A_GPU, backward=False, default=True),
    "long 128": Variant(plan=LONG_ON_A_GPU, dim=128, group=4, backward=False, default=True),
    "float32 64": Variant(dtype=torch.float32),
    "float16 128": Variant(dtype=torch.float16, dim=128, backward=False, default=True),
    "256": Variant(dim=256, backward=False),
    "masked and capped 128": Variant(dim=128, group=4, logits=IN_DOCUMENTS),
    "sliding window 128": Variant(plan=WHOLE, dim=128, group=4, logits=SLIDING, default=True),
    "two-sided band 64": Variant(plan=WHOLE, causal=False, padded=True, logits=NEAR, default=True),
    "learned sinks 64": Variant(plan=WHOLE, group=8, logits=Logits(K >= Q - 127), sunk=True, default=True),
    "default, learned sinks 64": Variant(group=8, sunk=True, default=True),
    "few queries 128": Variant(dim=128, queries=1, backward=False),
    "float32 128": Variant(dtype=torch.float32, dim=128, group=4, backward=False),
    "256, group of 4": Variant(dim=256, group=4, backward=False),
    "fixed 64": Variant(plan=ROUTED, default=True),
    "fixed 128": Variant(plan=ROUTED, dim=128, group=4, default=True),
    "fixed, two-sided 64": Variant(plan=ROUTED, causal=False, padded=True),
    "fixed, float32 64": Variant(plan=ROUTED, dtype=torch.float32),
    "fixed 256": Variant(plan=ROUTED, dim=256, backward=False),
    "fixed, masked and capped 128": Variant(plan=ROUTED, dim=128, group=4, logits=IN_DOCUMENTS),
    "keep 64": Variant(plan=Plan(keep=32, routes=0)),
    "keep and routes 64": Variant(plan=Plan(keep=32), group=4, backward=False),
    "centroids 64": Variant(plan=Plan(keep=24, centroids=8, routes=0, window=0), causal=False),
    "centroids 128": Variant(plan=Plan(keep=24, centroids=8, routes=0), dim=128, group=4, padded=True),
    "centroids, float32 64": Variant(plan=Plan(centroids=32, routes=0), dtype=torch.float32, backward=False),
    "two levels 128": Variant(plan=Plan(coarse=32), dim=128, group=4, backward=False),
    "residual 64": Variant(plan=TWO_SIDED_ON_A_GPU, causal=False, default=True),
    "residual 128": Variant(plan=TWO_SIDED_ON_A_GPU, causal=False, dim=128, group=4, default=True),
    "causal residual 128": Variant(plan=Plan(window=0, residual=True), dim=128, group=4),
    "heads alone 128": Variant(plan=CAUSAL, dim=128, group=4, backward=False, default=True),
    "many routes together": Variant(plan=Plan(routes=200, cluster=32, group_routes=True), group=3, backward=False),
    "share 64": Variant(plan=Plan(share=0.001), backward=False),
    "share 128": Variant(plan=Plan(share=0.001), dim=128, group=4, backward=False),
    "64 routes": Variant(plan=Plan(routes=64), backward=False),
    "many routes": Variant(plan=Plan(routes=200, cluster=32), backward=False),
    "kmeans 64": scored("kmeans", 64),
    "kmeans 128": scored("kmeans", 128),
    "relative kmeans 128": scored("kmeans_relative", 128, padded=True),
    "kmedian 64": scored("kmedian", 64),
    "kmedian 128": scored("kmedian", 128),
    "leverage 64": scored("leverage", 64),
    "leverage 128": scored("leverage", 128, padded=True),
    "leverage 256": scored("leverage", 256),
    "peak 64": scored("peak", 64, group=4),
    "peak 128": scored("peak", 128, group=4, padded=True),
    "float16 kmedian 128": scored("kmedian", 128, default=False, dtype=torch.float16),
    "float32 kmedian 64": scored("kmedian", 64, default=False, dtype=torch.float32),
    "float16 kmedian 64, chunk 256": scored("kmedian", 64, default=False, dtype=torch.float16, chunk=256),
    "float32 kmeans 256, chunk 32": scored("kmeans", 256, default=False, dtype=torch.float32, chunk=32),
    "float32 peak 128": scored("peak", 128, default=False, dtype=torch.float32),
    "float32 leverage 256": scored("leverage", 256, default=False, dtype=torch.float32),
    "kmeans 128, chunk 256": scored("kmeans", 128, default=False, chunk=256),
    "kmedian 256": scored("kmedian", 256, default=False, chunk=64),
    "peak 128, chunk 256": scored("peak", 128, default=False, chunk=256),
}


WIDELY = ("centroids 128", *(name for name, variant in VARIANTS.items() if variant.default))
"""Variants that are compiled for every target."""


def has_figures(name: str, target: str) -> bool:
    """Whether a variant is compiled for a target."""
    return target in CHOSEN_FOR or name in WIDELY


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was given."""

    name: str
    kernel: Any
    values: dict[str, Any]
    warps: int
    stages: int


def launches(variant: Variant, target: str) -> list[Launch]:
    """What the operators launch for a site of 4096 keys."""
    found: list[Launch] = []

    def keep(kernel: Any, grid: Any, values: dict[str, Any], *, warps: int, stages: int) -> None:
        given = {name: values[name] for name in kernel.arg_names}
        found.append(Launch(kernel.fn.__name__, kernel, given, warps, stages))

    with contextlib.ExitStack() as patches:
        for module in MODULES:
            patches.enter_context(mock.patch.object(module, "launch", keep))
        patches.enter_context(mock.patch.object(torch.version, "hip", "6" if target.startswith("gfx") else None))
        small = SHARED[target] < device.SHARED and not target.startswith("gfx")
        patches.enter_context(mock.patch.object(device, "is_small", lambda _: small))
        patches.enter_context(FakeTensorMode())
        _run(variant, found)
    return found


def _run(variant: Variant, found: list[Launch]) -> None:
    plan, scale = variant.plan, variant.dim**-0.5
    heads, length = 8, 4096

    def tensor(*shape: int, dtype: torch.dtype = variant.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    key = tensor(2, heads, length, variant.dim)
    valid = tensor(2, length, dtype=torch.bool) if variant.padded else None
    chosen = None
    query = tensor(2, heads * variant.group, variant.queries, variant.dim)
    value = tensor(2, heads, length, variant.value_dim or variant.dim)
    sinks = tensor(heads * variant.group).reshape(1, -1, 1).expand(query.shape[:3]) if variant.sunk else None
    site = Operands(query, key, value, valid, variant.causal, scale, sinks)
    if plan.keep:
        of_keys = tensor(2, heads, length, dtype=torch.float32)
        if scores.fits(plan, variant.dim, DTYPES[variant.dtype], device.is_small(key.device)):
            of_keys = scores.scores(query, key, valid, plan, variant.causal, scale)
        if select.segments_fit(plan):
            chosen = select.select_segments(*select.select(of_keys, valid, plan), plan)
    if variant.scores:
        return
    summary = Summary(*summarizing.empty(key, value, plan.text))
    if variant.queries > 1 and rows.fits(plan, variant.dim, value.shape[3]):
        rows.rows(key, value, valid, chosen, plan)
    logits = variant.logits
    read = {name: tensor(2, length, dtype=variant.read) for name in logits.tensors}
    more: dict[str, Any] = dict(read, softcap=logits.softcap)
    routes = query.new_empty((*query.shape[:3], 0), dtype=torch.int32)
    if plan.routes:
        if variant.queries > 1:
            clusters.clusters(key, value, valid, plan)
        known = by_chunk(logits, read, plan.chunk)
        near = None
        if plan.needs_mass:  # another source of ``attend``
            before = len(found)
            near = mass.mass(site, summary, plan, logits.lifted, **more)
            found[before:] = [replace(launch, name="mass") for launch in found[before:]]
        routes = route.route(query, summary, plan, variant.causal, length, scale, logits.reach, known, near)
    out, sums = attend.attend(site, summary, routes, plan, logits.lifted, **more)
    if variant.backward:
        attend_backward.attend_backward(out, out, sums, site, summary, routes, plan, logits.lifted, **more)
        if plan.sinks or plan.rows_per_segment:
            rows_backward.rows_backward(summary.row_key, *summary[4:6], summary.row_bias, length, plan)


def source_of(launch: Launch, wide: bool = False) -> Any:
    """A launch's ``ASTSource``, types and alignments as a GPU would see them; ``wide``: as where no size is known."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for at, (name, value) in enumerate(launch.values.items()):
        aligned = True
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            aligned = isinstance(value, FakeTensor) or value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        elif value is None or (value == 1 and not wide):
            signature[name], aligned = "constexpr", False
            constants[(at,)] = value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 and not wide else "i64"
            aligned = value % 16 == 0 and not wide
        if aligned:
            attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def gpu_of(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)


def compiled(launch: Launch, target: str) -> Any:
    """What ``triton.compile`` makes of a launch."""
    import triton

    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source_of(launch), target=gpu_of(target), options=options)


def parsed(launch: Launch, target: str, wide: bool = False) -> Any:
    """What Triton's front end makes of a launch, in a fraction of a second: names and types are checked, no more."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    backend = make_backend(gpu_of(target))
    options = backend.parse_options({"num_warps": launch.warps, "num_stages": launch.stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    more = (backend.get_codegen_implementation(options), backend.get_module_map(), context)
    return source_of(launch, wide).make_ir(gpu_of(target), options, *more)


def figures(binary: Any, target: str) -> dict[str, int]:
    """``registers`` a lane, ``stack`` bytes a lane, ``shared`` bytes a program, ``products`` on tensor cores."""
    if target.startswith("gfx"):
        assembly = binary.asm["amdgcn"]
        registers, stack = _noted(assembly, r"\.vgpr_count"), _noted(assembly, r"\.private_segment_fixed_size")
    else:
        assembly = binary.asm["ptx"]
        registers, stack = _resources(binary.asm["cubin"])
    return {
        "registers": registers,
        "stack": stack,
        "shared": int(binary.metadata.shared),
        "products": len(re.findall(PRODUCTS[target], assembly)),
    }


def report(variant: Variant, target: str, only: str | None = None) -> dict[str, dict[str, int]]:
    """Figures of each kernel of a variant (or of one); a kernel of two sources counts with its larger figures."""
    found: dict[str, dict[str, int]] = {}
    seen = set()
    for launch in launches(variant, target):
        known = (launch.name, launch.kernel.src)
        if known in seen or only not in (None, launch.name):
            continue
        seen.add(known)
        new = figures(compiled(launch, target), target)
        old = found.get(launch.name, new)
        found[launch.name] = {name: max(new[name], old[name]) for name in new}
    return found


def broken(name: str, target: str, kernels: dict[str, dict[str, int]]) -> list[str]:
    """What is out of bounds."""
    found = []
    for kernel, got in kernels.items():
        where = f"{name}, {kernel}, {target}"
        if got["shared"] > SHARED[target]:
            found.append(f"{where}: {got['shared']} bytes of shared memory, {SHARED[target]} fit")
        spilled = 0 if target in CHOSEN_FOR else MILD
        if kernel == "cluster" and VARIANTS[name].dtype == torch.float16:
            spilled = TWO_PIECES
        if VARIANTS[name].default and got["stack"] > spilled:
            found.append(f"{where}: spills {got['stack']} bytes")
        if not got["products"] and kernel not in WITHOUT_PRODUCTS:
            found.append(f"{where}: no tensor-core instruction")
    return found


WITHOUT_PRODUCTS = (
    "cluster", "mark", "union", "arrange", "centroids", "merge", "rows", "rows_backward",
    "select", "select_segments", "segment_moments", "segment_rows",
)  # fmt: skip
"""Kernels whose source has no product of matrices, or not for all inputs."""


def _noted(assembly: str, key: str) -> int:
    found = re.search(key + r":?\s+(\d+)", assembly)
    assert found, f"{key} is not in the assembly"
    return int(found[1])


def _resources(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


@contextlib.contextmanager
def fresh_cache() -> Iterator[None]:
    """Triton's cache in an empty folder, so that everything is compiled."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ", TRITON_CACHE_DIR=folder):
        yield


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--targets", nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument("--kernel", help="only this one, where a variant has it")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    old = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"figures": {}}
    found: dict[str, Any] = old["figures"] if not arguments.check else {}
    problems = []
    with fresh_cache():
        for name in arguments.only:
            for target in [target for target in arguments.targets if has_figures(name, target)]:
                kernels = report(VARIANTS[name], target, arguments.kernel)
                problems += broken(name, target, kernels)
                for kernel, got in kernels.items():
                    print(
                        f"{name:20} {target:7} {kernel:10} " + " ".join(f"{k} {v}" for k, v in got.items()), flush=True
                    )
                    known = old["figures"].get(name, {}).get(kernel, {}).get(target)
                    if arguments.check and known != got:
                        problems.append(f"{name}, {kernel}, {target}: was {known}")
                    found.setdefault(name, {}).setdefault(kernel, {})[target] = got
    if not arguments.check:
        about = {"command": "python -m bench.aot", "triton": triton.__version__}
        arguments.out.write_text(json.dumps({"about": about, "figures": found}, indent=1) + "\n")
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
