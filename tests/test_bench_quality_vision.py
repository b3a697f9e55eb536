"""The image classifiers of the quality bench: data, training, and the check before it measures."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.quality import images, vision
from bench.quality.images import Images
from bench.quality.vision import TASKS
from prescore_compile import Config
from prescore_compile.kernels.plan import Plan


@pytest.fixture(scope="module")
def digits() -> Images:
    pytest.importorskip("sklearn")
    return images.digits()


def test_digits_are_images(digits: Images) -> None:
    assert digits.train.shape == (1297, 64, 9)
    assert digits.test.shape == (500, 64, 9)
    assert set(digits.train_labels.tolist()) == set(digits.test_labels.tolist()) == set(range(10))
    pixels = torch.cat([digits.train, digits.test]).flatten(1)
    assert pixels.unique(dim=0).shape[0] == len(pixels), "no image is in both"


def test_photographs_are_split_by_area() -> None:
    blocks = list(images.split(427, 640))
    places = [(row, column) for _, row, column in blocks]
    assert len(set(places)) == len(places) == 6 * 10
    assert all(row % images.BLOCK == column % images.BLOCK == 0 for row, column in places)
    assert 0.25 < sum(held_out for held_out, _, _ in blocks) / len(blocks) < 0.4


def test_photographs_are_images() -> None:
    pytest.importorskip("PIL")
    try:
        data = images.photographs(train_crops=3)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    assert data.train.shape == (48, 256, 36)
    assert data.test.shape == (480, 256, 36)
    assert data.classes == 16


def test_plans_cost_what_they_say() -> None:
    """... and are what a site runs, whatever its defaults are."""
    for tokens in (64, 256):
        for target in vision.DENSITIES:
            for name, options in vision.plans(tokens, target):
                assert vision.density(Plan(**options), tokens) <= 1.3 * target, (name, tokens, target)
                assert Config(**options).plan_for(False, "cpu", tokens) == Plan(**options), name
    assert vision.density(Plan(window=None, sinks=0, routes=0), 64) == 1


def test_keeping_everything_is_exact(digits: Images) -> None:
    assert vision.check(TASKS["digits"], digits) <= vision.TOLERANCE


def test_a_step_through_prescored_attention_lowers_the_loss(digits: Images) -> None:
    task = dataclasses.replace(TASKS["digits"], layers=1, batch=16)
    model = vision.build(task, digits, 0)
    call = vision.prescored(model, dict(vision.plans(64, 0.25))["kmeans + residual"])
    few = dataclasses.replace(digits, train=digits.train[:16], train_labels=digits.train_labels[:16])
    losses = vision.train(model, call, vision.new_optimizer(model), task, few, 0, range(20, 26))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_table_pairs_each_seed_with_its_exact() -> None:
    cells = {
        f"{when}{seed}": dict(task="digits", seed=seed, when=when, method=method, target=d, density=d, accuracy=a)
        for seed, when, method, d, a in (
            (0, "exact", "exact", 1.0, 0.9),
            (1, "exact", "exact", 1.0, 0.8),
            (0, "after", "kmeans", 0.25, 0.8),
            (1, "after", "kmeans", 0.25, 0.7),
        )
    }
    assert "-10.0 ± 0.0" in vision.table(cells)
