"""``prescore demo``: an unmodified SmolLM2-135M on real text, exact and prescored, side by side."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch.overrides import TorchFunctionMode

from . import smollm
from .attention import attention
from .backend import explain
from .passes import Config, Report
from .timing import interleaved
from .tokens import next_tokens

ROUNDS = 3


@dataclass(frozen=True)
class Figures:
    """What the demo measured. Times in seconds; perplexity = exp(mean natural-log cross-entropy)."""

    seq_len: int
    sites: int
    rewritten: int
    kept: int
    kept_reasons: list[str]
    exact_seconds: float
    prescored_seconds: float
    exact_tokens_per_second: float
    prescored_tokens_per_second: float
    prefill_speedup: float
    exact_attention_seconds: float
    prescored_attention_seconds: float
    attention_speedup: float
    attention_sites_timed: int
    exact_perplexity: float
    prescored_perplexity: float
    perplexity_ratio: float
    top1_agreement: float
    threads: int
    torch: str
    machine: str


class _TimeAttention(TorchFunctionMode):
    """Times each SDPA call on the model's own tensors, exact and prescored in turn."""

    def __init__(self, config: Config, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.config, self.tell = config, tell
        self.exact: list[float] = []
        self.prescored: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        scale = (kwargs or {}).get("scale")
        with torch._C.DisableTorchFunction():
            # The strongest exact form: SDPA's flash kernel skips the masked half, and takes keys
            # and values expanded to the query heads (not timed) faster than grouped ones.
            group = query.shape[1] // key.shape[1]
            k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            ways = {
                "exact": lambda: F.scaled_dot_product_attention(query, k, v, is_causal=True, scale=scale),
                "prescored": lambda: attention(
                    query, key, value, is_causal=True, scale=scale, enable_gqa=True, config=self.config
                ),
            }
            times = interleaved(ways, ROUNDS)
            self.exact.append(times["exact"])
            self.prescored.append(times["prescored"])
            done = f"site {len(self.exact)}: exact {self.exact[-1]:.3f} s, prescored {self.prescored[-1]:.3f} s"
            self.tell(f"  attention alone, {done}")
            return ways["exact"]()


def run(seq_len: int = 8192, config: Config | None = None) -> Figures:
    """Run the demo; progress goes to standard error.

    Raises:
        ValueError: the text is shorter than ``seq_len``. FileNotFoundError: no weights installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    config = config or Config()
    tell = _teller()
    tell(f"loading {smollm.GGUF}")
    model, tokenizer = smollm.load()
    ids = smollm.token_ids(tokenizer, smollm.topics(), seq_len)
    with torch.no_grad():
        tell(f"explaining what backend='prescore' does at {seq_len} tokens")
        report = explain(model, ids, config=config)
        print(report, file=sys.stderr, flush=True)
        exact = torch.compile(model, backend="inductor")
        options: Any = config  # which torch's types do not know
        prescored = torch.compile(model, backend="prescore", options=options)
        tell("compiling and running exact (backend='inductor')")
        losses, best = next_tokens(exact(ids).logits, ids)
        tell("compiling and running prescored (backend='prescore')")
        prescored_losses, prescored_best = next_tokens(prescored(ids).logits, ids)
        tell("timing the prefill")
        times = interleaved({"exact": lambda: exact(ids), "prescored": lambda: prescored(ids)}, ROUNDS, tell)
        tell("timing attention alone, on the model's own queries, keys and values")
        of_one_site = Config(min_seq_len=config.min_seq_len, **config.own_settings())
        with _TimeAttention(of_one_site, tell) as alone:
            model.model(ids)
    return _figures(seq_len, report, times, alone, losses, prescored_losses, best == prescored_best)


def table(figures: Figures) -> str:
    """The figures as a table."""
    f = figures
    rows = [
        ["sites found / rewritten / kept", f"{f.sites} / {f.rewritten} / {f.kept}", "", ""],
        ["prefill, tokens/s", f"{f.exact_tokens_per_second:.0f}", f"{f.prescored_tokens_per_second:.0f}",
         f"{f.prefill_speedup:.2f}x faster"],
        [f"attention alone, {f.attention_sites_timed} sites, s", f"{f.exact_attention_seconds:.2f}",
         f"{f.prescored_attention_seconds:.2f}", f"{f.attention_speedup:.2f}x faster"],
        ["perplexity", f"{f.exact_perplexity:.3f}", f"{f.prescored_perplexity:.3f}",
         f"{f.perplexity_ratio:.4f}x exact"],
        ["top-1 agreement", "", "", f"{100 * f.top1_agreement:.1f}%"],
    ]  # fmt: skip
    title = f"SmolLM2-135M-Instruct, {f.seq_len} tokens, float32, {f.threads} threads, torch {f.torch}"
    body = tabulate(rows, headers=["", "exact (inductor)", "prescored", ""], disable_numparse=True)
    reasons = "".join(f"\nkept exact: {reason}" for reason in f.kept_reasons)
    return f"{title}\n\n{body}{reasons}"


def as_dict(figures: Figures) -> dict[str, Any]:
    """The figures as plain data, for JSON."""
    return asdict(figures)


def _figures(
    seq_len: int,
    report: Report,
    times: dict[str, float],
    alone: _TimeAttention,
    exact_losses: torch.Tensor,
    losses: torch.Tensor,
    same: torch.Tensor,
) -> Figures:
    exact_loss, loss = exact_losses.double().mean().item(), losses.double().mean().item()
    return Figures(
        seq_len=seq_len,
        sites=len(report.sites),
        rewritten=len(report.rewritten),
        kept=len(report.kept),
        kept_reasons=sorted({site.reason for site in report.kept}),
        exact_seconds=times["exact"],
        prescored_seconds=times["prescored"],
        exact_tokens_per_second=seq_len / times["exact"],
        prescored_tokens_per_second=seq_len / times["prescored"],
        prefill_speedup=times["exact"] / times["prescored"],
        exact_attention_seconds=sum(alone.exact),
        prescored_attention_seconds=sum(alone.prescored),
        attention_speedup=sum(alone.exact) / sum(alone.prescored),
        attention_sites_timed=len(alone.exact),
        exact_perplexity=math.exp(exact_loss),
        prescored_perplexity=math.exp(loss),
        perplexity_ratio=math.exp(loss - exact_loss),
        top1_agreement=same.double().mean().item(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        machine=platform.processor() or platform.machine(),
    )


def _teller() -> Callable[[str], None]:
    begin = time.perf_counter()

    def tell(text: str) -> None:
        print(f"[{time.perf_counter() - begin:6.1f} s] {text}", file=sys.stderr, flush=True)

    return tell
