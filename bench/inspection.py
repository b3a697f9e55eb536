"""What `prescore explain` and `prescore diff` add to the time of capturing a model: at most 1 s of CPU time.

    python -m bench.inspection                       # 30 Llama layers, sdpa and eager attention, 3 processes each
    python -m bench.inspection --layers 60 --rounds 5
    python -m bench.inspection --compile             # the share of the passes in a compile by Inductor: at most 5 %

Each figure is the median, over fresh processes, of the CPU time of one step. "import" is of this package alone, after
torch and transformers and from byte code, as an installed package has it; "explain" is import + rewrite + text,
"diff" that and the comparison and its text.

--compile compiles the 30 layers (random weights, 256 tokens, all rewritten) by backend="inductor" and by
backend="prescore", in one process, in turns, after one compile to warm up; Inductor's caches are off, Dynamo is reset
before each. "passes" is the time inside of ``backend.rewrite``; the figure is its median over that of "inductor".
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

LIMIT = 1.0
SHARE = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="the share of the passes in a compile by Inductor")
    parser.add_argument("--once", metavar="ATTENTION", help="measure in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(_once(arguments.once, arguments.layers)))
        return 0
    if arguments.compile:
        return _share(arguments.layers, arguments.rounds)
    worst = 0.0
    for package in ("prescore_compile", "passes", "kernels"):
        compileall.compile_dir(Path(__file__).parent.parent / package, quiet=1)
    for attention in ("sdpa", "eager"):
        command = [sys.executable, "-m", "bench.inspection", "--once", attention, "--layers", str(arguments.layers)]
        outputs = [
            subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(arguments.rounds)
        ]
        runs = [json.loads(output.splitlines()[-1]) for output in outputs]
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        print(f"{attention:6}" + "".join(f"  {name} {seconds:.2f}" for name, seconds in middle.items()), flush=True)
        worst = max(worst, middle["= diff"])
    print(f"at most {worst:.2f} s more than the capture; allowed: {LIMIT} s")
    return int(worst > LIMIT)


def _llama(layers: int, attention: str) -> Any:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 1000}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=layers, num_key_value_heads=2, attn_implementation=attention, **sizes
        )
    ).eval()


def _share(layers: int, rounds: int) -> int:
    os.environ |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    import torch

    from prescore_compile import backend

    passes: list[float] = []
    backend.rewrite = _timed(backend.rewrite, passes)
    inputs = {"input_ids": torch.zeros(1, 256, dtype=torch.long), "use_cache": False}
    options = {"min_seq_len": 0, "only_if_faster": False}
    model = _llama(layers, "sdpa")

    def compiled(**how: Any) -> float:
        torch._dynamo.reset()
        start = _cpu()
        with torch.no_grad():
            torch.compile(model, **how)(**inputs)
        return _cpu() - start

    compiled(backend="inductor")
    found: dict[str, list[float]] = {"inductor": [], "prescore": []}
    for _ in range(rounds):
        found["inductor"].append(compiled(backend="inductor"))
        found["prescore"].append(compiled(backend="prescore", options=options))
    middle = {name: statistics.median(runs) for name, runs in (found | {"passes": passes}).items()}
    print("  ".join(f"{name} {seconds:.2f}" for name, seconds in middle.items()))
    share = middle["passes"] / middle["inductor"]
    print(f"the passes take {share:.1%} of a compile by Inductor; allowed: {SHARE:.0%}")
    return int(share > SHARE)


def _cpu() -> float:
    """CPU seconds of this process and of the compilers that it ran."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*given: Any) -> Any:
        begin = process_time()
        result = function(*given)
        spent.append(process_time() - begin)
        return result

    return timed


def _once(attention: str, layers: int) -> dict[str, float]:
    import torch
    import torch._dynamo
    import torch._inductor
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _llama(layers, attention)
        inputs = {"input_ids": torch.zeros(1, 8192, dtype=torch.long), "use_cache": False}
    found: dict[str, float] = {}
    start = process_time()
    from prescore_compile import backend
    from prescore_compile.inspection import Inspection, command, text

    found["import"] = process_time() - start
    spent: list[float] = []
    backend.rewrite = _timed(backend.rewrite, spent)
    with command.uncollected():
        start = process_time()
        inspection = Inspection("model", backend.stages(model, (), inputs))
        captured = process_time()
        found["rewrite"] = sum(spent)
        text.explain(inspection)
        explained = process_time()
        text.diff(inspection)
        found["explain's text"] = explained - captured
        found["diff and its text"] = process_time() - explained
    explain = found["import"] + found["rewrite"] + found["explain's text"]
    return (
        {"capture": captured - start - sum(spent)}
        | found
        | {"= explain": explain, "= diff": explain + found["diff and its text"]}
    )


if __name__ == "__main__":
    sys.exit(main())
