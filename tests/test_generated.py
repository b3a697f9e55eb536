"""Thousands of generated programs: attention is found and stays right, lookalikes are left alone.

A failure prints its case, shrunk; ``check(Case(...))`` or ``check_lookalike(Lookalike(...))`` runs it again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import generate_disguises  # noqa: F401
import pytest
import torch
from conftest import check_budget
from generate import Case, axes, cases, data, inputs, reference
from generate_graphs import KINDS, rewritten, seeded
from generate_lookalikes import NEVER, NUMERICS, Lookalike, Looks, lookalike_axes, lookalike_inputs, lookalikes
from generate_written import written
from hypothesis import HealthCheck, given, seed, settings
from torch import Tensor

from prescore_compile.passes import REASONS

CHUNKS, CASES = 10, 200  # distinct cases: together 2000 of attention and as many lookalikes
DRAWS = 400  # hypothesis repeats itself, so that a chunk has CASES distinct ones


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Tiny tensors are slower on many threads, and pytest would keep all that torch logs of its compilers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def each(strategy: Any, chunk: int, check: Callable[[Any], None]) -> None:
    """Check CASES distinct cases of a chunk, always the same ones."""
    passed: set[Any] = set()

    @seed(chunk)
    @settings(max_examples=DRAWS, deadline=None, derandomize=True, database=None, print_blob=False,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def run(case: Any) -> None:
        if case not in passed and len(passed) < CASES:
            check(case)
            passed.add(case)

    run()
    assert len(passed) == CASES, f"only {len(passed)} distinct cases in {DRAWS} draws"


def drawn(strategy: Any) -> list[Any]:
    """The cases of all chunks."""
    found: list[Any] = []
    for chunk in range(CHUNKS):
        each(strategy, chunk, found.append)
    return found


def close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    """Equal, but for rounding."""
    if isinstance(want, tuple | list):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            close(g, w, tolerance)
    else:
        size = max(1.0, want.double().abs().nan_to_num(0.0, 0.0, 0.0).max().item()) if want.numel() else 1.0
        torch.testing.assert_close(got, want, atol=tolerance * size, rtol=tolerance, equal_nan=True)


def check(case: Case) -> None:
    """Attention: one site a layer, with a reason if it is kept, and exact if it is rewritten."""
    program = written(case)
    runs = [inputs(case, data(case, 0)), inputs(case, data(case, 1, longer=3 if case.dynamic else 0))]
    outs, reports = rewritten(program, runs, case.kind, case.dynamic, axes(case))
    for sites in reports:
        assert len(sites) == case.layers, f"{len(sites)} sites, {case.layers} attentions"
        for site in sites:
            assert site.decision == "rewrite" or site.reason.partition(":")[0] in REASONS, site.reason
            assert site.decision == "rewrite" or not case.must, site.reason
    for run, out in zip(runs, outs, strict=True):
        check_same(case, out, program(*(x.clone() for x in run)), run)


def check_same(case: Case, out: Tensor, want: Tensor, run: tuple[Tensor, ...]) -> None:
    if case.dtype == "bfloat16":
        double = [x.double() if x.is_floating_point() else x for x in run]
        true = written(case).in_double()(*double)
        known = ~true.isnan()
        assert out.dtype == want.dtype and (out.isnan() <= ~known).all()
        return check_budget(out[known], want[known], true[known])
    if case.empty:  # where there is no key, NaN is what nobody relies on
        out = torch.where(want.isnan(), want, out)
    close(out, want)


def check_lookalike(case: Lookalike) -> None:
    """Right, whatever is decided, and not rewritten where that could not be right."""
    program = Looks(case).eval()
    runs = [lookalike_inputs(case, 0), lookalike_inputs(case, 1, longer=3 if case.dynamic else 0)]
    with torch.random.fork_rng(devices=[]):
        wants = [seeded(program, tuple(x.clone() for x in run)) for run in runs]
    outs, reports = rewritten(program, runs, case.kind, case.dynamic, lookalike_axes(case))
    for out, want in zip(outs, wants, strict=True):
        close(out, want, 0.05 if "rounded" in case.name else 2e-5)  # without what the program itself rounds
    if case.name in NEVER:
        assert not [site.source for sites in reports for site in sites if site.decision == "rewrite"], "rewritten"
    for sites in reports:
        for site in sites:
            assert site.decision == "rewrite" or site.reason.partition(":")[0] in REASONS, site.reason


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_attention_is_found_and_stays_right(chunk: int) -> None:
    each(cases(), chunk, check)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_lookalikes_are_left_alone(chunk: int) -> None:
    each(lookalikes(), chunk, check_lookalike)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_the_programs_mean_what_their_cases_say(chunk: int) -> None:
    """Against plain index notation, in float64, without any compiler."""

    def mean(case: Case) -> None:
        case = replace(case, dtype="float64")
        program = written(case)
        for longer in (0, 3) if case.dynamic else (0,):
            at = data(case, 0, longer)
            torch.testing.assert_close(program(*inputs(case, at)), reference(program, at), atol=1e-5, rtol=1e-5)

    each(cases(), chunk, mean)


CHOICES = {
    "kind": "symbolic dynamo export decomposed",
    "dynamic": "all length",
    "dtype": "float32 bfloat16 float64",
    "form": "bhnd bnhd folded bnd grouped windows",
    "source": "form seq linear chunk split unbind",
    "kv_heads": "same half one",
    "repeat": "none repeat_interleave method expand flatten grouped broadcast",
    "query_stored": "nd dn",
    "key_stored": "nd dn early",
    "value_stored": "same seq",
    "scale": "none after q k both alpha",
    "scale_form": "shape math constant tensor buffer",
    "softcap": "none functions methods",
    "bias": "none relative alibi",
    "mask": "none causal padding causal+padding offset window chunked prefix documents window+padding prefix+padding "
    "causal+documents",
    "index": "aranges commuted tril triu new_ones buffer",
    "padding": "bool int",
    "combine": "and separate",
    "rank": "least full",
    "fold": "unfold expand",
    "apply": "masked_fill where masked_fill_ Tensor.where add_ torch.add is_causal",
    "floats": "where masked_fill full",
    "fill": "-inf min -1e9",
    "softmax": "F.softmax torch.softmax method module positive float32 float",
    "row_max": "none amax max",
    "dropout": "none module",
    "score": "@ torch.matmul Tensor.matmul einsum torch.bmm Tensor.bmm baddbmm Tensor.baddbmm kq",
    "value": "@ torch.matmul Tensor.matmul einsum torch.bmm Tensor.bmm baddbmm vp",
    "out": "none merge view proj",
}
SPACED = {
    "sizes": ("distinct", "n = h = d", "b = n = h = d", "batch 1", "one head", "longer", "n = d"),
    "transpose": ("transpose(-1, -2)", "mT", "swapaxes", "permute", "transpose", "rearrange"),
    "scale": ("after mask",),
    "scale_how": ("mul", "div", "in place", "commuted"),
    "apply": ("where swapped", "s + m", "m + s", "s += m", "add out"),
    "floats": ("one minus",),
    "score": ("einsum ...",),
    "value": ("einsum ...", "einsum to seq"),
    "dropout": ("p = 0", "not training"),
    "sdpa": (True, False),
    "cross": (True, False),
    "value_dim": (True, False),
    "empty": (True, False),
    "layers": (1, 2),
    "must": (True, False),
}
LEAST = 10


def test_every_choice_occurs() -> None:
    found = drawn(cases())
    assert len(found) == CHUNKS * CASES
    wanted = [(name, value) for name, values in CHOICES.items() for value in values.split()]
    wanted += [(name, value) for name, values in SPACED.items() for value in values]
    counts = Counter((name, getattr(case, name)) for case in found for name in {name for name, _ in wanted})
    assert not {choice: counts[choice] for choice in wanted if counts[choice] < LEAST}
    unlisted = {choice for choice in counts if choice not in wanted and choice != ("dynamic", "")}
    assert not unlisted, "choices that this test does not list"
    assert {f.name for f in fields(Case)} == {name for name, _ in wanted} - {"must"}
    forms = {(case.kind, case.form) for case in found if not case.sdpa}
    assert len(forms) == len(KINDS) * len(CHOICES["form"].split())


def test_every_lookalike_occurs() -> None:
    found = drawn(lookalikes())
    counts = Counter(case.name for case in found)
    assert not {name: counts[name] for name in (*NEVER, *NUMERICS) if counts[name] < 2}
    assert {(case.kind, case.mask) for case in found} == {(k, m) for k in KINDS for m in ("none", "causal", "padding")}
