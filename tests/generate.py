"""Random attention programs: ``Case`` says what was chosen, ``Program`` is written so, ``reference`` is what it means.

A case is rebuilt from its text: ``Program(eval(str(case)))``. The first option of a choice is the plainest, so
hypothesis shrinks a failure to what matters. ``reference`` computes in plain index notation from the case and the
canonical operands, with none of the code that writes the program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

CAP, WINDOW, CHUNK, PREFIX, MOST = 2.0, 4, 4, 3, 40
# batch, heads, queries, head dim
SIZES = {
    "distinct": (2, 4, 10, 6),
    "n = h = d": (2, 8, 8, 8),
    "b = n = h = d": (4, 4, 4, 4),
    "batch 1": (1, 4, 12, 6),
    "one head": (2, 1, 9, 4),
    "longer": (2, 2, 24, 8),
    "n = d": (3, 2, 8, 8),
}
MASKS = (
    "none causal padding causal+padding offset window chunked prefix documents window+padding prefix+padding "
    "causal+documents"
).split()
FILLS = ("-inf", "min", "-1e9")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What was chosen. Printed without what is as plain as can be."""

    kind: str = "symbolic"  # symbolic, dynamo, export, decomposed
    dynamic: str = ""  # "", all (every size), length
    dtype: str = "float32"
    sizes: str = "distinct"
    form: str = "bhnd"  # the layout that the scores are computed in: bhnd, bnhd, folded, bnd, grouped, windows
    source: str = "form"  # inputs in that form, seq [b, n, h, d], linear, chunk, split, unbind
    cross: bool = False  # Nq != Nk
    value_dim: bool = False  # another head dim of the values
    kv_heads: str = "same"  # same, half, one
    repeat: str = "none"  # none, repeat_interleave, method, expand, flatten, grouped, broadcast
    query_stored: str = "nd"  # nd, dn (an input that is transposed first)
    key_stored: str = "nd"  # nd, dn (an input), early (permuted right after its projection)
    value_stored: str = "same"  # same, seq ([b, n, h, d], with an einsum)
    transpose: str = "transpose(-1, -2)"
    sdpa: bool = False
    score: str = "@"
    scale: str = "after"  # none, after, q, k, both, alpha (of baddbmm), after mask
    scale_how: str = "mul"  # mul, div, in place, commuted
    scale_form: str = "shape"  # shape, math, constant, tensor, buffer
    softcap: str = "none"  # none, functions, methods
    bias: str = "none"  # none, relative, alibi
    mask: str = "none"
    index: str = "aranges"  # how an index mask is made: aranges, commuted, tril, triu, new_ones, buffer
    padding: str = "bool"  # bool, int
    combine: str = "and"  # and, separate
    rank: str = "least"  # least, full
    fold: str = "unfold"  # how a mask by batch meets folded scores: unfold, expand
    apply: str = "masked_fill"
    floats: str = "where"  # how an added mask is made of a bool one: where, masked_fill, one minus, full
    fill: str = "-inf"
    empty: bool = False  # the second run has a sequence that is all padding
    softmax: str = "F.softmax"
    row_max: str = "none"  # none, amax, max
    dropout: str = "none"  # none, p = 0, not training, module
    value: str = "@"
    out: str = "none"  # none, merge, view, proj
    layers: int = 1

    def __str__(self) -> str:
        chosen = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in chosen)})"

    __repr__ = __str__

    def _repr_pretty_(self, printer: Any, _: bool) -> None:  # what hypothesis prints
        printer.text(str(self))

    @property
    def masks(self) -> list[str]:
        return [] if self.mask == "none" else self.mask.split("+")

    @property
    def by_batch(self) -> bool:
        return "padding" in self.mask or "documents" in self.mask

    @property
    def projected(self) -> bool:
        return self.source not in ("form", "seq")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def length(self) -> tuple[int, int]:
        n = SIZES[self.sizes][2]
        return n, n + 5 if self.cross else n

    @property
    def heads(self) -> tuple[int, int]:
        h = 1 if self.form == "bnd" else SIZES[self.sizes][1]
        return h, {"same": h, "half": max(1, h // 2), "one": 1}[self.kv_heads]

    @property
    def dims(self) -> tuple[int, int]:
        d = SIZES[self.sizes][3]
        return d, d + 3 if self.value_dim else d

    @property
    def lead(self) -> tuple[int, ...]:
        b = SIZES[self.sizes][0]
        return (b, 3) if self.form == "windows" else (b,)

    @property
    def multiplier(self) -> float:
        """The scale that it means."""
        if self.scale == "none":
            return 1.0 if not self.sdpa else self.dims[0] ** -0.5
        return 0.37 if self.scale_form == "constant" else self.dims[0] ** -0.5

    @property
    def must(self) -> bool:
        """It must be rewritten, however it is written: self attention, plainly masked, with what is known."""
        # symbolic_trace runs what no input is part of, and what it finds is an attribute of the module.
        attribute = self.index in ("tril", "triu") or self.floats == "full" or self.apply == "where swapped"
        known = self.index != "buffer" and not (self.kind == "symbolic" and attribute)
        return (
            not self.cross
            and self.dtype in ("float32", "bfloat16")
            and self.softcap == self.bias == "none"
            and self.mask in ("none", "causal", "padding", "causal+padding")
            and known
            and ("padding" not in self.mask or self.fill == "-inf")  # any other fill means sth. for an empty row
            and not (self.form == "windows" and self.by_batch)
            and self.scale_form != "buffer"
            and not (self.scale_form == "tensor" and self.kind == "symbolic")
            and (self.score, self.value) == (self.score.replace("kq", ""), self.value.replace("vp", ""))
        )


@st.composite
def cases(draw: Any) -> Case:
    """Any case that makes sense."""

    def pick(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    def often(usual: Any, *options: Any) -> Any:
        """``usual`` half of the time."""
        return pick(*[usual] * len(options), *options)

    kind = pick(*["symbolic"] * 20, *["dynamo"] * 12, *["export"] * 7, "decomposed")
    case = Case(
        kind=kind,
        dynamic=pick(*[""] * 16, "all", "length") if kind in ("dynamo", "export") else "",
        dtype=pick(*["float32"] * 8, "bfloat16", "float64"),
        sizes=pick(*SIZES),
        sdpa=kind != "decomposed" and pick(*[False] * 7, True),
        cross=pick(*[False] * 4, True),
        value_dim=pick(False, False, False, True),
        scale_form=pick("shape", "math", "constant", "tensor", "buffer"),
        index=pick("aranges", "commuted", "tril", "triu", "new_ones", "buffer"),
        transpose=pick("transpose(-1, -2)", "mT", "swapaxes", "permute", "transpose", "rearrange"),
        dropout=often("none", "p = 0", "not training", "module"),
        mask=pick("none", *["causal"] * 4, *MASKS[:4], *MASKS),
    )
    change: dict[str, Any] = {}
    # Layout.
    forms = ("bhnd", "bhnd", "windows", "bnd") if case.sdpa else ("bhnd", "bhnd", "bnhd", "folded", "folded", "bnd",
                                                                 "grouped", "windows")  # fmt: skip
    change["form"] = form = pick(*forms)
    sources = ["form", "linear", "chunk", "split", "unbind"]
    if form in ("bhnd", "folded", "grouped"):
        sources.insert(1, "seq")
    change["source"] = source = pick(*sources)
    if form == "grouped" and SIZES[case.sizes][1] == 1:
        change["sizes"] = "distinct"
    if "documents" in case.mask or source in ("chunk", "split", "unbind"):
        change["cross"] = False
    if source in ("chunk", "unbind"):
        change["value_dim"] = False
    shared = source in ("chunk", "unbind") or form in ("bnd",) or (form == "folded" and source == "form")
    if form == "grouped":
        change |= {"kv_heads": "half", "repeat": "grouped"}
        if source in ("chunk", "unbind"):
            change["source"] = "split"
    elif not shared and pick(False, True):
        change["kv_heads"] = kv_heads = pick("half", "one")
        ways = ["repeat_interleave", "method", "expand", "flatten"]
        if form in ("bhnd", "windows") and (kv_heads == "one" or case.sdpa):
            ways += ["broadcast"] * 4
        change["repeat"] = pick(*ways)
    if case.sdpa:
        change["scale"] = pick("none", "alpha")
        change["scale_form"] = pick("shape", "constant", "math")
        change["out"] = pick("none", "merge", "view", *["proj"] * 2 * (change["source"] not in ("form", "seq")))
        change["apply"] = often("masked_fill", "s + m")
    else:
        if source == "form" and form != "bnhd":
            change["query_stored"] = often("nd", "dn")
        if form != "bnhd":
            change["key_stored"] = often("nd", "dn" if source == "form" else "early")
        early = change.get("key_stored") in ("dn", "early")
        # Scores.
        score = ["@", "torch.matmul", "Tensor.matmul", "einsum", "einsum ..."]
        value = ["@", "torch.matmul", "Tensor.matmul", "einsum", "einsum ..."]
        if form in ("folded", "bnd"):
            score += ["torch.bmm", "Tensor.bmm", "baddbmm", "baddbmm", "Tensor.baddbmm"]
            value += ["torch.bmm", "Tensor.bmm", "Tensor.bmm", "baddbmm"]
        if form == "grouped":
            score, value = [*score, "einsum"], [*value, "einsum"]
        if form == "bhnd" and change.get("repeat") != "broadcast":
            value += ["einsum to seq"]
            change["value_stored"] = often("same", "seq")
        if not early and form not in ("bnhd", "grouped"):
            score += ["kq"]
            value += ["vp"]
        if form == "bnhd":
            score, value = ["einsum"], ["einsum"]
        change["score"] = pick(*score)
        change["value"] = "einsum to seq" if change.get("value_stored") == "seq" else pick(*value)
        # Scale, softcap, bias.
        plain = pick(*[True] * 4, False)
        if not plain:
            change["softcap"] = often("none", "functions", "methods")
            change["bias"] = pick("relative", "alibi")
        scales = ["after", "after", "q", "k", "both", "none"]
        if plain and case.mask != "none":
            scales += ["after mask"]
        if change["score"].endswith("baddbmm"):
            scales = ["alpha"]
            if case.scale_form in ("tensor", "buffer"):
                change["scale_form"] = "math"
        change["scale"] = pick(*scales)
        change["scale_how"] = pick("mul", "div", "in place", "commuted")
        change["apply"] = pick("masked_fill", "where", "where swapped", "Tensor.where", "masked_fill_", "s + m",
                               "m + s", "torch.add", "s += m", "add_", "add out")  # fmt: skip
        change["row_max"] = pick(*["none"] * 6, "amax", "max")
        ways = ["F.softmax", "torch.softmax", "method", "module", "positive", "float32", "float"]
        change["softmax"] = pick(*(ways[:-2] if case.dtype == "float64" else ways))
        change["out"] = pick("none", "merge", "view", *["proj"] * 2 * (change["source"] not in ("form", "seq")))
        change["fold"] = pick("unfold", "expand")
    # Masks.
    change["fill"] = pick("-inf", *FILLS)
    change["floats"] = pick("where", "masked_fill", "one minus", "full")
    if change["floats"] == "one minus" and change["fill"] == "-inf":
        change["fill"] = "min"
    if change["floats"] == "full" and case.mask != "causal":
        change["floats"] = "where"
    change |= {"padding": pick("bool", "int"), "rank": pick("least", "full"), "combine": pick("and", "separate")}
    if case.sdpa:
        change["rank"] = "full"
        if case.mask == "causal" and pick(True, True, True, False):
            change["apply"] = "is_causal"
    change["empty"] = "padding" in case.mask and pick(False, False, False, True)
    # Two layers, one on top of the other.
    if change["out"] == "proj" and pick(False, False, True):
        change["layers"] = 2
    case = replace(case, **change)
    return plainer(case)


def plainer(case: Case) -> Case:
    """Without the choices that are of no consequence, so that a case counts (and prints) what it really does."""
    none: set[str] = set()
    if case.mask == "none":
        none |= {"index", "padding", "combine", "rank", "fold", "apply", "floats", "fill", "empty"}
    if "+" not in case.mask:
        none.add("combine")
    if "padding" not in case.mask:
        none |= {"padding", "empty"}
    if case.form != "folded" or not case.by_batch:
        none.add("fold")
    if not set(case.masks) & {"causal", "offset", "window"} or case.apply == "is_causal":
        none.add("index")
    if case.apply in ("masked_fill", "where", "where swapped", "Tensor.where", "masked_fill_"):
        none.add("floats")
    if case.scale == "none":
        none.add("scale_form")
    if case.scale in ("none", "alpha"):
        none.add("scale_how")
    if case.sdpa:
        none |= {"transpose", "combine"}
        if case.apply in ("masked_fill", "is_causal"):
            none.add("fill")
        if case.dropout == "module":
            none.add("dropout")
    if not (case.score.startswith(("@", "torch", "Tensor", "b", "kq"))) or case.key_stored != "nd":
        none.add("transpose")
    plain = {f.name: f.default for f in fields(Case) if f.name in none}
    if "apply" not in none and case.apply in ("s + m",) and case.floats == "one minus" and case.fill == "-inf":
        plain["floats"] = "where"
    return replace(case, **plain)


@dataclass(frozen=True)
class Data:
    """The canonical operands of a run: q, k, v [*lead, h, n, d], or x, y [*lead, n, c]; and the run-time masks."""

    operands: tuple[Tensor, ...]
    padding: Tensor | None
    documents: Tensor | None


def data(case: Case, seed: int, longer: int = 0) -> Data:
    g = torch.Generator().manual_seed(seed)
    (n, nk), (h, hkv), (d, dv), lead = case.length, case.heads, case.dims, case.lead
    n, nk = n + longer, nk + longer

    def normal(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=g, dtype=torch.float64).to(case.torch_dtype)

    if case.projected:
        operands: tuple[Tensor, ...] = (normal(n, h * d), normal(nk, h * d))[: 1 + case.cross]
    else:
        operands = normal(h, n, d), normal(hkv, nk, d), normal(hkv, nk, dv)
    padding = documents = None
    if "padding" in case.mask:
        # Right-padded, by less than a window, or anyhow behind the first key.
        lengths = torch.randint(max(1, nk - WINDOW + 1), nk + 1, (lead[0],), generator=g)
        padding = torch.arange(nk) < lengths[:, None]
        if "window" not in case.mask and seed % 2:
            padding = torch.rand(lead[0], nk, generator=g) > 0.4
            padding[:, 0] = True
        if case.empty and seed:
            padding[-1] = False
        padding = padding.long() if case.padding == "int" else padding
    if "documents" in case.mask:
        documents = (torch.rand(lead[0], n, generator=g) > 0.7).cumsum(-1)
    return Data(operands, padding, documents)


def inputs(case: Case, d: Data) -> tuple[Tensor, ...]:
    """The operands as the program takes them."""
    tensors = list(d.operands)
    if not case.projected:
        (h, hkv) = case.heads

        def laid(x: Tensor, dn: bool) -> Tensor:
            if case.source == "seq" or case.form == "bnhd":
                x = x.transpose(-2, -3)
            elif case.form == "bnd":
                x = x[:, 0]
            elif case.form == "folded":
                x = x.flatten(0, 1)
            elif case.form == "grouped" and x.shape[1] == h:
                x = x.unflatten(1, (hkv, -1))
            return (x.transpose(-1, -2) if dn else x).contiguous()

        q, k, v = tensors
        tensors = [laid(q, case.query_stored == "dn"), laid(k, case.key_stored == "dn"), laid(v, False)]
        if case.value_stored == "seq" and case.source == "form":
            tensors[2] = v.transpose(-2, -3).contiguous()
    return tuple(t for t in (*tensors, d.padding, d.documents) if t is not None)


def allowed(case: Case, d: Data, n: int, nk: int) -> Tensor:
    """Which keys a query attends: [b, n, nk]."""
    keep = torch.ones(case.lead[0], n, nk, dtype=torch.bool)
    for i in range(n):
        for j in range(nk):
            for name in case.masks:
                keep[:, i, j] &= {
                    "causal": j <= i,
                    "offset": j <= i + (nk - n if case.cross else 2),
                    "window": i - WINDOW < j <= i,
                    "chunked": i // CHUNK == j // CHUNK,
                    "prefix": j <= i or j < PREFIX,
                    "padding": d.padding is not None and d.padding[:, j] != 0,
                    "documents": d.documents is not None and d.documents[:, i] == d.documents[:, j % n],
                }[name]
    return keep


def reference(program: Any, d: Data) -> Tensor:
    """What the program means, in float64, in its output's layout."""
    case = program.case
    hidden = [t.double() for t in d.operands]
    for layer in program.layers:
        out = _layer(case, layer, d, hidden)
        hidden = [out, *hidden[1:]] if case.layers == 1 else [hidden[0] + out, *hidden[1:]]
    return hidden[0]


def _layer(case: Case, layer: Any, d: Data, hidden: list[Tensor]) -> Tensor:
    (h, hkv), (dim, dv) = case.heads, case.dims

    def project(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
        y = torch.einsum("...c,oc->...o", x, weight.double()) + bias.double()
        return y.reshape(*y.shape[:-1], heads, -1).transpose(-2, -3)

    if case.projected:
        if hasattr(layer, "qkv"):
            sizes = (h * dim, hkv * dim, hkv * dv)
            projections = list(zip(layer.qkv.weight.split(sizes), layer.qkv.bias.split(sizes), strict=True))
        else:
            projections = [(p.weight, p.bias) for p in (layer.q, layer.k, layer.v)]
        states = (hidden[0], hidden[-1], hidden[-1])
        q, k, v = (project(x, *p, at) for x, p, at in zip(states, projections, (h, hkv, hkv), strict=True))
    else:
        q, k, v = hidden
    of = torch.arange(h) // (h // hkv)
    k, v = k[..., of, :, :], v[..., of, :, :]
    n, nk = q.shape[-2], k.shape[-2]
    s = torch.einsum("...qd,...kd->...qk", q, k) * case.multiplier
    if case.softcap != "none":
        s = (s / CAP).tanh() * CAP
    if case.bias == "relative":
        s = s + torch.stack(
            [torch.stack([layer.table.double()[i - j + MOST] for j in range(nk)], -1) for i in range(n)], 1
        )
    if case.bias == "alibi":
        for head in range(h):
            for i in range(n):
                for j in range(nk):
                    s[..., head, i, j] -= 2.0 ** -(head + 1) * abs(i - j)
    keep = allowed(case, d, n, nk).reshape(-1, *[1] * (q.dim() - 3), n, nk)
    hidden_value = {"-inf": -math.inf, "min": torch.finfo(case.torch_dtype).min, "-1e9": -1e9}[case.fill]
    out = torch.einsum("...qk,...kd->...qd", s.masked_fill(~keep, hidden_value).softmax(-1), v)
    if case.out != "none":
        out = torch.stack([torch.cat([out[..., at, i, :] for at in range(h)], -1) for i in range(n)], -2)
        return out if case.out != "proj" else out @ layer.o.weight.double().T + layer.o.bias.double()
    if case.form == "bnhd" or (case.value == "einsum to seq"):
        return out.transpose(-2, -3)
    if case.form == "bnd":
        return out[:, 0]
    if case.form == "folded":
        return out.flatten(0, 1)
    return out.unflatten(1, (hkv, -1)) if case.form == "grouped" else out


def axes(case: Case) -> list[tuple[int, ...]]:
    """For each input, the axes that are a length."""
    if case.projected:
        states = [(len(case.lead),)] * (1 + case.cross)
    else:
        at = {"bhnd": 2, "bnhd": 1, "folded": 1, "bnd": 1, "grouped": 3, "windows": 3}[case.form]
        if case.source == "seq":
            at = 1
        keys = at - (case.form == "grouped" and case.source == "form")
        value = 1 if case.value_stored == "seq" else keys
        states = [(at + (case.query_stored == "dn"),), (keys + (case.key_stored == "dn"),), (value,)]
    return states + [(1,)] * (("padding" in case.mask) + ("documents" in case.mask))
