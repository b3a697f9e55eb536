"""Few queries over many keys, as where a sequence is continued: the kernel, and the sites that have it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from prescore_compile import Config, explain
from prescore_compile.kernels import cpu, few, library, ops
from prescore_compile.kernels.reference import Operands
from prescore_compile.passes import cost

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler")
LOWEST = torch.finfo(torch.float32).min
N = 1500  # keys: two parts, the last block not full


def drawn(
    shape: tuple[int, ...] = (2, 6, 1, N, 16, 16), group: int = 3, dtype: torch.dtype = torch.float32
) -> Operands:
    """``shape``: batch, heads, queries, keys, features of keys and of values."""
    batch, heads, queries, keys, dim, value_dim = shape
    make = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(batch, heads, queries, dim, generator=make)
    key = torch.randn(batch, heads // group, keys, dim, generator=make)
    value = torch.randn(batch, heads // group, keys, value_dim, generator=make)
    return Operands(query.to(dtype), key.to(dtype), value.to(dtype), None, False, dim**-0.5)


def wanted(site: Operands, allowed: Any = None, added: Any = None, softcap: float = 0.0) -> torch.Tensor:
    """By the definition, in float64."""
    wide = site._replace(query=site.query.double(), key=site.key.double(), value=site.value.double())
    if site.sink_logit is not None:
        wide = wide._replace(sink_logit=site.sink_logit.double())
    return few.reference(wide, allowed, added, softcap)


def check(site: Operands, allowed: Any = None, added: Any = None, softcap: float = 0.0) -> torch.Tensor:
    """The kernel's error is at most twice what rounding the result to the dtype costs, or float32's own."""
    sink, given = site.sink_logit, (allowed, added, site.scale, softcap)
    out, want = ops.attend_few(*site[:3], *given, sink), wanted(site, allowed, added, softcap)
    assert out.dtype == site.query.dtype and out.shape == want.shape
    assert out.transpose(1, 2).is_contiguous()
    room = 2e-5 if out.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), want, atol=room, rtol=room)
    return out


# Queries, keys, features of keys and of values, query heads a KV head.
SIZES = [
    (1, N, 64, 64, 3), (1, 1, 16, 16, 1), (1, 31, 16, 16, 4), (1, 33, 80, 80, 1), (1, 1024, 128, 128, 8),
    (1, 1025, 20, 36, 2), (5, 777, 8, 24, 3), (16, 2049, 256, 256, 2), (3, 100, 7, 5, 1), (1, 3000, 96, 64, 71),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys", "dim", "value_dim", "group"), SIZES)
def test_sizes(queries: int, keys: int, dim: int, value_dim: int, group: int, dtype: torch.dtype) -> None:
    check(drawn((2, 2 * group, queries, keys, dim, value_dim), group, dtype))


def masks(queries: int) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(1)
    some = torch.rand(2, 6, queries, N, generator=make) < 0.5
    return {
        "of keys": some[:, :1, :1], "of one batch": some[:1, :1], "of heads": some[:1, :, :1], "of all": some,
        "of queries": some[:, :, :, :1], "what is filled": torch.arange(N).expand(1, 1, 1, N) < 70,
        "last keys": torch.arange(N).expand(1, 1, 1, N) >= N - 3, "turned": some.mT.contiguous().mT,
    }  # fmt: skip


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("name", masks(1))
def test_masks(name: str, queries: int) -> None:
    site, allowed = drawn((2, 6, queries, N, 16, 16)), masks(queries)[name]
    out = check(site, allowed)
    numbers = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
    torch.testing.assert_close(check(site, None, numbers), out, atol=1e-6, rtol=1e-6)
    bytes_ = (allowed.to(torch.uint8) * torch.randint(1, 256, (1,), dtype=torch.uint8)).view(torch.bool)
    assert torch.equal(ops.attend_few(*site[:3], bytes_, None, site.scale, 0.0, None), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_softcaps_and_sinks(dtype: torch.dtype) -> None:
    site = drawn((2, 6, 4, N, 16, 16), dtype=dtype)
    slopes = torch.linspace(0.01, 2, 6)[None, :, None, None] * torch.arange(-N, 0) / 64
    allowed = torch.arange(N) >= torch.tensor([3, 900])[:, None, None, None]
    plain = check(site)
    for added in (slopes, slopes.to(torch.bfloat16)):
        assert (check(site, None, added) - plain).abs().max() > 0.05
        check(site, allowed, added)
    capped = check(site, allowed, slopes, 3.0)
    with_sink = site._replace(sink_logit=torch.randn(2, 6, 4, dtype=dtype) * 4)
    assert (check(with_sink, allowed, slopes, 3.0) - capped).abs().max() > 0.05
    expanded = with_sink._replace(sink_logit=torch.randn(6, dtype=dtype)[None, :, None].expand(2, 6, 4))
    check(expanded, allowed)


@pytest.mark.parametrize("cap", [0.1, 1.0, 50.0, 1e4, 1e6])
def test_softcaps_of_any_size(cap: float) -> None:
    """Far below the cap nothing of the logits is lost; far beyond it they are the cap."""
    check(drawn((2, 6, 2, N, 16, 16)), None, None, cap)


def test_queries_without_a_key() -> None:
    """What hides decides: nothing is left of -inf; a finite number leaves the mean."""
    site, allowed = drawn((2, 6, 2, N, 16, 16)), torch.ones(2, 1, 2, N, dtype=torch.bool)
    allowed[1, 0, 0] = False
    assert (check(site, allowed)[1, :, 0] == 0).all()
    assert (check(site, None, torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf))[1, :, 0] == 0).all()
    out = check(site, None, torch.zeros(allowed.shape).masked_fill(~allowed, LOWEST))
    mean = site.value.mean(2).repeat_interleave(3, 1)
    torch.testing.assert_close(out[1, :, 0], mean[1], atol=1e-6, rtol=1e-6)
    with_sink = site._replace(sink_logit=torch.zeros(2, 6, 2))
    assert (check(with_sink, allowed)[1, :, 0] == 0).all()


def test_what_is_hidden_is_not_read() -> None:
    """Nor what an empty cache holds: it may be no number."""
    site, allowed = drawn(), torch.arange(N).expand(1, 1, 1, N) < 900
    want = check(site, allowed)
    for number in (math.nan, math.inf, -math.inf):
        key, value = site.key.clone(), site.value.clone()
        key[:, :, 900:], value[:, :, 900:] = number, number
        out = ops.attend_few(site.query, key, value, allowed, None, site.scale, 0.0, None)
        assert torch.equal(out, want)
    value = site.value.clone()
    value[:, :, 899, 0] = math.nan
    out = ops.attend_few(site.query, site.key, value, allowed, None, site.scale, 0.0, None)
    assert out[..., 0].isnan().all() and torch.equal(out[..., 1:], want[..., 1:])


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_sinks_that_are_no_numbers(number: float) -> None:
    site = drawn()._replace(sink_logit=torch.full((2, 6, 1), number))
    out = ops.attend_few(*site[:3], None, None, site.scale, 0.0, site.sink_logit)
    if number == -math.inf:
        assert torch.equal(out, ops.attend_few(*site[:3], None, None, site.scale, 0.0, None))
    else:
        assert out.isnan().all()


def test_large_logits() -> None:
    """No power overflows, whichever keys come first."""
    site = drawn()._replace(scale=300.0)
    check(site)
    check(site._replace(key=site.key.flip(2), value=site.value.flip(2)))


def test_layouts() -> None:
    site = drawn((2, 6, 1, N, 16, 16))
    want = check(site)
    turned = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in site[:3])
    within = [torch.randn(2, t.shape[1], N + 9, 32) for t in site[1:3]]
    for whole, t in zip(within, site[1:3], strict=True):
        whole[:, :, 5 : 5 + N, 3:19] = t
    spread = [t.repeat_interleave(2, 3)[..., ::2] for t in site[:3]]
    for given in (list(turned), [site.query, *(t[:, :, 5 : 5 + N, 3:19] for t in within)], spread):
        assert torch.equal(ops.attend_few(*given, None, None, site.scale, 0.0, None), want)


def test_the_order_of_keys_does_not_matter() -> None:
    site, allowed = drawn(), torch.rand(2, 1, 1, N) < 0.7
    order = torch.randperm(N)
    turned = site._replace(key=site.key[:, :, order], value=site.value[:, :, order])
    torch.testing.assert_close(check(turned, allowed[..., order]), check(site, allowed), atol=2e-6, rtol=2e-6)


def test_threads_have_no_say() -> None:
    site, threads = drawn((2, 6, 2, 5000, 64, 64)), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(ops.attend_few(*site[:3], None, None, site.scale, 0.0, None))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_without_the_kernel() -> None:
    """Where it does not run, the definition does."""
    site, allowed = drawn(), torch.rand(2, 1, 1, N) < 0.7
    wide = [t.double() for t in site[:3]]
    out = ops.attend_few(*wide, allowed, None, site.scale, 0.0, None)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*wide, allowed, enable_gqa=True))
    sink = torch.randn(2, 6, 1, dtype=torch.float64)
    logits = wide[0] @ wide[1].repeat_interleave(3, 1).mT * site.scale
    logits = (5 * torch.tanh(logits / 5)).masked_fill(~allowed, -math.inf)
    weights = torch.cat([logits, sink[..., None]], 3).softmax(3)[..., :-1]
    out = ops.attend_few(*wide, allowed, None, site.scale, 5.0, sink)
    torch.testing.assert_close(out, weights @ wide[2].repeat_interleave(3, 1))


def test_opcheck() -> None:
    site = drawn((2, 6, 2, 40, 16, 16))
    given = (*site[:3], torch.rand(2, 1, 2, 40) < 0.7, torch.randn(1, 6, 1, 40), site.scale, 5.0, torch.randn(2, 6, 2))
    torch.library.opcheck(ops.attend_few, given)
    with pytest.raises(NotImplementedError, match="got a backward; allowed: none"):
        ops.attend_few(site.query.requires_grad_(), *given[1:]).sum().backward()


# Through the compiler.


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a call cost nothing, so that small sites gain."""
    of = dict(FEW_NUMBERS=2**15, FEW_NUMBERS_MORE=2**13, FEW_REPEATED_MORE=2**9, FEW_NARROW=2**15)
    for name, numbers in of.items():
        monkeypatch.setattr(cost, name, numbers)


def repeated(t: torch.Tensor, group: int = 3) -> torch.Tensor:
    batch, heads, length, dim = t.shape
    return t[:, :, None].expand(batch, heads, group, length, dim).reshape(batch, heads * group, length, dim)


def by_hand(q: Any, k: Any, v: Any, mask: Any, cap: float = 0.0, sink: Any = None) -> Any:
    logits = q @ repeated(k).transpose(2, 3) * 0.25
    if cap:
        logits = torch.tanh(logits / cap) * cap
    logits = logits + torch.where(mask, 0.0, LOWEST)
    if sink is not None:
        logits = torch.cat([logits, sink.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)], 3)
    weights = torch.softmax(logits, -1, dtype=torch.float32).to(q.dtype)
    return (weights if sink is None else weights[..., :-1]) @ repeated(v)


SPELLINGS: dict[str, Callable[..., Any]] = {
    "grouped": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "grouped, masked": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
    "repeated, masked": lambda q, k, v, mask: F.scaled_dot_product_attention(q, repeated(k), repeated(v), mask),
    "repeated, numbers": lambda q, k, v, mask: F.scaled_dot_product_attention(
        q, repeated(k), repeated(v), torch.where(mask, 0.0, -math.inf)),
    "interleaved": lambda q, k, v, mask: F.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), mask),
    "known": lambda q, k, v, mask: F.scaled_dot_product_attention(
        q, repeated(k), repeated(v), torch.arange(N) <= torch.arange(N - q.shape[2], N)[:, None]),
    "a window": lambda q, k, v, mask: F.scaled_dot_product_attention(
        q, repeated(k), repeated(v), (torch.arange(N) > torch.arange(N - q.shape[2], N)[:, None] - 99) & mask),
    "by hand": by_hand,
    "by hand, capped": lambda q, k, v, mask: by_hand(q, k, v, mask, 3.0),
    "by hand, sink": lambda q, k, v, mask: by_hand(q, k, v, mask, 0.0, torch.linspace(-1, 3, 6)),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, queries: int) -> None:
    site = drawn((2, 6, queries, N, 16, 16))
    mask = torch.arange(N).expand(2, 1, queries, N) < torch.tensor([1200, 1400])[:, None, None, None]
    run = SPELLINGS[name]
    (found,) = explain(run, *site[:3], mask).sites
    assert found.decision == "rewrite" and found.exact in ("few", "band")
    assert found.shape["heads"] == "6" and found.shape["kv_heads"] == "2" and found.shape["q_len"] == str(queries)
    compiled = torch.compile(run, backend="prescore", options={"inner": "aot_eager"}, fullgraph=True)
    torch.testing.assert_close(compiled(*site[:3], mask), run(*site[:3], mask), atol=2e-6, rtol=2e-6)
    turned = mask.flip(3)
    torch.testing.assert_close(compiled(*site[:3], turned), run(*site[:3], turned), atol=2e-6, rtol=2e-6)


@torch.no_grad()
def test_parts_of_many_heads_are_longer() -> None:
    """What parts leave in memory stays small; one part alone is the least."""
    check(drawn((3, 96, 9, 3000, 128, 128), 4))
    check(drawn((5, 80, 40, 1200, 64, 64), 4))


@pytest.mark.usefixtures("small")
def test_inductor_runs_it() -> None:
    site, mask = drawn(dtype=torch.bfloat16), torch.rand(2, 1, 1, N) < 0.7
    run = SPELLINGS["repeated, masked"]
    compiled = torch.compile(run, backend="prescore")
    torch.testing.assert_close(compiled(*site[:3], mask), run(*site[:3], mask), atol=1e-2, rtol=1e-2)


def exact_of(run: Callable[..., Any], *given: Any, **config: Any) -> tuple[str, str]:
    (found,) = explain(run, *given, config=Config(**config)).sites
    return found.exact, found.reason.split(":")[0]


@torch.no_grad()
@pytest.mark.usefixtures("small")
def test_where_it_is_not_used() -> None:
    mask = torch.rand(2, 1, 1, N) < 0.7
    run, plain = SPELLINGS["repeated, masked"], F.scaled_dot_product_attention
    site = drawn()
    assert exact_of(run, *site[:3], mask) == ("few", "cross_attention")
    assert exact_of(run, *site[:3], torch.rand(2, 6, 1, N) < 0.7) == ("few", "")
    assert exact_of(run, *site[:3], mask, exclude=["*"]) == ("", "excluded")
    assert exact_of(run, *drawn((2, 6, few.MOST, N, 16, 16))[:3], mask) == ("few", "cross_attention")
    assert exact_of(run, *drawn((2, 6, few.MOST + 1, N, 16, 16))[:3], mask) == ("", "cross_attention")
    short = drawn((2, 6, 1, 200, 16, 16))
    assert exact_of(run, *short[:3], mask[..., :200]) == ("", "cross_attention")
    alone = drawn((2, 2, 1, N, 16, 16), group=1)
    assert exact_of(plain, *alone[:3]) == ("", "cross_attention")  # SDPA reads all once, too
    assert exact_of(plain, *(t.bfloat16() for t in alone[:3])) == ("few", "cross_attention")
    assert exact_of(plain, *(t.half() for t in alone[:3])) == ("few", "cross_attention")
    long = drawn((2, 2, 1, 9000, 16, 16), group=1)
    assert exact_of(plain, *long[:3], torch.rand(2, 1, 1, 9000) < 0.7) == ("few", "cross_attention")


def test_where_it_is_faster() -> None:
    """As measured: SDPA's time, of the numbers in keys and values, passes that of a call."""

    def least(
        heads: int, kv_heads: int, queries: int, narrow: bool = False, masked: bool = False, by_hand: bool = False,
        repeated: bool = False, unit: bool = False,
    ) -> int | None:  # fmt: skip
        shape = cost.Shape(1, heads, kv_heads, 64, 64, False, queries=queries, narrow=narrow, unit=unit)
        return cost.few_from(shape, queries, masked, by_hand, repeated)

    assert least(9, 3, 1) == 2048 and least(32, 8, 1) == 768 and least(71, 1, 1) == 6144
    assert least(9, 3, 1, narrow=True) == 512 and least(8, 8, 1, narrow=True) == 192
    assert least(9, 3, 4) == least(9, 3, 4, narrow=True) == 4096
    assert least(8, 8, 1) is None and least(8, 8, 1, masked=True) == 8192
    assert least(9, 3, 1, narrow=True, by_hand=True) == 4096 and least(8, 8, 1, narrow=True, by_hand=True) is None
    assert least(9, 3, 1, by_hand=True) == 2048
    assert least(9, 3, 4, repeated=True) == 2176 and least(9, 3, 4, narrow=True, repeated=True) == 2560
    assert least(8, 8, 4, narrow=True, by_hand=True) == 768
    assert least(8, 8, 4, narrow=True, by_hand=True, unit=True) is None
    assert least(8, 8, 5, masked=True) is None and least(8, 8, 2, narrow=True, masked=True) is None


@torch.no_grad()
@pytest.mark.usefixtures("small")
def test_a_few_graphs_are_for_any_number_of_queries() -> None:
    """A second turn is never as long as the first: 5 to 16 queries, to 64, to 127; of prompts nothing is changed."""
    run, graphs = SPELLINGS["repeated, masked"], []

    def inner(gm: Any, inputs: Any) -> Any:
        graphs.append({str(node.target) for node in gm.graph.nodes})
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="prescore", dynamic=True, options={"inner": inner})
    for queries in (5, 30, 16, 40, 127, 128):
        site = drawn((2, 6, queries, N, 16, 16))
        mask = torch.arange(N) <= torch.arange(N - queries, N)[:, None]
        want = run(*site[:3], mask[None, None])
        torch.testing.assert_close(compiled(*site[:3], mask[None, None]), want, atol=1e-5, rtol=1e-5)
    assert [any("attend_few" in target for target in graph) for graph in graphs] == [True, True, True, False]


@pytest.mark.usefixtures("small")
def test_not_with_gradients() -> None:
    site, run = drawn(), SPELLINGS["grouped"]
    assert exact_of(run, site.query.requires_grad_(), *site[1:3], None) == ("", "cross_attention")
    sink = torch.nn.Parameter(torch.zeros(6))
    given = drawn()
    mask = torch.ones(1, 1, 1, N, dtype=torch.bool)
    found = exact_of(lambda q, k, v: by_hand(q, k, v, mask, 0.0, sink), *given[:3])
    assert found[0] == ""


@torch.no_grad()
@pytest.mark.usefixtures("small")
def test_growing_caches() -> None:
    """One graph below the length from which on it is used, and one above; never one a length."""
    graphs: list[str] = []

    def inner(gm: Any, _: Any) -> Any:
        graphs.append(str(gm.code))
        return gm.forward

    def step(q: Any, k: Any, v: Any, new: Any) -> Any:
        k, v = torch.cat([k, new], 2), torch.cat([v, new], 2)
        return k, v, F.scaled_dot_product_attention(q, repeated(k), repeated(v), enable_gqa=False)

    compiled = torch.compile(step, backend="prescore", options={"inner": inner}, dynamic=True)
    q, k, new = torch.randn(1, 6, 1, 16), torch.randn(1, 2, 500, 16), torch.randn(1, 2, 1, 16)
    v = k.clone()
    for _ in range(30):
        want = step(q, k, v, new)[2]
        k, v, out = compiled(q, k, v, new)
        torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-6)
    assert ["attend_few" in code for code in graphs] == [False, True]


def llama(attention: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=4096, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("cache", "attention"), [("dynamic", "sdpa"), ("static", "sdpa"), ("static", "eager")])
def test_a_model_that_continues(cache: str, attention: str) -> None:
    """Padded prompts, and caches that grow and that do not: the tokens of the model as it is."""
    from transformers import DynamicCache, StaticCache

    model = llama(attention)
    ids, pad = torch.randint(0, 64, (2, 640)), torch.ones(2, 660, dtype=torch.long)
    pad[0, :30] = 0
    compiled = torch.compile(model, backend="prescore", options={"inner": "aot_eager"}, dynamic=cache == "dynamic")
    found: dict[str, list[torch.Tensor]] = {}
    sites: list[str] = []
    for name, forward in (("eager", model), ("compiled", compiled)):
        past = StaticCache(config=model.config, max_cache_len=700) if cache == "static" else DynamicCache()
        logits = model(ids, attention_mask=pad[:, :640], past_key_values=past).logits[:, -1:]
        steps = found.setdefault(name, [])
        for at in range(640, 644):
            given = dict(attention_mask=pad[:, : at + 1], past_key_values=past)
            if name == "compiled" and at == 640:
                sites = [site.exact for site in explain(model, logits.argmax(2), **given).sites]
                assert past.get_seq_length() == 640
            logits = forward(logits.argmax(2), **given).logits
            steps.append(logits)
    assert sites == ["few", "few"]
    for one, other in zip(found["eager"], found["compiled"], strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


def test_the_kernel_runs_where_it_should() -> None:
    """On float32 and bfloat16 the compiled one, which the definition is compared with above."""
    calls: list[int] = []
    usual = cpu.attend_few
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "attend_few", lambda *given: (calls.append(1), usual(*given))[1])
        check(drawn())
        check(drawn(dtype=torch.bfloat16))
    assert len(calls) == 2
