"""A part that is trained but never updates, and one that is frozen but does, stop a run."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed import Pool
from tests.training.conftest import Trainable
from tests.workers import train


@contextlib.contextmanager
def tower_without_gradient() -> Iterator[None]:
    """As a tower that runs under ``torch.no_grad()``, whatever is said to be trained."""
    from megatron_vlm.models.vision import VisionTower

    forward = VisionTower.forward

    def detached(self: VisionTower, *args: torch.Tensor) -> torch.Tensor:
        return forward(self, *args).detach()

    with mock.patch.object(VisionTower, "forward", detached):
        yield


@contextlib.contextmanager
def one_layer_without_gradient() -> Iterator[None]:
    """The first linear layer of the projector computes with a copy of its weight."""
    from megatron_vlm.models.projector import Projector

    forward = Projector.forward

    def replaced(self: Projector, features: torch.Tensor, *index: Any) -> torch.Tensor:
        weight = self.encoder.linear_fc1.weight
        features = features @ torch.eye(features.shape[-1])
        with mock.patch.dict(self.encoder.linear_fc1._parameters, weight=weight.detach()):
            return forward(self, features, *index)

    with mock.patch.object(Projector, "forward", replaced):
        yield


@contextlib.contextmanager
def step_that_touches_the_frozen() -> Iterator[None]:
    from megatron_vlm.parallel.optimizer import Optimizer

    step = Optimizer.step

    def touching(self: Optimizer, *args: object) -> None:
        step(self, *args)
        frozen = [p for model in self.models for p in model.parameters() if not p.requires_grad]
        if frozen:
            frozen[0].data.flatten()[0] += 1e-6

    with mock.patch.object(Optimizer, "step", touching):
        yield


def train_with(fault: str, argv: list[str]) -> tuple[str, str]:
    """Train under one of the faults above; the error with which it ends, and what was printed."""
    printed = io.StringIO()
    with globals()[fault](), contextlib.redirect_stdout(printed):
        try:
            train(argv)
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}", printed.getvalue()
    return "none", printed.getvalue()


@pytest.fixture
def flags(trainables: dict[str, Trainable], tmp_path: Path) -> list[str]:
    return trainables["untied"].flags(tmp_path, "run", "--no-save", "--train-iters", "12")


@pytest.mark.parametrize("layout", [[], ["--pp", "2"]], ids=str)
def test_a_tower_that_never_updates(pool: Pool, flags: list[str], layout: list[str]) -> None:
    world = 2 if layout else 1
    for error, _ in pool.run(
        world, train_with, "tower_without_gradient", [*flags, *layout, "--train-vision"]
    ):
        assert error.startswith(
            "ValueError: iteration 1 of this start: --train-modules trains the vision tower"
        )
    for error, _ in pool.run(world, train_with, "tower_without_gradient", [*flags, *layout]):
        assert error == "none"


def test_without_images_it_cannot_be_seen(
    pool: Pool, flags: list[str], trainables: dict[str, Trainable]
) -> None:
    text = ["--data-path", str(trainables["untied"].text_only), "--train-vision"]
    assert pool.run(1, train_with, "tower_without_gradient", [*flags, *text])[0][0] == "none"


def test_a_tensor_that_never_updates_is_named(pool: Pool, flags: list[str]) -> None:
    ((error, printed), _) = pool.run(2, train_with, "one_layer_without_gradient", [*flags, "--tp", "2"])
    assert error == "none"
    name = "vision_projection.encoder.linear_fc1.weight"
    assert (
        f"warning: no gradient has reached these in 10 iterations, so they don't change: {name}\n" in printed
    )
    only = ["--train-modules", f"language|{name}|vision_projection.encoder.linear_fc2.weight"]
    ((error, _),) = pool.run(1, train_with, "one_layer_without_gradient", [*flags, *only])
    assert error.startswith(f"ValueError: --train-modules: no gradient has reached {name} in 10 iterations")


def test_a_frozen_part_that_changes(pool: Pool, flags: list[str]) -> None:
    argv = [*flags, "--dist-optim", "--freeze-lm"]
    for error, _ in pool.run(2, train_with, "step_that_touches_the_frozen", argv):
        assert error.startswith("RuntimeError: the first step has changed frozen parameters: vision_model.")
