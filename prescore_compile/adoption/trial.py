"""``trial``: four questions in the order of what they cost, each answered by measurement on the user's own data."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..backend import fresh, stages
from ..batches import Call, Tell, calls_of, check_model, teller, told
from ..drift import NOISE, Drift, Measure, Reference, check_repeats, compared, counted, resolve
from ..kernels.plan import OptionError
from ..passes import Config, Report
from ..passes.compat import many_recompiles
from ..tokens import next_tokens
from .verdict import STAGES, Stage, Verdict

ALLOWED = {"kl": 0.05, "cosine": 0.01}
"""Drift that is allowed where nothing is said, by measure."""
SAME = {torch.float32: NOISE, torch.float64: NOISE}
"""Drift that rounding explains, where every key is kept."""
Reading = tuple[torch.Tensor, torch.Tensor]
"""Losses and likeliest next tokens."""
SAME_HALF = 1e-2
"""The same of outputs in 16 bits."""


def trial(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    drift: float | None = None,
    faster: float = 1.1,
    options: Mapping[str, Any] | Config | None = None,
    measure: str | Measure | None = None,
    rounds: int = 5,
    every_stage: bool = False,
    progress: Tell | None = told,
) -> Verdict:
    """Try ``torch.compile(model, backend="prescore", options=options)`` on data, and say whether to adopt it.

    Four stages, the cheap ones first; the first that fails ends the trial:

    1. sites: some attention is rewritten.
    2. same: with the plan that keeps every key, the rewritten model's output is the model's, but for rounding.
    3. quality: the drift of what will run is within ``drift``. Of a language model also told: how many of its likeliest
       next tokens stay, and its perplexity on the batches.
    4. speed: what will run is ``faster`` than the model compiled by the same inner compiler, from end to end, in the
       median of rounds in which both run in turn.

    Args:
        model: a module in eval mode, or a function. Its output must depend on its input alone.
        batches: what it is called with: each a tensor, a tuple of positional or a dict of keyword arguments, of the
            lengths that will be run. Each run is given a copy.
        drift: the mean drift that is allowed; by default 0.05 nats a position (``measure="kl"``) or 0.01 ("cosine").
        faster: how many times as fast it must be.
        options: as for ``torch.compile``.
        measure: what drift is, as for ``calibrate``; a function of one's own needs ``drift``.
        rounds: in which time is measured.
        every_stage: go on after a stage that failed.
        progress: told a line at a time what goes on; None: silent.

    Returns:
        Print it for a table; ``.adopt``, ``.stages``, ``.to_json()``.

    Raises:
        OptionError: an argument that does not hold what is allowed.
        ValueError: the exact model's output is not finite, or differs from run to run.
    """
    check_model(model)
    run = _Trial(model, calls_of(batches), Config.from_options(options), teller(progress))
    _check(drift, faster, rounds, measure)
    with torch.no_grad(), many_recompiles():
        try:
            found = run.staged(drift, faster, measure, rounds, every_stage)
        finally:
            torch._dynamo.reset()  # the model's own code objects may have been compiled
    devices = sorted({leaf.device.type for call in run.calls for leaf in _tensors(call)}) or ["cpu"]
    about = {"torch": torch.__version__, "device": ", ".join(devices), "threads": torch.get_num_threads()}
    return Verdict(tuple(found), repr(run.config), about)


class _Trial:
    def __init__(self, model: Callable[..., Any], calls: Sequence[Call], config: Config, tell: Tell) -> None:
        self.model, self.calls, self.config, self.tell = model, calls, config, tell
        self.prescored = _Way(model, backend="prescore", options=config)
        self.usual = _Way(model, backend=config.inner)

    def staged(
        self, drift: float | None, faster: float, measure: str | Measure | None, rounds: int, every: bool
    ) -> list[Stage]:
        """The stages up to the first that fails, or all."""
        found: list[Stage] = []
        ask: dict[str, Callable[[], Stage]] = {
            "sites": self.sites,
            "same": lambda: self.same(measure),
            "quality": lambda: self.quality(measure, drift),
            "speed": lambda: self.speed(faster, rounds),
        }
        for at, (name, question) in enumerate(STAGES.items()):
            self.tell(f"[{at + 1}/{len(STAGES)}] {name}: {question}")
            found.append(ask[name]())
            self.tell(f"  {'passed' if found[-1].passed else 'failed'}: {found[-1].found.splitlines()[0]}")
            if not found[-1].passed and not every:
                break
        return found

    def sites(self) -> Stage:
        reports = []
        for call in self.calls:
            own = call.copied()
            reports.append(stages(self.model, own.args, own.kwargs, self.config).report)
        lines = list(dict.fromkeys(report.line() for report in reports))
        expected = [site.gain for report in reports for site in report.rewritten if site.gain is not None]
        evidence = {
            "sites": [len(report.sites) for report in reports],
            "rewritten": [len(report.rewritten) for report in reports],
            "kept": [_reasons(report) for report in reports],
            "expected": statistics.median(expected) if expected else None,
        }
        passed = any(report.rewritten for report in reports)
        advice = "" if passed else "`prescore explain` says at which line of the model each condition failed."
        return Stage("sites", passed, "\n".join(lines), evidence, advice)

    def same(self, measure: str | Measure | None) -> Stage:
        """Of the first batch, not compiled further: it is the graph that is tried."""
        config = Config.exact(include=self.config.include, exclude=self.config.exclude, inner="eager")
        call = self.calls[0]
        output, again = self.exact(call), self.exact(call)
        # A measure of one's own has a scale of its own.
        usual = Reference(output, call.kwargs, resolve(None if callable(measure) else measure, output))
        check_repeats(usual, again, self.tell)
        if callable(measure):
            check_repeats(Reference(output, call.kwargs, measure), again, self.tell)
        kept = _Way(self.model, backend="prescore", options=config)(call)
        found, (most, scale) = usual.drift(kept).mean, _difference(compared(output), compared(kept))
        allowed = SAME.get(compared(output).dtype, SAME_HALF)
        evidence = {"drift": found, "allowed": allowed, "largest_difference": most, "largest_value": scale}
        text = f"drift {found:.2g} (allowed: {allowed:g}); largest difference {most:.2g}, of values up to {scale:.3g}"
        advice = (
            "either the model amplifies rounding, or the rewriting is wrong: exclude=[...] finds the module. "
            "Please report it."
        )
        passed = found <= allowed
        return Stage("same", passed, text, evidence, "" if passed else advice)

    def quality(self, measure: str | Measure | None, allowed: float | None) -> Stage:
        total, each, text = Drift(), [], _Text()
        name = measure
        for at, call in enumerate(self.calls):
            output = self.exact(call)
            name = resolve(measure, output)
            reference, mine = Reference(output, call.kwargs, name), text.of(call, output)
            del output
            self.tell(f"  batch {at + 1}/{len(self.calls)}: running prescored")
            other = self.prescored(call)
            now = reference.drift(other)
            total += now
            each.append(now.mean)
            text.add(mine, text.of(call, other))
            self.tell(f"  batch {at + 1}/{len(self.calls)}: drift {now.mean:.3g}")
        shown = name if isinstance(name, str) else getattr(name, "__name__", "own")
        bound = ALLOWED[shown] if allowed is None else allowed
        found = f"drift {total.mean:.3g} ({shown}; allowed: {bound:g})"
        evidence = {"drift": total.mean, "measure": shown, "allowed": bound, "of_batches": each} | text.evidence
        advice = (
            "a larger budget (options={'share': 0.0005}), a plan for each site (`prescore calibrate --drift`), or the "
            "sites that matter most kept exact (exclude)."
        )
        passed = total.mean <= bound
        return Stage("quality", passed, found + text.told, evidence, "" if passed else advice)

    def speed(self, wanted: float, rounds: int) -> Stage:
        ways = {"usual": self.usual, "prescored": self.prescored}
        for name, way in ways.items():
            self.tell(f"  compiling and warming up: {name}")
            for _ in range(2):  # a second length makes sizes dynamic, and compiles once more
                for call in self.calls:
                    way(call)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds):
            for name in list(ways)[:: 1 if turn % 2 else -1]:
                times[name].append(sum(ways[name].timed(call) for call in self.calls))
            seconds = ", ".join(f"{name} {found[-1]:.3g} s" for name, found in times.items())
            self.tell(f"  round {turn + 1}/{rounds}: {seconds}")
        ratios = [a / b for a, b in zip(times["usual"], times["prescored"], strict=True)]
        ratio = statistics.median(ratios)
        usual, mine = (statistics.median(found) for found in times.values())
        text = (
            f"{ratio:.2f}x as fast ({min(ratios):.2f}x to {max(ratios):.2f}x in {rounds} rounds; wanted: {wanted:g}x): "
            f"{usual:.3g} s, prescored {mine:.3g} s\n"
            f"first calls, with compiling: {self.usual.first:.3g} s, prescored {self.prescored.first:.3g} s"
        )
        evidence = {"faster": ratio, "wanted": wanted, "ratios": ratios, "seconds": times} | {
            "first_calls": {name: way.first for name, way in ways.items()}
        }
        advice = (
            "what attention takes of the whole decides what can be gained, and it grows with the length. "
            "`prescore explain` tells the expected gain of each site."
        )
        passed = ratio >= wanted
        return Stage("speed", passed, text, evidence, "" if passed else advice)

    def exact(self, call: Call) -> Any:
        own = call.copied()
        return self.model(*own.args, **own.kwargs)


class _Way:
    """The model compiled in one way, with a code object of its own. ``first``: seconds of its first call."""

    def __init__(self, model: Callable[..., Any], **how: Any) -> None:
        call, self.args, self.kwargs = fresh(model, (), {})
        self.compiled = torch.compile(call, **how)
        self.first = math.nan

    def __call__(self, call: Call) -> Any:
        own, begin = call.copied(), time.perf_counter()
        output = self.compiled(*self.args, *own.args, **self.kwargs, **own.kwargs)
        if math.isnan(self.first):
            _finished()
            self.first = time.perf_counter() - begin
        return output

    def timed(self, call: Call) -> float:
        """Seconds of a call, with its copy made before."""
        own = call.copied()
        _finished()
        begin = time.perf_counter()
        self.compiled(*self.args, *own.args, **self.kwargs, **own.kwargs)
        _finished()
        return time.perf_counter() - begin


class _Text:
    """How a language model reads: of the batches that have its tokens, losses and likeliest tokens of both."""

    def __init__(self) -> None:
        self.losses, self.exact_losses, self.same, self.count = 0.0, 0.0, 0, 0

    def of(self, call: Call, output: Any) -> Reading | None:
        """Losses and likeliest tokens of an output that is logits of the batch's own tokens."""
        logits = compared(output)
        shape = logits.shape[:2]
        given = [call.kwargs.get("input_ids"), *call.args[:1]]
        ids = next((t for t in given if isinstance(t, torch.Tensor) and t.dtype == torch.int64), None)
        if logits.dim() != 3 or ids is None or ids.shape != shape or not ids.numel() or ids.max() >= logits.shape[2]:
            return None
        return next_tokens(logits, ids.to(logits.device), counted(logits, call.kwargs))

    def add(self, exact: Reading | None, other: Reading | None) -> None:
        if exact is not None and other is not None:
            self.exact_losses += exact[0].double().sum().item()
            self.losses += other[0].double().sum().item()
            self.same += int((exact[1] == other[1]).sum())
            self.count += len(exact[0])

    @property
    def evidence(self) -> dict[str, Any]:
        if not self.count:
            return {}
        before, after = (math.exp(total / self.count) for total in (self.exact_losses, self.losses))
        agree = self.same / self.count
        return {"top1_agreement": agree, "exact_perplexity": before, "perplexity": after}

    @property
    def told(self) -> str:
        found = self.evidence
        if not found:
            return ""
        ratio = found["perplexity"] / found["exact_perplexity"]
        return (
            f"\ntop-1 agreement {100 * found['top1_agreement']:.1f}%; perplexity {found['exact_perplexity']:.4g} -> "
            f"{found['perplexity']:.4g} ({ratio:.4f}x)"
        )


def _check(drift: object, faster: object, rounds: object, measure: object) -> None:
    for name, value, least in (("drift", drift, 0.0), ("faster", faster, 0.0)):
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (name == "drift" and value is None) and not (known and least <= value < math.inf):  # type: ignore[operator]
            raise OptionError(name, value, "a number, 0 or more")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise OptionError("rounds", rounds, "an int, 1 or more")
    if callable(measure) and drift is None:
        raise OptionError("drift", drift, "a number, beside a measure of one's own")


def _reasons(report: Report) -> dict[str, int]:
    found: dict[str, int] = {}
    for site in report.kept:
        code = site.reason.partition(":")[0]
        found[code] = found.get(code, 0) + 1
    return found


def _difference(exact: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """The largest difference, and the largest value; what is infinite in both alike does not differ."""
    exact, other = exact.double(), other.double()
    apart = torch.where(exact == other, 0.0, (exact - other).abs())
    finite = exact.abs()[exact.isfinite()]
    return (apart.max().item(), finite.max().item()) if finite.numel() else (math.nan, math.nan)


def _finished() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _tensors(call: Call) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves((call.args, dict(call.kwargs))) if isinstance(leaf, torch.Tensor)]
