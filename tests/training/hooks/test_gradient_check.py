"""A part that is trained but never updates, and one that is frozen but does, stop a run."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vlm import parallel
from megatron_vlm.models.modalities.base import Placed
from megatron_vlm.training.batch import Batch, GlobalBatch
from megatron_vlm.training.checkpoint import RunState
from megatron_vlm.training.freezing import Regime
from megatron_vlm.training.hooks.gradient_check import GradientCheck
from megatron_vlm.training.step import StepResult
from tests.distributed import Pool
from tests.training.conftest import Trainable
from tests.workers import train


@contextlib.contextmanager
def tower_without_gradient() -> Iterator[None]:
    """Let the tower run as under ``torch.no_grad()``, whatever is said to be trained."""
    from megatron_vlm.models.encoders.vit import VisionTower

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


@contextlib.contextmanager
def no_fault() -> Iterator[None]:
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


def text_only(one: Trainable, folder: Path, *more: str) -> list[str]:
    return one.flags(folder, "run", "--data-path", str(one.text_only), "--save-optim", *more)


def iterations(run: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (run / "metrics.jsonl").read_text().splitlines()]


NO_IMAGE = "no sample has had an image"


@pytest.mark.parametrize(
    ("more", "parts", "updates", "saved"),
    [
        (("--pp", "2", "--train-iters", "12"), "projector", "12 updates", []),
        (("--train-iters", "30", "--save-interval", "8"), "projector", "20 updates", [8, 16]),
        (
            ("--dist-optim", "--train-vision", "--train-iters", "2"),
            "projector, vision tower",
            "2 updates",
            [],
        ),
    ],
    ids=["the whole of a short run", "the first updates", "the tower too"],
)
def test_a_run_that_trains_nothing(
    pool: Pool,
    trainables: dict[str, Trainable],
    tmp_path: Path,
    more: tuple[str, ...],
    parts: str,
    updates: str,
    saved: list[int],
) -> None:
    """Stage 1 on samples without images: no checkpoint of its end takes the place of another."""
    flags = [*text_only(trainables["untied"], tmp_path, *more), "--stage", "1", "--global-batch-size", "4"]
    answers = pool.run(2, train_with, "no_fault", [*flags, "--micro-batch-size", "2"])
    for error, _ in answers:
        assert error == (
            f"ValueError: nothing of what is trained ({parts}) has had a gradient in {updates}: {NO_IMAGE}, "
            "so the run was stopped"
        )
    assert iterations(tmp_path / "run")[-1] < 20
    found = sorted(folder.name for folder in tmp_path.glob("run/checkpoints/iter_*"))
    assert found == [f"iter_{iteration:07d}" for iteration in saved]


def test_a_part_that_trains_nothing_is_named_once(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    """By the updates of the run, not of each start; adapters are parts of their own."""
    adapters = ("--lora-rank", "2", "--lora-targets", "all-linear")
    flags = text_only(trainables["untied"], tmp_path, "--freeze-lm", *adapters)
    said = []
    for length in ("3", "22", "44"):
        ((error, printed),) = pool.run(1, train_with, "no_fault", [*flags, "--train-iters", length])
        assert error == "none"
        said.append([line for line in printed.splitlines() if line.startswith("warning: no gradient")])
    warning = f"warning: no gradient has reached the projector in 3 updates: {NO_IMAGE}"
    assert said == [[warning], [], []]


def judge(with_image: bool) -> str:
    """The verdict on twenty updates without a trained token, or with one in the samples without an image."""
    layout = parallel.initialize(1, 1, 0, "cpu")
    weight = torch.nn.Parameter(torch.ones(2))
    weight.main_grad = torch.zeros(2)  # type: ignore[attr-defined]
    name = "vision_projection.encoder.linear_fc1.weight"
    check = GradientCheck(Regime((), {name: [2]}, {name: 0}, [(name, weight)]), layout, RunState(), print)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.tensor([[False] * 3, [with_image] * 3])
    media = {"image": Placed({}, torch.zeros(2, 1, dtype=torch.int64))} if with_image else {}
    batch = Batch(tokens, tokens, mask, tokens, media)
    try:
        for _ in range(20):
            check.after_step(GlobalBatch([batch], 3), StepResult(1.0, int(mask.sum()), 0.0))
    except ValueError as error:
        return f"{check.updates}: {error}"
    return "none"


def test_why_nothing_was_trained(pool: Pool) -> None:
    start = "20: nothing of what is trained (projector) has had a gradient in 20 updates: no sample "
    assert pool.run(1, judge, False)[0].startswith(f"{start}has had a token that is trained; look at")
    assert pool.run(1, judge, True)[0].startswith(f"{start}with an image has had a token that is trained;")
