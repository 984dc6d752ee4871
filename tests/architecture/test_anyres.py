"""Tiles and tokens of an image are those of transformers, whatever the image's size."""

from __future__ import annotations

import random

import pytest
import transformers
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from megatron_vlm.architecture.connectors.anyres import UNCUT, Size, best_resolution
from megatron_vlm.architecture.model import ModelConfig
from tests.data.tiny_data import llama_tokenizer

TEXT = {"vocab_size": 152000}


def hub_model(kind: str) -> tuple[ModelConfig, transformers.ProcessorMixin]:
    """The architecture of llava-v1.6-vicuna-7b or of llava-onevision-qwen2-7b-ov, and its processor."""
    model = ModelConfig.from_hf({"model_type": kind, "text_config": {"model_type": "qwen2", **TEXT}})
    side = {"height": model.vision.image_size, "width": model.vision.image_size}
    if kind == "llava_next":
        images = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=side)
        processor = transformers.LlavaNextProcessor(
            images, llama_tokenizer(), 14, "default", num_additional_image_tokens=1
        )
    else:
        # Its constructor asks for torchvision, for videos.
        processor = object.__new__(transformers.LlavaOnevisionProcessor)
        processor.image_processor = LlavaOnevisionImageProcessorPil(size=side)
        processor.num_image_tokens, processor.image_token = 729, "<image>"
        processor.vision_feature_select_strategy = "full"
        processor.vision_aspect_ratio = "anyres_max_9"
    return model, processor


def sizes(count: int, seed: int) -> list[Size]:
    """Return sizes of every shape, most of them as photographs have them; and those where resolutions tie."""
    rng = random.Random(seed)
    drawn = [(int(2 ** rng.uniform(4, 12)), int(2 ** rng.uniform(4, 12))) for _ in range(count)]
    common = [
        (480, 640),
        (1080, 1920),
        (336, 336),
        (672, 672),
        (384, 384),
        (768, 768),
        (1, 1),
        (2000, 20),
        (1, 3000),
    ]
    squares = [(side, side) for side in range(300, 2400, 97)]
    return [*drawn, *common, *squares]


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_tiles_and_tokens_equal_transformers(kind: str) -> None:
    model, processor = hub_model(kind)
    assert model.anyres is not None
    pinpoints = [list(size) for size in model.anyres.grid_pinpoints]
    assert pinpoints == processor.image_processor.image_grid_pinpoints
    side, fewest, most = model.vision.image_size, 10**9, 0
    for size in sizes(400, seed=1):
        assert best_resolution(size, model.anyres.grid_pinpoints) == select_best_resolution(size, pinpoints)
        tiling = model.tiling(size)
        assert tiling.tiles == image_size_to_num_patches(size, pinpoints, side) <= model.image_tiles
        expected = processor._get_number_of_features(*size, side, side) - (kind == "llava_next")
        assert tiling.tokens == model.count_tokens(size) == expected, size
        fewest, most = min(fewest, expected), max(most, expected)
    assert model.min_image_tokens <= fewest and most <= model.image_tokens
    # The bound is near what these images come to.
    assert most >= 0.9 * model.image_tokens and model.image_tokens in (2928, 8829)


def test_of_resolutions_that_tie_the_first_is_taken() -> None:
    """LLaVA's own code reads the same list as (width, height), and so takes the other one."""
    model, _ = hub_model("llava_next")
    assert model.anyres is not None
    assert best_resolution((200, 200), model.anyres.grid_pinpoints) == (336, 672)
    assert select_best_resolution((200, 200), [list(s) for s in model.anyres.grid_pinpoints]) == (336, 672)


def test_several_images_of_onevision_are_a_tile_each() -> None:
    model, processor = hub_model("llava_onevision")
    pixels = {"pixel_values": None, "batch_num_images": [2], "image_sizes": [(480, 640), (50, 60)]}
    assert processor.replace_image_token(pixels, 1) == "<image>" * model.count_tokens(UNCUT)
    assert model.tiling(UNCUT).tiles == 1


REFUSED = [
    (
        {"image_grid_pinpoints": [[336, 600]]},
        r"image_grid_pinpoints is \[\[336, 600\]\]; supported",
    ),
    ({"image_grid_pinpoints": [[336, 672, 1]]}, "multiples of the 336 pixels of a tile"),
    ({"image_grid_pinpoints": []}, "multiples of the 336 pixels of a tile"),
    (
        {"vision_feature_select_strategy": "full"},
        "only with 'default' do the features of a clip",
    ),
    ({"model_type": "llava_onevision", "vision_aspect_ratio": "pad"}, "is 'pad'; supported: 'anyres_max_9'"),
    (
        {"model_type": "llava_onevision", "vision_feature_select_strategy": "default"},
        "only with 'full' do the features of a siglip tower's tiles",
    ),
    (
        {"model_type": "llava_next_video"},
        "is 'llava_next_video'; supported: 'llava', 'llava_next'",
    ),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_what_cannot_be_cut_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({"model_type": "llava_next", "text_config": TEXT, **change})


def test_described_and_read_back() -> None:
    for kind in ("llava", "llava_next", "llava_onevision"):
        model = ModelConfig.from_hf({"model_type": kind, "text_config": TEXT})
        described = model.to_dict()
        assert ModelConfig.from_dict(described) == ModelConfig.from_dict(described) == model
    without = model.to_dict()
    del without["anyres"]  # as earlier releases describe a model
    assert ModelConfig.from_dict(without).anyres is None
