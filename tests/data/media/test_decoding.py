"""Image files are read as transformers reads them, and deep grey by its range."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import ExifTags, Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.image_rule import FIRST_RULE, LOADED, ImageRule
from megatron_vlm.data.media import decoding
from megatron_vlm.data.media.images import normalize
from megatron_vlm.data.prepare.pictures import Encoding
from megatron_vlm.data.prepare.records.values import Rejected
from megatron_vlm.data.processing import load_processing
from megatron_vlm.data.templates import SampleError
from tests.data.tiny_data import asked
from tests.media import pixels as pixels_of
from tests.tiny import save_llava

RAMP = np.linspace(0, 255, 60).astype(np.uint8)[None].repeat(34, 0)
RGB = Image.fromarray(np.stack([RAMP, RAMP[:, ::-1], np.tril(RAMP)], -1))
ALPHA = Image.fromarray(np.tril(np.full_like(RAMP, 255), 9))


def encoded(image: Image.Image, format: str, orientation: int = 1, **options: Any) -> bytes:
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def with_late_exif(orientation: int) -> bytes:
    """A PNG whose EXIF chunk stands behind its pixels, as the format allows."""
    early, plain = encoded(RGB, "PNG", orientation), encoded(RGB, "PNG")
    begin = early.index(b"eXIf") - 4
    chunk = early[begin : begin + 12 + int.from_bytes(early[begin : begin + 4], "big")]
    end = plain.index(b"IEND") - 4
    return plain[:end] + chunk + plain[end:]


def deep_rgb() -> bytes:
    """A PNG with 16 bits a channel, which PIL can't write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    values = (np.asarray(RGB).astype(">u2") * 257 + 3).reshape(34, -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = b"".join(side.to_bytes(4, "big") for side in (60, 34)) + bytes([16, 2, 0, 0, 0])
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def transparent(mode: str) -> Image.Image:
    image = RGB.convert("RGBA")
    image.putalpha(ALPHA)
    return image.convert(mode)


PALETTE = RGB.quantize(16)
OF_TRANSFORMERS = {
    **{f"jpeg-{n}": encoded(RGB, "JPEG", n, quality=95) for n in range(1, 9)},
    **{f"{kind}-6": encoded(RGB, kind, 6) for kind in ("PNG", "WEBP", "TIFF")},
    "late-png-8": with_late_exif(8),
    "late-png-3": with_late_exif(3),
    "rgba": encoded(transparent("RGBA"), "PNG"),
    "rgba-5": encoded(transparent("RGBA"), "WEBP", 5, lossless=True),
    "la": encoded(transparent("LA"), "PNG"),
    "palette": encoded(PALETTE, "PNG"),
    "palette-index": encoded(PALETTE, "PNG", transparency=3),
    "palette-bytes": encoded(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))),
    "colour-key": encoded(RGB, "PNG", transparency=(0, 255, 0)),
    "grey-key": encoded(RGB.convert("L"), "PNG", transparency=80),
    "gif": encoded(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)], transparency=3),
    "apng": encoded(RGB, "PNG", save_all=True, append_images=[RGB.rotate(180)]),
    "webp": encoded(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(180)]),
    "mpo-6": encoded(RGB, "MPO", 6, save_all=True, append_images=[RGB.rotate(180)]),
    "cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "one-bit": encoded(RGB.convert("1"), "PNG"),
    "ycbcr": encoded(RGB.convert("YCbCr"), "TIFF"),
    "deep-rgb": deep_rgb(),
    "deep-but-8-bit": encoded(Image.fromarray(RAMP.astype(np.uint16)), "PNG"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decoding")
    for kind in ("llava", "llava_next"):
        save_llava(root / kind, tie_word_embeddings=False, kind=kind)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_pixels_equal_those_that_transformers_loads(name: str, tmp_path: Path) -> None:
    data = OF_TRANSFORMERS[name]
    (tmp_path / name).write_bytes(data)
    expected = load_image(str(tmp_path / name))
    opened = Image.open(io.BytesIO(data))
    assert decoding.size(opened, LOADED) == (expected.height, expected.width)
    made = decoding.rgb(opened, LOADED)
    assert made.mode == "RGB"
    assert np.array_equal(np.asarray(made), np.asarray(expected))
    assert made.info.get("transparency") == expected.info.get("transparency")
    # As images were read before there was a rule: by PIL alone, and on white.
    opened = Image.open(io.BytesIO(data))
    if not opened.mode.startswith("I"):
        before = convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
        assert decoding.size(opened, FIRST_RULE) == before.shape[:2]
        assert np.array_equal(np.asarray(decoding.rgb(opened, FIRST_RULE)), before)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_a_sample_equals_transformers_processor_with_a_path(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Pixels, and of images that are cut also how many tokens stand for them."""
    folder = folders[kind]
    made = load_processing(str(folder), ModelConfig.from_hf_dir(str(folder)), seq_length=1024)
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    for name, data in OF_TRANSFORMERS.items():
        (tmp_path / name).write_bytes(data)
        content = [{"type": "image", "path": str(tmp_path / name)}, {"type": "text", "text": "What is this?"}]
        expected = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        sample = made.encode("key", asked("What is this?", "A cat."), {"image": [data]})
        prompt = expected["input_ids"][0].tolist()
        assert sample.input_ids[: len(prompt)] == prompt, name
        pixels = normalize(pixels_of(sample), made.images, torch.float32)
        torch.testing.assert_close(pixels, expected["pixel_values"].view_as(pixels), rtol=0, atol=1e-5)


def test_broken_exif_data_turn_nothing() -> None:
    """They would end an application of transformers; photo viewers show the picture."""
    data, plain = (encoded(RGB, "JPEG", **{"exif": b"Exif\0\0MM\0*"} | more) for more in ({}, {"exif": b""}))
    opened = Image.open(io.BytesIO(data))
    assert decoding.size(opened, LOADED) == (34, 60)
    expected = Image.open(io.BytesIO(plain))
    assert np.array_equal(np.asarray(decoding.rgb(opened, LOADED)), np.asarray(expected))


DEEP = RAMP.astype(np.uint16) * 257
PGM = b"P5 60 34 65535\n" + DEEP.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(DEEP), "PNG"),
        encoded(Image.fromarray(DEEP), "TIFF"),
        encoded(Image.fromarray(DEEP.astype(">u2")), "TIFF"),
        encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        encoded(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        PGM,
    ],
    ids=["png", "tiff", "big-endian", "int32", "int32-8-bit", "float-1", "float-255", "pgm"],
)
@pytest.mark.parametrize("rule", [LOADED, FIRST_RULE], ids=str)
def test_deep_grey_is_scaled_by_its_range(data: bytes, rule: ImageRule) -> None:
    made = np.asarray(decoding.rgb(Image.open(io.BytesIO(data)), rule))
    assert np.array_equal(made, RAMP[..., None].repeat(3, -1))
    assert Encoding()(data).data == data
    smaller = np.asarray(Image.open(io.BytesIO(Encoding(max_side=30)(data).data)).convert("L")).astype(int)
    assert np.abs(smaller - RAMP[:17, ::2]).max() < 8  # the same ramp


@pytest.mark.parametrize(
    "values, reason",
    [
        (RAMP.astype(np.int32) * 1000, "from 0 to 255000, and can be read from 0 to 255 or 0 to 65535"),
        (RAMP.astype(np.int32) - 7, "from -7 to 248"),
        (RAMP.astype(np.float32) * 10, "from 0 to 2550, and can be read from 0 to 1 or 0 to 255"),
        (np.where(RAMP > 9, np.nan, RAMP).astype(np.float32), "from nan to nan"),
        (RAMP.astype(np.uint16) % 3 + 300, "from 300 to 302, which is a single shade in 8 bits"),
        ((RAMP / 255e3).astype(np.float32), "which is a single shade in 8 bits"),
    ],
)
def test_grey_of_another_range_is_left_out(values: np.ndarray, reason: str) -> None:
    data = encoded(Image.fromarray(values), "TIFF")
    with pytest.raises(SampleError, match=reason) as error:
        decoding.rgb(Image.open(io.BytesIO(data)), LOADED)
    assert error.value.kind == "corrupt"
    with pytest.raises(Rejected, match=reason):
        Encoding()(data)


@pytest.mark.parametrize("target", ["jpg", "png", "webp"])
def test_what_prepare_encodes_keeps_its_orientation(target: str) -> None:
    """In the file, so that a run may still be told to take pixels as they lie."""
    data = encoded(RGB, "JPEG", 6, quality=100)
    made = Image.open(io.BytesIO(Encoding(max_side=30, format=target, quality=95)(data).data))
    expected = RGB.transpose(Image.Transpose.ROTATE_270).resize((17, 30), Image.Resampling.LANCZOS)
    turned = np.asarray(decoding.rgb(made, LOADED)).astype(int)
    assert np.abs(turned - np.asarray(expected)).mean() < 8
    assert decoding.size(made, FIRST_RULE) == (17, 30)


def test_prepare_keeps_the_alpha_of_grey() -> None:
    data = Encoding(format="webp", quality=100)(encoded(transparent("LA"), "PNG")).data
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data)).getchannel("A")), np.asarray(ALPHA))


@pytest.mark.parametrize("target", ["png", "webp"])
def test_what_prepare_encodes_keeps_colours_behind_alpha(target: str) -> None:
    """A run sees them, as transformers does."""
    data = encoded(transparent("RGBA"), "PNG")
    for max_side, expected in ((None, RGB), (30, RGB.resize((30, 17), Image.Resampling.LANCZOS))):
        made = Encoding(max_side=max_side, format=target, quality=100)(data).data
        seen = np.asarray(decoding.rgb(Image.open(io.BytesIO(made)), LOADED)).astype(int)
        assert np.abs(seen - np.asarray(expected)).mean() < 8
        assert Image.open(io.BytesIO(made)).mode == "RGBA"
