"""Look inside calls that contain an attention: multi-head attention as one function, operator or leaf module.

Dynamo leaves ``F.multi_head_attention_forward`` and the fast paths of ``nn.TransformerEncoderLayer``
whole, ``symbolic_trace`` whole modules. Each is traced on the fake tensors that its node has and
put into the graph beside the call. What is not rewritten in the end goes back to the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .calls import call_of, hooked
from .compat import trace, value_of
from .provenance import same_place

_MODULES = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.Transformer,
)


@dataclass(frozen=True)
class Expansion:
    """``call`` does not run any more; ``output``, the last of ``nodes``, has taken the place of ``taken``."""

    call: fx.Node
    taken: fx.Node
    output: fx.Node
    nodes: tuple[fx.Node, ...]


def composite(node: fx.Node) -> str:
    """The name of the composite that ``node`` calls; "" if it calls none."""
    if node.op == "call_module":
        module = _module(node)
        return f"nn.{type(module).__name__}" if isinstance(module, _MODULES) else ""
    if node.op != "call_function":
        return ""
    if node.target is F.multi_head_attention_forward:
        return "F.multi_head_attention_forward"
    name = call_of(node).spelled
    return name if name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd") else ""


def output_of(node: fx.Node) -> fx.Node | None:
    """The attention's output among what the call returns; None if the weights are used, too."""
    if isinstance(value_of(node), Tensor):
        return node
    used = [user for user in node.users if user.users or user.op == "output"]
    if len(used) == 1 and used[0].op == "call_function" and used[0].args[1:] == (0,):
        return used[0]
    return None


def expand(gm: fx.GraphModule) -> list[Expansion]:
    """Expand, in place, every composite whose weights nobody looks at."""
    found: list[Expansion] = []
    for node in list(gm.graph.nodes):
        name = composite(node)
        taken = output_of(node) if name and node.users else None
        module = _module(node) if node.op == "call_module" else None
        if module is not None and hooked(module):
            continue  # looked inside, it would not be called
        if taken is not None:
            expansion = _expand(gm, node, taken, name)
            if expansion is not None:
                found.append(expansion)
    return found


def restore(graph: fx.Graph, expansion: Expansion) -> None:
    """Undo an expansion."""
    expansion.output.replace_all_uses_with(expansion.taken)
    for node in reversed(expansion.nodes):
        if not node.users:
            graph.erase_node(node)


def _expand(gm: fx.GraphModule, node: fx.Node, taken: fx.Node, name: str) -> Expansion | None:
    function, given = _function(gm, node, name)
    # Heads and widths are structure: where Dynamo made them dynamic, a guard fixes them.
    given = [int(value_of(arg)) if isinstance(arg, fx.Node) and _is_size(arg) else arg for arg in given]
    want = value_of(taken)
    tensors = [arg for arg in given if isinstance(arg, fx.Node)]
    fakes = [value_of(n) for n in tensors]
    if not all(isinstance(fake, Tensor) for fake in fakes) or any(fake.is_nested for fake in fakes):
        return None

    def on_tensors(*values: Tensor) -> Tensor:
        rest = iter(values)
        return function(*(next(rest) if isinstance(arg, fx.Node) else arg for arg in given))

    try:
        body = trace(on_tensors, fakes)
    except Exception:  # what cannot be traced stays the call that it is, and ``find`` says so
        return None
    nodes: list[fx.Node] = []
    mapped: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), tensors, strict=True))
    with gm.graph.inserting_after(taken):
        anchor = gm.graph.call_function(_anchor)
    with gm.graph.inserting_before(anchor):
        for inner in body.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            new = gm.graph.node_copy(inner, mapped.__getitem__)
            if inner.op == "get_attr":
                new.target = _attribute(gm, getattr(body, str(inner.target)))
            same_place(new, node)
            mapped[inner] = new
            nodes.append(new)
    gm.graph.erase_node(anchor)
    (returned,) = body.graph.output_node().all_input_nodes
    output = mapped[returned]
    got = value_of(output)
    if got.dtype != want.dtype or got.dim() != want.dim():
        restore(gm.graph, Expansion(node, taken, output, tuple(nodes)))
        return None
    inside = set(nodes)
    taken.replace_all_uses_with(output, delete_user_cb=lambda user: user not in inside)
    return Expansion(node, taken, output, tuple(nodes))


def _is_size(node: fx.Node) -> bool:
    return isinstance(value_of(node), (int, torch.SymInt))


def _anchor() -> None:
    """Marks a place in a graph while nodes are put before it."""


def _attribute(gm: fx.GraphModule, value: Any) -> str:
    at = sum(name.startswith("_prescore_constant") for name in vars(gm)) + sum(
        name.startswith("_prescore_constant") for name in gm._buffers
    )
    name = f"_prescore_constant{at}"
    if isinstance(value, Tensor):
        gm.register_buffer(name, value, persistent=False)
    else:
        setattr(gm, name, value)
    return name


def _module(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


def _function(gm: fx.GraphModule, node: fx.Node, name: str) -> tuple[Callable[..., Tensor], list[Any]]:
    """What the call computes as a function of a flat list of arguments, nodes among them."""
    if node.op == "call_module":
        return _module_function(gm, node)
    functions: dict[str, Callable[..., Tensor]] = {
        "F.multi_head_attention_forward": _forward,
        "_native_multi_head_attention": _native,
        "_transformer_encoder_layer_fwd": _encoder_layer,
    }
    function = functions[name]
    keys = list(node.kwargs)
    split = len(node.args)

    def flat(*given: Any) -> Tensor:
        return function(*given[:split], **dict(zip(keys, given[split:], strict=True)))

    return flat, [*node.args, *node.kwargs.values()]


def _module_function(gm: fx.GraphModule, node: fx.Node) -> tuple[Callable[..., Tensor], list[Any]]:
    module = _module(node)
    assert module is not None
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    keys, split = list(node.kwargs), len(node.args)
    with gm.graph.inserting_before(node):
        held = [gm.graph.get_attr(f"{node.target}.{name}") for name in names]
    for attribute, name in zip(held, names, strict=True):
        attribute.meta["val"] = _like(value_of(_first_tensor(node)), _held(module, name))

    def flat(*given: Any) -> Tensor:
        state = dict(zip(names, given, strict=False))
        args, kwargs = given[len(names) :][:split], dict(zip(keys, given[len(names) + split :], strict=True))
        if isinstance(module, nn.MultiheadAttention):
            if kwargs.get("need_weights", True) and kwargs.get("attn_mask") is not None:
                kwargs["is_causal"] = False  # the hint counts only where no weights are wanted
            kwargs["need_weights"] = False
        found = torch.func.functional_call(module, state, args, kwargs)
        return found[0] if isinstance(found, tuple) else found

    return flat, [*held, *node.args, *node.kwargs.values()]


def _held(module: nn.Module, name: str) -> Tensor:
    owner, _, own = name.rpartition(".")
    return getattr(module.get_submodule(owner), own)


def _first_tensor(node: fx.Node) -> fx.Node:
    return next(n for n in node.all_input_nodes if isinstance(value_of(n), Tensor))


def _like(fake: Any, real: Tensor) -> Tensor:
    """``real`` as a fake tensor of the mode of ``fake``."""
    return fake.fake_mode.from_tensor(real, static_shapes=True)


def _forward(*args: Any, **kwargs: Any) -> Tensor:
    """``F.multi_head_attention_forward`` without weights, through the fused operator."""
    names = F.multi_head_attention_forward.__code__.co_varnames
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("need_weights", True) and given.get("attn_mask") is not None:
        given["is_causal"] = False  # a hint that it may take only where it does not need the weights
    found: Tensor = F.multi_head_attention_forward(**(given | {"need_weights": False}))[0]
    return found


def _native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Tensor:
    """``aten::_native_multi_head_attention``: batch first; True is masked."""
    if mask is not None and mask_type == 2:  # [B, H, L, L]
        mask, mask_type = mask.flatten(0, 1), 0
    found = _forward(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        embed_dim,
        num_head,
        qkv_weight,
        qkv_bias,
        None,
        None,
        False,
        0.0,
        proj_weight,
        proj_bias,
        training=False,
        key_padding_mask=mask if mask_type == 1 else None,
        attn_mask=mask if mask_type == 0 else None,
    )
    return found.transpose(0, 1)


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``aten::_transformer_encoder_layer_fwd``, the inference path of ``nn.TransformerEncoderLayer``."""

    def attend(x: Tensor) -> Tensor:
        return _native(
            x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type=mask_type
        )

    def feed(x: Tensor) -> Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    if norm_first:
        src = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return src + feed(norm(src, norm_weight_2, norm_bias_2))
    src = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(src + feed(src), norm_weight_2, norm_bias_2)
