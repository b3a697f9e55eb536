"""Example inputs for a transformers model, from the names of its ``forward``'s parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .shrink import parts

BATCH, LENGTH, PADDED = 2, 29, 5
DECODED = 23
"""Length on the decoder's side."""


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these attributes that the config, or one inside it, has."""
    for name in names:
        for part in parts(config):
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def tokens(config: Any, length: int = LENGTH) -> Tensor:
    """Random tokens, none of them special."""
    longest = find(config, "max_position_embeddings", "n_positions", default=length)
    length = min(length, longest) if isinstance(longest, int) and longest > 4 else length
    vocab = find(config, "vocab_size", default=100)
    return torch.randint(5, max(6, min(int(vocab), 200)), (BATCH, length))


def padding(length: int = LENGTH) -> Tensor:
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[-1, length - PADDED :] = 0
    return mask


def boxes(config: Any) -> Tensor:
    corner = torch.randint(0, 40, (BATCH, LENGTH, 2))
    return torch.cat([corner, corner + torch.randint(1, 40, (BATCH, LENGTH, 2))], -1)


def image_side(config: Any) -> tuple[int, int]:
    size = find(config, "image_size", "img_size", "input_size", default=64)
    if isinstance(size, dict):
        size = (size.get("height", 64), size.get("width", 64))
    return tuple(size)[-2:] if isinstance(size, (list, tuple)) else (size, size)  # type: ignore[return-value]


def images(config: Any) -> Tensor:
    channels = find(config, "num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
    return torch.randn(BATCH, channels if isinstance(channels, int) else 3, *image_side(config))


def video(config: Any) -> Tensor:
    frames = find(config, "num_frames", "frames_per_clip", default=4)
    return torch.randn(BATCH, frames, find(config, "num_channels", default=3), *image_side(config))


def features(config: Any) -> Tensor:
    bins = find(
        config,
        "feature_projection_input_dim",
        "num_mel_bins",
        "input_feat_per_channel",
        "n_mels",
        "feature_size",
        "input_dim",
        default=80,
    )
    positions = find(config, "max_source_positions")
    if type(config).__name__.startswith(("Whisper", "Qwen2Audio", "Voxtral", "Moonshine")) and positions:
        return torch.randn(BATCH, bins, 2 * positions)
    return torch.randn(BATCH, 96, bins)


def patches(config: Any) -> Tensor:
    """Images cut into flat patches, one after the other."""
    patch = find(config, "patch_size", default=16)
    return torch.randn(int(grids(config).prod(1).sum()), patch_length(config, patch))


def patch_length(config: Any, patch: int) -> int:
    channels = find(config, "in_channels", "in_chans", "num_channels", default=3)
    return channels * find(config, "temporal_patch_size", "patch_temporal", default=1) * patch**2


def grids(config: Any) -> Tensor:
    merge = find(config, "spatial_merge_size", "merge_size", default=2)
    return torch.tensor([[1, 2 * merge, 3 * merge], [1, 4 * merge, 2 * merge]])


def waves(config: Any) -> Tensor:
    bins = find(config, "num_mel_bins")
    if find(config, "frequency_stride") and bins:
        return torch.randn(BATCH, find(config, "max_length", default=96), bins)
    return torch.randn(BATCH, 6400)


MAKERS: dict[str, Callable[[Any], Any]] = {
    "input_ids": tokens,
    "attention_mask": lambda config: padding(),
    "decoder_input_ids": lambda config: tokens(config, DECODED),
    "decoder_attention_mask": lambda config: padding(DECODED),
    "bbox": boxes,
    "pixel_values": images,
    "pixel_values_videos": video,
    "input_features": features,
    "input_values": waves,
    "qformer_input_ids": tokens,
    "pixel_mask": lambda config: torch.ones(BATCH, *image_side(config), dtype=torch.long),
    "hidden_states": patches,
    "grid_thw": grids,
    "input_features_mask": lambda config: torch.ones(BATCH, features(config).shape[1], dtype=torch.long),
    "feature_attention_mask": lambda config: torch.ones(BATCH, features(config).shape[1], dtype=torch.long),
    "past_values": lambda config: torch.randn(
        BATCH, find(config, "context_length", default=64), find(config, "num_input_channels", default=1)
    ),
    "labels": lambda config: tokens(config),
}


def variants(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Inputs to try, the richest first."""
    accepts = inspect.signature(model.forward).parameters
    needed = [
        name
        for name, p in accepts.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and name in MAKERS
    ]
    main = getattr(model, "main_input_name", "input_ids")
    mains = [main] if isinstance(main, str) else list(main)
    chosen = [name for name in dict.fromkeys([*needed, *mains]) if name in accepts and name in MAKERS]
    if "input_ids" in accepts and "input_ids" not in chosen and not getattr(config, "is_encoder_decoder", False):
        chosen.append("input_ids")
    decoder = ["decoder_input_ids"] if "decoder_input_ids" in accepts and "decoder_input_ids" not in chosen else []
    if "input_ids" in chosen:
        if "pixel_values" in accepts:
            yield from _with_image(model, config, accepts)
        extra = [name for name in ("attention_mask", "bbox", "decoder_attention_mask") if name in accepts]
        yield _made(config, [*chosen, *extra, *decoder])
        yield _made(config, [*chosen, *extra[:1], *decoder])
        yield _made(config, [*chosen, "attention_mask"])
        yield _made(config, [n for n in chosen if n != "pixel_values"])
    yield _made(config, [*chosen, *decoder])
    yield _made(config, chosen)
    if "pixel_values" in chosen:
        made = _made(config, chosen)
        if "pixel_mask" in accepts:
            yield _made(config, [*chosen, "pixel_mask"])
        yield made | {"pixel_values": video(config)}
        if "attention_mask" in accepts:
            yield made | {"pixel_values": video(config), "attention_mask": padding()}
        yield made | {"pixel_values": torch.stack([images(config), images(config)], 1)}  # pairs to match
        if "input_ids" in chosen and "attention_mask" in accepts:
            yield made | {"pixel_values": images(config)[:, None], "attention_mask": padding()}
        if "grid_thw" in accepts:
            yield made | {"pixel_values": patches(config)}
    if "input_features" in chosen:
        made = _made(config, chosen)
        frames = 2 * find(config, "max_source_positions", default=48)
        bins = features(config).shape[-1]
        for shape in (
            (BATCH, bins, frames),
            (BATCH, 96, bins),
            (BATCH, 96, 2 * bins),
            (BATCH, bins, 96),
            (BATCH, 96, 4 * bins),
        ):
            yield made | {"input_features": torch.randn(shape)}
            yield made | {"input_features": torch.randn(shape), "attention_mask": torch.ones(shape[0], shape[1]).long()}
    if "input_values" in chosen:
        for shape in ((BATCH, 1, 6400), (BATCH, 1, 7680), (BATCH, 24000)):
            yield _made(config, chosen) | {"input_values": torch.randn(shape)}


def _made(config: Any, names: list[str]) -> dict[str, Any]:
    return {name: MAKERS[name](config) for name in dict.fromkeys(names)}


def _with_image(model: nn.Module, config: Any, accepts: Any) -> Iterator[dict[str, Any]]:
    """Text in which image tokens stand for as many features as the model makes of an image."""
    token = find(config, "image_token_id", "image_token_index")
    text = tokens(config)
    if token is None or not hasattr(model, "get_image_features"):
        for picture in (images, video):
            yield {"input_ids": text, "attention_mask": padding(), "pixel_values": picture(config)}
        return
    for extra in _pictures(model, config):
        try:
            with torch.no_grad():
                got = model.get_image_features(**extra)
            count = _rows(got) // BATCH
        except Exception:
            continue
        run = torch.full((BATCH, count), token)
        ids = torch.cat([text[:, :3], run, text[:, 3:]], 1)
        made = {"input_ids": ids, "attention_mask": padding(ids.shape[1]), **extra}
        if "mm_token_type_ids" in accepts:
            yield made | {"mm_token_type_ids": (ids == token).long()}
        if "token_type_ids" in accepts:
            yield made | {"token_type_ids": (ids == token).long()}
        yield made


def _pictures(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    accepts = inspect.signature(model.get_image_features).parameters
    if "image_grid_thw" in accepts:
        vision = getattr(config, "vision_config", config)
        patch, merge = find(vision, "patch_size", default=14), find(vision, "spatial_merge_size", default=2)
        length = find(vision, "in_channels", "in_chans", "num_channels", default=3)
        length *= find(vision, "temporal_patch_size", default=1) * patch**2
        grid = torch.tensor([[1, 2 * merge, 3 * merge]] * BATCH)
        yield {"pixel_values": torch.randn(BATCH * 6 * merge**2, length), "image_grid_thw": grid}
    picture = images(config)
    sizes = torch.tensor([picture.shape[-2:]] * BATCH)
    if "image_sizes" in accepts:
        yield {"pixel_values": picture[:, None].repeat(1, 5, 1, 1, 1), "image_sizes": sizes}
        yield {"pixel_values": picture, "image_sizes": sizes}
    if "qformer_input_ids" in accepts:
        yield {"pixel_values": picture, "qformer_input_ids": tokens(config)}
    yield {"pixel_values": picture}
    yield {"pixel_values": picture[:, None]}


def _rows(got: Any) -> int:
    """How many features: those of a tensor, of a list of tensors, or of an output's ``pooler_output``."""
    got = getattr(got, "pooler_output", got)
    if isinstance(got, Tensor):
        return got.numel() // got.shape[-1]
    return sum(_rows(part) for part in got if isinstance(part, Tensor))
