"""Adapters train as PEFT's do: losses of 20 iterations, at several layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from megatron_vlm.architecture.lora import LANGUAGE_TARGETS, VISION_TARGETS, LoRAConfig
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.hf.convert import import_hf
from tests.distributed import ROUNDING, Pool
from tests.models.test_parity import make_batch
from tests.tiny import save_tiny_llava
from tests.workers import Layout, adapters_behind_a_fused_norm, train_adapters

ITERATIONS = 20
LR, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0
LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2),
    Layout(dp=2, distributed_optimizer=True),
    Layout(tp=2, pp=2),
    Layout(tp=2, dp=2, sequence_parallel=True, distributed_optimizer=True),
]
_TOWER = r".*vision_tower\..*layers\.(0|1)\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
_TEXT = r".*language_model\..*\."
# Grouped-query attention with biases; some projections of a fused linear without adapters; the tower too.
CASES: dict[str, tuple[str, tuple[str, ...], str, bool]] = {
    "all-linear": ("siglip-llama-biases", LANGUAGE_TARGETS, _TEXT + f"({'|'.join(LANGUAGE_TARGETS)})", False),
    "some, and the tower": (
        "clip-llama",
        ("q_proj", "v_proj", "up_proj", *VISION_TARGETS),
        f"{_TEXT}(q_proj|v_proj|up_proj)|{_TOWER}",
        True,
    ),
}


class Reference:
    """PEFT's losses on transformers' model, and what to start from here."""

    def __init__(self, case: str, folder: Path) -> None:
        family, targets, pattern, rslora = CASES[case]
        net = save_tiny_llava(folder / "hf", family)
        import_hf(folder / "hf", folder / "megatron", tp=1, pp=1)
        self.checkpoint, self.adapter = folder / "megatron" / "release", folder / "adapter"
        self.model = ModelConfig.from_hf_dir(str(folder / "hf"))
        self.lora = LoRAConfig(rank=4, alpha=12, dropout=0.0, targets=targets, rslora=rslora)
        self.batches = [
            [make_batch(self.model, 10 * i + j, images, 60) for j, images in enumerate(([1, 0], [0, 0]))]
            for i in range(4)
        ]
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=4,
            lora_alpha=12,
            target_modules=pattern,
            use_rslora=rslora,
            modules_to_save=["multi_modal_projector"],
            init_lora_weights=False,  # B is random, too, so that A has gradients from the start
        )
        net = peft.get_peft_model(net, config)
        net.save_pretrained(str(self.adapter))
        optimizer = self._optimizer(net)
        self.losses = [self._step(net, optimizer, i) for i in range(ITERATIONS)]

    def _optimizer(self, net: Any) -> torch.optim.Optimizer:
        trained = [p for p in net.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=LR)

    def _step(self, net: Any, optimizer: torch.optim.Optimizer, iteration: int) -> float:
        loss, trained = torch.zeros(()), 0
        for batch in self.batches[iteration % len(self.batches)]:
            pixels = batch["pixel_values"]
            logits = net(input_ids=batch["input_ids"], pixel_values=pixels if len(pixels) else None).logits
            labels = batch["labels"].flatten()
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
            trained += int((labels != -100).sum())
        optimizer.zero_grad()
        (loss / trained).backward()
        torch.nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], CLIP)
        optimizer.step()
        return float(loss.detach()) / trained


@pytest.fixture(scope="module", params=list(CASES))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(request.param, tmp_path_factory.mktemp("lora"))


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_trains_as_peft(reference: Reference, pool: Pool, sizes: Layout) -> None:
    answers = pool.run(
        sizes.world,
        train_adapters,
        str(reference.checkpoint),
        str(reference.adapter),
        reference.lora,
        reference.batches,
        sizes,
        ITERATIONS,
        (LR, WEIGHT_DECAY, CLIP),
    )
    assert reference.losses[-1] < 0.9 * reference.losses[0]
    for losses in answers:
        assert losses == pytest.approx(reference.losses, rel=1e-5 * ROUNDING)


@pytest.mark.parametrize("place", ["linear_qkv", "linear_fc1"])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_inside_the_linear(pool: Pool, place: str, bias: bool) -> None:
    """Where the linear normalises its input itself, as Transformer Engine's does, A sees the normed input."""
    ((found, expected),) = pool.run(1, adapters_behind_a_fused_norm, place, bias)
    torch.testing.assert_close(found, expected)
