"""The fused attention operators: ``F.scaled_dot_product_attention`` and ATen's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from .axes import Axes, Miss, Prover, prove
from .calls import probability
from .compat import guard_equal, value_of
from .indices import broadcast, coordinate, divide, is_one
from .memory import Memory
from .site import Add, Attention, Fill, Term

_ARGS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
# These return the output first, and then what a backward or a debugger needs.
_TUPLES = {
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
}
_PLAIN = {"scaled_dot_product_attention"}


def fused_call(node: fx.Node) -> Mapping[str, Any] | None:
    """The arguments of a fused attention by name, if ``node`` is one."""
    if node.op != "call_function":
        return None
    if node.target is F.scaled_dot_product_attention:
        return dict(zip(_ARGS, node.args, strict=False)) | node.kwargs
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    if packet is None or target.namespace != "aten" or packet.__name__ not in _TUPLES | _PLAIN:
        return None
    names = [argument.name for argument in target._schema.arguments]
    found = dict(zip(names, node.args, strict=False)) | node.kwargs
    return found | {"attn_mask": found.get("attn_mask", found.get("attn_bias"))}


def output_of(node: fx.Node) -> fx.Node:
    """Where the attention itself comes out of a fused call.

    Raises:
        Miss: something else of it is used, too.
    """
    if isinstance(value_of(node), torch.Tensor):
        return node
    found = [user for user in node.users if user.args[1:] == (0,)]
    if len(found) != 1 or len(node.users) != 1:
        raise Miss("weights_observed: the log-sum-exp of the attention is used")
    return found[0]


def prove_fused(node: fx.Node, call: Mapping[str, Any], memory: Memory) -> Attention:
    """What a fused call computes.

    Raises:
        Miss: what cannot be proved.
    """
    return prove(lambda axes, undo_repeats: _attempt(node, call, memory, axes, undo_repeats))


def _attempt(node: fx.Node, call: Mapping[str, Any], memory: Memory, axes: Axes, undo_repeats: bool) -> Attention:
    query, key, value = (call[name] for name in ("query", "key", "value"))
    for name in ("is_causal", "enable_gqa"):
        if isinstance(call.get(name), fx.Node):
            raise Miss(f"unproved_axes: {name} is known at run time only")
    q_shape, k_shape, v_shape = (value_of(n).shape for n in (query, key, value))
    rank = len(q_shape)
    if not rank == len(k_shape) == len(v_shape) or rank < 3:
        raise Miss(f"unsupported_rank: {rank}, {len(k_shape)}, {len(v_shape)}")
    # The caches of keys and values grow alike, but their lengths are two symbols; the call takes no others.
    guard_equal(k_shape[-2], v_shape[-2])
    out = value_of(output_of(node)).shape
    prover = Prover((*out[:-1], k_shape[-2]), memory, axes, undo_repeats)
    *batch, q, k = prover.index
    d, e = prover.new(coordinate("d"), q_shape[-1]), prover.new(coordinate("e"), v_shape[-1])

    def shared(shape: Any) -> list[Any]:
        """The batch and head axes of keys or values, which ``enable_gqa`` repeats."""
        found = list(batch)
        if call.get("enable_gqa") and rank >= 3 and not is_one(shape[-3]):
            # Heads are structure: where they are dynamic, a guard fixes them.
            found[-1] = divide(found[-1], sympy.Integer(int(out[-3]) // int(shape[-3])), prover.sizes)[0]
        return list(broadcast(shape[:-2], tuple(found)))

    q_index, k_index = (*broadcast(q_shape[:-2], tuple(batch)), q, d), (*shared(k_shape), k, d)
    v_index = (*shared(v_shape), k, e)
    prover.cut([*k_index, *v_index])
    query_at = prover.whole(query, q_index, "query")
    key_at, value_at = (
        prover.unrepeated(key, k_index, "key", (k, d)),
        prover.unrepeated(value, v_index, "value", (k, e)),
    )
    output = output_of(node)
    result = prover.whole(output, (*batch, q, e), "output")
    roles = prover.roles(query_at, key_at, value_at, k)
    for at in (query_at.node, key_at.node, value_at.node):
        if at not in (query, key, value) and memory.changes(at, node):
            raise Miss(f"modified_in_place: {at.name}", at)
    return Attention(
        query=query_at,
        key=key_at,
        value=value_at,
        result=result.axes,
        batch=roles.batch,
        heads=roles.heads,
        kv_heads=roles.kv_heads,
        q=roles.q,
        k=k if isinstance(k, sympy.Symbol) else None,
        d=d if isinstance(d, sympy.Symbol) else None,
        e=e if isinstance(e, sympy.Symbol) else None,
        sizes=dict(prover.sizes),
        scale=max(int(q_shape[-1]), 1) ** -0.5 if call.get("scale") is None else call["scale"],
        terms=_terms(call.get("attn_mask"), (*batch, q, k)),
        is_causal=bool(call.get("is_causal", False)),
        dropout=probability(call.get("dropout_p", 0.0)),
    )


def _terms(mask: Any, index: tuple[Any, ...]) -> tuple[Term, ...]:
    if not isinstance(mask, fx.Node):
        return ()
    at = broadcast(value_of(mask).shape, index)
    if value_of(mask).dtype == torch.bool:
        return (Fill(mask, at, False, -math.inf),)
    return (Add(mask, at),)
