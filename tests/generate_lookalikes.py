"""Programs that look like attention and are not, or are not the attention that they look like.

NEVER: not attention of q, k and v, or its weights are seen: rewriting any of it is a mistake.
NUMERICS: attention in disguise. Rewriting may be right, and then the result must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from generate import SIZES
from hypothesis import strategies as st
from torch import Tensor, nn

Body = Callable[["Lookalike", Tensor, Tensor, Tensor, Tensor, Tensor], Any]
NEVER: dict[str, Body] = {}
NUMERICS: dict[str, Body] = {}
EQUAL = {  # the axes that must be of one size, where the program would not run otherwise
    "last_axis_temperature": "hn",
    "head_bias_on_the_last_axis": "hn",
    "mask_by_the_wrong_axis": "bn",
    "mask_by_head": "bh",
    "keys_not_transposed": "nd",
    "channels_over_equal_sizes": "nd",
    "values_transposed": "nd",
    "batch_and_heads_swapped": "bh",
    "batch_and_heads_swapped_by_einsum": "bh",
    "heads_and_length_swapped": "hn",
    "keys_seen_as_heads": "hn",
}
SPECIAL = {*EQUAL, "heads_not_moved"}  # cannot be captured with a dynamic length
EXTRA = {  # the last input, by the name of its argument
    "row": lambda b, h, n, d: (b, h, n, 1),
    "col": lambda b, h, n, d: (b, h, 1, n),
    "heads": lambda b, h, n, d: (h,),
    "pairs": lambda b, h, n, d: (b, h, n, n),
    "mixer": lambda b, h, n, d: (h, h),
    "other": lambda b, h, n, d: (b, h, n, d),
    "one": lambda b, h, n, d: (1,),
    "_": lambda b, h, n, d: (1,),
}


@dataclass(frozen=True, kw_only=True)
class Lookalike:
    """What was chosen; its methods write the ordinary parts of attention that way."""

    name: str
    kind: str = "symbolic"
    dynamic: str = ""
    sizes: str = "distinct"
    score: str = "@"  # @, matmul, einsum, folded
    scale: str = "none"  # none, mul, div, q
    mask: str = "none"  # none, causal, padding
    softmax: str = "F.softmax"  # F.softmax, method, torch.softmax
    value: str = "@"  # @, matmul, einsum, folded

    def __str__(self) -> str:
        chosen = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Lookalike({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in chosen)})"

    __repr__ = __str__

    def _repr_pretty_(self, printer: Any, _: bool) -> None:  # what hypothesis prints
        printer.text(str(self))

    @property
    def body(self) -> Body:
        return NEVER.get(self.name) or NUMERICS[self.name]

    def raw(self, q: Tensor, k: Tensor) -> Tensor:
        if self.score == "matmul":
            return torch.matmul(q, k.transpose(2, 3))
        if self.score == "einsum":
            return torch.einsum("bhqd,bhkd->bhqk", q, k)
        if self.score == "folded":
            s = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
            return s.view(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        return q @ k.mT

    def scaled(self, s: Tensor) -> Tensor:
        return s * 0.4 if self.scale == "mul" else (s / 2.5 if self.scale == "div" else s)

    def logits(self, q: Tensor, k: Tensor, padding: Tensor | None = None) -> Tensor:
        q = q * 0.4 if self.scale == "q" else q
        return self.masked(self.scaled(self.raw(q, k)), padding)

    def masked(self, s: Tensor, padding: Tensor | None) -> Tensor:
        if self.mask == "causal":
            i, j = torch.arange(s.shape[2]), torch.arange(s.shape[3])
            return s.masked_fill(j > i[:, None], -math.inf)
        if self.mask == "padding" and padding is not None:
            return s.masked_fill(~padding[:, None, None, :], -math.inf)
        return s

    def weights(self, s: Tensor, dim: int = -1) -> Tensor:
        if self.softmax == "method":
            return s.softmax(dim)
        return torch.softmax(s, dim=dim) if self.softmax == "torch.softmax" else F.softmax(s, dim=dim)

    def p(self, q: Tensor, k: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.weights(self.logits(q, k, padding))

    def mix(self, p: Tensor, v: Tensor) -> Tensor:
        if self.value == "matmul":
            return torch.matmul(p, v)
        if self.value == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", p, v)
        if self.value == "folded":
            out = torch.bmm(p.flatten(0, 1), v.flatten(0, 1))
            return out.view(p.shape[0], p.shape[1], p.shape[2], v.shape[3])
        return p @ v


def never(body: Any) -> Any:
    return NEVER.setdefault(body.__name__, body)


def numerics(body: Any) -> Any:
    return NUMERICS.setdefault(body.__name__, body)


def extra_of(name: str) -> str:
    body: Any = NEVER.get(name) or NUMERICS[name]
    return body.__code__.co_varnames[5]


def lookalike_axes(case: Lookalike) -> list[tuple[int, ...]]:
    """For each input, the axes that are a length."""
    return [
        (2,),
        (2,),
        (2,),
        (1,),
        {"row": (2,), "other": (2,), "col": (3,), "pairs": (2, 3)}.get(extra_of(case.name), ()),
    ]


@st.composite
def lookalikes(draw: Any) -> Lookalike:
    def pick(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    name = pick(*NEVER, *NUMERICS)
    sizes = [s for s, (b, h, n, d) in SIZES.items() if h % 2 == 0]
    if name in EQUAL:
        sizes = [s for s in sizes if _equal(SIZES[s], EQUAL[name])]
    kind = pick(*["symbolic"] * 10, *["dynamo"] * 7, *["export"] * 3)
    kind = pick("decomposed", *["export"] * 4) if kind == "export" else kind
    return Lookalike(
        name=name,
        kind=kind,
        dynamic=pick(*[""] * 12, "all", "length") if kind == "dynamo" and name not in SPECIAL else "",
        sizes=pick(*sizes),
        score=pick("@", "matmul", "einsum", "folded"),
        scale=pick("none", "mul", "div", "q"),
        mask=pick("none", "causal", "padding"),
        softmax=pick("F.softmax", "method", "torch.softmax"),
        value=pick("@", "matmul", "einsum", "folded"),
    )


def _equal(size: tuple[int, int, int, int], names: str) -> bool:
    of = dict(zip("bhnd", size, strict=True))
    return len({of[name] for name in names}) == 1


def lookalike_inputs(case: Lookalike, seed: int, longer: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    b, h, n, d = SIZES[case.sizes]
    n += longer
    padding = torch.rand(b, n, generator=g) > 0.3
    padding[:, 0] = True
    q, k, v = (torch.randn(b, h, n, d, generator=g) for _ in range(3))
    return q, k, v, padding, torch.rand(EXTRA[extra_of(case.name)](b, h, n, d), generator=g) + 0.2


class Looks(nn.Module):
    def __init__(self, case: Lookalike) -> None:
        super().__init__()
        self.case = case

    def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor, extra: Tensor) -> Any:
        return self.case.body(self.case, q, k, v, padding, extra)


# The softmax is over another axis.
@never
def over_queries(w, q, k, v, m, _):
    return w.mix(w.weights(w.logits(q, k, m).nan_to_num(neginf=-1e9), -2), v)


@never
def over_queries_by_another_axis(w, q, k, v, m, _):
    return w.mix(w.weights(w.scaled(w.raw(q, k)), 2), v)


@never
def over_heads(w, q, k, v, m, _):
    return w.mix(w.weights(w.scaled(w.raw(q, k)), 1), v)


@never
def over_the_batch(w, q, k, v, m, _):
    return w.mix(w.weights(w.scaled(w.raw(q, k)), 0), v)


@never
def over_all_pairs(w, q, k, v, m, _):
    s = w.logits(q, k)
    return w.mix(w.weights(s.flatten(2)).view(s.shape), v)


@never
def over_queries_by_einsum(w, q, k, v, m, _):
    p = w.weights(w.scaled(torch.einsum("bhqd,bhkd->bhkq", q, k)))
    return torch.einsum("bhkq,bhkd->bhqd", p, v)


# The weights are seen.
@never
def weights_returned(w, q, k, v, m, _):
    p = w.p(q, k, m)
    return w.mix(p, v), p


@never
def weights_averaged_over_heads(w, q, k, v, m, _):
    p = w.p(q, k, m)
    return w.mix(p, v), p.mean(1)


@never
def weights_summed(w, q, k, v, m, _):
    p = w.p(q, k, m)
    return w.mix(p, v), p.sum(-2)


@never
def entropy(w, q, k, v, m, _):
    p = w.p(q, k, m)
    return w.mix(p, v), -(p * (p + 1e-6).log()).sum(-1)


@never
def largest_weight(w, q, k, v, m, _):
    p = w.p(q, k, m)
    return w.mix(p, v) * p.amax(-1, keepdim=True)


@never
def weights_mixed_twice(w, q, k, v, m, other):
    p = w.p(q, k, m)
    return w.mix(p, v), p @ other


@never
def weights_of_weights(w, q, k, v, m, _):
    p = w.p(q, k, m)
    return w.mix(p @ p, v)


@never
def a_view_of_the_weights_returned(w, q, k, v, m, _):
    p = w.p(q, k, m)
    return w.mix(p, v), p[:, :, -1]


# The second is attention with a bias, which a CPU reads as it comes.
@numerics
def weights_added_to_the_next_logits(w, q, k, v, m, _):
    p = w.p(q, k, m)
    return w.weights(w.logits(w.mix(p, v), k, m) + p) @ v


# The values are contracted over another axis.
@never
def weights_transposed(w, q, k, v, m, _):
    return w.mix(w.p(q, k, m).mT, v)


@never
def weights_transposed_by_einsum(w, q, k, v, m, _):
    return torch.einsum("bhqk,bhqd->bhkd", w.p(q, k, m), v)


@never
def values_on_the_left(w, q, k, v, m, _):
    return v.transpose(-1, -2) @ w.p(q, k, m)


# Something lies between softmax and values.
@never
def gated_weights(w, q, k, v, m, pairs):
    return w.mix(w.p(q, k, m) * pairs, v)


@never
def weights_gated_by_head(w, q, k, v, m, heads):
    return w.mix(w.p(q, k, m) * heads[:, None, None], v)


@never
def weights_plus_bias(w, q, k, v, m, pairs):
    return w.mix(w.p(q, k, m) + pairs, v)


@never
def weights_masked(w, q, k, v, m, _):
    return w.mix(w.p(q, k) * m[:, None, None, :], v)


@never
def weights_masked_and_renormalised(w, q, k, v, m, _):
    p = w.p(q, k) * m[:, None, None, :]
    return w.mix(p / (p.sum(-1, keepdim=True) + 1e-3), v)


@never
def weights_cut_off(w, q, k, v, m, _):
    p = w.p(q, k, m)
    return w.mix(p.masked_fill(p < 0.1, 0.0), v)


@never
def weights_squared(w, q, k, v, m, _):
    return w.mix(w.p(q, k, m).square(), v)


@never
def weights_clamped(w, q, k, v, m, _):
    return w.mix(w.p(q, k, m).clamp(0.05, 0.5), v)


@never
def weights_zeroed_in_place(w, q, k, v, m, _):
    p = w.p(q, k, m)
    p[:, :, :, :2].zero_()
    return w.mix(p, v)


@never
def weights_written_in_place(w, q, k, v, m, pairs):
    p = w.p(q, k, m)
    p.mul_(pairs)
    return w.mix(p, v)


@never
def weights_written_through_a_view(w, q, k, v, m, pairs):
    p = w.p(q, k, m)
    p.flatten(0, 1).mul_(pairs.flatten(0, 1))
    return w.mix(p, v)


@never
def talking_heads_after(w, q, k, v, m, mixer):
    return w.mix(torch.einsum("bhqk,hg->bgqk", w.p(q, k, m), mixer), v)


@never
def weights_smoothed(w, q, k, v, m, _):
    return w.mix(w.p(q, k, m).cumsum(-1), v)


@never
def softmax_twice(w, q, k, v, m, _):
    return w.mix(w.weights(w.p(q, k, m)), v)


@never
def differential(w, q, k, v, m, other):
    return w.mix(w.p(q, k, m) - 0.3 * w.p(other, k, m), v)


@never
def dropout_in_training(w, q, k, v, m, _):
    return w.mix(F.dropout(w.p(q, k, m), 0.3, training=True), v)


@never
def dropout_by_default(w, q, k, v, m, _):
    return w.mix(F.dropout(w.p(q, k, m)), v)


@never
def identity_left_over(w, q, k, v, m, _):
    i = torch.arange(q.shape[2])
    return w.mix(w.p(q, k, m) + (i[:, None] == i).float(), v)


# No softmax of a score matmul.
@never
def linear_attention(w, q, k, v, m, _):
    return w.weights(q) @ (w.weights(k, -2).transpose(-1, -2) @ v)


@never
def linear_attention_feature_map(w, q, k, v, m, _):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2)[..., None])


@never
def no_softmax(w, q, k, v, m, _):
    return w.mix(w.scaled(w.raw(q, k)), v)


@never
def sigmoid(w, q, k, v, m, _):
    return w.mix(w.logits(q, k, m).sigmoid(), v)


@never
def relu(w, q, k, v, m, _):
    return w.mix(F.relu(w.logits(q, k, m)) / 8, v)


@never
def log_softmax(w, q, k, v, m, _):
    return w.mix(F.log_softmax(w.scaled(w.raw(q, k)), -1), v)


@never
def softmin(w, q, k, v, m, _):
    return w.mix(F.softmin(w.scaled(w.raw(q, k)), -1) * 2, v)


@never
def gumbel(w, q, k, v, m, _):
    s = w.scaled(w.raw(q, k))
    return w.mix(w.weights(s - (-torch.rand_like(s).clamp(0.01, 0.99).log()).log()), v)


@never
def router(w, q, k, v, m, mixer):
    p, at = w.weights(q @ k[:, :, :4].mT).topk(2, dim=-1)
    p = p / p.sum(-1, keepdim=True)
    return (p[..., None] * v[:, :, :4].unsqueeze(2).expand(-1, -1, q.shape[2], -1, -1).gather(
        3, at[..., None].expand(-1, -1, -1, -1, v.shape[3]))).sum(-2)  # fmt: skip


@never
def weighted_sum_without_matmul(w, q, k, v, m, row):
    return (w.weights(row, 2) * v).sum(2)


@never
def classifier(w, q, k, v, m, _):
    return w.weights(q @ k[:, :, :3].mT).argmax(-1)


# The mask depends on the logits.
@never
def top_k(w, q, k, v, m, _):
    s = w.logits(q, k, m)
    least = s.topk(3, dim=-1).values[..., -1:]
    return w.mix(w.weights(s.masked_fill(s < least, -math.inf)), v)


@never
def top_k_by_scatter(w, q, k, v, m, _):
    s = w.logits(q, k, m)
    top = s.topk(3, dim=-1)
    return w.mix(w.weights(torch.full_like(s, -math.inf).scatter(-1, top.indices, top.values)), v)


@never
def above_the_mean(w, q, k, v, m, _):
    s = w.scaled(w.raw(q, k))
    return w.mix(w.weights(torch.where(s > s.mean(-1, keepdim=True), s, -1e9)), v)


@never
def negative_logits_dropped(w, q, k, v, m, _):
    s = w.scaled(w.raw(q, k))
    return w.mix(w.weights(s.masked_fill(s < 0, -1e4)), v)


@never
def relu_of_the_logits(w, q, k, v, m, _):
    return w.mix(w.weights(F.relu(w.scaled(w.raw(q, k)))), v)


@never
def talking_heads_before(w, q, k, v, m, mixer):
    return w.mix(w.weights(torch.einsum("bhqk,hg->bgqk", w.scaled(w.raw(q, k)), mixer)), v)


@never
def logits_squared(w, q, k, v, m, _):
    return w.mix(w.weights(w.scaled(w.raw(q, k)).square().neg()), v)


@never
def logits_cumulated(w, q, k, v, m, _):
    return w.mix(w.weights(w.scaled(w.raw(q, k)).cumsum(-1)), v)


@never
def logits_shifted(w, q, k, v, m, _):
    return w.mix(w.weights(w.scaled(w.raw(q, k)).roll(1, 2)), v)


@never
def logits_transposed(w, q, k, v, m, _):
    s = w.scaled(w.raw(q, k))
    return w.mix(w.weights(s + s.mT), v)
