"""What single families need beyond the rules of shrink.py and inputs.py, in three tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, ResNetConfig

from . import inputs
from .shrink import HEAD_DIM, HEADS, HIDDEN, parts, put


def _resnet() -> ResNetConfig:
    return ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def _last_stage() -> ResNetConfig:
    backbone = _resnet()
    backbone.out_features = ["stage4"]
    return backbone


_ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    # In place of backbones of timm by default.
    "conditional_detr|dab-detr|detr|table-transformer": lambda: {"backbone_config": _last_stage()},
    "deformable_detr|omdet-turbo|grounding-dino|mm-grounding-dino": lambda: {"backbone_config": _resnet()},
    "cohere_compass_text": lambda: {"rope_parameters": _ROPES},
    "cohere_compass": lambda: {"text_config": {"rope_parameters": _ROPES}},
    "autoformer|informer|time_series_transformer": lambda: {
        "prediction_length": 8, "context_length": 24, "num_time_features": 2, "lags_sequence": [1, 2, 3],
    },
}  # fmt: skip
"""Arguments of the config's constructor."""

SETTINGS: dict[str, dict[str, Any]] = {
    "glm4v|glm4v_text|glm46v|glm_ocr*|glm_image*|glmga*": {"rope_parameters.mrope_section": [2, 3, 3]},
    "glm4v_moe*": {"rope_parameters.mrope_section": [2, 1, 1]},
    "qwen2_vl*|qwen2_5_vl*|paddleocr_vl*|qwen2_5_omni*|colqwen2": {"rope_parameters.mrope_section": [2, 3, 3]},
    "hunyuan_vl*": {"rope_parameters.mrope_section": [2, 2, 2, 2]},
    "gemma3n*|gemma4_unified*": {"num_kv_shared_layers": 0},
    "mamba2": {"num_heads": 8, "head_dim": HEAD_DIM},
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN, "mamba_d_head": HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bros": {"dim_bbox_sinusoid_emb_2d": HIDDEN, "dim_bbox_sinusoid_emb_1d": 8, "dim_bbox_projection": HEAD_DIM},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
               "hybrid_layer_ids": [1, 3], "mamba_headdim": 32},
    "zamba*": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS, "kv_channels": HEAD_DIM},
    "dots1": {"n_shared_experts": 1, "moe_intermediate_size": HIDDEN, "first_k_dense_replace": 1},
    "lilt": {"hidden_size": 96},
    "clap*": {"spec_size": 256},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "step3p7*": {"sliding_window": 8},
    "esm": {"pad_token_id": 1, "mask_token_id": 2},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "swin2sr": {"num_heads": (2, 2, 2, 2), "depths": (2, 2, 2, 2), "embed_dim": 32, "hidden_size": 32},
    "cvt": {"depth": (1, 2, 3)},
    "pvt": {"image_size": 224},
    "efficientnet": {"hidden_dim": 2560},
    "align": {"hidden_dim": 640},
    "sam|sam_hq": {"image_embedding_size": 4, "num_pos_feats": HIDDEN // 2},
    "sam2": {"memory_attention_rope_feat_sizes": [4, 4]},
    "mimi*": {"vector_quantization_hidden_dimension": HIDDEN},
    "mimi*|csm|pocket*|kyutai*|moshi": {"upsample_groups": HIDDEN},
    "mobilebert": {"intra_bottleneck_size": HIDDEN, "true_hidden_size": HIDDEN, "embedding_size": HIDDEN},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (8, 8)},
    "xmod": {"default_language": "en_XX"},
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10},
    "qwen4_exp*": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
                   "indexer_compress_ratio": 4},
    "chameleon": {"vocabulary_map": {"<image>": 200}},
    "emu3": {"vocabulary_map": {"<image>": 200}},
    "funnel": {"block_sizes": [1, 1, 1]},
}  # fmt: skip
"""Attributes; ``a.b`` is an entry of a dict. Of every part of the config that has the attribute."""


def started(name: str, config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """The family's config at its usual size."""
    return config_class(**{key: value for make in _of(ARGUMENTS, name) for key, value in make().items()})


def fixed(name: str, config: PretrainedConfig) -> PretrainedConfig:
    for settings in _of(SETTINGS, name):
        for part in parts(config):
            for key, value in settings.items():
                attribute, _, entry = key.partition(".")
                if attribute in vars(part) and entry and isinstance(vars(part)[attribute], dict):
                    vars(part)[attribute][entry] = value
                elif attribute in vars(part) and not entry:
                    put(part, attribute, value)
    return config


def inputs_for(name: str, model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Inputs to try before those of inputs.py."""
    for make in _of(INPUTS, name):
        yield make(config)


def _of(entries: dict[str, Any], name: str) -> list[Any]:
    return [value for key, value in entries.items() if any(fnmatchcase(name, glob) for glob in key.split("|"))]


def _siglip2(config: Any) -> dict[str, Any]:
    length = inputs.patch_length(config, inputs.find(config, "patch_size"))
    return {
        "pixel_values": torch.randn(inputs.BATCH, 24, length),
        "pixel_attention_mask": torch.ones(inputs.BATCH, 24, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 6]] * inputs.BATCH),
    }


def _trajectory(config: Any) -> dict[str, Any]:
    shape = (inputs.BATCH, inputs.DECODED)
    return {
        "states": torch.randn(*shape, config.state_dim), "actions": torch.randn(*shape, config.act_dim),
        "rewards": torch.randn(*shape, 1), "returns_to_go": torch.randn(*shape, 1),
        "timesteps": torch.arange(inputs.DECODED).expand(shape), "attention_mask": inputs.padding(inputs.DECODED),
    }  # fmt: skip


def _series(config: Any) -> dict[str, Any]:
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    return {
        "past_values": torch.randn(inputs.BATCH, past), "past_observed_mask": torch.ones(inputs.BATCH, past),
        "past_time_features": torch.randn(inputs.BATCH, past, config.num_time_features),
        "future_values": torch.randn(inputs.BATCH, future),
        "future_time_features": torch.randn(inputs.BATCH, future, config.num_time_features),
    }  # fmt: skip


def _text(config: Any) -> dict[str, Any]:
    return {"input_ids": inputs.tokens(config), "attention_mask": inputs.padding()}


def _lxmert(config: Any) -> dict[str, Any]:
    seen = torch.randn(inputs.BATCH, 11, config.visual_feat_dim)
    return _text(config) | {"visual_feats": seen, "visual_pos": torch.rand(inputs.BATCH, 11, config.visual_pos_dim)}


def _udop(config: Any) -> dict[str, Any]:
    boxes, decoded = inputs.boxes(config) / 100, inputs.tokens(config, inputs.DECODED)
    return _text(config) | {"bbox": boxes, "decoder_input_ids": decoded}


def _segments(config: Any) -> dict[str, Any]:
    height, width = config.image_size  # of an image above its prompt
    image = torch.randn(inputs.BATCH, 3, height // 2, width)
    return {"pixel_values": image, "prompt_pixel_values": image + 1, "prompt_masks": image * 2}


def _kosmos2(config: Any) -> dict[str, Any]:
    marked = torch.zeros(inputs.BATCH, inputs.LENGTH, dtype=torch.long)
    marked[:, 2 : 2 + config.latent_query_num] = 1
    return _text(config) | {"pixel_values": inputs.images(config), "image_embeds_position_mask": marked}


INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "siglip2_vision_model": _siglip2,
    "siglip2": lambda config: {"input_ids": inputs.tokens(config), **_siglip2(config.vision_config)},
    "blip_2_qformer": lambda config: {
        "query_embeds": torch.randn(2, 16, HIDDEN), "encoder_hidden_states": torch.randn(2, 19, HIDDEN),
    },
    "decision_transformer": _trajectory,
    "autoformer|informer|time_series_transformer": _series,
    "lxmert": _lxmert,
    "udop": _udop,
    "seggpt": _segments,
    "kosmos-2": _kosmos2,
    "oneformer": lambda config: {
        "pixel_values": inputs.images(config), "task_inputs": torch.randint(5, 99, (2, config.task_seq_len)),
    },
    "clap": lambda config: _text(config) | {
        "input_features": torch.randn(2, 1, 96, 64), "is_longer": torch.zeros(2, 1, dtype=torch.bool),
    },
    "pix2struct": lambda config: {
        "flattened_patches": torch.rand(2, 31, 2 + config.vision_config.patch_embed_hidden_size) * 9,
        "decoder_input_ids": inputs.tokens(config, inputs.DECODED),
    },
    "idefics": lambda config: _text(config) | {
        "pixel_values": inputs.images(config)[:, None], "image_attention_mask": torch.ones(2, inputs.LENGTH, 1).long(),
    },
    "kyutai_speech_to_text": lambda config: {"input_ids": torch.randint(5, 99, (2, 29, config.num_codebooks + 1))},
    "video_llama_3_vision": lambda config: {
        "pixel_values": inputs.patches(config), "grid_thw": inputs.grids(config), "merge_sizes": torch.tensor([2, 2]),
    },
    "timesfm2_5": lambda config: {"past_values": [torch.randn(64), torch.randn(50)]},
    "timesfm": lambda config: {
        "past_values": torch.randn(2, 96), "past_values_padding": torch.zeros(2, 96, dtype=torch.long),
        "freq": torch.zeros(2, 1, dtype=torch.long),
    },
    "tvp": lambda config: _text(config) | {"pixel_values": torch.randn(2, 4, 3, 448, 448)},
}  # fmt: skip
"""Inputs that do not follow from the parameters' names."""
