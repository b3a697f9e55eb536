"""Real images that Python packages carry, as tokens: digits, and crops of photographs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

CROP, BLOCK = 32, 64
PATCH, STRIDE = 6, 2
TEST_CROPS = 30
PHOTOGRAPHS = {
    "skimage/data": (
        "astronaut.png brick.png camera.png cell.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg"
    ).split(),
    "sklearn/datasets/images": ["china.jpg", "flower.jpg"],
}
"""Folder in a package: photographs, each a class."""


@dataclass(frozen=True)
class Images:
    """A classification task: ``[N, tokens, values]`` float32 and ``[N]`` int64, twice."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: int


def digits() -> Images:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, one token a pixel; 500 are the test.

    A token is a pixel and its 8 neighbours.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    pixels = _tokens(torch.tensor(data.images, dtype=torch.float32) / 8 - 1, 3, 1)[order]
    labels = torch.tensor(data.target, dtype=torch.int64)[order]
    return Images(pixels[500:], labels[500:], pixels[:500], labels[:500], 10)


def photographs(train_crops: int = 400) -> Images:
    """Which of 16 photographs is a grey 32 x 32 crop from? 256 tokens: 6 x 6 pixels every 2 pixels.

    Each photograph is cut into blocks of 64 x 64 pixels, a third of them for the test: no pixel is in both.
    Every crop has mean 0 and variance 1, so that neither brightness nor contrast tells.
    """
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for grey in _greys():
        blocks = {False: [], True: []}  # type: dict[bool, list[torch.Tensor]]
        for held_out, row, column in split(*grey.shape):
            blocks[held_out].append(grey[row : row + BLOCK, column : column + BLOCK])
        train.append(_crops(blocks[False], train_crops, generator))
        test.append(_crops(blocks[True], TEST_CROPS, generator))
    labels = torch.arange(len(train))
    return Images(
        torch.cat(train),
        labels.repeat_interleave(train_crops),
        torch.cat(test),
        labels.repeat_interleave(TEST_CROPS),
        len(train),
    )


def split(height: int, width: int) -> Iterator[tuple[bool, int, int]]:
    """Whether a block is held out for the test, and where it begins."""
    for row in range(height // BLOCK):
        for column in range(width // BLOCK):
            yield (row + column) % 3 == 0, row * BLOCK, column * BLOCK


def _greys() -> Iterator[torch.Tensor]:
    import numpy as np
    from PIL import Image

    for folder, names in PHOTOGRAPHS.items():
        package, _, inside = folder.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"{package} carries the photographs {', '.join(names)}: see requirements/models.txt"
            )
        for name in names:
            with Image.open(Path(spec.origin).parent / inside / name) as image:
                yield torch.from_numpy(np.array(image.convert("L"))).float()


def _crops(blocks: list[torch.Tensor], count: int, generator: torch.Generator) -> torch.Tensor:
    """Crops that are not flat, at random places of random blocks: ``[count, tokens, PATCH * PATCH]``."""
    crops: list[torch.Tensor] = []
    while len(crops) < count:
        block = blocks[int(torch.randint(len(blocks), (), generator=generator))]
        row, column = torch.randint(BLOCK - CROP + 1, (2,), generator=generator).tolist()
        crop = block[row : row + CROP, column : column + CROP]
        if crop.std() > 4:
            crops.append((crop - crop.mean()) / crop.std())
    return _tokens(torch.stack(crops), PATCH, STRIDE)


def _tokens(images: torch.Tensor, patch: int, stride: int) -> torch.Tensor:
    """Overlapping patches ``[N, tokens, patch * patch]``: the pixels around each place."""
    return F.unfold(images.unsqueeze(1), patch, padding=(patch - stride) // 2, stride=stride).mT.contiguous()
