"""Short inputs: a site that is kept exact costs nothing. Prefill of 128 tokens, three ways in turn.

    python -m bench.short            # SmolLM2-135M; prints the ratio of medians

backend="prescore" against backend="inductor", and a second backend="inductor" against the first:
how far two compiles of the same model differ on this machine.
"""

from __future__ import annotations

import argparse

import torch

from prescore_compile import explain, smollm
from prescore_compile.timing import interleaved


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    model, tokenizer = smollm.load()
    ids = smollm.token_ids(tokenizer, smollm.topics(), arguments.seq_len)
    with torch.no_grad():
        print({site.reason for site in explain(model, ids).sites})
        names = {"inductor": "inductor", "prescore": "prescore", "inductor again": "inductor"}
        runs = {name: torch.compile(model, backend=backend) for name, backend in names.items()}
        want = runs["inductor"](ids).logits
        for name, run in runs.items():
            torch.testing.assert_close(run(ids).logits, want, atol=1e-4, rtol=1e-4)
            print(f"{name} compiled, same logits", flush=True)
        times = interleaved({name: lambda r=run: r(ids) for name, run in runs.items()}, arguments.rounds)  # type: ignore[misc]
    for name, seconds in times.items():
        print(f"{name:15} {1e3 * seconds:7.1f} ms   {seconds / times['inductor']:.3f}x inductor")


if __name__ == "__main__":
    main()
