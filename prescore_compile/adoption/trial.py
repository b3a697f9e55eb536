"""``trial``: four questions in the order of what they cost, each answered by measurement on the user's own data."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..backend import fresh, stages
from ..batches import Call, Tell, calls_of, check_model, teller, tensors_in, to_stderr
from ..drift import MEASURES, Drift, Measure, Reference, check_repeats, compared, counted, difference, resolve
from ..kernels.plan import OptionError
from ..passes import REASONS, Config, Report
from ..passes.compat import many_recompiles
from .reading import Reading
from .step import Loss, Ran, Step, apart
from .verdict import STAGES, Stage, Verdict

ALLOWED = {"kl": 0.05, "cosine": 0.01}
"""Drift that is allowed where nothing is said, by measure."""
ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}
"""Relative L2 error of an output that rounding explains, by the dtype of attention: six times and more what models had
(float32 1e-6, float16 3e-4, bfloat16 5e-3)."""
OF_GRADIENTS = 3
"""So many times that is allowed of gradients, whose backward rounds once more (float16 5e-3, bfloat16 8e-3)."""
GRADIENTS = 0.05
"""1 - cosine of the gradients from those of the exact model that is allowed."""
HOLDS = 0.75
"""Share of the rounds in which what is wanted must be gained."""


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
    progress: Tell | None = to_stderr,
    loss: Loss | None = None,
) -> Verdict:
    """Try ``torch.compile(model, backend="prescore", options=options)`` on data, and say whether to adopt it.

    Four stages, the cheap ones first; the first that fails ends the trial:

    1. sites: some attention is rewritten.
    2. same: with the plan that keeps every key, the rewritten model's output is the model's, but for rounding.
    3. quality: the drift of what will run is within ``drift``. Of a causal language model also told: how many of its
       likeliest next tokens stay, and its perplexity on the batches.
    4. speed: what will run is ``faster`` than the model compiled by the inner compiler alone, from end to end: in the
       medians, and in three of four rounds in which both run in turn.

    All runs are without gradients, unless there is a ``loss``. The model runs as it is, compiled or not by
    ``model.compile``, uncompiled where it is compared with. What it writes into itself (a cache in a buffer) stays
    written; Dynamo's caches are cleared afterwards, so that what was compiled before compiles once more.

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
        loss: of an output, a tensor of one number: what is tried is a training step. Then "same" is asked of the
            gradients of the model's parameters, too, "quality" of their direction (1 - cosine of all of them together:
            0.05 is allowed), and "speed" of forward and backward.

    Returns:
        Print it for a table; ``.adopt``, ``.stages``, ``.to_json()``.

    Raises:
        OptionError: an argument that does not hold what is allowed.
        ValueError: the exact model's output is not finite, or it or its gradients differ from run to run; the backward
            changes parameters.
    """
    check_model(model)
    _check(drift, faster, rounds, measure)
    step = Step(model, loss)
    run = _Trial(model, calls_of(batches), Config.from_options(options), measure, teller(progress), step)
    inference = torch.is_inference_mode_enabled() and not step.trains
    with torch.inference_mode(inference), torch.set_grad_enabled(step.trains), many_recompiles():
        try:
            found = run.staged(drift, faster, rounds, every_stage)
        finally:
            torch._dynamo.reset()  # the model's own code objects may have been compiled
    devices = sorted(
        {leaf.device.type for call in run.calls for leaf in tensors_in((call.args, dict(call.kwargs)))}
    ) or ["cpu"]
    about = {"torch": torch.__version__, "device": ", ".join(devices), "threads": torch.get_num_threads()}
    about |= {"runs": "forward and backward"} if step.trains else {}
    return Verdict(tuple(found), repr(run.config), about)


class _Trial:
    """The stages. ``reports``: of each call, known after the first stage."""

    def __init__(
        self,
        model: Callable[..., Any],
        calls: Sequence[Call],
        config: Config,
        measure: str | Measure | None,
        tell: Tell,
        step: Step,
    ) -> None:
        self.model, self.calls, self.config, self.measure, self.tell = model, calls, config, measure, tell
        self.step = step
        self.prescored = _Way(model, step, backend="prescore", options=config)
        self.usual = _Way(model, step, backend=config.inner)
        self.reports: list[Report] = []

    def staged(self, drift: float | None, faster: float, rounds: int, every: bool) -> list[Stage]:
        """The stages up to the first that fails, or all."""
        found: list[Stage] = []
        ask: dict[str, Callable[[], Stage]] = {
            "sites": self.sites,
            "same": self.same,
            "quality": lambda: self.quality(drift),
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
        for call in self.calls:
            own = call.copied()
            self.reports.append(stages(self.model, own.args, own.kwargs, self.config).report)
        expected = [site.gain for report in self.reports for site in report.rewritten if site.gain is not None]
        kept = [dict(Counter(site.reason.partition(":")[0] for site in report.kept)) for report in self.reports]
        evidence = {
            "sites": [len(report.sites) for report in self.reports],
            "rewritten": [len(report.rewritten) for report in self.reports],
            "kept": kept,
            "expected": statistics.median(expected) if expected else None,
        }
        passed = any(report.rewritten for report in self.reports)
        why = [f"{code}: {REASONS.get(code, '')}" for code in dict.fromkeys(code for some in kept for code in some)]
        advice = " ".join(why) or "no attention is in the graphs that torch.compile captures of this call."
        text = "\n".join(dict.fromkeys(report.line() for report in self.reports))
        return Stage("sites", passed, text, evidence, "" if passed else advice)

    def same(self) -> Stage:
        """Of the batch with most rewritten sites, not compiled further: it is the graph that is tried."""
        config = Config.exact(include=self.config.include, exclude=self.config.exclude, inner="eager")
        at = max(range(len(self.calls)), key=lambda i: len(self.reports[i].rewritten))
        call = self.calls[at]
        ran = self.exact(call)
        # Copies: a model may write its next output where this one is.
        reference = Reference(ran.output, call.kwargs, resolve(self.measure, ran.output))
        exact, gradients = [tensor.clone() for tensor in _main(ran.output, call)], ran.gradients
        del ran
        again = self.exact(call)
        check_repeats(reference, again.output, self.tell)
        noise = difference(gradients, again.gradients)[0]
        del reference, again
        other = _Way(self.model, self.step, backend="prescore", options=config)(call)
        error, most, largest = difference(exact, _main(other.output, call))
        dtypes = {str(site.kernel.get("dtype")) for site in self.reports[at].rewritten}
        dtypes |= {str(tensor.dtype)[6:] for tensor in exact}
        allowed = max(ROUNDING.get(dtype, ROUNDING["float32"]) for dtype in dtypes)
        if noise > allowed:
            raise ValueError(
                f"the exact model's gradients differ from run to run, by {noise:.3g} (relative L2): a loss that draws "
                "noise or negatives, or dropout"
            )
        evidence = {"error": error, "allowed": allowed, "largest_difference": most, "largest_value": largest}
        of = f"batch {at + 1}: " if len(self.calls) > 1 else ""
        text = f"{of}error {error:.2g} (relative L2; allowed: {allowed:g}); largest difference {most:.2g}, of values "
        text += f"up to {largest:.3g}"
        passed = error <= allowed
        if self.step.trains:
            turned = difference(gradients, other.gradients)[0]
            evidence |= {"gradients_error": turned, "gradients_allowed": OF_GRADIENTS * allowed}
            text += f"\ngradients: error {turned:.2g} (allowed: {OF_GRADIENTS * allowed:g})"
            passed = passed and turned <= OF_GRADIENTS * allowed
        advice = (
            "either the model amplifies rounding, or the rewriting is wrong: with some modules excluded "
            "(exclude) it can be found which. Please report it, with what --json or to_json() holds."
        )
        return Stage("same", passed, text, evidence | {"batch": at}, "" if passed else advice)

    def quality(self, allowed: float | None) -> Stage:
        total, each, name = Drift(), [], "own"
        losses, turned = [], []
        reading = Reading(self.model, self.reports)
        _warm(self.config.inner)
        for at, call in enumerate(self.calls):
            exact = self.exact(call)
            measure = resolve(self.measure, exact.output)
            name = measure if isinstance(measure, str) else getattr(measure, "__name__", "own")
            reference, read = Reference(exact.output, call.kwargs, measure), reading.of(call, exact.output)
            exact = replace(exact, output=None)
            self.tell(f"  batch {at + 1}/{len(self.calls)}: running prescored")
            other = self.prescored(call)
            now = reference.drift(other.output)
            total += now
            each.append(now.mean)
            reading.add(read, reading.of(call, other.output))
            losses.append((exact.loss, other.loss))
            turned.append(apart(exact.gradients, other.gradients))
            del exact, other
            self.tell(f"  batch {at + 1}/{len(self.calls)}: drift {now.mean:.3g}")
        bound = ALLOWED[name] if allowed is None else allowed
        text = "\n".join(filter(None, (f"drift {total.mean:.3g} ({name}; allowed: {bound:g})", str(reading))))
        evidence = {"drift": total.mean, "measure": name, "allowed": bound, "of_batches": each} | reading.evidence
        passed = total.mean <= bound
        if self.step.trains:
            before, after = (statistics.fmean(of) for of in zip(*losses, strict=True))
            evidence |= {"losses": losses, "gradients": turned, "gradients_allowed": GRADIENTS}
            text += f"\ngradients {max(turned):.3g} apart (1 - cosine; allowed: {GRADIENTS}); loss {before:.4g} -> "
            text += f"{after:.4g}"
            passed = passed and max(turned) <= GRADIENTS
        advice = (
            "a smaller share (option share=0.0005 reads more), a plan for each site (prescore calibrate --drift), or "
            "the sites that matter most kept exact (option exclude)."
        )
        return Stage("quality", passed, text, evidence, "" if passed else advice)

    def speed(self, wanted: float, rounds: int) -> Stage:
        ways = {"inductor" if self.config.inner == "inductor" else "inner": self.usual, "prescore": self.prescored}
        usual = next(iter(ways))
        for name, way in ways.items():
            self.tell(f"  warming up: {name}")
            for _ in range(2):  # a second length makes sizes dynamic, and compiles once more
                for call in self.calls:
                    way(call)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds):
            for name in list(ways)[:: 1 if turn % 2 else -1]:
                times[name].append(sum(ways[name].timed(call) for call in self.calls))
            seconds = ", ".join(f"{name} {found[-1]:.3g} s" for name, found in times.items())
            self.tell(f"  round {turn + 1}/{rounds}: {seconds}")
        ratios = [a / b for a, b in zip(*times.values(), strict=True)]
        before, after = (statistics.median(found) for found in times.values())
        held = sum(ratio >= wanted for ratio in ratios)
        passed = before / after >= wanted and held >= HOLDS * rounds
        first = ", ".join(f"{name} {way.first:.3g} s" for name, way in ways.items())
        text = (
            f"{before / after:.2f}x as fast: {usual} {before:.3g} s, prescore {after:.3g} s\n"
            f"wanted: {wanted:g}x, held in {held} of {rounds} rounds ({min(ratios):.2f}x to {max(ratios):.2f}x)\n"
            f"first calls, with compiling: {first}"
        )
        evidence = {"faster": before / after, "wanted": wanted, "held": held, "ratios": ratios, "seconds": times} | {
            "first_calls": {name: way.first for name, way in ways.items()}
        }
        advice = (
            "what attention takes of the whole decides what can be gained, and it grows with the length. prescore "
            "explain tells the expected gain of each site. Where rounds disagree, ask for more of them (rounds)."
        )
        return Stage("speed", passed, text, evidence, "" if passed else advice)

    def exact(self, call: Call) -> Ran:
        own = call.copied()
        with torch.compiler.set_stance("force_eager"):
            return self.step.of(self.model(*own.args, **own.kwargs))


class _Way:
    """The model compiled in one way, with a code object of its own. ``first``: seconds of its first call."""

    def __init__(self, model: Callable[..., Any], step: Step, **how: Any) -> None:
        call, self.args, self.kwargs = fresh(model, (), {})
        self.compiled, self.step = torch.compile(call, **how), step
        self.first = math.nan

    def __call__(self, call: Call) -> Ran:
        own, begin = call.copied(), time.perf_counter()
        ran = self._run(own)
        if math.isnan(self.first):
            _finished()
            self.first = time.perf_counter() - begin
        return ran

    def timed(self, call: Call) -> float:
        """Seconds of a call, with its copy made before."""
        own = call.copied()
        _finished()
        begin = time.perf_counter()
        self._run(own)
        _finished()
        return time.perf_counter() - begin

    def _run(self, own: Call) -> Ran:
        return self.step.of(self.compiled(*self.args, *own.args, **self.kwargs, **own.kwargs))


def _check(drift: object, faster: object, rounds: object, measure: object) -> None:
    for name, value in (("drift", drift), ("faster", faster)):
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (name == "drift" and value is None) and not (known and 0 <= value < math.inf):  # type: ignore[operator]
            raise OptionError(name, value, "a number, 0 or more")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise OptionError("rounds", rounds, "an int, 1 or more")
    if callable(measure) and drift is None:
        raise OptionError("drift", drift, "a number, beside a measure of one's own")
    if measure is not None and not callable(measure) and measure not in ALLOWED:
        raise OptionError("measure", measure, MEASURES)


def _main(output: Any, call: Call) -> list[torch.Tensor]:
    """What of an output is compared, without what is padded; all of its tensors where there is no such."""
    try:
        tensor = compared(output)
    except ValueError:
        leaves = [leaf.detach() for leaf in tensors_in(output)]
        if not leaves:
            raise
        return leaves
    rows = counted(tensor, call.kwargs)
    return [tensor if bool(rows.all()) else tensor[rows]]


def _warm(inner: Any) -> None:
    """Start the inner compiler, so that the first of two ways does not pay for it."""
    torch.compile(lambda x: x + 1, backend=inner)(torch.zeros(8))


def _finished() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
