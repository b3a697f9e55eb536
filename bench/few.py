"""What continues a sequence: queries over a cache of keys, compiled by Inductor and by prescore, in turn.

    python -m bench.few              # steps: one query; some minutes; a table and bench/results/few-cpu.json
    python -m bench.few --queries 4 16 64 --ways "repeated, padded" "repeated, half full" --out few-more.json
    python -m bench.few --model      # steps of SmolLM2-135M behind random keys, and few-model-cpu.json

Both attend every key; each result is checked before it is timed: its error against float64 may be twice Inductor's.
``grouped`` is SDPA with enable_gqa, as transformers calls it where there is no mask; ``repeated`` what it does where
there is one (a batch that is padded, a static cache): keys and values repeated for each query head that shares them.
``half full`` has a static cache twice as long as what is in it. Queries are the last of the sequence, and see no key
after their own. GB/s: keys and values once, in that time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.bands import finish
from prescore_compile import smollm
from prescore_compile.timing import interleaved

RESULTS = Path(__file__).parent / "results"
DIM = 64


def repeated(t: Any, group: int) -> Any:
    """As ``repeat_kv`` of transformers."""
    batch, heads, length, dim = t.shape
    return t[:, :, None].expand(batch, heads, group, length, dim).reshape(batch, heads * group, length, dim)


def grouped(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def masked(q: Any, k: Any, v: Any, mask: Any) -> Any:
    group = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, repeated(k, group), repeated(v, group), mask)


def by_hand(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """``eager_attention_forward`` of transformers."""
    group = q.shape[1] // k.shape[1]
    logits = q @ repeated(k, group).transpose(2, 3) * DIM**-0.5 + torch.where(mask, 0.0, -1e9)
    return torch.softmax(logits, -1, dtype=torch.float32).to(q.dtype) @ repeated(v, group)


WAYS: dict[str, Callable[..., Any]] = {
    "grouped": grouped, "repeated, padded": masked, "repeated, half full": masked, "by hand, padded": by_hand,
}  # fmt: skip


def row(way: str, length: int, heads: tuple[int, int], dtype: torch.dtype, queries: int, rounds: int) -> dict[str, Any]:
    make = torch.Generator().manual_seed(0)
    shapes = [(1, heads[0], queries, DIM), (1, heads[1], length, DIM), (1, heads[1], length, DIM)]
    q, k, v = (torch.randn(shape, generator=make).to(dtype) for shape in shapes)
    filled = length // 2 if way.endswith("full") else length
    places, own = torch.arange(length), torch.arange(filled - queries, filled)[:, None]
    mask = ((places <= own) & (places >= (0 if way.endswith("full") else 7)))[None, None]
    run, ways = WAYS[way], {}
    torch._dynamo.reset()
    for backend in ("inductor", "prescore"):
        compiled = torch.compile(run, backend=backend, dynamic=False)
        ways[backend] = lambda compiled=compiled: compiled(q, k, v, mask)
    want = run(q.double(), k.double(), v.double(), mask)
    errors = {name: float((work() - want).norm() / want.norm()) for name, work in ways.items()}
    found: dict[str, Any] = {"n": length, "way": way, "heads": f"{heads[0]}/{heads[1]}"}
    found |= {"queries": queries, "dtype": str(dtype).split(".")[1]}
    if errors["prescore"] > 2 * errors["inductor"]:
        return found | {"failed": errors}
    times = interleaved(ways, rounds)
    read = k.nbytes + v.nbytes
    return found | {
        "inductor_ms": 1e3 * times["inductor"], "prescore_ms": 1e3 * times["prescore"],
        "faster": times["inductor"] / times["prescore"], "gb_s": read / times["prescore"] / 1e9,
        "error": errors["prescore"],
    }  # fmt: skip


def of_model(kind: str, length: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Steps of SmolLM2 behind ``length`` keys; ``kind``: of cache; ``padded``: two sequences, one of them short."""
    from transformers import DynamicCache, StaticCache

    model, _ = smollm.load(dtype)
    config, batch = model.config, 2 if kind == "padded" else 1
    token, pad = torch.full((batch, 1), 17), torch.ones(batch, length, dtype=torch.long)
    pad[1:, :100] = 0
    names, logits, past = ("inductor", "prescore"), {}, {}
    torch._dynamo.reset()
    runs = {name: torch.compile(model, backend=name, dynamic=kind != "static") for name in names}
    for name in names:
        room = length + rounds + 8
        past[name] = StaticCache(config=config, max_cache_len=room) if kind == "static" else DynamicCache()
        make = torch.Generator().manual_seed(0)
        for layer in range(config.num_hidden_layers):
            shape = (batch, config.num_key_value_heads, length, config.head_dim)
            past[name].update(*(torch.randn(shape, generator=make).to(dtype) for _ in range(2)), layer)
    done = dict.fromkeys(names, 0)

    def step(name: str) -> None:
        done[name] += 1
        given = {"attention_mask": F.pad(pad, (0, done[name]), value=1)} if kind == "padded" else {}
        logits[name] = runs[name](token, past_key_values=past[name], **given).logits

    worst = 0.0
    for _ in range(3):  # compiles, the second time for lengths that change
        for name in names:
            step(name)
        worst = max(worst, float((logits["prescore"] - logits["inductor"]).norm() / logits["inductor"].norm()))
    found = {"n": length, "way": kind, "batch": batch, "dtype": str(dtype).split(".")[1]}
    if not worst < (1e-3 if dtype == torch.float32 else 5e-2):
        return found | {"failed": worst}
    times = interleaved({name: lambda name=name: step(name) for name in names}, rounds)
    return found | {
        "inductor_ms": 1e3 * times["inductor"], "prescore_ms": 1e3 * times["prescore"],
        "faster": times["inductor"] / times["prescore"], "difference": worst,
    }  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--queries", type=int, nargs="+", default=[1])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.backward = False
    options.out = options.out or RESULTS / ("few-model-cpu.json" if options.model else "few-cpu.json")
    rows = []
    if options.model:
        for kind, length, dtype in product(("dynamic", "padded", "static"), options.lengths or [8192], options.dtypes):
            rows.append(of_model(kind, length, getattr(torch, dtype), options.rounds))
            print(rows[-1], flush=True)
    else:
        lengths, heads = options.lengths or [512, 1024, 4096, 32768], [(9, 3), (32, 8), (8, 8)]
        for dtype, way, of, length, queries in product(options.dtypes, options.ways, heads, lengths, options.queries):
            rows.append(row(way, length, of, getattr(torch, dtype), queries, options.rounds))
            print(rows[-1], flush=True)
    finish(rows, options)


if __name__ == "__main__":
    main()
