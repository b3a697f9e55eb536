"""What the command line looks at: a function in a file, or a Hugging Face config."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..passes.compat import raised

_NOT_THE_USERS = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, Path(__file__).parent))


class TargetError(ValueError):
    """TARGET is not what the command line takes; the message says what was got and what is allowed."""


class TargetFailed(RuntimeError):
    """TARGET was found, but its own code raised; that error is the cause."""


@dataclass(frozen=True)
class Target:
    """A model and a call of it."""

    title: str
    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


FORMS = (
    "file.py:function, where function() returns (model, inputs) with inputs a tensor, a tuple of positional or a "
    "dict of keyword arguments, or (model, args, kwargs); or a folder with the config.json of a Hugging Face model"
)


def load(text: str, seq_len: int) -> Target:
    """The target that ``text`` names; ``seq_len`` tokens for a Hugging Face config.

    Raises:
        TargetError: there is no such thing, or it is something else.
        TargetFailed: its code raised.
    """
    if Path(text).is_dir():
        return _config(Path(text), seq_len)
    file, colon, name = text.rpartition(":")
    if not colon or not name:
        raise TargetError(f"TARGET: got {text!r}; allowed: {FORMS}")
    path = Path(file)
    if not path.is_file():
        raise TargetError(f"TARGET: got {text!r}, but there is no file {str(path)!r}; allowed: {FORMS}")
    function = _function(path, name)
    try:
        returned = function()
    except (Exception, SystemExit) as error:
        raise TargetFailed(f"{text}: {name}() raised {error_text(error)}") from error
    return _target(text, returned)


def _function(path: Path, name: str) -> Callable[..., Any]:
    # Dynamo looks a function's module up by its name, so it must be registered, but in nobody's place.
    module_name = path.stem if path.stem not in sys.modules else f"prescore_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    if spec is None or spec.loader is None:
        raise TargetError(f"TARGET: got the file {str(path)!r}; allowed: a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.resolve().parent))  # as `python file.py` has it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TargetFailed(f"{path}: importing it raised {error_text(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TargetError(f"TARGET: {path} has no function {name!r}; it has {', '.join(known) or 'none'}")
    return found


def _target(text: str, returned: Any) -> Target:
    model, inputs, kwargs = _parts(returned)
    if not callable(model) or not isinstance(kwargs, Mapping):
        got = type(returned).__name__
        if isinstance(returned, (tuple, list)):
            got = f"a {got} of {', '.join(type(part).__name__ for part in returned) or 'nothing'}"
        raise TargetError(f"TARGET: {text} returned {got}; allowed: {FORMS}")
    return Target(text, model, inputs, kwargs)


def _parts(returned: Any) -> tuple[Any, tuple[Any, ...], Any]:
    if not isinstance(returned, (tuple, list)) or len(returned) not in (2, 3):
        return None, (), {}
    model, inputs, kwargs = (*returned, {})[:3]
    if isinstance(inputs, Mapping) and not kwargs:
        return model, (), inputs
    return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), kwargs


def _config(folder: Path, seq_len: int) -> Target:
    """A model without weights: fake tensors, so that one of any size is captured in seconds."""
    if not (folder / "config.json").is_file():
        raise TargetError(f"TARGET: got the folder {str(folder)!r} without a config.json; allowed: {FORMS}")
    try:
        import transformers
    except ImportError:
        raise TargetError("TARGET: a Hugging Face config needs the package transformers") from None
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with FakeTensorMode(allow_non_fake_inputs=True):
            # Some draws of weights look at numbers, which fake tensors have not.
            with importlib.import_module("transformers.initialization").no_init_weights():
                model = _build(transformers, config).eval()
            kwargs = _inputs(model, seq_len)
    except Exception as error:
        raise TargetFailed(f"{folder}: building the model raised {error_text(error)}") from error
    return Target(str(folder), model, (), kwargs)


def _build(transformers: Any, config: Any) -> Any:
    """The class that the config names, else the family's base model."""
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    cls = next((cls for cls in named if cls is not None), None)
    return cls(config) if cls is not None else transformers.AutoModel.from_config(config)


def _inputs(model: Any, seq_len: int) -> dict[str, Any]:
    """What the model's forward asks for: token ids, an image of the size it was made for, sound; or several."""
    config, asked = model.config, inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, Any] = {}
    ids = torch.zeros(1, seq_len, dtype=torch.long)
    if "pixel_values" in asked:
        vision = getattr(config, "vision_config", None) or config
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        inputs["pixel_values"] = torch.zeros(1, getattr(vision, "num_channels", 3), height, width)
    if "input_features" in asked:
        steps = 2 * getattr(config, "max_source_positions", seq_len)  # Whisper's two convolutions halve them
        inputs["input_features"] = torch.zeros(1, getattr(config, "num_mel_bins", 80), steps)
    if main == "input_values":
        inputs["input_values"] = torch.zeros(1, 320 * seq_len)  # samples, 20 ms a position
    if "input_ids" in asked and (main == "input_ids" or hasattr(config, "text_config")):
        text = getattr(config, "text_config", None) or config
        most = getattr(text, "max_position_embeddings", seq_len) if "pixel_values" in asked else seq_len
        inputs["input_ids"] = ids[:, :most]
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, : getattr(config, "max_target_positions", seq_len)]
    return inputs | ({"use_cache": False} if "use_cache" in asked else {})


def error_text(error: BaseException) -> str:
    """The error and the line of the user's that raised it, or called into torch or this package, which did.

    No line where the call in this file raised, as of a function with parameters.
    """
    error, frames = raised(error)
    users = [frame for frame in frames if not frame.filename.startswith(_NOT_THE_USERS)]
    place = (users or frames)[-1]
    where = "" if place.filename == __file__ else f" at {place.filename}:{place.lineno}"
    try:
        return f"{type(error).__name__}: {error}{where}"
    except Exception:  # of its own ``__str__``
        return f"{type(error).__name__}{where}"
