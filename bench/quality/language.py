"""The language-model part: perplexity on whole texts, copies and planted facts at a distance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from prescore_compile import smollm

from .methods import Method, Planned, exact
from .model import Compared, compare, context, hidden, tail
from .store import Store
from .texts import CHOSEN_ON, HELD_OUT, TEXTS, Recall, copied, planted

SKIPPED = 1024
"""Positions that are not scored: there every method is nearly exact."""


def run_text(
    store: Store,
    model: Any,
    tokenizer: Any,
    name: str,
    length: int,
    methods: Iterable[Method],
    draw: int = 0,
    label: str | None = None,
) -> None:
    """All methods on one text: the whole model with every attention replaced; ``label``: what the text is called."""
    todo = [(m, _key("text", label or name, m, draw)) for m in methods]
    todo = [(method, key) for method, key in todo if store.find(**key) is None]
    if not todo:
        return
    ids = smollm.token_ids(tokenizer, TEXTS[name](), length)
    before = hidden(model, ids, exact)
    for method, key in todo:

        def run(method: Method = method) -> dict[str, Any]:
            # A plan that counts what it spends counts this text alone.
            attend = Planned(method.attend.plan) if isinstance(method.attend, Planned) else method.attend
            after = hidden(model, ids, attend)
            found = told(compare(model, before[SKIPPED:-1], after[SKIPPED:-1], ids[0, SKIPPED + 1 :]))
            if isinstance(attend, Planned) and attend.plan.share:
                found["spent"] = attend.density(length)
            return found

        store.measure(key, run)


def run_recall(store: Store, model: Any, task: str, recall: Recall, methods: list[Method], draw: int = 0) -> None:
    """All methods on one tail whose context was read exactly."""
    keys = [_key("recall", task, m, draw) for m in methods]
    if all(store.find(**key) for key in keys):
        return
    before = context(model, recall.ids[:, : recall.first], exact)
    rest = recall.ids[:, recall.first :]
    want = tail(model, rest, before, exact)
    # The state at a position predicts the next token.
    at = recall.scored[recall.first :].nonzero()[:, 0]
    for key, method in zip(keys, methods, strict=True):

        def run(method: Method = method) -> dict[str, Any]:
            got = tail(model, rest, before, method.attend)
            return told(compare(model, want[at - 1], got[at - 1], rest[0, at]))

        store.measure(key, run)


def _key(part: str, text: str, method: Method, draw: int) -> dict[str, Any]:
    key = {"part": part, "text": text, "method": method.name, "density": round(method.density, 4)}
    return key | ({"draw": draw} if draw else {})


def told(found: Compared) -> dict[str, Any]:
    return {"ratio": math.exp(found.loss - found.exact_loss)} | asdict(found)


def check(model: Any, tokenizer: Any) -> None:
    """The replacement itself must not change the model: exact against the untouched model, and tails likewise.

    Raises:
        AssertionError: it does.
    """
    ids = smollm.token_ids(tokenizer, smollm.topics(), 640)
    with torch.no_grad():
        want = model.model(ids, use_cache=False).last_hidden_state[0]
    whole = hidden(model, ids, exact)
    before = context(model, ids[:, :512], exact)
    part = tail(model, ids[:, 512:], before, exact)
    for got, wanted in ((whole, want), (part, want[512:])):
        off = ((got - wanted).norm() / wanted.norm()).item()
        assert off < 1e-4, f"replacing attention by itself moved the model's output by {off:.2g}"


def tasks(tokenizer: Any, length: int, names: Iterable[str], draw: int = 0) -> dict[str, Recall]:
    """For each text: copies from two depths, and 24 facts planted in it; each ``draw`` has others."""
    texts = (*HELD_OUT, *CHOSEN_ON)
    found = {}
    for name in names:
        found[f"copy {name}"] = copied(tokenizer, name, length, draw)
        found[f"facts {name}"] = planted(tokenizer, name, length, texts.index(name) + len(texts) * draw)
    return found
