"""Pixels equal those of transformers' own image processors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megatron_vlm.data.images import ImageTransform
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
def test_pixels_equal_transformers(name: str, tmp_path: Path) -> None:
    processor = PROCESSORS[name]
    processor.save_pretrained(tmp_path)
    transform = ImageTransform.from_dir(str(tmp_path), image_size=28, num_channels=3)
    mean, std = (torch.tensor(values)[:, None, None] for values in (transform.mean, transform.std))
    for data in pictures():
        (pixels,) = transform.tiles(transform.open([data]))
        assert pixels.dtype == torch.uint8 and tuple(pixels.shape) == transform.shape == (3, 28, 28)
        expected = processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"][0]
        finished = (pixels * transform.rescale - mean) / std
        # One uint8 level is at least 1e-2 where there is normalisation; what is left is rounding.
        torch.testing.assert_close(finished, expected.float(), rtol=0, atol=2e-6)


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


def test_folder_without_processor_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image processor that can be loaded"):
        ImageTransform.from_dir(str(tmp_path), image_size=28, num_channels=3)
