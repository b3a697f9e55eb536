"""``Program``: a case of ``generate`` written as a module, the way its choices say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from generate import CAP, CHUNK, MOST, PREFIX, WINDOW, Case
from torch import Tensor, fx, nn

EINSUM = {  # query, key, value, scores, output
    "bhnd": ("bhqd", "bhkd", "bhkd", "bhqk", "bhqd"),
    "bnhd": ("bqhd", "bkhd", "bkhd", "bhqk", "bqhd"),
    "folded": ("bqd", "bkd", "bkd", "bqk", "bqd"),
    "bnd": ("bqd", "bkd", "bkd", "bqk", "bqd"),
    "grouped": ("bhgqd", "bhkd", "bhkd", "bhgqk", "bhgqd"),
    "windows": ("bwhqd", "bwhkd", "bwhkd", "bwhqk", "bwhqd"),
}


# Calls that symbolic_trace does not look into, and Dynamo does (see generate_graphs).
@fx.wrap
def filled(n: Any, nk: Any, value: Any, dtype: torch.dtype) -> Tensor:
    return torch.full((n, nk), value, dtype=dtype)


@fx.wrap
def constant(_: Tensor, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@fx.wrap
def added(s: Tensor, mask: Tensor) -> Tensor:
    s += mask
    return s


@fx.wrap
def cut(mask: Tensor, n: Any, nk: Any) -> Tensor:
    return mask[:n, :nk]


class Layer(nn.Module):
    """One attention with its projections."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        (self.h, self.hkv), (self.d, self.dv) = case.heads, case.dims
        self.n, self.nk = case.length
        self.dtype = case.torch_dtype
        self.fill = {"-inf": -math.inf, "min": torch.finfo(self.dtype).min, "-1e9": -1e9}[case.fill]
        width = self.h * self.d
        if case.source == "linear":
            self.q = nn.Linear(width, width)
            self.k, self.v = nn.Linear(width, self.hkv * self.d), nn.Linear(width, self.hkv * self.dv)
        elif case.projected:
            self.qkv = nn.Linear(width, width + self.hkv * (self.d + self.dv))
        if case.out == "proj":
            self.o = nn.Linear(self.h * self.dv, width)
        if case.bias == "relative":
            self.table = nn.Parameter(torch.randn(2 * MOST, self.h))
        if case.softmax == "module":
            self.softmax_module = nn.Softmax(dim=-1)
        if case.dropout == "module":
            self.dropout_module = nn.Dropout(0.3)
        if case.scale_form == "buffer":
            self.register_buffer("scale", torch.tensor(case.multiplier))
        if case.index == "buffer":
            self.register_buffer("keep", self.index_mask(case.masks, torch.arange(MOST)[:, None], torch.arange(MOST)))

    # Projections and layouts.

    def forward(self, states: tuple[Tensor, ...], padding: Tensor | None, documents: Tensor | None) -> Tensor:
        q, k, v = self.project(states) if self.case.projected else self.lay_out(states)
        if self.case.sdpa:
            return self.output(self.call(q, k, v, padding, documents))
        q, k, v = self.formed(q, k, v)
        scores = self.masked(self.scores(q, k), q, padding, documents)
        return self.output(self.mixed(self.weights(scores), v))

    def project(self, states: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        case, x, y = self.case, states[0], states[-1]
        if case.source == "linear":
            q, k, v = self.q(x), self.k(y), self.v(y)
        elif case.source == "chunk" and self.hkv == self.h and self.dv == self.d:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        elif case.source == "unbind":
            qkv = self.qkv(x).unflatten(-1, (3, self.h, self.d))
            q, k, v = qkv.unbind(-3)
            return self.lay_out((q, k, v), split=False)
        else:
            q, k, v = self.qkv(x).split([self.h * self.d, self.hkv * self.d, self.hkv * self.dv], dim=-1)
        return self.lay_out((q, k, v), split=True)

    def lay_out(self, states: tuple[Tensor, ...], split: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Heads first, where the scores want that."""
        case = self.case
        q, k, v = states
        if case.form == "bnd":
            if case.projected and not split:
                q, k, v = q.squeeze(-2), k.squeeze(-2), v.squeeze(-2)
            if case.query_stored == "dn":
                q = self.transposed(q)
            return q, k.transpose(1, 2) if case.key_stored == "early" else k, v
        if split:
            q, k, v = (self.split_heads(x, d) for x, d in ((q, self.d), (k, self.d), (v, self.dv)))
        if case.source == "form" or case.form == "bnhd":
            return self.transposed(q) if case.query_stored == "dn" else q, k, v
        q = q.transpose(-2, -3) if case.form == "windows" else q.permute(0, 2, 1, 3)
        if case.key_stored == "early":
            k = k.permute(0, 1, 3, 4, 2) if case.form == "windows" else k.permute(0, 2, 3, 1)
        else:
            k = k.transpose(-2, -3)
        return q, k, v if case.value_stored == "seq" else v.transpose(-3, -2)

    def split_heads(self, x: Tensor, d: int) -> Tensor:
        if self.case.form == "windows":
            return x.unflatten(-1, (-1, d))
        return x.view(x.shape[0], x.shape[1], -1, d)

    def formed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values repeated, heads folded into the batch or grouped."""
        case = self.case
        axis = 2 if case.form in ("bnhd", "windows") else 1
        k = self.repeated(k, axis)
        v = self.repeated(v, 2 if case.value_stored == "seq" else axis)
        if case.source == "form" or case.form not in ("folded", "grouped"):
            return q, k, v
        if case.form == "folded":
            if case.fold == "unfold":
                return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            return tuple(x.reshape(x.shape[0] * self.h, x.shape[2], x.shape[3]) for x in (q, k, v))  # type: ignore
        return q.view(q.shape[0], self.hkv, self.h // self.hkv, -1, self.d), k, v

    def repeated(self, x: Tensor, axis: int) -> Tensor:
        case, g = self.case, self.h // self.hkv
        if case.repeat == "repeat_interleave":
            return torch.repeat_interleave(x, g, dim=axis)
        if case.repeat == "method":
            return x.repeat_interleave(g, axis)
        if case.repeat in ("expand", "flatten"):
            wide = x.unsqueeze(axis + 1)
            wide = wide.expand(*[-1] * (axis + 1), g, *[-1] * (x_rank(case) - axis - 1))
            if case.repeat == "flatten":
                return wide.flatten(axis, axis + 1)
            return wide.reshape(*(x.shape[at] if at != axis else self.h for at in range(x_rank(case))))
        return x

    def transposed(self, x: Tensor) -> Tensor:
        """With the last two axes swapped."""
        how, rank = self.case.transpose, rank_of(self.case)
        if how == "mT":
            return x.mT
        if how == "swapaxes":
            return torch.swapaxes(x, -1, -2)
        if self.case.form == "grouped":
            return x.transpose(-1, -2)
        if how == "permute":
            return x.permute(*range(rank - 2), rank - 1, rank - 2)
        if how == "transpose":
            return torch.transpose(x, rank - 2, rank - 1)
        if how == "rearrange":
            return torch.movedim(x, -1, -2)
        return x.transpose(-1, -2)

    # Scores.

    def factor(self, x: Tensor, power: float) -> Any:
        """The scale to a power, as a Python number or a tensor without axes."""
        case, value = self.case, self.case.multiplier**power
        if case.scale_form == "shape":
            return x.shape[-1] ** (-0.5 * power)
        if case.scale_form == "math":
            return math.sqrt(self.d) ** -power if power != -1 else math.sqrt(self.d)
        if case.scale_form == "tensor":
            return torch.tensor(value) if case.kind == "symbolic" else constant(x, value)
        if case.scale_form == "buffer":
            return self.scale if power == 1 else self.scale**power
        return value

    def scaled(self, x: Tensor, like: Tensor, power: float = 1.0) -> Tensor:
        """``x`` times the scale to a power; ``like`` has the head dim last."""
        how = self.case.scale_how
        if how == "div":
            return x / self.factor(like, -power)
        factor = self.factor(like, power)
        if how == "in place":
            x = x.clone() if x is like else x
            return x.mul_(factor)
        return factor * x if how == "commuted" else x * factor

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        case, op = self.case, self.case.score
        early = case.key_stored != "nd"
        like = q
        if case.scale in ("q", "both"):
            q = self.scaled(q, q, 1.0 if case.scale == "q" else 0.5)
        if case.scale in ("k", "both"):
            power = 1.0 if case.scale == "k" else 0.5
            k = self.scaled(k.clone() if case.scale_how == "in place" else k, like, power)
        query, key, _, score, _ = EINSUM[case.form]
        if op == "einsum":
            key = key[:-2] + "dk" if early else key
            s = torch.einsum(f"{query},{key}->{score}", q, k)
        else:
            if case.form == "grouped":
                k = k.unsqueeze(2)
            if op == "einsum ...":
                s = torch.einsum("...qd,...dk->...qk" if early else "...qd,...kd->...qk", q, k)
            elif op == "kq":
                s = self.transposed(k @ self.transposed(q))
            else:
                s = product(op, q, k if early else self.transposed(k), self.factor(like, 1.0))
        if case.scale == "after":
            s = self.scaled(s, like)
        if case.softcap == "functions":
            s = CAP * torch.tanh(s / CAP)
        elif case.softcap == "methods":
            s = s.div(CAP).tanh().mul(CAP)
        return s

    # Masks and biases.

    def sizes_of(self, s: Any) -> tuple[Any, Any]:
        return s.shape[-2], s.shape[-1]

    def index_mask(self, names: list[str], i: Tensor, j: Tensor) -> Tensor:
        """From the indices; [n, nk]."""
        keep = None
        for name in names:
            if name in ("padding", "documents"):
                continue
            if name == "causal":
                one = j <= i if self.case.index != "commuted" else i >= j
            elif name == "offset":
                one = j <= i + self.offset if self.case.index != "commuted" else i + self.offset >= j
            elif name == "window":
                one = (j <= i) & (j > i - WINDOW) if self.case.index != "commuted" else (i >= j) & (i - j < WINDOW)
            elif name == "chunked":
                one = i // CHUNK == j // CHUNK
            else:
                one = (j <= i) | (j < PREFIX)
            keep = one if keep is None else keep & one
        return torch.ones(MOST, MOST, dtype=torch.bool) if keep is None else keep

    @property
    def offset(self) -> int:
        return self.nk - self.n if self.case.cross else 2

    def index_only(self, n: Any, nk: Any, like: Tensor) -> Tensor | None:
        case = self.case
        names = [name for name in case.masks if name not in ("padding", "documents")]
        if not names:
            return None
        diagonal = self.offset if "offset" in names else 0
        if case.index == "buffer":
            return self.keep[: self.n, : self.nk] if case.kind == "symbolic" else cut(self.keep, n, nk)
        if set(names) <= {"causal", "offset", "window"} and case.index in ("tril", "triu", "new_ones"):
            if case.index == "new_ones":
                ones = like.new_ones(n, nk)
                keep = torch.tril(ones, diagonal) * torch.triu(ones, 1 - WINDOW) if "window" in names else (
                    torch.tril(ones, diagonal))  # fmt: skip
                return keep.bool()
            if case.kind == "symbolic":
                n, nk = self.n, self.nk
            ones = filled(n, nk, True, torch.bool)
            if case.index == "tril":
                keep = ones.tril(diagonal)
                return keep & ones.triu(1 - WINDOW) if "window" in names else keep
            keep = ~torch.triu(ones, diagonal=diagonal + 1)
            return keep & ~ones.tril(-WINDOW) if "window" in names else keep
        i, j = torch.arange(n), torch.arange(nk)
        return self.index_mask(names, i[:, None], j[None, :])

    def masks(self, s: Any, padding: Tensor | None, documents: Tensor | None, rank: int) -> list[Tensor]:
        """Bool masks that broadcast with scores of that rank."""
        case, found = self.case, []
        n, nk = self.sizes_of(s)
        index = self.index_only(n, nk, s)
        if index is not None:
            found.append(index[(None,) * (rank - 2)] if case.rank == "full" else index)
        for mask in (padding, documents):
            if mask is None:
                continue
            if mask is padding:
                keep = (mask if case.padding == "bool" else mask != 0)[:, None, :]
            else:
                keep = mask.unsqueeze(-1) == mask.unsqueeze(-2)
            if case.form == "folded" and rank == 3:
                keep = keep[:, None].expand(-1, self.h, -1, -1).flatten(0, 1)
            else:
                for _ in range(rank - 3):
                    keep = keep.unsqueeze(1)
            found.append(keep)
        if case.combine == "and" and len(found) == 2:
            found = [found[0] & found[1]]
        return found

    def additive(self, keep: Tensor, s: Any) -> Tensor:
        case = self.case
        if case.floats == "full":
            n, nk = (self.n, self.nk) if case.kind == "symbolic" else self.sizes_of(s)
            return filled(n, nk, self.fill, self.dtype).triu(1)
        if case.floats == "one minus":
            return (1.0 - keep.to(self.dtype)) * self.fill
        if case.floats == "masked_fill":
            return torch.zeros_like(keep, dtype=self.dtype).masked_fill(~keep, self.fill)
        zero: Any = torch.zeros((), dtype=self.dtype) if case.dtype == "float64" else 0.0
        return torch.where(keep, zero, self.fill).to(self.dtype)

    def masked(self, s: Tensor, q: Tensor, padding: Tensor | None, documents: Tensor | None) -> Tensor:
        case = self.case
        n, nk = self.sizes_of(s)
        unfolds = case.form == "folded" and (case.bias != "none" or (case.by_batch and case.fold == "unfold"))
        if unfolds:
            s = s.view(-1, self.h, n, nk)
        bias = self.bias(s)
        s = s if bias is None else s + bias
        for keep in self.masks(s, padding, documents, rank_of(case) + unfolds):
            s = self.apply(s, keep)
        if unfolds:
            s = s.view(-1, n, nk)
        if case.scale == "after mask":
            s = self.scaled(s, q)
        return s

    def apply(self, s: Tensor, keep: Tensor) -> Tensor:
        case, how, fill = self.case, self.case.apply, self.fill
        if how == "masked_fill":
            return s.masked_fill(~keep, fill)
        if how == "where":
            return torch.where(keep, s, fill)
        if how == "where swapped":
            if case.kind == "symbolic":
                return torch.where(~keep, torch.tensor(fill, dtype=self.dtype), s)
            return torch.where(~keep, constant(s, fill, self.dtype), s)
        if how == "Tensor.where":
            return s.where(keep, fill)
        if how == "masked_fill_":
            return s.masked_fill_(torch.logical_not(keep), fill)
        mask = self.additive(keep, s)
        if how == "m + s":
            return mask + s
        if how == "torch.add":
            return torch.add(s, mask)
        if how == "s += m":
            return s + mask if case.kind == "symbolic" else added(s, mask)
        if how == "add_":
            return s.add_(mask)
        if how == "add out":
            return torch.add(s, mask, out=torch.empty_like(s, memory_format=torch.contiguous_format))
        return s + mask

    def bias(self, s: Tensor) -> Tensor | None:
        case = self.case
        if case.bias == "none":
            return None
        n, nk = self.sizes_of(s)
        i, j = torch.arange(n)[:, None], torch.arange(nk)[None, :]
        if case.bias == "relative":
            bias = F.embedding(i - j + MOST, self.table).permute(2, 0, 1)
        else:
            slopes = torch.tensor([2.0 ** -(head + 1) for head in range(self.h)])
            bias = (slopes[:, None, None] * -(i - j).abs()).to(self.dtype)
        if case.form == "bnd":
            return bias[0]
        return bias.unflatten(0, (self.hkv, -1)) if case.form == "grouped" else bias

    # Softmax and values.

    def weights(self, s: Tensor) -> Tensor:
        case = self.case
        if case.row_max == "amax":
            s = s - s.amax(dim=-1, keepdim=True)
        elif case.row_max == "max":
            s = s - s.max(dim=-1, keepdim=True)[0]
        if case.softmax == "F.softmax":
            p = F.softmax(s, dim=-1)
        elif case.softmax == "torch.softmax":
            p = torch.softmax(s, -1)
        elif case.softmax == "method":
            p = s.softmax(dim=-1)
        elif case.softmax == "module":
            p = self.softmax_module(s)
        elif case.softmax == "positive":
            p = F.softmax(s, rank_of(case) - 1)
        elif case.softmax == "float32":
            p = F.softmax(s, dim=-1, dtype=torch.float32).to(self.dtype)
        else:
            p = s.float().softmax(-1).type_as(s)
        if case.dropout == "p = 0":
            p = F.dropout(p, 0.0, self.training)
        elif case.dropout == "not training":
            p = F.dropout(p, p=0.3, training=self.training)
        elif case.dropout == "module":
            p = self.dropout_module(p)
        return p

    def mixed(self, p: Tensor, v: Tensor) -> Tensor:
        case, op = self.case, self.case.value
        _, _, value, score, out = EINSUM[case.form]
        if op == "einsum to seq":
            return torch.einsum("bhqk,bkhd->bqhd" if case.value_stored == "seq" else "bhqk,bhkd->bqhd", p, v)
        if op == "einsum":
            return torch.einsum(f"{score},{value}->{out}", p, v)
        if case.form == "grouped":
            v = v.unsqueeze(2)
        if op == "einsum ...":
            return torch.einsum("...qk,...kd->...qd", p, v)
        if op == "vp":
            return self.transposed(self.transposed(v) @ self.transposed(p))
        return product(op, p, v, 1.0)

    def output(self, out: Tensor) -> Tensor:
        case = self.case
        if case.out == "none" or case.form == "bnd":
            return self.o(out) if case.out == "proj" else out
        if case.form == "folded":
            out = out.view(-1, self.h, out.shape[-2], self.dv)
        elif case.form == "grouped":
            out = out.flatten(1, 2)
        if case.form != "bnhd" and case.value != "einsum to seq":
            out = out.transpose(-2, -3)
        if case.out == "view" and case.form != "windows":
            return out.contiguous().view(out.shape[0], out.shape[1], self.h * self.dv)
        if case.form == "windows":
            out = out.flatten(-2, -1)
        else:
            out = out.reshape(out.shape[0], out.shape[1], -1)
        return self.o(out) if case.out == "proj" else out

    def call(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, documents: Tensor | None) -> Tensor:
        """F.scaled_dot_product_attention."""
        case = self.case
        kwargs: dict[str, Any] = {}
        if case.repeat == "broadcast":
            kwargs["enable_gqa"] = True
        else:
            k, v = (self.repeated(x, 2 if case.form == "windows" else 1) for x in (k, v))
        if case.scale != "none":
            kwargs["scale"] = self.factor(q, 1.0)
        if case.dropout != "none":
            kwargs["dropout_p"] = 0.0 if case.dropout == "p = 0" else (0.3 if self.training else 0.0)
        if case.apply == "is_causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **kwargs)
        n, nk = q.shape[-2], k.shape[-2]
        mask = None
        shaped = Sized(n, nk, q)
        for keep in self.masks(shaped, padding, documents, rank_of(case)):
            mask = keep if case.apply == "masked_fill" else self.additive(keep, shaped)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **kwargs)


class Sized:
    """The scores' sizes, where there are no scores."""

    def __init__(self, n: Any, nk: Any, like: Tensor) -> None:
        self.shape, self.new_ones = (n, nk), like.new_ones


def rank_of(case: Case) -> int:
    return {"folded": 3, "bnd": 3, "grouped": 5, "windows": 5}.get(case.form, 4)


def x_rank(case: Case) -> int:
    return 5 if case.form == "windows" else 4


def product(op: str, a: Tensor, b: Tensor, alpha: Any) -> Tensor:
    if op == "torch.matmul":
        return torch.matmul(a, b)
    if op == "Tensor.matmul":
        return a.matmul(b)
    if op == "torch.bmm":
        return torch.bmm(a, b)
    if op == "Tensor.bmm":
        return a.bmm(b)
    if op == "baddbmm":
        return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=alpha)
    if op == "Tensor.baddbmm":
        return a.new_empty(1, 1, 1).baddbmm(batch1=a, batch2=b, beta=0.0, alpha=alpha)
    return a @ b


class Program(nn.Module):
    """A case as a module in eval mode: ``program(*inputs(case, data))``. Its weights are drawn from ``seed``."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(Layer(case) for _ in range(case.layers))
        self.case = case
        self.to(case.torch_dtype).eval().requires_grad_(False)

    def run(self, *inputs: Tensor) -> Tensor:
        case = self.case
        count = (2 if case.cross else 1) if case.projected else 3
        states, rest = inputs[:count], list(inputs[count:])
        padding = rest.pop(0) if "padding" in case.mask else None
        documents = rest.pop(0) if "documents" in case.mask else None
        for layer in self.layers:
            out = layer(states, padding, documents)
            states = (out, *states[1:]) if case.layers == 1 else (states[0] + out, *states[1:])
        return states[0]

    def in_double(self) -> Program:
        program = written(replace(self.case, dtype="float64"))
        program.load_state_dict(self.state_dict())
        return program


class Program1(Program):
    def forward(self, a: Tensor) -> Tensor:
        return self.run(a)


class Program2(Program):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.run(a, b)


class Program3(Program):
    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return self.run(a, b, c)


class Program4(Program):
    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return self.run(a, b, c, d)


def written(case: Case) -> Program:
    """The program of a case, with as many arguments as it has inputs."""
    count = (1 + case.cross if case.projected else 3) + ("padding" in case.mask) + ("documents" in case.mask)
    return {1: Program1, 2: Program2, 3: Program3, 4: Program4}[count](case)
