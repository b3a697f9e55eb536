"""The attend kernel: one softmax over window, rows, routes and residual, as ``kernels.reference`` defines it.

One program attends one tile of queries of one KV head, in the manner of FlashAttention-2 (Dao
2023): the softmax is kept up to date while keys go by, so that no logits are ever in memory.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from ..plan import Plan
from ..reference import Operands
from ..summary import Summary
from . import device as devices
from . import loops, options, residual
from .cache import features_last, launch, load, strides
from .render import fill, source
from .spec import DTYPES, NOTHING, Lifted, Spec
from .union import union

SPLITS = 8
"""Programs that share the keys of one tile where there are few queries."""
FEW_QUERIES = 16
FEW_TILES = 64
"""With no more queries, and fewer tiles than this, one program a tile leaves most of a GPU idle."""

ATTEND = """
def attend(
    $parameters
):
    $constants

    $tile
    $borders

    $operands
    top = tl.full([ROWS], float("-inf"), tl.float32)  #? not sink_logit
    total = tl.zeros([ROWS], tl.float32)  #? not sink_logit
    # A learned sink: a logit that belongs to no key.  #? sink_logit
    sink_at = sink_logit + batch * sink_logit_b + head * sink_logit_h  #? sink_logit
    sink_at += query_at.to(tl.int64) * sink_logit_n  #? sink_logit
    own = tl.load(sink_at, mask=live, other=float("-inf")).to(tl.float32)  #? sink_logit
    own = tl.where(split == 0, own, float("-inf"))  #? sink_logit and split
    total = tl.where(tl.abs(own) < float("inf"), 1.0, float("nan"))  #? sink_logit
    total = tl.where(own == float("-inf"), 0.0, total)  #? sink_logit
    # The largest numbers are not in range as powers of two.  #? sink_logit
    top = tl.minimum(tl.maximum(own, -2.3e38), 2.3e38) * LOG2E  #? sink_logit
    summed = tl.zeros([ROWS, VALUE_TILE], tl.float32)

    $window

    $rows

    $routes

    $residual

    # A query without any key gives 0.
    none = total == 0.0
    summed = summed / tl.where(none, 1.0, total)[:, None]
    log_sum = (tl.where(top == float("-inf"), 0.0, top) + tl.log2(tl.where(none, 1.0, total))) / LOG2E
    log_sum = tl.where(none, float("$nothing"), log_sum)
    out_at = out + split.to(tl.int64) * out_s + batch * out_b  #? split
    out_at = out + batch * out_b  #? not split
    out_at = out_at + (head * out_h + query_at.to(tl.int64) * out_n)[:, None]
    tl.store(out_at + value_feature[None, :], summed.to(out.dtype.element_ty), mask=$out_mask)
    sum_at = log_sums + (batch * kv_heads * GROUP + head) * q_len + query_at
    sum_at += split.to(tl.int64) * sums_s  #? split
    tl.store(sum_at, log_sum, mask=live)
"""

SOFTMAX = """
highest = tl.maximum(top, tl.max(logits, 1))
# While a query has met no key, any finite number will do.
base = tl.where(highest == float("-inf"), 0.0, highest)
weight = tl.exp2(logits - base[:, None])
shrink = tl.exp2(top - base)
total = total * shrink + tl.sum(weight, 1)
summed = tl.dot(weight.to(value_tile.dtype), value_tile, summed * shrink[:, None]$precision)
top = highest
"""

MERGE = """
def merge(
    part, part_sums, out, log_sums, out_b, out_h, out_n, heads, q_len, size,
):
    SPLITS: tl.constexpr = $splits
    VALUE_DIM: tl.constexpr = $value_dim
    VALUE_TILE: tl.constexpr = $value_tile
    at = tl.program_id(0).to(tl.int64)  # of batch, head and query
    split = tl.arange(0, SPLITS)
    feature = tl.arange(0, VALUE_TILE)
    sums = tl.load(part_sums + split.to(tl.int64) * size + at)
    top = tl.max(sums, 0)
    weight = tl.exp(sums - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    found = tl.load(
        part + (split.to(tl.int64) * size + at)[:, None] * VALUE_DIM + feature[None, :],
        mask=(feature < VALUE_DIM)[None, :],
        other=0.0,
    )
    merged = tl.sum(found * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    to = out + at // (heads * q_len) * out_b + at // q_len % heads * out_h + at % q_len * out_n
    tl.store(to + feature, merged.to(out.dtype.element_ty), mask=feature < VALUE_DIM)
    log_sum = tl.where(total == 0.0, float("inf"), top + tl.log(tl.where(total == 0.0, 1.0, total)))
    tl.store(log_sums + at, log_sum)
"""


def attend(
    site: Operands, summary: Summary, routes: torch.Tensor, plan: Plan, lifted: Lifted = NOTHING, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """``reference.attend`` by a generated kernel, and the logarithm of the softmax's sum.

    Args:
        site, summary, routes, plan: as in the reference.
        lifted: the rest of the mask; its tensors by name in ``more``, with the axes it says.
        more: also ``softcap``, a float; 0.0: none.

    Returns:
        out: ``[B, H, Nq, Dv]`` of the query's dtype, laid out ``[B, Nq, H, Dv]`` in memory.
        log_sums: ``[B, H, Nq]`` float32; +inf for a query without any key, so that ``exp(logit -
        log_sum)`` is its weight everywhere.
    """
    batch, heads, q_len, _ = site.query.shape
    value_dim = site.value.shape[3]
    out = site.query.new_empty(batch, q_len, heads, value_dim).transpose(1, 2)
    sums = site.query.new_empty((batch, heads, q_len), dtype=torch.float32)
    if 0 in (batch, heads, q_len, value_dim):
        return out, sums
    if site.key.shape[2] == 0:
        return out.zero_(), sums.fill_(float("inf"))
    spec = spec_of(site, plan, lifted, float(more.pop("softcap", 0.0)))
    values, grid = operands(spec, site, summary, routes, more)
    if site.sink_logit is not None:
        values |= dict(sink_logit=site.sink_logit) | strides("sink_logit", site.sink_logit)
    parts = out
    if spec.splits > 1:
        parts = out.new_empty((spec.splits, *out.shape), dtype=torch.float32)
        part_sums = sums.new_empty((spec.splits, *sums.shape))
        values |= dict(out_s=parts.stride(0), sums_s=part_sums.stride(0), log_sums=part_sums)
    else:
        values["log_sums"] = sums
    values |= dict(out=parts) | strides("out", parts.select(0, 0) if spec.splits > 1 else parts)
    stages = stages_of(spec, out.device)
    launch(load(attend_source(spec), "attend"), (grid, spec.splits), values, warps=spec.tile.warps, stages=stages)
    if spec.splits > 1:
        size = batch * heads * q_len
        merged = dict(part=parts, part_sums=part_sums, out=out, log_sums=sums, heads=heads, q_len=q_len, size=size)
        launch(load(merge_source(spec), "merge"), (size,), merged | strides("out", out), warps=4, stages=1)
    return out, sums


@functools.cache
def attend_source(spec: Spec) -> str:
    """Source of ``attend``."""
    own = ["out", "log_sums", *["out_s"] * (spec.splits > 1), "out_b", "out_h", "out_n"]
    own += ["sink_logit", *(f"sink_logit_{axis}" for axis in "bhn")] * spec.sink_logit
    update = fill(SOFTMAX, {"precision": loops.precision(spec)})
    value_mask = loops.inside(spec.value_dim, "value_feature < VALUE_DIM", "[None, :]")
    parts = loops.names(spec) | dict(
        parameters=loops.parameters(spec, *own, *["sums_s"] * (spec.splits > 1)),
        constants=loops.constants(spec),
        tile=loops.tile(spec),
        borders=loops.borders(spec),
        operands=loops.operands(spec),
        window=loops.window(spec, update, taint=True),
        rows=loops.rows(spec, update, taint=True),
        routes=loops.routes(spec, update, taint=True),
        residual=residual.loop(spec, update),
        nothing="-inf" if spec.splits > 1 else "inf",
        out_mask=loops.all_of("live[:, None]", value_mask),
    )
    return source("attend", about(spec, "attend"), fill(ATTEND, parts))


def stages_of(spec: Spec, device: torch.device) -> int:
    """Of a launch: where shared memory is less, two do not fit every plan."""
    plan = spec.settings
    more = plan.rows_per_segment or plan.residual or plan.cluster > 32 or max(spec.dim, spec.value_dim) > 128
    return 1 if more and devices.is_small(device) else spec.tile.stages


@functools.cache
def merge_source(spec: Spec) -> str:
    """Source of ``merge``: what the programs that share a tile found, put together."""
    return source("merge", about(spec, "attend, the parts of few queries"), fill(MERGE, loops.names(spec)))


def about(spec: Spec, stage: str) -> dict[str, str]:
    """What the head of a source says."""
    lengths = f"head_dim {spec.dim}, value_dim {spec.value_dim}, {spec.group} query heads a KV head"
    mask = ["causal" if spec.causal else "bidirectional", *["valid keys"] * spec.valid, spec.lifted.allowed]
    mask += ["a learned sink"] * spec.sink_logit
    return {
        "stage": stage,
        "plan": spec.plan,
        "site": f"{lengths}, {spec.dtype}, {spec.target}",
        "mask": ", ".join(part for part in mask if part),
    }


def spec_of(site: Operands, plan: Plan, lifted: Lifted = NOTHING, softcap: float = 0.0) -> Spec:
    """The spec of a site's forward kernel.

    Raises:
        ValueError: a dtype or size that no kernel is written for, or a plan that a mask rules out.
    """
    query, key, value = site[:3]
    if query.dtype not in DTYPES:
        raise ValueError(f"query: got {query.dtype}; allowed: {', '.join(str(dtype) for dtype in DTYPES)}")
    if lifted.allowed and plan.centroids:
        raise ValueError(f"centroids: got {plan.centroids}; allowed: 0 where a mask speaks of pairs of query and key")
    if plan.residual and (lifted != NOTHING or softcap):
        raise ValueError("residual: got True; allowed: False where a mask, a bias or a softcap speaks of pairs")
    target, dtype = devices.target(), DTYPES[query.dtype]
    dim, value_dim = int(query.shape[3]), int(value.shape[3])
    spec = Spec(
        plan=plan.text,
        dtype=dtype,
        target=target,
        dim=dim,
        value_dim=value_dim,
        group=int(query.shape[1]) // int(key.shape[1]),
        causal=site.causal,
        valid=site.valid is not None,
        routes=bool(plan.routes),
        lifted=lifted,
        softcap=softcap,
        sink_logit=site.sink_logit is not None,
        tile=options.forward(target, dtype, dim, value_dim, bool(plan.routes)),
    )
    batch, _, q_len, _ = query.shape
    # A size that is symbolic is never "few": one graph serves all lengths.
    sizes = (batch, key.shape[1], q_len, key.shape[2])
    few = all(isinstance(size, int) for size in sizes) and q_len <= FEW_QUERIES
    if few and sizes[0] * sizes[1] * spec.tiles(q_len, key.shape[2]) < FEW_TILES:
        spec = replace(spec, splits=SPLITS)
    return spec


def operands(
    spec: Spec, site: Operands, summary: Summary, routes: torch.Tensor, more: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """The values that ``loops.parameters`` names but for outputs, and the number of programs."""
    query, key, value = (features_last(t) for t in site[:3])
    batch, _, q_len, _ = query.shape
    kv_heads, k_len = key.shape[1], key.shape[2]
    tiles = spec.tiles(q_len, k_len)
    values: dict[str, Any] = dict(
        query=query, key=key, value=value, kv_heads=kv_heads, q_len=q_len, k_len=k_len, tiles=tiles, scale=site.scale
    )
    values |= strides("query", query) | strides("key", key) | strides("value", value)
    if spec.aligned:
        values["first_block"] = spec.first_block(q_len, k_len)
    if site.valid is not None:
        values |= dict(valid=site.valid, valid_b=site.valid.stride(0), valid_n=site.valid.stride(1))
    if loops.has_rows(spec):
        values |= dict(
            row_key=summary.row_key.contiguous(),
            row_value=summary.row_value.contiguous(),
            row_index=summary.row_index.contiguous(),
            row_bias=summary.row_bias.contiguous(),
            row_count=summary.row_index.shape[2],
        )
    if spec.routes:
        order = summary.order.contiguous()
        clusters = order.shape[2] // spec.settings.cluster
        values |= union(spec, routes, q_len, k_len, kv_heads, clusters) | dict(order=order, places=order.shape[2])
        if loops.copies(spec):
            values["copies"] = copies(summary, spec.settings, k_len)
        if loops.residual(spec):
            values |= residual.centroids(spec, site._replace(key=key, value=value), summary)
            values |= dict(routes=routes.contiguous(), route_count=routes.shape[3])
    return values | loops.mask_values(spec, more), batch * kv_heads * tiles


def copies(summary: Summary, plan: Plan, k_len: Any) -> torch.Tensor:
    """In which segments each key was selected: ``[B, Hkv, Nk + 1]`` int32, bit l for the one of 2^l chunks.

    The last column is where rows without a key go.
    """
    # Indexing with [...] would need the device itself, which a fake tensor's machine may not have.
    rows = summary.row_index
    index = rows.narrow(2, plan.sinks, rows.shape[2] - plan.sinks).unflatten(2, (-1, plan.rows_per_segment))
    index = index.narrow(3, 0, plan.keep)
    place = index.long().where(index >= 0, k_len)
    name = torch.arange(1, index.shape[2] + 1, dtype=torch.int32, device=index.device)
    bit = (name & -name).unsqueeze(1).expand_as(index)
    table = index.new_zeros(*index.shape[:2], k_len + 1)
    return table.scatter_add(2, place.flatten(2), bit.flatten(2))
