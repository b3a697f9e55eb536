"""Peak memory of a whole prefill, exact and prescored, each in a process of its own.

    python -m bench.memory                      # SmolLM2-135M at 8192 tokens, float32 and bfloat16

What a compiled forward (the second one: nothing is compiled any more) adds to the process at its peak; the
model's weights are not in it. The prescored logits are compared with exact's first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from tabulate import tabulate

from prescore_compile import smollm

from .attention import peak

BACKENDS = {"exact": "inductor", "prescored": "prescore"}


def measure(backend: str, length: int, dtype: str) -> dict[str, Any]:
    """Peak MB of one forward, and the likeliest last token, in this process."""
    model, tokenizer = smollm.load()
    model = model.to(getattr(torch, dtype))
    ids = smollm.token_ids(tokenizer, smollm.topics(), length)
    run = torch.compile(model, backend=BACKENDS[backend])
    with torch.no_grad():
        logits = run(ids, use_cache=False, logits_to_keep=1).logits
        added = peak(lambda: run(ids, use_cache=False, logits_to_keep=1))
    return {"mb": added, "logits": logits[0, -1].float().tolist()}


def in_a_process(backend: str, length: int, dtype: str) -> dict[str, Any]:
    """``measure`` in a fresh process."""
    command = [sys.executable, "-m", "bench.memory", "--one", backend, "--lengths", str(length), "--dtypes", dtype]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--one", choices=BACKENDS, help="measure in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.lengths[0], arguments.dtypes[0])))
        return
    rows = []
    for dtype in arguments.dtypes:
        for length in arguments.lengths:
            found = {name: in_a_process(name, length, dtype) for name in BACKENDS}
            exact, other = (torch.tensor(found[name]["logits"]).log_softmax(0) for name in BACKENDS)
            kl = (exact.exp() * (exact - other)).sum().item()
            if not kl < 0.5:
                raise AssertionError(f"wrong result: the next token's KL to exact is {kl:.2g} nats")
            megabytes = {name: found[name]["mb"] for name in BACKENDS}
            rows.append({"n": length, "dtype": dtype} | megabytes | {"KL": kl})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(tabulate(rows, headers="keys", floatfmt=".3g"))


if __name__ == "__main__":
    main()
