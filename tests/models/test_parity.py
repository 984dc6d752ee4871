"""Loss, logits and every gradient of each family equal transformers', at several layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_vlm.config.model import ModelConfig, padded_vocab_size
from megatron_vlm.hf.convert import import_hf
from megatron_vlm.hf.folder import HFFolder
from megatron_vlm.hf.mapping import build_table, detect_prefixes
from tests.distributed import Pool
from tests.tiny import FAMILIES, save_tiny_llava
from tests.workers import Layout, logits_and_gradients

LAYOUTS = [
    Layout(),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2),
    Layout(tp=2, pp=2),
]
# Where a family differs is the embedding: tied ones stand on two stages.
MORE_LAYOUTS = [
    Layout(pp=2, first=3),
    Layout(tp=2, pp=2, vpp=2, sequence_parallel=True),
    Layout(tp=2, sequence_parallel=True, recompute="full"),
    Layout(pp=2, recompute="selective"),
]


def make_batch(model: ModelConfig, seed: int, images: list[int], length: int) -> dict[str, torch.Tensor]:
    """A microbatch with ``images[i]`` images in sample ``i``, random text and random trained positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 190, (len(images), length), generator=generator)
    for row, count in enumerate(images):
        for image in range(count):
            start = 2 + image * (model.image_tokens + 3)
            ids[row, start : start + model.image_tokens] = model.image_token_id
    labels = torch.randint(3, 190, ids.shape, generator=generator)
    labels[torch.rand(ids.shape, generator=generator) < 0.5] = -100
    size = model.vision.image_size
    pixels = torch.randn(sum(images), model.vision.num_channels, size, size, generator=generator)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def make_global_batch(model: ModelConfig) -> list[dict[str, torch.Tensor]]:
    """Microbatches with images, without, and mixed."""
    return [
        make_batch(model, 1, [1, 2], 70),
        make_batch(model, 2, [0, 0], 31),
        make_batch(model, 3, [0, 1], 45),
        make_batch(model, 4, [1, 0], 52),
    ]


class Reference:
    """A tiny Hugging Face model, its results on the global batch, and its converted checkpoint.

    Args:
        make: the global batch; samples that share a row (``lengths``) are given to it one by one.
    """

    def __init__(
        self,
        family: str,
        folder: Path,
        make: Callable[[ModelConfig], list[dict[str, torch.Tensor]]] = make_global_batch,
    ) -> None:
        net = save_tiny_llava(folder / "hf", family)
        self.model = ModelConfig.from_hf_dir(str(folder / "hf"))
        self.batch = make(self.model)
        import_hf(folder / "hf", folder / "megatron", tp=2, pp=1)
        self.checkpoint = str(folder / "megatron" / "release")

        self.logits = []
        loss, trained = torch.zeros(()), 0
        for microbatch in self.batch:
            logits = torch.cat(
                [
                    net(input_ids=ids, pixel_values=pixels if len(pixels) else None).logits
                    for ids, pixels in self._apart(microbatch)
                ],
                dim=1,
            )
            self.logits.append(logits.detach())
            labels = microbatch["labels"].flatten()
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
            trained += int((labels != -100).sum())
        (loss / trained).backward()
        self.loss = float(loss.detach()) / trained
        self.gradients = self._native_gradients(net, folder / "hf")

    def _apart(self, microbatch: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        ids, pixels = microbatch["input_ids"], microbatch["pixel_values"]
        for sample in ids.split(microbatch.get("lengths", torch.tensor([ids.shape[1]])).tolist(), dim=1):
            images = int((sample == self.model.image_token_id).sum()) // self.model.image_tokens
            yield sample, pixels[:images]
            pixels = pixels[images:]

    def _native_gradients(self, net: transformers.PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
        names = HFFolder(folder).tensors
        table = build_table(
            self.model, padded_vocab_size(self.model.language.vocab_size, 1), detect_prefixes(names)
        )
        parameters = dict(net.named_parameters())
        gradients = {}
        for row in table.rows:
            parts = [_parameter(parameters, name).grad for name, _ in row.hf]
            gradients[row.native] = row.op.to_native(parts)
        return gradients


def _parameter(parameters: dict[str, torch.Tensor], saved: str) -> torch.Tensor:
    """A module's parameter by the name it has on disk."""
    candidates = [saved, f"model.{saved}", saved.replace("language_model.model.", "model.language_model.")]
    candidates += [f"model.{c}" for c in candidates]
    candidates.append(saved.replace("language_model.lm_head", "lm_head"))
    candidates.append(f"model.{saved}".replace("vision_tower.vision_model.", "vision_tower."))
    return next(parameters[name] for name in candidates if name in parameters)


@pytest.fixture(scope="module", params=list(FAMILIES))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_equals_transformers(reference: Reference, pool: Pool, sizes: Layout) -> None:
    check(reference, pool, sizes)


@pytest.mark.parametrize("sizes", MORE_LAYOUTS, ids=str)
@pytest.mark.parametrize("reference", ["clip-llama", "clip-qwen2-tied"], indirect=True)
def test_stages_and_recomputation_equal_transformers(reference: Reference, pool: Pool, sizes: Layout) -> None:
    check(reference, pool, sizes)


def check(reference: Reference, pool: Pool, sizes: Layout) -> None:
    answers = pool.run(sizes.world, logits_and_gradients, reference.checkpoint, reference.batch, sizes)
    for loss, _, _ in answers:
        assert loss == pytest.approx(reference.loss, rel=1e-6)
    check_logits(reference, answers, sizes)
    check_gradients(reference, answers)


def check_logits(reference: Reference, answers: list[Any], sizes: Layout) -> None:
    last_stage = answers[-sizes.tp :]
    for number, expected in enumerate(reference.logits):
        parts = [logits[number] for _, logits, _ in last_stage]
        logits = torch.cat(parts, dim=-1)[:, : expected.shape[1], : expected.shape[2]]
        # fp32 rounds to 6e-8; four layers of sums in another order were seen to stay within 2e-6.
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def check_gradients(reference: Reference, answers: list[Any]) -> None:
    found: dict[str, torch.Tensor] = {}
    for _, _, pieces in answers:
        for name, shape, offset, piece in pieces:
            whole = found.setdefault(name, torch.full(shape, float("nan")))
            region = tuple(slice(o, o + s) for o, s in zip(offset, piece.shape, strict=True))
            whole[region] = piece
    assert found.keys() == reference.gradients.keys()
    total = torch.stack([g.norm() for g in reference.gradients.values()]).norm()
    for name, expected in reference.gradients.items():
        gradient = found[name]
        if gradient.shape[0] > expected.shape[0]:  # the vocabulary is padded more at higher TP
            assert not gradient[expected.shape[0] :].any(), name
        gradient = gradient[: expected.shape[0]]
        # A gradient that is zero in exact arithmetic (a tower's key bias) is noise of the global size.
        allowed = 1e-4 * max(float(expected.norm()), 1e-4 * float(total))
        assert float((gradient - expected).norm()) <= allowed, name
