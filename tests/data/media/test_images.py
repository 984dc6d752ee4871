"""Pixels equal those of transformers' own image processors."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megatron_vlm.artifacts.image_rule import FIRST_RULE, LOADED, ImageRule
from megatron_vlm.data.media.images import ImageTransform, Steps
from megatron_vlm.data.templates import SampleError
from tests.data.tiny_data import jpeg

_CROPPED: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
PROCESSORS = {
    "clip": CLIPImageProcessorPil(**_CROPPED),
    "siglip": SiglipImageProcessorPil(size={"height": 28, "width": 28}),
    "llava-padded": LlavaImageProcessorPil(**_CROPPED, do_pad=True),
    "crop larger than the picture": CLIPImageProcessorPil(do_resize=False, crop_size=_CROPPED["crop_size"]),
    "no normalisation": CLIPImageProcessorPil(**_CROPPED, do_normalize=False, do_rescale=False, resample=2),
}


def encode(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (37, 61, 3), dtype=np.uint8))
    return [
        jpeg(0),
        jpeg(1, 23, 90),
        encode(rgb, "PNG"),
        encode(rgb.convert("L"), "JPEG"),
        encode(rgb.convert("CMYK"), "JPEG"),
        encode(rgb.convert("P"), "PNG"),
        encode(rgb.convert("RGBA"), "WEBP"),
    ]


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("rule", [LOADED, FIRST_RULE], ids=str)
def test_pixels_equal_transformers(name: str, rule: ImageRule, tmp_path: Path) -> None:
    """Those of a file that it is told to load, or of an image that it is given."""
    processor = PROCESSORS[name]
    processor.save_pretrained(tmp_path)
    transform = ImageTransform.from_dir(str(tmp_path), image_size=28, num_channels=3, rule=rule)
    mean, std = (torch.tensor(values)[:, None, None] for values in (transform.mean, transform.std))
    for data in pictures():
        (pixels,) = transform.tiles(transform.open([data]))
        assert pixels.dtype == torch.uint8 and tuple(pixels.shape) == transform.shape == (3, 28, 28)
        (tmp_path / "file").write_bytes(data)
        image = Image.open(io.BytesIO(data)) if rule == FIRST_RULE else load_image(str(tmp_path / "file"))
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        finished = (pixels * transform.rescale - mean) / std
        # One uint8 level is at least 1e-2 where there is normalisation; what is left is rounding.
        torch.testing.assert_close(finished, expected.float(), rtol=0, atol=2e-6)


def pictures_at_random(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Noise and smooth ones of all sizes, in all the modes and kinds of JPEG that PIL writes."""
    for mode, format, options in [
        *(("RGB", "JPEG", {"subsampling": subsampling, "quality": 90}) for subsampling in (0, 1, 2)),
        *((mode, "JPEG", {"progressive": True}) for mode in ("L", "CMYK")),
        *((mode, "PNG", {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        ("RGB", "PNG", {"transparency": (7, 7, 7)}),
    ]:
        for grain in (1, 7, 60):
            height, width = (int(side) for side in np.exp(rng.uniform(0, np.log(400), 2)))
            noise = rng.integers(0, 256, (max(1, height // grain), max(1, width // grain), 4), dtype=np.uint8)
            noise[:1, :1, :3] = 7
            buffer = io.BytesIO()
            Image.fromarray(noise).resize((width, height)).convert(mode).save(buffer, format, **options)
            yield f"{mode} {format} {options} {height}x{width}, grain {grain}", buffer.getvalue()


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 21, "width": 20}),
        CLIPImageProcessorPil(**_CROPPED, do_convert_rgb=False),
        SiglipImageProcessorPil(size={"height": 28, "width": 33}, resample=Image.Resampling.BILINEAR),
        SiglipImageProcessorPil(size={"height": 20, "width": 33}, resample=Image.Resampling.LANCZOS),
    ],
    ids=range(4),
)
def test_quick_steps_make_the_same_pixels(processor: Any) -> None:
    """Value by value, and where the processor takes no such picture neither is taken here."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    slow = ImageTransform(processor, (3, size.height, size.width), 1.0, (0.0,) * 3, (1.0,) * 3)
    quick = replace(slow, steps=Steps.of(processor))
    assert quick.steps is not None
    for name, data in pictures_at_random(np.random.default_rng(0)):
        try:
            (expected,) = slow.tiles(slow.open([data]))
        except SampleError as error:
            with pytest.raises(SampleError, match=re.escape(str(error))):
                quick.tiles(quick.open([data]))
        else:
            assert torch.equal(quick.tiles(quick.open([data]))[0], expected), name


@pytest.mark.parametrize(
    "processor",
    [
        LlavaImageProcessorPil(**_CROPPED, do_pad=True),
        CLIPImageProcessorPil(do_resize=False, crop_size=_CROPPED["crop_size"]),
        SiglipImageProcessorPil(size={"longest_edge": 28, "shortest_edge": 20}),
    ],
    ids=range(3),
)
def test_other_steps_are_the_processors(processor: Any) -> None:
    assert Steps.of(processor) is None


def test_a_processor_that_does_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CLIPImageProcessorPil(**_CROPPED).save_pretrained(tmp_path)
    normalize = CLIPImageProcessorPil.normalize
    monkeypatch.setattr(CLIPImageProcessorPil, "normalize", lambda *a, **k: normalize(*a, **k) + 0.01)
    with pytest.raises(ValueError, match="does more than resize, crop, rescale and normalise"):
        ImageTransform.from_dir(str(tmp_path), image_size=28, num_channels=3)


def test_unreadable_pictures_are_corrupt(tmp_path: Path) -> None:
    CLIPImageProcessorPil(**_CROPPED).save_pretrained(tmp_path)
    transform = ImageTransform.from_dir(str(tmp_path), image_size=28, num_channels=3)
    whole = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "PNG")
    broken = whole[:100] + b"\0" * 400 + whole[500:]
    for data in (b"", b"not a picture", jpeg(0)[:-200], whole[:-500], broken):
        with pytest.raises(SampleError, match=r"its image (can't be decoded|is in no format)") as error:
            transform.tiles(transform.open([data]))
        assert error.value.kind == "corrupt"


@pytest.mark.parametrize("name", ["clip", "llava-padded"])
def test_a_hair_of_a_picture_takes_no_gigabytes(name: str, tmp_path: Path) -> None:
    """Of 28 x 28 x 300,000 pixels with three channels and one unused, 1 GB; padded 360 GB."""
    PROCESSORS[name].save_pretrained(tmp_path)
    transform = ImageTransform.from_dir(str(tmp_path), image_size=28, num_channels=3)
    hair = encode(Image.new("RGB", (1, 300_000)), "PNG")
    with pytest.raises(
        SampleError, match=r"its image of 1 x 300000 would have \d+ pixels, more than"
    ) as error:
        transform.tiles(transform.open([hair]))
    assert error.value.kind == "dropped"


def test_folder_without_processor_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image processor that can be loaded"):
        ImageTransform.from_dir(str(tmp_path), image_size=28, num_channels=3)
