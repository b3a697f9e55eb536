"""What `prescore explain` and `prescore diff` add to the time of capturing a model: at most 1 s of CPU time.

    python -m bench.inspection                       # 30 Llama layers, sdpa and eager attention, 3 processes each
    python -m bench.inspection --layers 60 --rounds 5

Each figure is the median, over fresh processes, of the CPU time of one step. "import" is of this package alone, after
torch and transformers and from byte code, as an installed package has it; "explain" is import + rewrite + text,
"diff" that and the comparison and its text.
"""

from __future__ import annotations

import argparse
import compileall
import json
import statistics
import subprocess
import sys
from pathlib import Path
from time import process_time
from typing import Any

LIMIT = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once", metavar="ATTENTION", help="measure in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(_once(arguments.once, arguments.layers)))
        return 0
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


def _once(attention: str, layers: int) -> dict[str, float]:
    import torch
    import torch._dynamo
    import torch._inductor
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 1000}
    llama = transformers.LlamaConfig(
        num_hidden_layers=layers, num_key_value_heads=2, attn_implementation=attention, **sizes
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = transformers.LlamaForCausalLM(llama).eval()
        inputs = {"input_ids": torch.zeros(1, 8192, dtype=torch.long), "use_cache": False}
    found: dict[str, float] = {}
    start = process_time()
    from prescore_compile import backend
    from prescore_compile.inspection import Inspection, command, text

    found["import"] = process_time() - start
    rewrite, spent = backend.rewrite, []

    def timed(*given: Any) -> Any:
        begin = process_time()
        result = rewrite(*given)
        spent.append(process_time() - begin)
        return result

    backend.rewrite = timed
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
