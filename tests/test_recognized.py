"""Masks that only the run time knows, and what they turn out to be: no more than causality and valid keys, or more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import operands

from prescore_compile import Config, explain
from prescore_compile.calibration import calibrate
from prescore_compile.kernels import cpu, library, masked, ops
from prescore_compile.kernels.logits import parse
from prescore_compile.kernels.plan import Plan
from prescore_compile.kernels.reads import reads_of
from prescore_compile.kernels.reference import Operands

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler")
N = 333
LOWEST = torch.finfo(torch.float32).min
PLANS = {"causal": Plan(chunk=64, window=0, routes=4), "two-sided": Plan(chunk=64, window=64, sinks=2, routes=3)}
ALLOWED, ADDED = "softcap 0.0; add 0; where Ne({}, 0)", "softcap 0.0; add {}; where True"


def valid(*lengths: int) -> torch.Tensor:
    """Padding on the left: so many keys of each batch are valid."""
    return torch.arange(N) >= N - torch.tensor(lengths)[:, None]


def causal(of: torch.Tensor) -> torch.Tensor:
    return of[:, None, None] & torch.ones(N, N, dtype=torch.bool).tril()


# Of two batches: a mask, whether it is causal, and which keys are valid (None: all).
KNOWN: dict[str, tuple[torch.Tensor, bool, torch.Tensor | None]] = {
    "causal": (causal(valid(N)), True, None),
    "causal, of each batch and head": (causal(valid(N)).expand(2, 4, -1, -1).clone(), True, None),
    "padded on the left": (causal(valid(N - 9, N - 99)), True, valid(N - 9, N - 99)),
    "padded anywhere": (causal(torch.arange(N) % 7 != torch.tensor([[2], [3]])), True,
                        torch.arange(N) % 7 != torch.tensor([[2], [3]])),
    "every key": (torch.ones(1, 1, N, N, dtype=torch.bool), False, None),
    "of keys": (valid(N - 9, N - 99)[:, None, None], False, valid(N - 9, N - 99)),
    "of keys, in full": (valid(N - 9, N - 99)[:, None, None].expand(2, 4, N, N).clone(), False, valid(N - 9, N - 99)),
}  # fmt: skip


def flipped(mask: torch.Tensor, *at: int) -> torch.Tensor:
    mask = mask.clone()
    mask[at] = ~mask[at]
    return mask


def of_heads() -> torch.Tensor:
    mask = causal(valid(N)).expand(1, 4, -1, -1).clone()
    mask[0, 2, :, 5] = False
    return mask


OTHER: dict[str, Callable[[], torch.Tensor]] = {
    "one key less": lambda: flipped(causal(valid(N)), 0, 0, 200, 13),
    "one key more": lambda: flipped(causal(valid(N)), 0, 0, 200, 201),
    "the last key of the first": lambda: flipped(causal(valid(N)), 0, 0, 0, N - 1),
    "the last query": lambda: flipped(causal(valid(N)), 0, 0, N - 1, 0),
    "the first query": lambda: flipped(causal(valid(N)), 0, 0, 0, 0),
    "the other batch": lambda: flipped(causal(valid(N, N)), 1, 0, 77, 7),
    "one of every key": lambda: flipped(torch.ones(1, 1, N, N, dtype=torch.bool), 0, 0, 99, 99),
    "heads that differ": of_heads,
    "a window": lambda: causal(valid(N)) & ~torch.ones(N, N, dtype=torch.bool).tril(-100),
    "padded queries": lambda: causal(~valid(40)) & ~valid(40)[:, None, :, None],
    "before": lambda: torch.ones(1, 1, N, N, dtype=torch.bool).triu(),
    "of queries": lambda: valid(N - 40)[:, None, :, None],
    "drawn": lambda: torch.rand(1, 1, N, N) < 0.5,
    "one later key": lambda: torch.ones(1, 1, N, N, dtype=torch.bool).tril(1),
}


def seen(mask: torch.Tensor, added: bool = False) -> masked.Seen:
    axes = ", ".join(name if size > 1 else "0" for name, size in zip("bhqk", mask.shape, strict=True))
    reads = reads_of(parse((ADDED if added else ALLOWED).format(f"t00({axes})")))
    assert reads is not None
    return masked.see(reads, {"t00": mask}, torch.float32)


def as_numbers(mask: torch.Tensor, number: float = LOWEST) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, number)


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_mask_turns_out_to_be(name: str) -> None:
    mask, is_causal, keys = KNOWN[name]
    site = operands(N, causal=False)
    bytes_ = (mask.to(torch.uint8) * torch.randint(1, 256, (N,), dtype=torch.uint8)).view(torch.bool)
    turned = mask.mT.clone().mT
    for found in (seen(mask), seen(bytes_), seen(turned), seen(as_numbers(mask), added=True)):
        known = masked.recognized(site, found)
        assert known is not None and known.causal == is_causal
        assert (known.valid is None) == (keys is None)
        assert keys is None or torch.equal(known.valid != 0, keys.expand(2, -1))  # type: ignore[operator]


@pytest.mark.parametrize("name", OTHER)
def test_what_it_is_not(name: str) -> None:
    site, mask = operands(N, causal=False), OTHER[name]()
    assert masked.recognized(site, seen(mask)) is None
    assert masked.recognized(site, seen(as_numbers(mask), added=True)) is None


def test_a_bias_is_no_mask() -> None:
    bias = as_numbers(causal(valid(N)))
    bias[0, 0, 100, 50] = 1e-3
    assert masked.recognized(operands(N, causal=False), seen(bias, added=True)) is None


def run(site: Any, text: str, tensors: list[torch.Tensor], plans: dict[str, Plan] = PLANS) -> torch.Tensor:
    settings = [plans[name].text if name in plans else "" for name in PLANS]
    return ops.attend_recognized(*site[:3], site.scale, text, tensors, site.sink_logit, *settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KNOWN)
def test_the_plan_that_goes_with_it(name: str, dtype: torch.dtype) -> None:
    """To the bit what the plan gives where the mask is known before; attended whole without a plan."""
    mask, is_causal, keys = KNOWN[name]
    site = operands(N, causal=False, dtype=dtype)
    axes = ", ".join(name if size > 1 else "0" for name, size in zip("bhqk", mask.shape, strict=True))
    known = site._replace(causal=is_causal, valid=None if keys is None else keys.expand(2, N))
    plan = PLANS["causal" if is_causal else "two-sided"]
    want = ops.prescored(known, plan)
    assert not torch.allclose(want, ops.prescored(known, Plan(window=None, sinks=0, routes=0)), atol=0.1)
    out = run(site, ALLOWED.format(f"t00({axes})"), [mask])
    assert torch.equal(out, want) and out.stride() == want.stride()
    other = {key: found for key, found in PLANS.items() if found is not plan}
    whole = run(site, ALLOWED.format(f"t00({axes})"), [mask], other)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(whole, by_sdpa(site, mask), atol=tolerance, rtol=tolerance)


def by_sdpa(site: Any, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*site[:3], mask, scale=site.scale, enable_gqa=True)


@pytest.mark.parametrize("number", [LOWEST, -math.inf])
def test_queries_without_a_key(number: float) -> None:
    """With a plan, too, what hides decides: the mean of all values, or what SDPA gives."""
    mask, site = causal(valid(N - 9, N - 99)), operands(N, causal=False)
    out = run(site, ADDED.format("t00(b, 0, q, k)"), [as_numbers(mask, number)])
    want = by_sdpa(site, as_numbers(mask, number))
    none = ~mask.any(3, keepdim=True).expand_as(want)
    torch.testing.assert_close(out[none], want[none])
    plain = run(site, ALLOWED.format("t00(b, 0, q, k)"), [mask])
    assert torch.equal(out[~none], plain[~none])
    hides = "softcap 0.0; add Piecewise((0, Ne(t00(b, 0, q, k), 0)), (-3.4028234663852886e+38, True)); where True"
    torch.testing.assert_close(run(site, hides, [mask])[none], by_sdpa(site, as_numbers(mask))[none])


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_has_no_say(default: torch.dtype) -> None:
    """The compiled kernels write float32, whatever torch makes where nothing is said."""
    site, mask = operands(N, causal=False), causal(valid(N - 9, N - 99))
    hides = "softcap 0.0; add Piecewise((0, Ne(t00(b, 0, q, k), 0)), (-3.4028234663852886e+38, True)); where True"
    plans = [
        {"causal": plan} for plan in (*PLANS.values(), Plan(routes=9, share=0.01), Plan(chunk=64, keep=8, routes=2))
    ]
    want = [run(site, hides, [mask], plan) for plan in plans]
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        found = [run(site, hides, [mask], plan) for plan in plans]
    finally:
        torch.set_default_dtype(usual)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def cached(used: int, length: int, queries: int, keys: torch.Tensor | None = None) -> torch.Tensor:
    """The last of ``used`` tokens, in a cache for ``length``; ``keys``: which are valid, of each batch."""
    places = torch.arange(length)
    mask = (places <= torch.arange(used - queries, used)[:, None])[None, None]
    return mask if keys is None else mask & F.pad(keys, (0, length - used))[:, None, None]


@pytest.mark.parametrize("used", [N, N + 150, N + 200])
def test_a_cache_that_is_not_full(used: int) -> None:
    """What is behind the last query's key may be anything."""
    length = N + 200
    whole = operands(length, causal=False)
    keys = torch.arange(used) >= torch.tensor([0, 40])[:, None]
    for mask, valid_keys in ((cached(used, length, N), None), (cached(used, length, N, keys), keys)):
        site = whole._replace(query=whole.query[:, :, :N])
        known = masked.recognized(site, seen(mask))
        assert known is not None and known.causal and known.key.shape[2] == used
        short = (t[:, :, :used] for t in whole[1:3])
        want = ops.prescored(Operands(site.query, *short, valid_keys, True, site.scale), PLANS["causal"])
        axes = ", ".join(name if size > 1 else "0" for name, size in zip("bhqk", mask.shape, strict=True))
        dirty = [t.clone() for t in whole[1:3]]
        for t in dirty:
            t[:, :, used:] = math.nan
        found = ALLOWED.format(f"t00({axes})")
        assert torch.equal(run(Operands(site.query, *dirty, None, False, site.scale), found, [mask]), want)


OTHER_CACHES: dict[str, Callable[[], torch.Tensor]] = {
    "a later key": lambda: flipped(cached(N + 50, N + 99, N), 0, 0, 10, N + 60),
    "a key less": lambda: flipped(cached(N + 50, N + 99, N), 0, 0, 100, 7),
    "not by its end": lambda: cached(N + 50, N + 99, N) & (torch.arange(N + 99) < N + 40),
    "fewer keys than queries": lambda: torch.arange(N + 99) <= torch.arange(-40, N - 40)[:, None].expand(1, 1, -1, -1),
    "no key": lambda: torch.zeros(1, 1, N, N + 99, dtype=torch.bool),
    "all keys": lambda: torch.ones(1, 1, N, N + 99, dtype=torch.bool),
    "as many keys": lambda: (torch.arange(N + 99) < N).expand(1, 1, N, -1),
}


@pytest.mark.parametrize("name", OTHER_CACHES)
def test_what_is_no_cache(name: str) -> None:
    whole, mask = operands(N + 99, causal=False), OTHER_CACHES[name]()
    site = whole._replace(query=whole.query[:, :, :N])
    assert masked.recognized(site, seen(mask)) is None
    out = run(site, ALLOWED.format("t00(0, 0, q, k)"), [mask])
    torch.testing.assert_close(out, by_sdpa(site, mask), atol=1e-5, rtol=1e-5)


def test_fewer_keys_than_queries() -> None:
    whole, mask = operands(N, causal=False), torch.ones(1, 1, N, N - 9, dtype=torch.bool).tril()
    site = whole._replace(key=whole.key[:, :, : N - 9], value=whole.value[:, :, : N - 9])
    assert masked.recognized(site, seen(mask)) is None


def test_sinks_and_softcaps_go_with_it() -> None:
    site = operands(N, causal=False)._replace(sink_logit=torch.randn(2, 4, N))
    out = run(site, "softcap 5.0; add 0; where Ne(t00(0, 0, q, k), 0)", [causal(valid(N))])
    want = ops.prescored(site._replace(causal=True), PLANS["causal"], parse("softcap 5.0; add 0; where True"))
    assert torch.equal(out, want)


def test_opcheck() -> None:
    site, plans = operands(N, causal=False), [plan.text for plan in PLANS.values()]
    given = (*site[:3], site.scale, ALLOWED.format("t00(0, 0, q, k)"), [causal(valid(N))], None, *plans)
    torch.library.opcheck(ops.attend_recognized, given)
    with pytest.raises(NotImplementedError, match="got a backward; allowed: none"):
        ops.attend_recognized(site[0].requires_grad_(), *given[1:]).sum().backward()


# Through the compiler.

LENGTH = 640
QUICK: dict[str, Any] = dict(min_seq_len=0, only_if_faster=False, chunk=64, window=0, routes=3)


class Kept(torch.nn.Module):
    """Its mask is a buffer, as in minGPT, nanoGPT and what was made from them."""

    def __init__(self, hide: float = -math.inf) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.split, self.hide = torch.nn.Linear(64, 192), hide
        self.register_buffer("bias", torch.tril(torch.ones(LENGTH + 99, LENGTH + 99))[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        q, k, v = (t.unflatten(2, (4, 16)).transpose(1, 2) for t in self.split(x).split(64, 2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(16))
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, self.hide)
        return (F.softmax(att, dim=-1) @ v).transpose(1, 2).flatten(2)


class Causal(Kept):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(2, (4, 16)).transpose(1, 2) for t in self.split(x).split(64, 2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize("hide", [-math.inf, -1e9, LOWEST])
def test_a_mask_that_is_a_buffer(hide: float) -> None:
    model, x = Kept(hide).eval(), torch.randn(2, LENGTH, 64)
    (site,) = explain(model, x, config=Config(**QUICK)).sites
    assert site.decision == "rewrite" and not site.exact and [*site.recognized] == ["causal", "every key"]
    compiled = torch.compile(model, backend="prescore", options=QUICK | {"inner": "aot_eager"})
    out = compiled(x)
    want = torch.compile(Causal().eval(), backend="prescore", options=QUICK | {"inner": "aot_eager"})(x)
    torch.testing.assert_close(out, want, atol=1e-6, rtol=1e-6)
    assert (out - model(x)).abs().max() > 0.01
    later = x.clone()
    later[:, 500:] = torch.randn(2, LENGTH - 500, 64)
    assert torch.equal(compiled(later)[:, :500], out[:, :500])
    model.bias[..., 300:, :100] = 0  # another mask: exact
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dynamic_lengths() -> None:
    model, graphs = Kept().eval(), 0

    def inner(gm: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return gm.forward

    compiled = torch.compile(model, backend="prescore", options=QUICK | {"inner": inner}, dynamic=True)
    for length in (LENGTH, LENGTH + 50, LENGTH - 77):
        x = torch.randn(1, length, 64)
        want = torch.compile(Causal(), backend="prescore", options=QUICK | {"inner": "eager"}, dynamic=False)(x)
        torch.testing.assert_close(compiled(x), want, atol=1e-6, rtol=1e-6)
    assert graphs == 1


class Cached(Kept):
    """Its keys and values go into a cache with room for more, and its mask says how far."""

    def forward(self, x: torch.Tensor, cache: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(2, (4, 16)).transpose(1, 2) for t in self.split(x).split(64, 2))
        cache = torch.cat([torch.stack([k, v]), cache[:, :, :, x.shape[1] :]], 3)
        return F.scaled_dot_product_attention(q, cache[0], cache[1], mask).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_a_cache_through_the_compiler() -> None:
    model, x = Cached().eval(), torch.randn(1, LENGTH, 64)
    cache, mask = torch.randn(2, 1, 4, LENGTH + 120, 16), cached(LENGTH, LENGTH + 120, LENGTH)
    (site,) = explain(model, x, cache, mask, config=Config(**QUICK)).sites
    assert [*site.recognized] == ["causal"] and site.shape["k_len"] == str(LENGTH + 120)
    compiled = torch.compile(model, backend="prescore", options=QUICK | {"inner": "aot_eager"})
    want = torch.compile(Causal().eval(), backend="prescore", options=QUICK | {"inner": "aot_eager"})(x)
    torch.testing.assert_close(compiled(x, cache, mask), want, atol=1e-6, rtol=1e-6)
    assert (want - model(x, cache, mask)).abs().max() > 0.01
    other = torch.ones_like(mask)
    torch.testing.assert_close(compiled(x, cache, other), model(x, cache, other), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_lengths_of_several_inputs() -> None:
    """Dynamo has a symbol for each, and a guard that they are equal."""
    options = QUICK | {"inner": "eager"}

    def block(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, mask)

    compiled = torch.compile(block, backend="prescore", options=options)
    for length in (300, 333, 400):
        q, k, v = (torch.randn(2, 4, length, 16) for _ in range(3))
        mask = torch.ones(length, length).tril().bool()[None, None]
        known = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                              backend="prescore", options=options, dynamic=False)  # fmt: skip
        torch.testing.assert_close(compiled(q, k, v, mask), known(q, k, v), atol=1e-6, rtol=1e-6)


def site_of(config: Config) -> Any:
    with torch.no_grad():
        return explain(Kept().eval(), torch.randn(1, LENGTH, 64), config=config).sites[0]


def test_where_it_stays_exact() -> None:
    """Where the plan keeps every key, is for other sites or is not faster at the length."""
    assert site_of(Config.exact()).exact == "mask"
    assert site_of(Config(min_seq_len=0)).exact == "mask"
    assert site_of(Config(min_seq_len=0, exclude=["*"])).reason == "excluded"
    assert site_of(Config(min_seq_len=LENGTH + 1)).reason.startswith("opaque_mask")
    only = site_of(Config(**QUICK | {"window": 0, "routes": 0, "sinks": 0}))  # of a two-sided site it leaves nothing
    assert [*only.recognized] == ["causal"]


def test_a_plan_file_leaves_it_exact() -> None:
    model, x = Kept().eval(), torch.randn(1, LENGTH, 64)
    with pytest.raises(ValueError, match="it is read as it comes"):
        calibrate(model, [x], budget=0.9, candidates=[PLANS["causal"]], progress=None)


def test_the_report_tells() -> None:
    with torch.no_grad():
        report = explain(Kept().eval(), torch.randn(1, LENGTH, 64), config=Config(**QUICK))
    text = str(report)
    assert "1 sites: 1 rewritten, 0 kept exact" in text and "by its mask" in text
    assert "by its mask, where that turns out to be causal: {" in text
    assert "by its mask, else: every key that the mask allows" in text
    data = report.sites[0].data()
    assert data["recognized"]["causal"]["routes"] == 3 and data["density"] is None


def test_a_model_by_blocks_is_told_what_its_mask_is() -> None:
    """The kernel is asked once for each call, and looks at what the mask holds then."""
    asked: list[bool] = []
    usual = cpu.recognized

    def recognized(allowed: torch.Tensor, is_causal: bool, *sizes: Any) -> bool:
        asked.append(usual(allowed, is_causal, *sizes))
        return asked[-1]

    def block(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, mask)

    compiled = torch.compile(block, backend="prescore", options=QUICK | {"inner": "eager"})
    q, k, v = (torch.randn(2, 4, N, 16) for _ in range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "recognized", recognized)
        for mask in (KNOWN["padded on the left"][0], OTHER["drawn"]().expand(2, 1, -1, -1).clone()):
            compiled(q, k, v, mask)
    assert asked == [True, False]
