"""Loss, logits and every gradient of each family equal transformers', at several layouts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_vlm.architecture.connectors.anyres import UNCUT, Size
from megatron_vlm.architecture.model import ModelConfig, padded_vocab_size
from megatron_vlm.hf.convert import import_hf
from megatron_vlm.hf.formats.folder import HFFolder
from megatron_vlm.hf.tables.model import build_table
from megatron_vlm.hf.tables.table import detect_prefixes
from tests.distributed import ROUNDING, Pool
from tests.tiny import ALL, SIZES, save_tiny_llava, transformers_inputs
from tests.workers import Layout, logits_and_gradients

LAYOUTS = [
    Layout(),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2),
    Layout(tp=2, pp=2),
]
# Where a family differs is the embedding, since tied ones stand on two stages, and the MLP.
MORE_LAYOUTS = [
    Layout(pp=2, first=3),
    Layout(tp=2, pp=2, vpp=2, sequence_parallel=True),
    Layout(tp=2, sequence_parallel=True, recompute="full"),
    Layout(pp=2, recompute="selective"),
]


def make_batch(model: ModelConfig, seed: int, images: list[int], length: int) -> dict[str, torch.Tensor]:
    """A microbatch with ``images[i]`` images in sample ``i``, random text and random trained positions."""
    generator = torch.Generator().manual_seed(seed)
    sizes = image_sizes(model, images, seed)
    tokens = [[model.count_tokens(size) for size in row] for row in sizes]
    if model.anyres is not None:
        length += max(map(sum, tokens))
    ids = torch.randint(3, 190, (len(images), length), generator=generator)
    for row, counts in enumerate(tokens):
        start = 2
        for count in counts:
            ids[row, start : start + count] = model.image_token_id
            start += count + 3
    labels = torch.randint(3, 190, ids.shape, generator=generator)
    labels[torch.rand(ids.shape, generator=generator) < 0.5] = -100
    size, flat = model.vision.image_size, [size for row in sizes for size in row]
    tiles = sum(images) if model.anyres is None else sum(model.tiling(size).tiles for size in flat)
    pixels = torch.randn(tiles, model.vision.num_channels, size, size, generator=generator)
    batch = {"input_ids": ids, "labels": labels, "pixel_values": pixels}
    if model.anyres is not None:
        batch["image_sizes"] = torch.tensor(flat, dtype=torch.int64).view(-1, 2)
        if model.anyres.several_uncut:
            batch["batch_num_images"] = torch.tensor([count for count in images if count])
    return batch


def image_sizes(model: ModelConfig, images: list[int], seed: int) -> list[list[Size]]:
    """Return the sizes of each sample's images, of :data:`SIZES`, beginning with another one for each
    seed."""
    sizes = itertools.cycle(SIZES[seed % len(SIZES) :] + SIZES[: seed % len(SIZES)])
    found = [[next(sizes) for _ in range(count)] for count in images]
    if model.anyres is not None and model.anyres.several_uncut:
        found = [row if len(row) == 1 else [UNCUT] * len(row) for row in found]
    return found


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
        make: the global batch; samples that share a row (``samples``) are given to it one by one.
    """

    def __init__(
        self,
        family: str,
        folder: Path,
        make: Callable[[ModelConfig], list[dict[str, torch.Tensor]]] = make_global_batch,
        save: Callable[[Path, str], Any] = save_tiny_llava,
    ) -> None:
        net = save(folder / "hf", family)
        self.model = ModelConfig.from_hf_dir(str(folder / "hf"))
        self.batch = make(self.model)
        import_hf(folder / "hf", folder / "megatron", tp=2, pp=1)
        self.checkpoint = str(folder / "megatron" / "release")

        self.logits = []
        loss, trained = torch.zeros(()), 0
        for microbatch in self.batch:
            apart = microbatch.get("samples", [microbatch])
            logits = torch.cat([net(**transformers_inputs(sample)).logits for sample in apart], dim=1)
            self.logits.append(logits.detach())
            labels = microbatch["labels"].flatten()
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
            trained += int((labels != -100).sum())
        (loss / trained).backward()
        self.loss = float(loss.detach()) / trained
        self.gradients = self._native_gradients(net, folder / "hf")

    def _native_gradients(self, net: transformers.PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
        names = HFFolder(folder).tensors
        table = build_table(
            self.model, padded_vocab_size(self.model.language.vocab_size, 1), detect_prefixes(names)
        )
        found = dict(_gradients(net))
        gradients = {}
        for row in table.rows:
            parts = [_by_saved_name(found, name) for name, _ in row.hf]
            gradients[row.native] = row.op.to_native(parts)
        return gradients


def _gradients(net: transformers.PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """By the names in the running model; of Mixtral's experts, which share parameters there, as on disk."""
    for name, parameter in net.named_parameters():
        if parameter.grad is None:  # of a tower's block behind the last feature layer
            continue
        layer, _, fused = name.partition(".mlp.experts.")
        if ".mlp.gate." in name:
            yield name.replace(".mlp.", ".block_sparse_moe."), parameter.grad
        elif not fused:
            yield name, parameter.grad
        for number, expert in enumerate(parameter.grad if fused else ()):
            names = ("w1", "w3") if fused == "gate_up_proj" else ("w2",)
            for part, gradient in zip(names, expert.chunk(len(names)), strict=True):
                yield f"{layer}.block_sparse_moe.experts.{number}.{part}.weight", gradient


def _by_saved_name(found: dict[str, torch.Tensor], saved: str) -> torch.Tensor:
    candidates = [saved, f"model.{saved}", saved.replace("language_model.model.", "model.language_model.")]
    candidates += [f"model.{c}" for c in candidates]
    candidates.append(saved.replace("language_model.lm_head", "lm_head"))
    candidates.append(f"model.{saved}".replace("vision_tower.vision_model.", "vision_tower."))
    return next(found[name] for name in candidates if name in found)


@pytest.fixture(scope="module", params=list(ALL))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_equals_transformers(reference: Reference, pool: Pool, sizes: Layout) -> None:
    check(reference, pool, sizes)


@pytest.mark.parametrize("sizes", MORE_LAYOUTS, ids=str)
@pytest.mark.parametrize("reference", ["clip-llama", "clip-qwen2-tied", "clip-mixtral"], indirect=True)
def test_stages_and_recomputation_equal_transformers(reference: Reference, pool: Pool, sizes: Layout) -> None:
    check(reference, pool, sizes)


def check(
    reference: Reference, pool: Pool, sizes: Layout, run: Callable[..., Any] = logits_and_gradients
) -> None:
    answers = pool.run(sizes.world, run, reference.checkpoint, reference.batch, sizes)
    for loss, _, _ in answers:
        assert loss == pytest.approx(reference.loss, rel=1e-6 * ROUNDING)
    check_logits(reference, answers, sizes)
    check_gradients(reference, answers)


def check_logits(reference: Reference, answers: list[Any], sizes: Layout) -> None:
    last_stage = answers[-sizes.tp :]
    for number, expected in enumerate(reference.logits):
        parts = [logits[number] for _, logits, _ in last_stage]
        logits = torch.cat(parts, dim=-1)[:, : expected.shape[1], : expected.shape[2]]
        # fp32 rounds to 6e-8; four layers of sums in another order were seen to stay within 2e-6.
        allowed = 1e-5 * ROUNDING
        torch.testing.assert_close(logits, expected, rtol=0, atol=allowed * float(expected.abs().max()))


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
