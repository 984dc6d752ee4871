"""Images: looked through as the loader will, and kept byte for byte unless they are to be made smaller."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from megatron_vlm.artifacts.image_rule import LOADED, ImageRule
from megatron_vlm.data.media import decoding
from megatron_vlm.data.prepare.records.values import Rejected
from megatron_vlm.data.templates import SampleError

SUFFIXES = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}
ENCODINGS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass(frozen=True)
class Picture:
    """An encoded image. ``suffix`` is its format's, whatever its file was called."""

    data: bytes
    suffix: str
    width: int
    height: int


@dataclass(frozen=True)
class Encoding:
    """The way images are stored.

    Attributes:
        max_side: pixels; a longer side is reduced to it, the other in proportion.
        format: encode every image so, of :data:`ENCODINGS`; None keeps formats.
        quality: of JPEG and WebP where they are encoded, 1 to 100.
    """

    max_side: int | None = None
    format: str | None = None
    quality: int = 92

    def __call__(self, data: bytes) -> Picture:
        """Decode an image in full, and encode it anew only where these settings ask for it.

        Of an image's EXIF data its orientation is kept, and its pixels stay as they lie: how they are turned
        is the loader's affair.

        Raises:
            Rejected: it can't be decoded.
        """
        try:
            with Image.open(io.BytesIO(data)) as image:
                suffix = SUFFIXES.get(image.format or "", (image.format or "").lower())
                image.load()
                if image.mode not in decoding.PLAIN_MODES:
                    decoding.rgb(image, LOADED)
                return self._encoded(image, data, suffix)
        except UnidentifiedImageError:
            raise Rejected("corrupt image", "in no format that PIL knows") from None
        except SampleError as error:
            raise Rejected("corrupt image", str(error)) from None
        except MemoryError:
            raise
        except Exception as error:  # PIL's decoders fail with OSError, SyntaxError, struct.error, ...
            raise Rejected("corrupt image", str(error)[:200]) from None

    def _encoded(self, image: Image.Image, data: bytes, suffix: str) -> Picture:
        longest = max(image.size)
        too_long = self.max_side is not None and longest > self.max_side
        if not too_long and self.format in (None, suffix):
            return Picture(data, suffix, *image.size)
        target = self.format or (suffix if suffix in ENCODINGS else "png")
        pixels = _pixels(image, with_alpha=target != "jpg")
        if too_long:
            assert self.max_side is not None
            width, height = (max(1, round(side * self.max_side / longest)) for side in image.size)
            pixels = _resized(pixels, (width, height))
        buffer = io.BytesIO()
        options: dict[str, Any] = {} if target == "png" else {"quality": self.quality}
        if target == "webp":
            options["exact"] = True  # keeps colours that are transparent
        orientation = decoding.orientation(image)
        if orientation != 1:
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            options["exif"] = exif
        pixels.save(buffer, ENCODINGS[target], **options)
        return Picture(buffer.getvalue(), target, *pixels.size)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image, its colours whatever its alpha: PIL's own way makes black of what is transparent, and
    the loader may be told to drop alpha."""
    if image.mode != "RGBA":
        return image.resize(size, Image.Resampling.LANCZOS)
    return Image.merge("RGBA", [band.resize(size, Image.Resampling.LANCZOS) for band in image.split()])


def _pixels(image: Image.Image, with_alpha: bool) -> Image.Image:
    """Return an image in a mode that can be encoded, its pixels where they lie."""
    if with_alpha and image.mode in ("L", "RGB", "RGBA"):
        return image
    if with_alpha and image.mode in ("LA", "PA"):
        return image.convert("RGBA")
    return decoding.rgb(image, ImageRule("stored", "drop"))
