"""Images cut into tiles: tokens equal transformers' processor's, pixels its image processor's."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megatron_vlm.architecture.connectors.anyres import UNCUT
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.batch import collate
from megatron_vlm.data.processing import Processing, load_processing
from megatron_vlm.data.templates import SampleError
from tests.data.tiny_data import asked, jpeg
from tests.media import image_sizes
from tests.media import pixels as pixels_of
from tests.tiny import SIZES, save_llava

PICTURES = [jpeg(i, width, height) for i, (height, width) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiles")
    for kind in ("llava", "llava_next", "llava_onevision"):
        save_llava(root / kind, tie_word_embeddings=False, kind=kind)
    return {folder.name: folder for folder in root.iterdir()}


def processing(folder: Path) -> Processing:
    return load_processing(str(folder), ModelConfig.from_hf_dir(str(folder)), seq_length=1024)


def finished(made: Processing, tiles: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (made.images.mean, made.images.std))
    return (tiles * made.images.rescale - mean) / std


@pytest.mark.parametrize("pictures", [PICTURES[:1], PICTURES[1:2], PICTURES[3:7], PICTURES[2:5], []])
def test_a_sample_equals_transformers_processor(folders: dict[str, Path], pictures: list[bytes]) -> None:
    """Of LLaVA-1.6: several images in one conversation, each with its own number of tiles and tokens."""
    made = processing(folders["llava_next"])
    processor = transformers.AutoProcessor.from_pretrained(folders["llava_next"], backend="pil")
    sample = made.encode("key", asked("What is this?", "A cat."), {"image": pictures})
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [Image.open(io.BytesIO(data)) for data in pictures]
    expected = processor(text=text, images=images or None, return_tensors="pt")
    prompt = expected["input_ids"][0].tolist()
    assert sample.input_ids[: len(prompt)] == prompt
    if not pictures:
        assert sample.media == {}
        return
    assert image_sizes(sample) == [tuple(size) for size in expected["image_sizes"].tolist()]
    at, counts = 0, [made.model.tiling(size).tiles for size in image_sizes(sample)]
    for pixels, count in zip(expected["pixel_values"], counts, strict=True):
        # A uint8 level is 1e-2 at least; what is left is rounding.
        own = finished(made, pixels_of(sample)[at : at + count])
        torch.testing.assert_close(own, pixels[:count], rtol=0, atol=2e-6)
        assert not pixels[count:].any()  # it fills images up to the most tiles
        at += count
    assert at == len(pixels_of(sample))
    microbatch = collate([sample, sample], made.pad_token_id)
    assert len(pixels_of(microbatch)) == 2 * at and image_sizes(microbatch) == 2 * image_sizes(sample)


@pytest.mark.parametrize("count", [1, 3])
def test_onevision_cuts_an_image_that_is_alone(folders: dict[str, Path], count: int) -> None:
    made = processing(folders["llava_onevision"])
    processor = AutoImageProcessor.from_pretrained(folders["llava_onevision"], backend="pil")
    for start in range(len(PICTURES) - count + 1):
        pictures = PICTURES[start : start + count]
        sample = made.encode("key", asked("What is this?", "A cat."), {"image": pictures})
        images = [Image.open(io.BytesIO(data)) for data in pictures]
        expected = processor([images] if count > 1 else images, return_tensors="pt")
        sizes = [tuple(size) for size in expected["image_sizes"].tolist()]
        assert image_sizes(sample) == (sizes if count == 1 else [UNCUT] * count)
        pixels = expected["pixel_values"].flatten(0, 1)
        torch.testing.assert_close(finished(made, pixels_of(sample)), pixels, rtol=0, atol=2e-6)
        tokens = [made.model.count_tokens(size) for size in image_sizes(sample)]
        assert sample.input_ids.count(made.image_token_id) == sum(tokens)


def expand2square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """LLaVA's own, of llava/mm_utils.py."""
    side = max(image.size)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize("name", ["square", "pad"])
@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_the_images_of_a_dataset_as_llava_makes_them(folders: dict[str, Path], kind: str, name: str) -> None:
    """``process_images`` of llava/mm_utils.py: each is one tile, by the processor of the tower alone."""
    made = processing(folders[kind]).varied(image_aspect_ratio=name)
    given = made.images.processor
    if kind == "llava_onevision":  # SigLIP's
        tower: Any = SiglipImageProcessorPil(size={"height": 20, "width": 20}, resample=given.resample)
    else:
        tower = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})
    tower.image_mean, tower.image_std = given.image_mean, given.image_std
    colour = tuple(int(value * 255) for value in given.image_mean)
    for pictures in (PICTURES[:1], PICTURES[3:4], PICTURES[3:6]):
        sample = made.encode("key", asked("What is this?", "A cat."), {"image": pictures})
        images = [Image.open(io.BytesIO(data)) for data in pictures]
        fed = [expand2square(image, colour) if name == "pad" else image for image in images]
        expected = torch.cat([tower(image, return_tensors="pt")["pixel_values"] for image in fed])
        torch.testing.assert_close(finished(made, pixels_of(sample)), expected, rtol=0, atol=2e-6)
        assert image_sizes(sample) == [UNCUT] * len(pictures)
        tokens = len(pictures) * made.model.count_tokens(UNCUT)
        assert sample.input_ids.count(made.image_token_id) == tokens


def test_tiles_are_the_models_affair(folders: dict[str, Path]) -> None:
    made = processing(folders["llava_next"])
    assert made.varied(image_aspect_ratio="anyres").images is made.images
    with pytest.raises(
        ValueError, match="image_aspect_ratio anyres: the model cuts no images into tiles; write"
    ):
        processing(folders["llava"]).varied(image_aspect_ratio="anyres")


def test_what_is_no_picture(folders: dict[str, Path]) -> None:
    made = processing(folders["llava_next"])
    for data in (b"not a picture", PICTURES[0][:-200]):
        with pytest.raises(SampleError, match="its image") as error:
            made.encode("key", asked("What?", "A cat."), {"image": [PICTURES[1], data]})
        assert error.value.kind == "corrupt"


def test_a_picture_of_one_pixel_and_a_line(folders: dict[str, Path]) -> None:
    for kind in ("llava_next", "llava_onevision"):
        made = processing(folders[kind])
        for height, width in ((1, 1), (1, 400), (400, 1)):
            buffer = io.BytesIO()
            Image.fromarray(np.full((height, width, 3), 99, np.uint8)).save(buffer, "PNG")
            sample = made.encode("key", asked("What?", "A cat."), {"image": [buffer.getvalue()]})
            assert len(pixels_of(sample)) == made.model.tiling((height, width)).tiles, kind


def test_a_processor_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Pinpoints that differ would cut other tiles than the model's index expects."""
    next_folder, one = folders["llava_next"], folders["llava_onevision"]
    shutil.copytree(next_folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace("60", "80"))
    with pytest.raises(ValueError, match=r"image_grid_pinpoints are not those of the model.s config\.json"):
        processing(tmp_path / "model")
    model = ModelConfig.from_hf_dir(str(one))
    with pytest.raises(ValueError, match=r"makes uint8 images of \(2, [35], 3, 20, 20\)"):
        load_processing(str(one), model, seq_length=1024, image_processor_dir=str(next_folder))
    plain = tmp_path / "plain"
    save_llava(plain, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="image_grid_pinpoints are not those"):
        load_processing(
            str(next_folder),
            ModelConfig.from_hf_dir(str(next_folder)),
            seq_length=1024,
            image_processor_dir=str(plain),
        )
    with pytest.raises(ValueError, match=r"images of \(5, 3, 20, 20\), the vision tower takes uint8 \(3, 20"):
        load_processing(
            str(plain),
            ModelConfig.from_hf_dir(str(plain)),
            seq_length=1024,
            image_processor_dir=str(next_folder),
        )
