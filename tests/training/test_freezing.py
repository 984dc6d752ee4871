"""Each part at its own learning rate: losses equal those of torch's AdamW on transformers' LLaVA."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.hf.convert import import_hf
from megatron_vlm.training.schedule import Schedule
from tests.distributed import Pool
from tests.models.test_parity import make_batch
from tests.tiny import save_tiny_llava
from tests.workers import Layout, train_on

ITERATIONS = 20
SCHEDULE = Schedule(lr=1e-3, min_lr=1e-4, warmup_iters=0, decay_iters=ITERATIONS)
OPTIMIZER = dict(weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, clip_grad=1.0)
Choose = Callable[[str], float | None]  # a transformers parameter's learning rate; None: frozen


def by_part(name: str) -> float | None:
    """``projector:3e-3|language|language.embedding:2e-4|language.layers.1-2:5e-4|vision.last_block:2e-3``"""
    if "multi_modal_projector" in name:
        return 3e-3
    if "vision_tower" in name:
        return 2e-3 if "encoder.layers.1." in name else None  # of three blocks two are run
    if "embed_tokens" in name:
        return 2e-4
    return 5e-4 if ".layers.1." in name or ".layers.2." in name else 1e-3


def tied_embedding(name: str) -> float | None:
    """``vision.embeddings:1e-3|language.embedding:5e-4``: no projector, and nothing on inner stages."""
    if "vision_tower" in name:
        return 1e-3 if "embeddings." in name else None
    return 5e-4 if "embed_tokens" in name else None


def norms(name: str) -> float | None:
    """``*norm*``"""
    run = "vision_tower" not in name or ("encoder.layers.2." not in name and "post_layernorm" not in name)
    return 1e-3 if "norm" in name and "pre_layrnorm" not in name and run else None


def language(name: str) -> float | None:
    """``language``"""
    return None if "vision_tower" in name or "projector" in name else 1e-3


PARTS = "projector:3e-3|language|language.embedding:2e-4|language.layers.1-2:5e-4|vision.last_block:2e-3"
CASES: dict[str, tuple[str, str, Choose]] = {
    "parts": ("clip-llama", PARTS, by_part),
    "tied": ("clip-qwen2-tied", "vision.embeddings:1e-3|language.embedding:5e-4", tied_embedding),
    "pattern": ("clip-llama", "*norm*", norms),
    "experts": ("clip-mixtral", "language", language),
}
MATRIX = [
    ("parts", Layout()),
    ("parts", Layout(tp=2, sequence_parallel=True)),
    ("parts", Layout(pp=2)),
    ("parts", Layout(dp=2, distributed_optimizer=True)),
    ("tied", Layout(pp=2, dp=2, distributed_optimizer=True)),
    ("tied", Layout(tp=2, pp=2)),
    ("pattern", Layout(pp=2)),
    ("experts", Layout(tp=2)),
    ("experts", Layout(tp=2, pp=2, sequence_parallel=True)),
]


class Reference:
    """A tiny transformers model, its losses, and its counts of parameters."""

    def __init__(self, family: str, choose: Choose, folder: Path) -> None:
        net = save_tiny_llava(folder / "hf", family)
        import_hf(folder / "hf", folder / "megatron", tp=2, pp=1)
        self.checkpoint = str(folder / "megatron" / "release")
        self.model = ModelConfig.from_hf_dir(str(folder / "hf"))
        self.batches = [
            [make_batch(self.model, 10 * i, [1, 0], 40), make_batch(self.model, 10 * i + 1, [0, 0], 25)]
            for i in range(ITERATIONS)
        ]
        self.trained = 0
        self.losses = self._train(net, choose)

    def _train(self, net: transformers.PreTrainedModel, choose: Choose) -> list[float]:
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in net.named_parameters():
            lr = choose(name)
            parameter.requires_grad = lr is not None
            if lr is not None:
                # Megatron keeps the class token as [1, 1, h], and decays it.
                decayed = parameter.dim() > 1 or name.endswith("class_embedding")
                groups.setdefault((lr, 0.1 if decayed else 0.0), []).append(parameter)
                self.trained += parameter.numel()
        optimizer = torch.optim.AdamW(
            [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()],
            betas=(0.9, 0.95),
            eps=1e-8,
        )
        curve = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / ITERATIONS))
        )
        losses = []
        for microbatches in self.batches:
            optimizer.zero_grad()
            loss, trained = torch.zeros(()), 0
            for m in microbatches:
                pixels = m["pixel_values"] if len(m["pixel_values"]) else None
                logits = net(input_ids=m["input_ids"], pixel_values=pixels).logits
                labels = m["labels"].flatten()
                loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
                trained += int((labels != -100).sum())
            (loss / trained).backward()
            torch.nn.utils.clip_grad_norm_([p for params in groups.values() for p in params], 1.0)
            optimizer.step()
            curve.step()
            losses.append(float(loss.detach()) / trained)
        return losses


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    done: dict[str, Reference] = {}

    def get(case: str) -> Reference:
        if case not in done:
            family, _, choose = CASES[case]
            done[case] = Reference(family, choose, tmp_path_factory.mktemp("reference"))
        return done[case]

    return get


@pytest.mark.parametrize(("case", "layout"), MATRIX, ids=str)
def test_equals_adamw(reference: Callable[[str], Any], pool: Pool, case: str, layout: Layout) -> None:
    expected = reference(case)
    answers = pool.run(
        layout.world,
        train_on,
        expected.checkpoint,
        expected.batches,
        CASES[case][1],
        SCHEDULE,
        layout,
        OPTIMIZER,
    )
    assert abs(expected.losses[-1] - expected.losses[0]) > 1e-3 * expected.losses[0]  # something was learned
    for losses, text in answers:
        # fp32 rounds to 6e-8; over 20 iterations 2e-7 were seen.
        assert losses == pytest.approx(expected.losses, rel=1e-5)
        counts = {line[:18].strip(): line[18:].replace(",", "").split() for line in text.splitlines()}
        assert int(counts["total"][0]) == expected.trained
        if case == "experts":  # of five, each token has three
            idle = 4 * 2 * 3 * 68 * 48  # layers, experts, matrices of each
            assert [int(count) for count in counts["at work on a token"]] == [
                int(count) - idle for count in counts["total"]
            ]
