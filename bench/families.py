"""Every model family that the census runs, tiny and random, with inputs that it takes.

``names()`` lists them; ``build(name, implementation)`` makes one. A name is a model type of
transformers ("llama"), or "torch:..." or "timm:..." for those of modules.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.llama import modeling_llama  # noqa: F401, what most models import: workers fork with it

from . import modules
from .fixes import fixed, inputs_for, started
from .inputs import variants
from .shrink import shrink

IMPLEMENTATIONS = ("eager", "sdpa")
HEADS_OF_MODELS = (
    "MODEL", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "MODEL_FOR_PRETRAINING", "MODEL_FOR_MASKED_LM", "MODEL_FOR_IMAGE_CLASSIFICATION", "MODEL_FOR_OBJECT_DETECTION",
    "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION", "MODEL_FOR_UNIVERSAL_SEGMENTATION", "MODEL_FOR_DEPTH_ESTIMATION",
    "MODEL_FOR_KEYPOINT_DETECTION", "MODEL_FOR_KEYPOINT_MATCHING", "MODEL_FOR_TIME_SERIES_PREDICTION",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ", "MODEL_FOR_CTC", "MODEL_FOR_TEXT_TO_SPECTROGRAM", "MODEL_FOR_TEXT_TO_WAVEFORM",
    "MODEL_FOR_AUDIO_CLASSIFICATION", "MODEL_FOR_IMAGE_SEGMENTATION", "MODEL_FOR_SEMANTIC_SEGMENTATION",
    "MODEL_FOR_IMAGE_TO_IMAGE", "MODEL_FOR_MULTIMODAL_LM", "MODEL_FOR_VIDEO_CLASSIFICATION",
    "MODEL_FOR_POSE_ESTIMATION", "MODEL_FOR_MASK_GENERATION", "MODEL_FOR_TABLE_RECOGNITION",
    "MODEL_FOR_TEXT_RECOGNITION", "MODEL_FOR_RNNT", "MODEL_FOR_TDT", "MODEL_FOR_IMAGE_MATTING",
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A model in eval mode and the keyword arguments of a call."""

    model: nn.Module
    kwargs: dict[str, Any]


class CannotBuild(Exception):
    """Why a family is not part of the census."""


def classes(name: str) -> list[type[nn.Module]]:
    """The model classes of a model type, the base model first."""
    found: list[Any] = []
    for head in HEADS_OF_MODELS:
        names = getattr(auto, head + "_MAPPING_NAMES").get(name, ())
        found += [names] if isinstance(names, str) else list(names)
    return [getattr(transformers, each) for each in dict.fromkeys(found) if hasattr(transformers, each)]


def names() -> list[str]:
    """torch's and timm's modules, and every family that transformers has a model class for, one per config class."""
    found: dict[str, str] = {}
    for name, config in CONFIG_MAPPING_NAMES.items():
        if any(name in getattr(auto, head + "_MAPPING_NAMES") for head in HEADS_OF_MODELS):
            found[config] = min(found.get(config, name), name, key=len)
    return modules.names() + sorted(found.values())


def implementations(name: str) -> tuple[str, ...]:
    """The implementations of attention that the family has."""
    return modules.implementations(name) if ":" in name else IMPLEMENTATIONS


def build(name: str, implementation: str) -> Example:
    """Makes the family's smallest model and inputs on which it runs.

    Raises:
        CannotBuild: with the first error, of the first class and inputs tried.
    """
    if ":" in name:
        torch.manual_seed(0)
        try:
            model, kwargs = modules.build(name, implementation)
            liven(model)
            return Example(model, kwargs)
        except Exception as error:
            raise CannotBuild(_first_line(error)) from error
    errors: list[str] = []
    for model_class in classes(name):
        try:
            model = _model(name, model_class, implementation)
            kwargs = _runs(name, model, model.config)
            return Example(model, kwargs)
        except Exception as error:
            errors.append(_first_line(error))
    raise CannotBuild(errors[0] if errors else "no model class")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def _model(name: str, model_class: Any, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    config = fixed(name, shrink(started(name, CONFIG_MAPPING[name])))
    chosen: Any = implementation
    if type(getattr(config, "backbone_config", None)).__name__ == "ResNetConfig":  # has no attention to implement
        chosen = {"": implementation, "backbone_config": "eager"}
    model = model_class._from_config(config, attn_implementation=chosen).eval()
    liven(model)
    return model


def liven(model: nn.Module) -> None:
    """Random weights of a size that makes scores and masks matter; fresh models attend almost evenly."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        data = parameter.data
        if data.dim() > 1:
            fan_in = data[0].numel() if data.dim() != 2 or data.shape[0] > 1 else data.shape[1]
            data.normal_(0, max(fan_in, 1) ** -0.5, generator=generator)
        elif data.abs().max() < 0.05:  # biases and layer scales
            data.normal_(0, 0.3, generator=generator)


def _runs(name: str, model: nn.Module, config: Any) -> dict[str, Any]:
    """The first inputs on which the model runs."""
    first: Exception | None = None
    torch.manual_seed(0)
    for kwargs in [*inputs_for(name, model, config), *variants(model, config)]:
        try:
            with torch.no_grad():
                model(**kwargs)
            return kwargs
        except Exception as error:
            first = first or error
    raise first or CannotBuild("no inputs")
