"""Every family, at every layout, generates the tokens that transformers generates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.config.generation import SamplingSection
from megatron_vlm.hf.convert import import_hf
from megatron_vlm.inference.generator import Prompt
from tests.distributed import Pool
from tests.media import image_media
from tests.models.test_parity import image_sizes
from tests.tiny import FAMILIES, save_tiny_llava, transformers_inputs
from tests.workers import Layout, generate

LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)]
TOKENS = 12
GREEDY = SamplingSection(max_new_tokens=TOKENS)
PENALTY = SamplingSection(max_new_tokens=TOKENS, repetition_penalty=1.3)
SAMPLED = SamplingSection(max_new_tokens=TOKENS, temperature=1.5, top_k=50, top_p=0.95, seed=5)


def make_prompts(model: ModelConfig, images: list[int]) -> list[Prompt]:
    """Prompts of different lengths, with so many images each."""
    generator = torch.Generator().manual_seed(1)
    size = model.vision.image_size
    prompts = []
    for number, count in enumerate(images):
        (sizes,) = image_sizes(model, [count], number)
        ids = torch.randint(3, 190, (4 + 3 * number,), generator=generator).tolist()
        for i, image in enumerate(sizes):
            ids[1 + i : 1 + i] = [model.image_token_id] * model.count_tokens(image)
        tiles = sum(1 if model.anyres is None else model.tiling(image).tiles for image in sizes)
        pixels = torch.randn(tiles, model.vision.num_channels, size, size, generator=generator)
        prompts.append(Prompt(number, ids, image_media(pixels, sizes, "pixel_values")))
    return prompts


def transformers_answers(
    net: transformers.PreTrainedModel, prompts: list[Prompt], sampling: SamplingSection, end_tokens: list[int]
) -> list[list[int]]:
    """Return what ``generate`` answers, up to and with the first end token."""
    answers = []
    for prompt in prompts:  # one by one: its repetition penalty counts padding
        images = prompt.media.get("image")
        pixels = torch.empty(0) if images is None else images.tensors["pixel_values"]
        sizes = torch.empty(0, 2, dtype=torch.int64) if images is None else images.sizes
        inputs = {"input_ids": torch.tensor([prompt.input_ids]), "pixel_values": pixels}
        if net.config.model_type in ("llava_next", "llava_onevision"):
            inputs["image_sizes"] = sizes
        if net.config.model_type == "llava_onevision":
            inputs["batch_num_images"] = torch.tensor([len(sizes)])
        output = net.generate(
            **transformers_inputs(inputs),
            attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.int64),
            max_new_tokens=sampling.max_new_tokens,
            repetition_penalty=sampling.repetition_penalty,
            do_sample=False,
            eos_token_id=end_tokens or None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt.input_ids) :].tolist())
    return answers


class Reference:
    """A tiny model's prompts, its answers by transformers, and its converted checkpoint."""

    def __init__(self, family: str, folder: Path) -> None:
        net = save_tiny_llava(folder / "hf", family)
        net.generation_config.eos_token_id = None
        import_hf(folder / "hf", folder / "megatron", tp=2, pp=1)
        self.checkpoint = str(folder / "megatron" / "release")
        model = ModelConfig.from_hf_dir(str(folder / "hf"))
        self.mixed = make_prompts(model, [1, 0, 2, 0])
        self.text_only = make_prompts(model, [0, 0])
        greedy = transformers_answers(net, self.mixed, GREEDY, [])
        assert len({token for answer in greedy for token in answer}) > 4  # so that a mix-up would show
        end_tokens = [greedy[0][5], greedy[2][3]]
        self.calls = [(GREEDY, []), (GREEDY, end_tokens), (PENALTY, [])]
        self.expected = [greedy] + [transformers_answers(net, self.mixed, *call) for call in self.calls[1:]]
        self.expected_text_only = transformers_answers(net, self.text_only, GREEDY, [])
        self.sampled: list[list[int]] | None = None


@pytest.fixture(scope="module", params=list(FAMILIES))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_equals_transformers(reference: Reference, pool: Pool, sizes: Layout) -> None:
    calls = [*reference.calls, (SAMPLED, [])]
    ranks = pool.run(sizes.world, generate, reference.checkpoint, reference.mixed, calls, sizes)
    assert all(rank == ranks[0] for rank in ranks)
    *greedy, sampled = ranks[0]
    assert greedy == reference.expected
    # What is drawn depends on the seed, not on the layout.
    reference.sampled = reference.sampled or sampled
    assert sampled == reference.sampled != greedy[0]


@pytest.mark.parametrize("reference", ["clip-llama"], indirect=True)
def test_text_only_batch(reference: Reference, pool: Pool) -> None:
    (answers,), _ = pool.run(
        2, generate, reference.checkpoint, reference.text_only, [(GREEDY, [])], Layout(pp=2)
    )
    assert answers == reference.expected_text_only


@pytest.mark.parametrize("reference", ["clip-llama"], indirect=True)
def test_what_is_drawn_does_not_depend_on_the_batch(reference: Reference, pool: Pool) -> None:
    calls = [(SAMPLED, [])]
    (together,) = pool.run(1, generate, reference.checkpoint, reference.mixed, calls, Layout())[0]
    (alone,) = pool.run(1, generate, reference.checkpoint, reference.mixed[2:3], calls, Layout())[0]
    assert alone == together[2:3]
