"""Makes a transformers config tiny, keeping the relations between its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers import PretrainedConfig

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 4, 2, 16, 256
WINDOW = 8

# The first pattern that matches a whole attribute name gives its value, where that is smaller.
RULES: list[tuple[str, int]] = [
    (r"mamba_n_heads|mamba_num_heads", 2 * HIDDEN // HEAD_DIM),  # of an inner size of twice the hidden size
    (r"qk_rope_head_dim|rotary_dim|rope_head_dim", 8),
    (r"qk_head_dim", HEAD_DIM + 8),
    (r".*(head_dim|dim_head|d_kv|d_head|head_size|kv_channels)|attention_key_size", HEAD_DIM),
    (r".*(key_value_heads|kv_heads|num_key_heads|query_groups).*|kv_n_heads", KV_HEADS),
    (r".*(_heads|_head)|n_?head|encoder_heads", HEADS),
    (r".*vocab.*size.*|n_vocab|num_embeddings|num_embeds|codebook_size|vocab_offset", VOCAB),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|num_selected_experts|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r".*(experts|num_local_experts)", 4),
    (r".*(sliding_window|attention_window|window_len|local_attention|chunk_size|context_size|block_size).*", WINDOW),
    (r".*(_layers|n_layers?|_depth|num_.*blocks)|depth|layers|n_block|num_layer", 2),
    (r".*(lora_rank|_rank|lora_dim|bottleneck.*)", 32),
    (r".*(mamba_|ssm_|linear_|^)(d_state|state_size|state_dim)", 16),
    (r"image_size|img_size|input_size|.*image_size|resolution|spec_size", 64),
    (r".*(intermediate_size|intermediate_dim|ffn_dim|ffn_hidden.*|d_ff|dff|mlp_dim|d_inner|ffn_size|feedforward.*|"
     r"intermediate|dim_ff|linear_units|mlp_hidden_size|inner_dim|expand.*_dim)", 128),
    (r".*(hidden_size|d_model|embed_dim|n_embd|hidden_dim|emb_dim|embedding_size|proj_dim|projection_dim|_dim|_width|"
     r"projection_size|feature_size|embeds_hidden_size|n_state|d_latents|fusion_size|emb_size|out_channels|"
     r"embedding_dimension|project_dim|_channels|hidden_size.*|output_size)|width|dim|channels_out", HIDDEN),
    (r".*(num_queries|num_.*tokens|num_latents|latent_query_num|query_tokens|num_query|tokens_per_image)", 16),
    (r".*(max_source_positions)", 32),
]  # fmt: skip
NONES = {
    "vocab_size": VOCAB, "head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS, "rope_theta": 10000.0, "n_group": 1,
    "num_experts_per_tok": 2, "topk_group": 1, "n_routed_experts": 4, "image_token_index": 200, "image_token_id": 200,
}  # fmt: skip
"""What to set where a config leaves it to a checkpoint."""
KEPT = re.compile(
    r"num_feat_extract_layers|keypoint_decoder_dim|image_embedding_size|chunk_size_feed_forward|max_.*|.*_id|"
    r"(in|num|audio|input|mask_input|image|patch_embed_input)_channels|(?!num_experts).*token.*"
)
_RULES = [(re.compile(pattern), value) for pattern, value in RULES]


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """Shrinks ``config`` and every config inside it, in place."""
    ids: dict[int, int] = {}
    for part in parts(config):
        _shrink_one(part, ids)
    return config


def parts(config: Any) -> Iterable[PretrainedConfig]:
    """The config and all configs inside it."""
    yield config
    for value in vars(config).values():
        for inner in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(inner, PretrainedConfig):
                yield from parts(inner)


def put(config: Any, name: str, value: Any) -> None:
    """Sets an attribute, through the config's aliases but past its validation, which looks at one at a time."""
    try:
        setattr(config, name, value)
    except Exception:
        config.__dict__[name] = value


def _shrink_one(config: Any, ids: dict[int, int]) -> None:
    before = dict(vars(config))
    layers = _layer_choice(config, before)
    for name, value in before.items():
        new = _new_value(name, value, before)
        if isinstance(value, (list, tuple)) and layers and len(value) == layers[0] and layers[0] > 3:
            new = type(value)(value[i] for i in layers[1])
        if re.fullmatch(r"num_hidden_layers|n_layers?|num_layers|depth", name) and layers and value == layers[0]:
            new = len(layers[1])
        if new is not value:
            put(config, name, new)
    _fix_head_dims(config, before)
    _fix_stages(config, before)
    _fix_tokens(config, ids)
    _fix_rope(config)
    for name in ("use_cache", "return_loss"):
        if hasattr(config, name):
            put(config, name, False)
    if hasattr(config, "_attn_implementation"):
        config.__dict__.pop("_experts_implementation", None)


def _layer_choice(config: Any, before: dict[str, Any]) -> tuple[int, list[int]] | None:
    """How many layers there are and which stay: the first two, and the first of each kind."""
    count = next(
        (c for n in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(c := before.get(n), int)), None
    )
    if not count:
        return None
    kinds = [v for n, v in before.items() if isinstance(v, (list, tuple)) and len(v) == count and count > 3]
    chosen, seen = [], set()
    for i in range(count):
        kind = tuple(str(v[i]) for v in kinds if isinstance(v[i], (str, bool)))
        if kind not in seen or len(chosen) < 2:
            chosen.append(i)
        seen.add(kind)
    return count, sorted(chosen[:5] if len(seen) > 1 else chosen[:2])


def _new_value(name: str, value: Any, before: dict[str, Any]) -> Any:
    if value is None:
        return NONES.get(name)
    if isinstance(value, bool) or KEPT.fullmatch(name):
        return value
    if isinstance(value, int):
        if re.fullmatch(r".*(key_value_heads|kv_heads)", name):
            heads = [
                v for n, v in before.items() if n in (name.replace("key_value_heads", "attention_heads"), "n_head")
            ]
            return HEADS if heads and value == heads[0] else min(value, KV_HEADS)
        for pattern, small in _RULES:
            if pattern.fullmatch(name):
                return min(value, small)
        return value
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(v, int) for v in value):
        return value
    if name in ("depths", "num_blocks", "layer_depths", "depth"):
        return type(value)(min(d, 2) for d in value)
    if (
        re.fullmatch(r"(decoder_in|feature)_channels|backbone_feature_dims|(fpn|neck)_.*channels", name)
        and len({*value}) == 1
    ):
        return type(value)([HIDDEN] * len(value))  # levels that all have the decoder's width
    return value


def _fix_head_dims(config: Any, before: dict[str, Any]) -> None:
    """Latent attention calls the rotary part of a head ``head_dim``, some the whole of it."""
    rope, nope = before.get("qk_rope_head_dim"), before.get("qk_nope_head_dim")
    partial = (before.get("rope_parameters") or {}).get("partial_rotary_factor")
    if rope is None or nope is None or "head_dim" not in before or partial:
        return
    whole = before["head_dim"] != rope
    put(config, "head_dim", config.qk_rope_head_dim + (config.qk_nope_head_dim if whole else 0))


def _fix_stages(config: Any, before: dict[str, Any]) -> None:
    """Backbones: widths and heads double stage by stage; names of stages follow the number of layers."""
    depths, heads = before.get("depths"), before.get("num_heads")
    if (
        isinstance(before.get("embed_dim"), int)
        and isinstance(heads, (list, tuple))
        and isinstance(depths, (list, tuple))
    ):
        put(config, "embed_dim", HIDDEN // 2)
        put(config, "num_heads", type(heads)(2 << i for i in range(len(heads))))
        if "hidden_size" in before:
            put(config, "hidden_size", HIDDEN // 2 << (len(depths) - 1))
    if "embed_dim_per_stage" in before:
        put(config, "hidden_size", before["hidden_size"])
    names = before.get("stage_names")
    layers = vars(config).get("num_hidden_layers")
    if names and isinstance(layers, int) and len(names) == before["num_hidden_layers"] + 1:
        outs = len(before.get("_out_indices") or [1])
        put(config, "num_hidden_layers", max(layers, outs))
        last = config.num_hidden_layers
        config.__dict__["stage_names"] = ["stem", *(f"stage{i + 1}" for i in range(last))]
        config.__dict__["_out_indices"] = list(range(last - outs + 1, last + 1))
        config.__dict__["_out_features"] = [f"stage{i}" for i in config.__dict__["_out_indices"]]


def _fix_tokens(config: Any, ids: dict[int, int]) -> None:
    """Special tokens get small ids, the same for the same token in every part of the config."""
    for name, value in dict(vars(config)).items():
        if re.fullmatch(r".*(token_id|token_index|_token|_index|_id)s?", name) and isinstance(value, int):
            if not isinstance(value, bool) and value >= VOCAB:
                put(config, name, ids.setdefault(value, VOCAB - 1 - len(ids)))
        elif re.fullmatch(r".*token_ids?", name) and isinstance(value, (list, tuple)):
            small = [v if v < VOCAB else ids.setdefault(v, VOCAB - 1 - len(ids)) for v in value if isinstance(v, int)]
            put(config, name, type(value)(small))


def _fix_rope(config: Any) -> None:
    """Sections and factor lists of rotary embeddings have a length that follows from the head's."""
    for name in ("rope_parameters", "rope_scaling"):
        ropes = vars(config).get(name)
        if not isinstance(ropes, dict):
            continue
        for rope in [ropes, *(v for v in ropes.values() if isinstance(v, dict))]:
            half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
            for key in ("short_factor", "long_factor"):
                if isinstance(rope.get(key), list):
                    rope[key] = rope[key][:half] or [1.0] * half
            section = rope.get("mrope_section")
            if section:
                small = [max(1, s * half // sum(section)) for s in section]
                small[0] += half - sum(small)
                rope["mrope_section"] = small
