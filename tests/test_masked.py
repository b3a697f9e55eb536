"""Masks that are not understood, but are there: read as they come on a CPU, and what they hide is skipped."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from conftest import check_budget, in_double, operands

from bench import masks
from prescore_compile import Config, explain
from prescore_compile.calibration import calibrate
from prescore_compile.kernels import cpu, library, masked, ops
from prescore_compile.kernels.band import B, H, K, Q
from prescore_compile.kernels.logits import Logits, parse
from prescore_compile.kernels.plan import WHOLE, Plan
from prescore_compile.kernels.reads import Read, digits
from prescore_compile.kernels.reference import Operands
from prescore_compile.passes import rewrite

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler")
N = 150
EVERY = "softcap 0.0; add 0; where Ne(t00(b, h, q, k), 0)"


def near(length: int, width: int) -> torch.Tensor:
    at = torch.arange(length)
    return (at[:, None] - at).abs() <= width


def documents(length: int) -> torch.Tensor:
    of = torch.arange(length) // 37
    return of[:, None] == of


# Masks [B or 1, H or 1, Nq, Nk] of two batches, 6 heads and N keys.
MASKS: dict[str, Callable[[], torch.Tensor]] = {
    "near": lambda: near(N, 5)[None, None],
    "documents": lambda: documents(N)[None, None],
    "first and near": lambda: (near(N, 7) | (torch.arange(N) < 3))[None, None],
    "few": lambda: torch.rand(1, 1, N, N) < 0.03,
    "of batches": lambda: torch.rand(2, 1, N, N) < 0.03,
    "of heads": lambda: torch.rand(1, 6, N, N) < torch.tensor([0.3, 0.01, 0.0, 0.0, 0.2, 0.01])[:, None, None],
    "of all": lambda: torch.rand(2, 6, N, N) < 0.3,
    "half": lambda: torch.rand(2, 1, N, N) < 0.5,
    "of queries": lambda: torch.rand(2, 1, N, 1) < 0.5,
    "of keys": lambda: torch.rand(2, 1, 1, N) < 0.1,
    "no key": lambda: torch.zeros(1, 1, N, N, dtype=torch.bool),
    "every key": lambda: torch.ones(1, 1, N, N, dtype=torch.bool),
    "turned": lambda: torch.rand(1, 1, N, N).lt(0.1).mT,
    "a part": lambda: torch.rand(2, 3, 2 * N, 3 * N).lt(0.1)[:, 1:2, 5 : 5 + N, 7 : 7 + N],
    "bytes": lambda: (torch.randint(0, 256, (1, 1, N, N), dtype=torch.uint8) & 0xC4).view(torch.bool),
}


def by_mask(site: Operands, mask: torch.Tensor, softcap: float = 0.0) -> torch.Tensor:
    """Through the operator, as the pass inserts it."""
    axes = (symbol if size > 1 else 0 for symbol, size in zip((B, H, Q, K), mask.shape, strict=True))
    logits = Logits(parse(EVERY).allowed.subs(dict(zip((B, H, Q, K), axes, strict=True))), softcap=softcap)
    return ops.prescored(site, WHOLE, logits, {"t00": mask})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MASKS)
def test_the_mask_is_what_it_says(name: str, dtype: torch.dtype) -> None:
    site, mask = operands(N, heads=6, dim=20, value_dim=24, causal=False, dtype=dtype), MASKS[name]()
    for given in (site, site._replace(causal=True, valid=torch.rand(2, N) > 0.1)):
        check_budget(by_mask(given, mask), by_reference(given, mask), by_reference(in_double(given), mask), times=4)


def by_reference(site: Operands, mask: torch.Tensor) -> torch.Tensor:
    seen = mask != 0
    if site.valid is not None:
        seen = seen & site.valid[:, None, None]
    if site.causal:
        seen = seen & torch.ones(N, N, dtype=torch.bool).tril()
    key, value = (t.repeat_interleave(3, 1) for t in (site.key, site.value))
    logits = (site.query @ key.mT * site.scale).masked_fill(~seen, -math.inf)
    return logits.softmax(-1).nan_to_num() @ value


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("queries", "keys"), [(1, N), (40, N), (N, 7), (129, 64), (N, 1)])
def test_other_lengths_sinks_and_softcaps(queries: int, keys: int, softcap: float) -> None:
    site = operands(N, causal=False)
    site = Operands(site.query[:, :, :queries], site.key[:, :, :keys], site.value[:, :, :keys], None, False, 0.25)
    site = site._replace(sink_logit=torch.randn(2, 4, queries) if softcap else None)
    mask = torch.rand(2, 1, queries, keys) < 0.2
    out, want = by_mask(site, mask, softcap), by_mask(in_double(site), mask, softcap)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_hidden_does_not_change_a_bit(dtype: torch.dtype) -> None:
    mask = (near(600, 9) & (torch.rand(600, 600) < 0.6))[None, None]  # one that is not left to SDPA
    site = operands(600, causal=False, dtype=dtype)
    before = by_mask(site, mask)
    changed = site._replace(key=site.key.clone(), value=site.value.clone())
    changed.key[:, :, 77], changed.value[:, :, 77] = math.nan, math.inf
    after, blind = by_mask(changed, mask), ~mask[0, 0, :, 77]
    assert torch.equal(after[:, :, blind], before[:, :, blind]) and after[:, :, ~blind].isnan().all()


@pytest.mark.parametrize("name", MASKS)
def test_the_share_that_is_not_skipped(name: str) -> None:
    mask, tile = MASKS[name](), 32
    sizes = torch.Size((2, 6, N, 16)), torch.Size((2, 2, N, 16))
    wide = F.pad((mask != 0).expand(-1, -1, N, N), (0, -N % 64, 0, -N % tile))
    want = wide.unflatten(3, (-1, 64)).unflatten(2, (-1, tile)).any(5).any(3).double().mean()
    assert cpu.share(mask, *sizes, tile) == pytest.approx(want.item())


def test_what_hides_little_is_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(cpu, "attend", lambda *_, **__: called.append(1))
    site = operands(300, causal=False)
    for mask, ours in ((torch.ones(300, 300).tril(), False), (near(300, 3), True), (torch.rand(300, 300) < 0.9, False)):
        called.clear()
        allowed = mask.bool()[None, None]
        seen = masked.see([Read("t00", (0, 0, Q, K), "allowed")], {"t00": allowed}, torch.float32)
        out = masked.attend(site, Any, Any, WHOLE, seen, 0.0)  # type: ignore[arg-type]
        assert bool(called) == ours
        if not ours:
            want = F.scaled_dot_product_attention(*site[:3], allowed, scale=site.scale, enable_gqa=True)
            assert torch.equal(out, want) and out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_numbers(name: str, dtype: torch.dtype) -> None:
    """Hiding as a bool one does, where each query has a key; as a number, where a query has none."""
    site, hidden = operands(N, causal=False, dtype=dtype), MASKS[name]() == 0
    hidden = hidden if hidden.shape[1] == 1 else hidden[:, :1]
    for number in (torch.finfo(dtype).min, -math.inf):
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, number)
        key, value = (t.repeat_interleave(2, 1) for t in (site.key, site.value))
        given = [t.double() for t in (site.query, key, value, mask)]
        out, want = plus(site, mask), F.scaled_dot_product_attention(*given, scale=site.scale)
        torch.testing.assert_close(out.double(), want, atol=2e-2 if dtype.itemsize == 2 else 1e-5, rtol=2e-2)


def plus(site: Operands, mask: torch.Tensor) -> torch.Tensor:
    axes = (str(symbol) if size > 1 else "0" for symbol, size in zip((B, H, Q, K), mask.shape, strict=True))
    return ops.prescored(site, WHOLE, parse(f"softcap 0.0; add t00({', '.join(axes)}); where True"), {"t00": mask})


@pytest.mark.parametrize("number", [torch.finfo(torch.float32).min, -math.inf])
@pytest.mark.parametrize("batch", [1, 2])
def test_numbers_that_leave_some_queries_no_key(batch: int, number: float) -> None:
    """As on the left of a padded batch: SDPA attends these queries, the kernel the others."""
    site, hidden = operands(600, causal=False), ~near(600, 20).tril().expand(batch, 1, -1, -1)
    hidden = hidden | (torch.arange(600) < torch.tensor([70, 30])[:batch].view(-1, 1, 1, 1))
    mask = torch.zeros(hidden.shape).masked_fill(hidden, number)
    assert cpu.share(~hidden, site.query.shape, site.key.shape) < masked.DENSEST and hidden.all(3).any()
    key, value = (t.repeat_interleave(2, 1) for t in (site.key, site.value))
    want = F.scaled_dot_product_attention(site.query, key, value, mask, scale=site.scale)
    torch.testing.assert_close(plus(site, mask), want, atol=2e-6, rtol=1e-5)


def test_numbers_that_do_more_than_hide_are_a_bias() -> None:
    mask = torch.zeros(2, 1, N, N).masked_fill(torch.rand(2, 1, N, N) < 0.5, -1e9)
    mask[1, 0, 5] = -math.inf  # no key is left
    for given, lowest in ((mask, -9e8), (mask.half(), -6e4), (mask.bfloat16(), -9e8), (mask.mT, -9e8)):
        found = cpu.as_allowed(given, lowest)
        assert found is not None and torch.equal(found[0], given == 0)
        assert torch.equal(found[1], ~found[0].any(3))
    for at, number in ((0, 1e-30), (N - 1, -1e4), (17, math.nan), (18, math.inf)):
        other = mask.clone()
        other[1, 0, 77, at] = number
        assert cpu.as_allowed(other, -9e8) is None


def test_axes_that_are_merged() -> None:
    assert digits(0) == [] and digits(K) == [(K, -1)]
    assert digits(4 * B + H) == [(B, -1), (H, 4)] and digits(12 * K + 3 * Q + H) == [(K, -1), (Q, 4), (H, 3)]
    for axis in (
        K + 1,
        2 * K,
        K * Q,
        4 * B + 3 * H,
        B + H,
        -K,
        6 * B + 4 * H + Q,
        sympy.floor(K / 2),
        sympy.Symbol("x"),
    ):
        assert digits(axis) is None, axis
    tensor = torch.rand(5, 8, 7)
    found = Read("t00", (Q, 4 * B + H, K), "added").of_pairs(tensor)
    assert torch.equal(found, tensor.unflatten(1, (2, 4)).permute(1, 2, 0, 3))


@pytest.mark.parametrize("hand", [False, True])
def test_the_benchmark_checks_what_it_times(hand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Namespace(rounds=1, heads=(2, 1), by_hand=hand, flex=False)
    row = masks.row("documents", 600, torch.float32, options)
    assert row["faster"] > 0 and row["errors"]["read"] < 1e-5
    usual = ops.prescored
    monkeypatch.setattr(ops, "prescored", lambda *given: usual(*given) + 0.01)
    with pytest.raises(AssertionError, match=r"wrong result: read is off by 0\.01"):
        masks.row("documents", 600, torch.float32, options)


# Through the compiler.

LENGTH = 700
SHORT = Config(min_seq_len=0)


class Block(torch.nn.Module):
    """A model compiled layer by layer: the mask comes from outside."""

    def forward(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def inputs(length: int = LENGTH, grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(2, heads, length, 16, requires_grad=grad) for heads in (4, 2, 2)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_from_outside(dynamic: bool) -> None:
    block, lengths = Block(), (LENGTH, LENGTH + 131) if dynamic else (LENGTH,)
    compiled = torch.compile(
        block, backend="prescore", options={"inner": "aot_eager", "min_seq_len": 0}, dynamic=dynamic
    )
    for length in lengths:
        given = inputs(length)
        for mask in (near(length, 40).tril(), documents(length), torch.rand(length, length) < 0.8):
            four = mask.expand(2, 1, -1, -1).clone()
            four[0, :, :, :9] = False  # padding on the left
            torch.testing.assert_close(compiled(*given, four), block(*given, four), atol=1e-5, rtol=1e-5)
    (site,) = explain(block, *given, four, config=SHORT).sites
    assert site.decision == "rewrite" and site.exact == "mask" and site.density is site.gain is None


def test_lengths_that_change() -> None:
    """Dynamo may have a symbol for the length of each input."""
    found: list[Any] = []

    def backend(gm: Any, _: Any) -> Any:
        new, report = rewrite(gm, SHORT)
        found.extend(site.exact for site in report.sites)
        return new.forward

    compiled = torch.compile(Block(), backend=backend)
    for length in (LENGTH, LENGTH + 64, LENGTH + 300):
        given, mask = inputs(length), near(length, 30)[None, None]
        torch.testing.assert_close(compiled(*given, mask), Block()(*given, mask), atol=1e-5, rtol=1e-5)
    assert found == ["mask", "mask"]


class Packed(torch.nn.Module):
    """One layer within documents, one without."""

    def forward(self, x: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        q = x.unsqueeze(1)
        q = F.scaled_dot_product_attention(q, q, q, (of[:, None] == of)[None, None])
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_a_plan_file_leaves_them_alone() -> None:
    model, given = Packed().eval(), (torch.randn(1, 640, 16), torch.arange(640) // 100)
    plans = [Plan(window=0, chunk=64, routes=4)]
    found = calibrate(model, [given], budget=0.9, candidates=plans, progress=None)
    report = explain(model, *given, config=Config(plan=found, min_seq_len=0, only_if_faster=False))
    assert [site.exact for site in report.sites] == ["mask", ""] and not report.absent
    assert all(site.decision == "rewrite" for site in report.sites)


def blocks(length: int) -> torch.Tensor:
    """As Pixtral does: one block an image, written into a tensor of the graph."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for begin, end in ((0, 100), (100, 300), (300, length)):
        mask[begin:end, begin:end] = True
    return mask


def added(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """As transformers' ``eager_attention_forward``."""
    k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v))
    return (q @ k.mT * 0.25 + mask).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def packed(q: Any, k: Any, v: Any) -> Any:
    of = (torch.rand(q.shape[2]) < 0.01).cumsum(0)
    return F.scaled_dot_product_attention(q, k, v, of[:, None] == of, enable_gqa=True)


def by_hand(q: Any, k: Any, v: Any, mask: Any) -> Any:
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    return (q @ k.mT * 0.25).masked_fill(~mask, -math.inf).softmax(-1) @ v


def drawn(share: float, row: int = 7) -> torch.Tensor:
    """A row and a column of it are all True."""
    at = torch.arange(LENGTH)
    return (torch.rand(LENGTH, LENGTH) < share) | (at[:, None] == row) | (at == 9)


def some(share: float) -> torch.Tensor:
    """True off the diagonal."""
    return (torch.rand(LENGTH, LENGTH) < share) & (torch.eye(LENGTH) == 0)


def attended(q: Any, k: Any, v: Any, change: Callable[[Any], Any]) -> Any:
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    return change(q @ k.mT * 0.25).softmax(-1) @ v


def lowest(mask: Any, number: float = torch.finfo(torch.float32).min) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, number)


TAKEN: dict[str, Callable[..., Any]] = {
    "a finite number": lambda q, k, v: attended(q, k, v, lambda x: x.masked_fill(drawn(0.5), -1e9)),
    "a finite number that hides much": lambda q, k, v: attended(q, k, v, lambda x: x.masked_fill(drawn(0.99), -1e9)),
    "another value": lambda q, k, v: attended(
        q, k, v, lambda x: torch.where(drawn(0.5), torch.full([], torch.finfo(x.dtype).min), x)
    ),
    "filled, then a bias": lambda q, k, v: attended(
        q, k, v, lambda x: x.masked_fill(some(0.5), -math.inf) + torch.rand(LENGTH, LENGTH)
    ),
    "filled, then numbers": lambda q, k, v: attended(
        q, k, v, lambda x: x.masked_fill(drawn(0.5), torch.finfo(x.dtype).min) + lowest(drawn(0.3, 8))
    ),
    "twice": lambda q, k, v: attended(q, k, v, lambda x: torch.add(x, torch.rand(4, LENGTH, LENGTH), alpha=0.5)),
    "two, and of keys": lambda q, k, v: attended(
        q, k, v, lambda x: x + torch.rand(4, LENGTH, LENGTH) - 2 * torch.rand(2, 1, 1, LENGTH)
    ),
    "two that hide": lambda q, k, v: attended(
        q, k, v, lambda x: x.masked_fill(~near(LENGTH, 40) & drawn(2), -math.inf).masked_fill(some(0.2), -math.inf)
    ),
    "batch and heads in one axis": lambda q, k, v: attended(
        q, k, v, lambda x: (x.flatten(0, 1) + torch.rand(8, LENGTH, LENGTH)).unflatten(0, (2, 4))
    ),
    "transposed, in one axis": lambda q, k, v: attended(
        q, k, v, lambda x: (x.flatten(0, 1) + torch.rand(LENGTH, 8, LENGTH).transpose(0, 1)).unflatten(0, (2, 4))
    ),
    "made from the queries": lambda q, k, v: attended(q, k, v, lambda x: x + q @ torch.rand(16, LENGTH)),
    "two products": lambda q, k, v: attended(q, k, v, lambda x: x + q @ v.repeat_interleave(2, 1).mT),
    "numbers of two kinds": lambda q, k, v: attended(q, k, v, lambda x: x + lowest(drawn(0.5)) + lowest(drawn(0.3, 8))),
    "written in place": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, blocks(q.shape[2]), enable_gqa=True),
    "written by hand": lambda q, k, v: by_hand(q, k, v, near(LENGTH, 30) & (torch.rand(LENGTH, LENGTH) < 2)),
    "documents": packed,
    "prefix": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() | (torch.arange(LENGTH) < 200), enable_gqa=True
    ),
    "an image a block": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.where(blocks(q.shape[2]), 0.0, torch.finfo(q.dtype).min), enable_gqa=True
    ),
    "numbers by hand": lambda q, k, v: added(q, k, v, torch.where(blocks(q.shape[2]), 0.0, -math.inf)),
    "a bias by hand": lambda q, k, v: added(q, k, v, torch.rand(1, 4, LENGTH, LENGTH)),
    "a bias": lambda q, k, v: Block()(q, k, v, torch.rand(LENGTH, LENGTH)),
    "a part of the mask": lambda q, k, v: Block()(q, k, v, torch.rand(3 * LENGTH, LENGTH)[::3] < 0.01),
}


@pytest.mark.parametrize("name", TAKEN)
def test_masks_of_a_graph(name: str) -> None:
    fn, given = TAKEN[name], inputs()
    torch.manual_seed(5)
    want = fn(*given)
    torch.manual_seed(5)
    out = torch.compile(fn, backend="prescore", options={"inner": "aot_eager", "min_seq_len": 0})(*given)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    (site,) = explain(fn, *given, config=SHORT).sites
    assert site.exact == "mask", site.reason


def changed_before(q: Any, k: Any, v: Any) -> Any:
    """What hides is not what it was when the logits were filled."""
    mask = near(LENGTH, 30) & (torch.rand(LENGTH, LENGTH) < 2)
    logits = (q @ k.repeat_interleave(2, 1).mT).masked_fill(mask, -math.inf)
    mask.fill_(True)
    return logits.softmax(-1) @ v.repeat_interleave(2, 1)


def the_best(q: Any, k: Any, v: Any) -> Any:
    """The logits are in memory all the same."""
    logits = q @ k.repeat_interleave(2, 1).mT
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True), -math.inf).softmax(-1) @ v.repeat_interleave(2, 1)


LEFT: dict[str, Callable[..., Any]] = {
    "changed before": changed_before,
    "made from the logits": the_best,
    "no number to hide with": lambda q, k, v: attended(q, k, v, lambda x: x.masked_fill(drawn(0.5), -1e4)),
    "hidden by both": lambda q, k, v: attended(
        q, k, v, lambda x: x.masked_fill(drawn(0.5), -math.inf).masked_fill(drawn(0.5), -1e9)
    ),
    "a number, then a bias": lambda q, k, v: attended(
        q, k, v, lambda x: x.masked_fill(drawn(0.5), -1e9) + torch.rand(LENGTH, LENGTH)
    ),
    "a bias, then a number": lambda q, k, v: attended(
        q, k, v, lambda x: (x + torch.rand(LENGTH, LENGTH)).masked_fill(drawn(0.5), -1e38)
    ),
    "masked, and then scaled": lambda q, k, v: attended(q, k, v, lambda x: (x + torch.rand(LENGTH, LENGTH)) * 2),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_as_it_is(name: str) -> None:
    site = explain(LEFT[name], *inputs(), config=SHORT).sites[-1]
    assert site.decision == "keep" and site.reason.startswith("opaque_mask"), site.reason


def test_a_bias_that_is_trained_is_left() -> None:
    """By itself: queries, keys and values are not."""
    given, bias = inputs(), torch.rand(1, 4, LENGTH, LENGTH, requires_grad=True)
    assert explain(Block(), *given, bias, config=SHORT).sites[0].reason.startswith("opaque_mask")
    with torch.no_grad():
        assert explain(Block(), *given, bias, config=SHORT).sites[0].exact == "mask"


def test_a_gradient_that_is_asked_for_later_is_an_error() -> None:
    given, bias = inputs(), torch.rand(1, 4, LENGTH, LENGTH)
    with torch.no_grad():
        new, _ = rewrite(torch.export.export(Block(), (*given, bias)).module(), Config.exact())
    new(given[0].requires_grad_(), *given[1:], bias).sum().backward()
    with pytest.raises(NotImplementedError, match="got a gradient that is asked for in what is read"):
        new(*given, bias.requires_grad_())


def test_a_tensor_that_cancels_out_is_left() -> None:
    bias, mask = torch.rand(LENGTH, LENGTH), drawn(0.5)

    def cancels(q: Any, k: Any, v: Any) -> Any:
        return attended(q, k, v, lambda x: (x + bias - bias).masked_fill(mask, -math.inf))

    (site,) = explain(cancels, *inputs(), config=SHORT).sites
    assert site.decision == "keep" and site.reason.startswith("opaque_mask"), site.reason


def test_gradients_short_masks_few_queries_and_other_devices_are_left() -> None:
    mask = near(LENGTH, 30)[None, None]
    assert explain(Block(), *inputs(grad=True), mask, config=SHORT).sites[0].reason.startswith("opaque_mask")
    assert explain(Block(), *inputs(300), mask[..., :300, :300]).sites[0].reason.startswith("opaque_mask")
    assert explain(Block(), *inputs(300), mask[..., :300, :300], config=SHORT).sites[0].exact == "mask"
    few = [t[:, :, -3:] if at == 0 else t for at, t in enumerate(inputs())]
    assert explain(Block(), *few, mask[:, :, -3:], config=SHORT).sites[0].reason.startswith("opaque_mask")
    assert explain(Block(), *inputs(), mask, config=Config(min_seq_len=0, exclude=["*"])).sites[0].reason == "excluded"
