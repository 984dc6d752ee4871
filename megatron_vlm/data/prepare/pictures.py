"""Images: looked through as the loader will, and kept byte for byte unless they are to be made smaller."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from megatron_vlm.data.prepare.values import Rejected

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
    """What is done to images.

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

        Pixels are the loader's, which ignores an EXIF orientation; so an encoded image has none.

        Raises:
            Rejected: it can't be decoded.
        """
        try:
            with Image.open(io.BytesIO(data)) as image:
                suffix = SUFFIXES.get(image.format or "", (image.format or "").lower())
                image.load()
                return self._encoded(image, data, suffix)
        except UnidentifiedImageError:
            raise Rejected("corrupt image", "in no format that PIL knows") from None
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
        pixels = image if target != "jpg" and image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
        if too_long:
            assert self.max_side is not None
            size = [max(1, round(side * self.max_side / longest)) for side in image.size]
            pixels = pixels.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        options = {} if target == "png" else {"quality": self.quality}
        pixels.save(buffer, ENCODINGS[target], **options)
        return Picture(buffer.getvalue(), target, *pixels.size)
