"""The attention modules of torch itself, and architectures of timm where it is installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, BATCH, QUERIES, KEYS = 32, 4, 2, 23, 29
Made = tuple[nn.Module, dict[str, Any]]


class Call(nn.Module):
    """Calls a module with one tensor as query, key and value, or with another as key and value."""

    def __init__(self, inner: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.inner, self.kwargs = inner, kwargs

    def forward(self, x: Tensor, memory: Tensor | None = None, **kwargs: Any) -> Any:
        memory = x if memory is None else memory
        return self.inner(x, memory, memory, **self.kwargs, **kwargs)


class Functional(nn.Module):
    """``F.multi_head_attention_forward`` with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ParameterList(torch.randn(DIM, DIM) / DIM**0.5 for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        q, k, v, out = self.projections
        return F.multi_head_attention_forward(
            x, memory, memory, DIM, HEADS, None, None, None, None, False, 0.0, out, None, self.training,
            need_weights=False, use_separate_proj_weight=True, q_proj_weight=q, k_proj_weight=k, v_proj_weight=v,
        )  # fmt: skip


def _mha(inputs: str = "x", weights: bool = False, first: bool = True, **settings: Any) -> Callable[[], Made]:
    """``inputs``: names of what the call gets, besides x."""

    def make() -> Made:
        module = nn.MultiheadAttention(DIM, HEADS, batch_first=first, **settings)
        return Call(module, need_weights=weights), _inputs(inputs, first, settings.get("kdim", DIM))

    return make


def _inputs(names: str, first: bool = True, width: int = DIM) -> dict[str, Any]:
    query = torch.randn(BATCH, QUERIES, DIM) if first else torch.randn(QUERIES, BATCH, DIM)
    memory = torch.randn(BATCH, KEYS, width) if first else torch.randn(KEYS, BATCH, width)
    keys = KEYS if "memory" in names.split() else QUERIES
    padded = torch.zeros(BATCH, keys, dtype=torch.bool)
    padded[-1, keys - 5 :] = True
    known = {
        "x": query,
        "src": query,
        "tgt": query,
        "memory": memory,
        "key_padding_mask": padded,
        "src_key_padding_mask": padded,
        "attn_mask": torch.randn(QUERIES, keys).masked_fill(torch.ones(QUERIES, keys).triu(1).bool(), float("-inf")),
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(QUERIES),
        "tgt_is_causal": True,
    }
    return {name: known[name] for name in names.split()}


def _layer(kind: Any, inputs: str, **settings: Any) -> Callable[[], Made]:
    def make() -> Made:
        return kind(DIM, HEADS, 2 * DIM, batch_first=True, **settings), _inputs(inputs)

    return make


def _encoder(**settings: Any) -> Callable[[], Made]:
    def make() -> Made:
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, batch_first=True, **settings)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), _inputs("src src_key_padding_mask")

    return make


def _whole() -> Made:
    model = nn.Transformer(DIM, HEADS, 1, 1, 2 * DIM, batch_first=True)
    return model, _inputs("src") | _inputs("tgt tgt_mask")


_MADE: dict[str, Callable[[], Made]] = {
    "mha": _mha(),
    "mha-weights": _mha(weights=True),
    "mha-cross": _mha("x memory"),
    "mha-cross-weights": _mha("x memory", weights=True),
    "mha-length-first": _mha(first=False),
    "mha-length-first-weights": _mha("x memory", weights=True, first=False),
    "mha-padding": _mha("x memory key_padding_mask"),
    "mha-padding-weights": _mha("x memory key_padding_mask", weights=True),
    "mha-mask": _mha("x attn_mask"),
    "mha-mask-weights": _mha("x attn_mask", weights=True),
    "mha-padding-and-mask": _mha("x memory key_padding_mask attn_mask"),
    "mha-bias-kv": _mha("x memory", add_bias_kv=True),
    "mha-zero-attn": _mha("x memory", add_zero_attn=True, weights=True),
    "mha-other-widths": _mha("x memory", kdim=24, vdim=24),
    "mha-no-bias": _mha("x memory", bias=False),
    "functional": lambda: (Functional(), _inputs("x memory", first=False)),
    "encoder-layer": _layer(nn.TransformerEncoderLayer, "src"),
    "encoder-layer-padding": _layer(nn.TransformerEncoderLayer, "src src_key_padding_mask"),
    "encoder-layer-norm-first": _layer(nn.TransformerEncoderLayer, "src", norm_first=True, activation=torch.tanh),
    "encoder": _encoder(),
    "decoder-layer": _layer(nn.TransformerDecoderLayer, "tgt memory"),
    "decoder-layer-causal": _layer(nn.TransformerDecoderLayer, "tgt memory tgt_mask tgt_is_causal"),
    "transformer": _whole,
}

_SMALLER: list[tuple[dict[str, Any], str]] = [
    (
        {"depth": 2, "img_size": 64},
        """vit_tiny_patch16_224 deit_tiny_patch16_224 flexivit_small vit_small_patch14_reg4_dinov2
        vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 eva02_tiny_patch14_224 vit_base_patch16_siglip_224
        beit_base_patch16_224""",
    ),
    ({"depth": 2}, "cait_xxs24_224 convit_tiny tnt_s_patch16_224 xcit_nano_12_p16_224"),
    (
        {"depths": (2, 1, 1, 1)},
        """swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 davit_tiny pvt_v2_b0
        twins_svt_small""",
    ),
    (
        {},
        """gcvit_xxtiny mvitv2_tiny caformer_s18
        coatnet_0_224 maxxvit_rmlp_nano_rw_256 tiny_vit_5m_224 crossvit_tiny_240 coat_lite_tiny levit_128s pit_ti_224
        visformer_tiny volo_d1_224 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvit_m0
        fastvit_sa12 hiera_tiny_224 mobilevit_xxs mobilevitv2_050 nest_tiny nextvit_small shvit_s1 vitamin_small_224
        lambda_resnet26t botnet26t_256 halonet26t mobilenetv4_hybrid_medium resnet50_clip efficientvit_b0""",
    ),
]
_TIMM = {name: arguments for arguments, names in _SMALLER for name in names.split()}
"""Architectures, and the arguments that make them smaller."""


def names() -> list[str]:
    found = [f"torch:{name}" for name in _MADE]
    # Not imported here: its stand-in for torchvision must not be seen by transformers.
    return found + ([f"timm:{name}" for name in _TIMM] if importlib.util.find_spec("timm") else [])


def implementations(name: str) -> tuple[str, ...]:
    """torch's modules choose by themselves; timm's have a switch."""
    return ("eager", "sdpa") if name.startswith("timm:") else ("sdpa",)


def build(name: str, implementation: str) -> Made:
    kind, _, which = name.partition(":")
    if kind == "torch":
        model, kwargs = _MADE[which]()
        return model.eval(), kwargs
    timm = _timm()
    timm.layers.set_fused_attn(implementation == "sdpa")
    model = timm.create_model(which, pretrained=False, **_TIMM[which]).eval()
    side = _TIMM[which].get("img_size") or model.default_cfg["input_size"][-1]
    return model, {"x": torch.randn(1, 3, side, side)}


def _timm() -> Any:
    """timm imports torchvision for what no model with attention uses: names of it are enough."""
    if importlib.util.find_spec("torchvision") is None and "torchvision" not in sys.modules:
        sys.meta_path.append(_Stand())  # type: ignore[arg-type]
    return importlib.import_module("timm")


class _Stand:
    """Finds any module of torchvision: one whose attributes are empty modules' classes."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] == "torchvision":
            return importlib.util.spec_from_loader(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _empty(name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Names(type):
    """Classes that have every attribute: its name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


def _empty(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Names(name, (), {})
