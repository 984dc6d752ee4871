"""Opened image files to pixels: three channels of 8 bits, upright."""

from __future__ import annotations

from typing import IO, Any, Optional, cast

import numpy as np
from PIL import ExifTags, Image

from megatron_vlm.architecture.connectors.anyres import Size
from megatron_vlm.artifacts.image_rule import ImageRule
from megatron_vlm.data.templates import SampleError

PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # all pictures of these can be used
_TURNS = {  # of EXIF's orientations; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


def rgb(image: Image.Image, rule: ImageRule) -> Image.Image:
    """Decode an image, in mode ``RGB``. Of an animation it is the first frame.

    With the default rule pixels are those of ``transformers.image_utils.load_image``, but for grey of more
    than 8 bits, which that one clips at 255.

    Raises:
        SampleError: its grey values fit no range that is known; of kind ``corrupt``.
        Exception: whatever PIL's decoders raise.
    """
    image.load()
    deep = image.mode.startswith(("I", "F"))
    pixels = _eight_bits(image) if deep else image
    transparent = pixels.mode.endswith("A") or pixels.info.get("transparency") is not None
    if rule.alpha == "white" and transparent:
        pixels = pixels.convert("RGBA")
        pixels = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
    if pixels.mode != "RGB":
        pixels = pixels.convert("RGB")
    turn = _TURNS.get(orientation(image)) if rule.orientation == "exif" else None
    return pixels if turn is None else pixels.transpose(turn)


def size(image: Image.Image, rule: ImageRule) -> Size:
    """Return height and width of the picture that :func:`rgb` makes of an image, from the file's headers."""
    on_its_side = rule.orientation == "exif" and orientation(image) >= 5
    return (image.width, image.height) if on_its_side else (image.height, image.width)


def orientation(image: Image.Image) -> int:
    """Return the orientation of an image, 1 to 8, by EXIF or XMP; 1 where they say nothing or are broken.

    Always 1 of a TIFF, which PIL turns itself.
    """
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and _has_late_metadata(image):
        image.load()
    try:
        found: Any = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # a PNG's own would decode it
    except Exception:  # as of decoders, there is no list of them
        return 1
    return found if found in _TURNS else 1


def _has_late_metadata(image: Image.Image) -> bool:
    """Return whether a PNG, not decoded yet, has metadata behind its pixels, which PIL reads along with
    them."""
    file = cast(Optional[IO[bytes]], getattr(image, "fp", None))
    if file is None or "exif" in image.info:
        return False
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)
    behind = data[data.rfind(b"IDAT") :]
    return any(name in behind for name in _PNG_METADATA)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Reduce grey of more than 8 bits to 8, by the range of its values: whole numbers up to 255 as they are,
    up to 65535 without their lower 8 bits; floating-point numbers up to 1 times 255, up to 255 as they are.

    Raises:
        SampleError: they are in none of these ranges, or all become one shade.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    floating = values.dtype.kind == "f"
    most = 255 if floating else 65535
    shades = f"its grey values are from {low:g} to {high:g}"
    if not 0 <= low <= high <= most:  # nor with NaN among them
        known = "0 to 1 or 0 to 255" if floating else "0 to 255 or 0 to 65535"
        raise SampleError(f"{shades}, and can be read from {known}", kind="corrupt")
    if floating:
        scaled = np.rint(values * 255 if high <= 1 else values)
    else:
        scaled = values >> 8 if high > 255 else values
    if low != high and scaled.min() == scaled.max():
        raise SampleError(f"{shades}, which is a single shade in 8 bits", kind="corrupt")
    return Image.fromarray(scaled.astype(np.uint8))
