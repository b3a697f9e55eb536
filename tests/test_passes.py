"""Find, lift, decide and insert, on graphs captured by Dynamo."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import fx

from prescore_compile import Config, explain
from prescore_compile.backend import stages
from prescore_compile.kernels import library
from prescore_compile.passes import REASONS, find, rewrite
from prescore_compile.passes.masks import lift
from prescore_compile.passes.outside import told_apart

SHORT = Config.exact()


def capture(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(fn, backend=keep, fullgraph=True, dynamic=dynamic)(*args)
    (gm,) = graphs
    return gm


def qkv(length: int = 40, heads: int = 4, kv_heads: int = 4, dim: int = 8, batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, h, length, dim) for h in (heads, kv_heads, kv_heads)]


def targets(gm: fx.GraphModule) -> list[str]:
    return [n.name for n in gm.graph.nodes if n.name.startswith("prescore_") and n.target is not operator.getitem]


def checked(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> Any:
    """Rewrite with the plan that keeps everything; the result must be the original's. Returns its only site."""
    outs: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        new, report = rewrite(gm, SHORT)
        outs.extend(report.sites)
        return new.forward

    want = fn(*args)
    got = torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    (site,) = outs
    return site


# Masks: how people write them, and what they mean. i, j are [n, 1] and [1, n].
def _ij(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.arange(n)
    return at[:, None], at[None, :]


LIFTED: dict[str, tuple[Callable[[int, torch.Tensor], torch.Tensor], str]] = {
    "compare": (lambda n, p: _ij(n)[1] <= _ij(n)[0], "k <= q"),
    "compare the other way": (lambda n, p: _ij(n)[0] >= _ij(n)[1], "k <= q"),
    "strictly less than the next": (lambda n, p: _ij(n)[1] < _ij(n)[0] + 1, "k <= q"),
    "tril": (lambda n, p: torch.ones(n, n, dtype=torch.bool).tril(), "k <= q"),
    "torch.tril 4d": (lambda n, p: torch.tril(torch.ones(1, 1, n, n, dtype=torch.bool)), "k <= q"),
    "not triu": (lambda n, p: ~torch.ones(n, n, dtype=torch.bool).triu(1), "k <= q"),
    "padding": (lambda n, p: p[:, None, None, :], "[b, k]"),
    "padding as ints": (lambda n, p: (p.long() != 0)[:, None, None, :].expand(-1, 1, n, n), "[b, k]"),
    "both": (lambda n, p: (_ij(n)[1] <= _ij(n)[0]) & p[:, None, None, :], "k <= q and"),
    "both, by where": (
        lambda n, p: torch.where(p[:, None, None, :], _ij(n)[1] <= _ij(n)[0], torch.zeros((), dtype=torch.bool)),
        "k <= q and",
    ),
    "additive": (lambda n, p: torch.full((n, n), -math.inf).triu(1), "k <= q"),
    "additive, filled": (lambda n, p: torch.zeros(n, n).masked_fill(_ij(n)[1] > _ij(n)[0], -1e9), "k <= q"),
    "additive, where": (
        lambda n, p: torch.where(_ij(n)[1] <= _ij(n)[0], 0.0, torch.finfo(torch.float32).min),
        "k <= q",
    ),
    "additive padding": (lambda n, p: torch.zeros(()).masked_fill(~p, -math.inf)[:, None, None, :], "[b, k]"),
    "two added": (
        lambda n, p: torch.full((n, n), -math.inf).triu(1) + torch.where(p, 0.0, -math.inf)[:, None, None, :],
        "and",
    ),
    "everything": (lambda n, p: torch.ones(n, n, dtype=torch.bool), "true"),
    "window": (lambda n, p: (_ij(n)[1] <= _ij(n)[0]) & (_ij(n)[1] > _ij(n)[0] - 7), "k <= q and q - 6 <= k"),
    "padded window": (lambda n, p: (_ij(n)[1] >= _ij(n)[0] - 6) & p[:, None, None, :], "q - 6 <= k"),
    "padded window, additive": (
        lambda n, p: torch.where(
            (_ij(n)[1] >= _ij(n)[0] - 3) & (_ij(n)[1] <= _ij(n)[0]) & p[:, None, None, :] & (_ij(n)[1] != 0),
            0.0,
            torch.finfo(torch.float32).min,
        ),
        "q - 3 <= k",
    ),
    "padded both sides, additive": (
        lambda n, p: torch.where(
            ((_ij(n)[1] - _ij(n)[0]).abs() <= 2) & p[:, None, None, :], 0.0, torch.finfo(torch.float32).min
        ),
        "abs(k - q) <= 2",
    ),
    "padded chunks, additive": (
        lambda n, p: torch.where(
            (_ij(n)[1] // 4 == _ij(n)[0] // 4) & p[:, None, None, :], 0.0, torch.finfo(torch.float32).min
        ),
        "k//4 == q//4",
    ),
    "padded future, additive": (
        lambda n, p: torch.where((_ij(n)[1] > _ij(n)[0]) & p[:, None, None, :], 0.0, torch.finfo(torch.float32).min),
        "q + 1 <= k",
    ),
    "future": (lambda n, p: _ij(n)[1] >= _ij(n)[0], "q <= k"),
    "off by one": (lambda n, p: _ij(n)[1] <= _ij(n)[0] + 1, "k <= q + 1"),
    "chunked": (lambda n, p: _ij(n)[1] // 8 == _ij(n)[0] // 8, "k//8 == q//8"),
}


def _written(mask: torch.Tensor) -> torch.Tensor:
    mask[..., 0] = False
    return mask


KEPT: dict[str, tuple[Callable[[int, torch.Tensor], torch.Tensor], str]] = {
    "prefix": (lambda n, p: (_ij(n)[1] <= _ij(n)[0]) | (_ij(n)[1] < 7), "unsupported_mask: k <= 6 or k <= q"),
    "strided": (lambda n, p: (_ij(n)[0] - _ij(n)[1]) % 8 == 0, "unsupported_mask"),
    "query padding": (lambda n, p: p[:, None, :, None].expand(-1, 1, n, n), "unsupported_mask"),
    "written to": (lambda n, p: _written(_ij(n)[1] <= _ij(n)[0]), "opaque_mask"),
    "written through a view": (lambda n, p: _written((_ij(n)[1] <= _ij(n)[0])[None, None]), "opaque_mask"),
    "filled in place": (lambda n, p: torch.ones(n, n, dtype=torch.bool).tril().fill_(True), "opaque_mask"),
    "rolled padding": (lambda n, p: p[:, torch.arange(n) - 1][:, None, None, :], "opaque_mask"),
    "rounded": (lambda n, p: _ij(n)[1].half() <= _ij(n)[0].half(), "opaque_mask"),
    "halved": (lambda n, p: (_ij(n)[1] * 0.5).long() <= _ij(n)[0], "opaque_mask"),
    "drawn": (lambda n, p: torch.rand(n, n) > 0.1, "opaque_mask"),
    "soft padding": (lambda n, p: torch.zeros(()).masked_fill(~p, -1e9)[:, None, None, :], "additive_mask"),
    "a mild bias": (lambda n, p: torch.zeros(n, n).masked_fill(_ij(n)[1] > _ij(n)[0], -10.0), "unsupported_mask: +"),
    "alibi": (lambda n, p: (_ij(n)[1] - _ij(n)[0]) * 0.5, "unsupported_mask: + 0.5*k - 0.5*q"),
    "drawn bias": (lambda n, p: torch.randn(n, n), "opaque_mask"),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", LIFTED)
def test_masks_are_lifted_to_what_they_mean(name: str, dynamic: bool) -> None:
    make, text = LIFTED[name]
    padding = torch.rand(2, 40) > 0.3
    padding[:, 0] = True
    site = checked(lambda q, k, v, p: F.scaled_dot_product_attention(q, k, v, make(q.shape[2], p)), *qkv(), padding,
                   dynamic=dynamic)  # fmt: skip
    assert site.decision == "rewrite" and text in site.mask


@pytest.mark.parametrize("name", KEPT)
def test_other_masks_keep_the_site_exact(name: str) -> None:
    make, reason = KEPT[name]
    torch.manual_seed(1)
    # Where gradients are asked for: masks of bools are read as they come otherwise.
    site = capture_site(lambda q, k, v, p: F.scaled_dot_product_attention(q, k, v, make(q.shape[2], p)), trained=True)
    assert site.decision == "keep" and site.reason.startswith(reason)
    assert site.reason.partition(":")[0] in REASONS


def capture_site(fn: Callable[..., Any], trained: bool = False) -> Any:
    gm = capture(fn, *(tensor.requires_grad_(trained) for tensor in qkv()), torch.rand(2, 40) > 0.3)
    _, report = rewrite(gm, SHORT)
    return report.sites[0]


def test_the_mask_is_not_built_any_more() -> None:
    gm = capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, LIFTED["compare"][0](40, v)), *qkv())
    new, _ = rewrite(gm, SHORT)
    assert not [n for n in new.graph.nodes if "arange" in n.name or n.name.startswith("le")]


def repeat(x: torch.Tensor, how: str) -> torch.Tensor:
    b, h, n, d = x.shape
    if how == "transformers":
        return x[:, :, None, :, :].expand(b, h, 3, n, d).reshape(b, h * 3, n, d)
    if how == "unsqueeze":
        return x.unsqueeze(2).expand(-1, -1, 3, -1, -1).reshape(b, -1, n, d)
    if how == "flatten":
        return x.unsqueeze(2).expand(-1, -1, 3, -1, -1).flatten(1, 2)
    if how == "interleave":
        return torch.repeat_interleave(x, 3, dim=1)
    return x.repeat_interleave(3, 1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("how", ["transformers", "unsqueeze", "flatten", "interleave", "method"])
def test_repeat_kv_is_undone(how: str, dynamic: bool) -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, repeat(k, how), repeat(v, how), is_causal=True)

    site = checked(fn, *qkv(heads=6, kv_heads=2), dynamic=dynamic)
    assert site.decision == "rewrite" and site.shape["kv_heads"] == "2"


def test_a_tiled_head_order_is_another_grouping_than_repeat_kv() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        def tile(x: torch.Tensor) -> torch.Tensor:  # heads 0 1 0 1 0 1, not 0 0 0 1 1 1
            return x.unsqueeze(1).expand(-1, 3, -1, -1, -1).reshape(2, 6, 40, 8)

        return F.scaled_dot_product_attention(q, tile(k), tile(v), is_causal=True)

    assert checked(fn, *qkv(heads=6, kv_heads=2)).shape["kv_heads"] == "2"


def test_enable_gqa_and_scale_and_positional_arguments() -> None:
    site = checked(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=0.7, enable_gqa=True),
        *qkv(heads=6, kv_heads=2),
    )
    assert site.decision == "rewrite" and site.shape["kv_heads"] == "2"


def _autocast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v)


REFUSED: dict[str, tuple[Callable[..., Any], list[torch.Tensor], str]] = {
    "dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), qkv(), "dropout"),
    "double": (lambda q, k, v: F.scaled_dot_product_attention(q.double(), k.double(), v.double()), qkv(),
               "unsupported_dtype"),
    "cross": (lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :7], k, v), qkv(), "cross_attention"),
    "misaligned": (lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :7], k, v, is_causal=True), qkv(),
                   "causal_misaligned"),
    "batch of queries": (lambda q, k, v: F.scaled_dot_product_attention(q[:1], k, v), qkv(), "broadcast_query"),
    "batch of values": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v[:1]), qkv(), "broadcast_value"),
    "head_dim": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), qkv(dim=264), "unsupported_head_dim"),
    "empty": (lambda q, k, v: F.scaled_dot_product_attention(q[:0], k[:0], v[:0]), qkv(), "empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_kept_with_its_reason(name: str) -> None:
    fn, args, reason = REFUSED[name]
    gm = capture(fn, *args)
    new, report = rewrite(gm, Config(min_seq_len=0, only_if_faster=False))
    (site,) = report.sites
    assert site.decision == "keep" and site.reason.partition(":")[0] == reason and not targets(new)


LAYOUTS: dict[str, tuple[Callable[..., Any], tuple[str, str, str]]] = {
    "rank 3": (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), ("4", "1", "1")),
    "rank 5": (lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None]), ("2", "4", "4")),
    "one batch of keys": (lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]), ("1", "8", "4")),
    "one head of keys": (lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1]), ("2", "4", "1")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_are_brought_to_four_axes(name: str) -> None:
    fn, sizes = LAYOUTS[name]
    site = checked(fn, *qkv())
    assert site.decision == "rewrite"
    assert (site.shape["batch"], site.shape["heads"], site.shape["kv_heads"]) == sizes


@pytest.mark.parametrize("narrow", ["", "v", "qk"])
def test_autocast_is_followed(narrow: str) -> None:
    """``narrow``: operands that are bfloat16 already: rotary embeddings leave queries and keys float32."""
    outs: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        new, report = rewrite(gm, SHORT)
        outs.extend(report.sites)
        return new.forward

    args = [t.bfloat16() if name in narrow else t for name, t in zip("qkv", qkv(), strict=True)]
    leaves = [t.requires_grad_() for t in args]
    got, want = torch.compile(_autocast, backend=backend)(*args), _autocast(*args)
    assert got.dtype == torch.bfloat16 and outs[0].decision == "rewrite"
    torch.testing.assert_close(got, want, atol=0.03, rtol=0.03)
    grad = torch.randn_like(got)
    pairs = zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


def test_short_and_unprofitable_and_excluded_sites() -> None:
    class Block(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block()])

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                q = block(q, k, v)
            return q

    gm = capture(Model(), *qkv(600, batch=1, dim=64))
    reasons = lambda **options: [s.reason.partition(":")[0] for s in rewrite(gm, Config(**options))[1].sites]  # noqa: E731
    assert reasons() == ["too_short", "too_short"]
    assert reasons(min_seq_len=0) == ["not_faster", "not_faster"]
    assert reasons(min_seq_len=0, only_if_faster=False, exclude=("blocks.1",)) == ["", "excluded"]
    assert reasons(min_seq_len=0, only_if_faster=False, include=("blocks.1",)) == ["excluded", ""]


@pytest.mark.parametrize("tiles", [False, True])
def test_bfloat16_where_exact_attention_has_amx(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It breaks even later there, and in float32 where it did."""
    monkeypatch.setattr(library, "tiles", lambda: tiles)
    for dtype, kept in ((torch.bfloat16, tiles), (torch.float32, False)):
        q, k, v = (x.to(dtype) for x in qkv(3000, batch=1, dim=64))
        gm = capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)
        (site,) = rewrite(gm)[1].sites
        assert site.reason.startswith("not_faster") == kept, (dtype, site)


def _decisions(lengths: Sequence[int], **marked: int) -> list[str]:
    """Why the site of each graph that is compiled for these lengths is kept; thresholds: 300 keys, and some 3,500."""
    found: list[str] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        new, report = rewrite(gm, Config(min_seq_len=300))
        found.extend(site.reason.partition(":")[0] for site in report.sites)
        return new.forward

    compiled = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), backend=backend)
    for length in lengths:
        x = torch.randn(1, 2, length, 16)
        torch._dynamo.mark_dynamic(x, 2, **marked)
        compiled(x)
    return found


def test_a_dynamic_length_has_two_graphs_at_most() -> None:
    assert _decisions([4096, 400, 200, 4000]) == ["", "not_faster"]
    torch._dynamo.reset()
    assert _decisions([200, 400, 4096, 300]) == ["too_short", ""]


def test_where_the_range_of_a_length_is_fixed_there_is_one_graph() -> None:
    """A guard inside of it would be an error of torch's."""
    assert _decisions([4096, 400, 200], min=16, max=16384) == [""]
    torch._dynamo.reset()
    assert _decisions([400, 4096], min=16, max=16384) == ["not_faster"]


def test_the_inserted_nodes_bear_their_own_names() -> None:
    gm = capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv())
    plan: dict[str, Any] = dict(min_seq_len=0, only_if_faster=False)
    new, _ = rewrite(gm, Config(keep=4, **plan))
    assert targets(new) == ["prescore_score", "prescore_summarize", "prescore_route_attend"]
    new, _ = rewrite(gm, Config(share=0.0, **plan))
    assert targets(new) == ["prescore_summarize", "prescore_route_attend"]
    new, _ = rewrite(gm, Config(routes=0, **plan))
    assert targets(new) == ["prescore_summarize", "prescore_attend"], "what a plan does not use is not in the graph"
    assert len(find(gm)) == 1, "the graph that was given is not changed"
    attend = next(n for n in new.graph.nodes if n.name == "prescore_attend")
    assert "test_passes.py" in attend.meta["stack_trace"]


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_a_cpu_routes_and_attends_in_one_operator(share: float) -> None:
    """... which the graph before the last stage has as two or three."""
    settings: dict[str, Any] = dict(min_seq_len=0, only_if_faster=False, chunk=16, window=16, routes=2, share=share)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    before, after = stages(model, qkv(), {}, Config(**settings)).graphs[0].stages[-2:]
    names = [[n.name for n in s.graph.nodes if n.target.startswith("prescore.")] for s in (before, after)]
    three = ["prescore_summarize", *["prescore_mass"] * (share > 0), "prescore_route", "prescore_attend"]
    assert names == [three, ["prescore_summarize", "prescore_route_attend"]]
    last = next(n for n in after.graph.nodes if n.name == "prescore_route_attend")
    assert last.value.startswith("float32[") and "test_passes.py" in last.source
    new, _ = rewrite(capture(model, *qkv()), Config(**settings | {"routes": 100, "share": 0.0}))
    inputs = qkv()
    torch.testing.assert_close(new(*inputs)[0], model(*inputs), atol=1e-5, rtol=1e-5)


def test_the_output_keeps_the_layout_that_was_traced() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, torch.ones(40, 40, dtype=torch.bool).tril()).view(2, 160, 8)

    checked(fn, *qkv())


def test_a_dynamic_length_is_a_guard_not_a_recompile_per_length() -> None:
    decisions: list[str] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        new, report = rewrite(gm, Config(min_seq_len=100, only_if_faster=False, chunk=16, window=16, routes=2))
        decisions.append(report.sites[0].decision)
        return new.forward

    model = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), backend=backend,
                          dynamic=True)  # fmt: skip
    for length in (150, 163, 500, 40, 57, 99, 100, 222):
        assert model(*qkv(length)).shape[2] == length
    assert decisions == ["rewrite", "keep"]


def test_lift_says_true_where_there_is_no_mask() -> None:
    gm = capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *qkv())
    (site,) = find(gm)
    assert lift(site).text == "true" and not lift(site).causal
    assert site.source.rpartition(":")[0].endswith("test_passes.py") and "scaled_dot_product_attention" in site.code


def test_sites_inside_checkpoints_branches_and_loops() -> None:
    from torch._higher_order_ops import scan, while_loop
    from torch.utils.checkpoint import checkpoint

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).sin()

    def checkpointed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return checkpoint(attend, q, k, v, use_reentrant=False)

    def branches(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cond(q.sum() > 0, attend, lambda q, k, v: q.cos(), (q, k, v))

    def scanned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        def step(carry: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out = attend(carry, k, v) + x
            return out, out.sum(1)

        return scan(step, q, torch.ones(3, 2, 1, 1, 8))[0]

    def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, attend(x, k, v)), (torch.tensor(0), q))[1]

    for fn in (checkpointed, branches, scanned, repeated):
        assert checked(fn, *qkv()).decision == "rewrite"
        assert [site.reason for site in find(capture(fn, *qkv()))] == [""]


def check_gradients(loss: Callable[..., torch.Tensor], leaves: list[torch.Tensor], *more: torch.Tensor) -> None:
    """Those of a plan that keeps everything are the model's."""
    want = torch.autograd.grad(loss(*leaves, *more), leaves)
    options = dict(window=None, sinks=0, routes=0, min_seq_len=0, only_if_faster=False, inner="aot_eager")
    got = torch.autograd.grad(torch.compile(loss, backend="prescore", options=options)(*leaves, *more), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)


def test_gradients_through_a_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attend = lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)  # noqa: E731
        return checkpoint(attend, q, k, v, use_reentrant=False).square().sum()

    leaves = [t.requires_grad_() for t in qkv()]
    check_gradients(loss, leaves)


def test_gradients_through_a_checkpoint_whose_mask_is_made_outside() -> None:
    """As models do: causality and which keys are valid, in one mask for all layers."""
    from torch.utils.checkpoint import checkpoint

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        at = torch.arange(q.shape[2])
        mask = (at <= at[:, None])[None, None] & (pad != 0)[:, None, None]
        return checkpoint(F.scaled_dot_product_attention, q, k, v, mask, use_reentrant=False).square().sum()

    leaves, pad = [t.requires_grad_() for t in qkv()], torch.ones(2, 40, dtype=torch.long)
    pad[1, 20:] = 0
    with_mask = (*leaves, pad)
    assert [
        site.mask for site in explain(loss, *with_mask, config=Config(min_seq_len=0, only_if_faster=False)).sites
    ] == ["k <= q and mask[b, 0, 39, k]"]
    check_gradients(loss, leaves, pad)


def test_what_an_input_of_a_body_says_elsewhere() -> None:
    q, k, b = sympy.symbols("q k b", integer=True, nonnegative=True)
    pad, sizes = sympy.Function("pad", integer=True)(b, k), {q: 8, k: 8, b: 2}
    index, shape = (b, sympy.Integer(0), q, k), (2, 1, 8, 8)
    valid, causal = sympy.Ne(pad, 0), sympy.Le(k, q)
    assert told_apart(causal & valid, index, shape, sizes) == (causal, (b, 0, 7, k))
    assert told_apart(causal & (k >= q - 7) & valid, index, shape, sizes) is not None
    for found in (
        causal & (k >= q - 6) & valid,  # the last query does not see the first key
        causal & sympy.Ne(sympy.Function("of", integer=True)(q), 0) & valid,  # nor is what is read of keys alone
        causal & sympy.Eq(sympy.Mod(k, 2), 0) & valid,
        causal,
        valid,
    ):
        assert told_apart(found, index, shape, sizes) is None
    # Of a mask that was made for more queries: at the last one that there is, as what was found holds for no more.
    assert told_apart(causal & valid, index, (2, 1, 20, 20), sizes) == (causal, (b, 0, 7, k))
    assert told_apart(causal & valid, index, (2, 1, 4, 8), sizes) is None
    of_batch = sympy.Ne(sympy.Function("pad", integer=True)(b), 0)
    assert told_apart(causal & of_batch, (b, q, q + k), (2, 8, 8), sizes) is None
    unknown = sympy.Symbol("s0", integer=True)
    assert told_apart(causal & valid, index, (2, 1, unknown, unknown), sizes) is None
    assert told_apart(causal & valid, index, shape, {q: unknown, k: unknown, b: 2}) is None
