"""Images as the model folder's own Hugging Face image processor makes them, short of normalisation."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from megatron_vlm.architecture.connectors.anyres import NO_TILES, UNCUT, AnyRes, Size, best_resolution
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.image_rule import LOADED, ImageRule
from megatron_vlm.data.media import decoding
from megatron_vlm.data.media.base import ItemSize, MediaReader, ReaderSettings
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.data.templates import SampleError

_PLAIN = ("CLIPImageProcessorPil", "SiglipImageProcessorPil", "LlavaImageProcessorPil")
MOST_PIXELS = 178_956_970  # of an image on its way, as of one that PIL opens: twice its MAX_IMAGE_PIXELS
# What a processor does to an image before it is cut into tiles, or that isn't.
_TILE_SETTINGS = (
    *("do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)


@dataclass(frozen=True)
class Steps:
    """The steps of CLIP's and SigLIP's image processors, and of LLaVA's where it doesn't pad.

    An image is resized and, maybe, its middle cut out. PIL does it here as there, but without the ways
    from PIL to numpy and back.

    Attributes:
        shortest_edge: that images are resized to, or
        size: height and width.
        resample: one of PIL's filters.
        crop: height and width of the middle; None: nothing is cut.
    """

    shortest_edge: Optional[int]
    size: Optional[Size]
    resample: int
    crop: Optional[Size]

    @classmethod
    def of(cls, processor: Any) -> Optional[Steps]:
        """Return the steps of a processor; None where it takes others."""
        given = {name for name, value in dict(processor.size).items() if value}
        known = type(processor).__name__ in _PLAIN and processor.do_resize and not processor.do_pad
        if not known or given not in ({"shortest_edge"}, {"height", "width"}):
            return None
        size, crop = processor.size, processor.crop_size
        return cls(
            size.shortest_edge,
            (size.height, size.width) if size.height else None,
            int(processor.resample),
            (crop.height, crop.width) if processor.do_center_crop else None,
        )

    def apply(self, image: Image.Image) -> Optional[Tensor]:
        """Return uint8 ``[3, H, W]`` of an RGB image; None of one that takes other steps."""
        if image.info.get("transparency") is not None:  # a colour, which the processor makes white
            return None
        if self.shortest_edge is not None:
            short, long = sorted((image.height, image.width))
            longer = int(self.shortest_edge * long / short)
            upright = image.height > image.width
            size = (longer, self.shortest_edge) if upright else (self.shortest_edge, longer)
        else:
            assert self.size is not None
            size = self.size
        height, width = self.crop or size
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        if top < 0 or left < 0:  # then there is something to fill up
            return None
        pixels = np.asarray(image.resize(size[::-1], self.resample))[top : top + height, left : left + width]
        return _tensor(pixels.transpose(2, 0, 1))


@dataclass(frozen=True)
class ImageTransform:
    """The way from image bytes to uint8 pixels, and the constants that finish the job on the device.

    ``(pixels * rescale - mean) / std`` equals the processor's ``pixel_values``, at a quarter of the bytes.

    Attributes:
        processor: a transformers image processor of the PIL backend.
        shape: ``(c, H, W)`` of every tile.
        rescale: factor from uint8 to the processor's range, usually 1/255.
        mean, std: one per channel, after rescaling.
        anyres: how images are cut into tiles; None: each is one tile.
        steps: what the processor does, where that is known: a shorter way to the same pixels.
        rule: how image files are read before.
    """

    processor: Any
    shape: Tuple[int, int, int]
    rescale: float
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    anyres: Optional[AnyRes] = None
    steps: Optional[Steps] = None
    rule: ImageRule = LOADED

    @classmethod
    def from_dir(
        cls,
        directory: str,
        image_size: int,
        num_channels: int,
        anyres: AnyRes | None = None,
        rule: ImageRule = LOADED,
    ) -> ImageTransform:
        """Read the image processor of a Hugging Face folder.

        Args:
            directory: holds ``preprocessor_config.json`` or ``processor_config.json``.
            image_size, num_channels: what the vision tower takes.
            anyres: how the model has images cut.
            rule: how image files are read.

        Raises:
            ValueError: there is no usable processor, or its images are not what the model takes.
        """
        from transformers import AutoImageProcessor

        try:
            # Never the torchvision backend, which resizes a little differently, wherever it is installed.
            processor = AutoImageProcessor.from_pretrained(
                directory, backend="pil", local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{directory}: no image processor that can be loaded ({reason})") from None
        transform = cls(
            processor=processor,
            shape=(num_channels, image_size, image_size),
            rescale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
            mean=_per_channel(processor.image_mean if processor.do_normalize else 0.0, num_channels),
            std=_per_channel(processor.image_std if processor.do_normalize else 1.0, num_channels),
            anyres=anyres,
            steps=Steps.of(processor) if anyres is None else None,
            rule=rule,
        )
        transform._check(directory)
        return transform

    def with_aspect_ratio(self, name: str) -> ImageTransform:
        """Return the transform that cuts images into tiles, or not, as LLaVA's ``image_aspect_ratio`` says.

        Args:
            name: ``square``, one tile, resized and cropped as the tower's processor does; ``pad``, one tile,
                padded to a square with the mean colour before; ``anyres``, as the model has images cut.

        Raises:
            ValueError: the model doesn't have images cut.
        """
        if name == "anyres":
            if self.anyres is None:
                raise ValueError(NO_TILES)
            return self
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        settings = {setting: getattr(self.processor, setting) for setting in _TILE_SETTINGS}
        processor = LlavaImageProcessorPil(**settings, do_pad=name == "pad")
        transform = replace(self, processor=processor, anyres=None, steps=Steps.of(processor))
        transform._check(f"image_aspect_ratio {name}")
        return transform

    def open(self, images: Sequence[bytes | Path]) -> List[Image.Image]:
        """Read the headers of a sample's images.

        Args:
            images: encoded, in any format that PIL reads; or files.

        Raises:
            SampleError: one is in no such format; of kind ``corrupt``.
        """
        with _decoding():
            return [Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) for data in images]

    def sizes(self, images: Sequence[Image.Image]) -> List[Size]:
        """Return the size that tells how each image of a sample is cut: its height and width, or
        ``UNCUT``."""
        if self.anyres is None or (self.anyres.several_uncut and len(images) > 1):
            return [UNCUT] * len(images)
        return [self.size(image) for image in images]

    def size(self, image: Image.Image) -> Size:
        """Return height and width of an opened image, once it is turned as the rule says."""
        return decoding.size(image, self.rule)

    def tiles(self, images: Sequence[Image.Image]) -> List[Tensor]:
        """Decode, resize, crop and cut the images of a sample.

        Returns:
            The tiles of all of them, image by image, uint8 ``[c, H, W]`` each.

        Raises:
            SampleError: one can't be decoded, of kind ``corrupt``; or is too narrow to be made as wide as the
                tower takes it.
        """
        if self.anyres is None:
            self._check_growth(images)
        with _decoding():
            decoded = (decoding.rgb(image, self.rule) for image in images)  # one after the other
            if self.anyres is None:
                return [self._tile(image) for image in decoded]
            if self.anyres.several_uncut and len(images) > 1:
                tiles = [pixels[0] for pixels in self._several(list(decoded))]
            else:
                tiles = [tile for image in decoded for tile in self._pixels(image)]
        return [_tensor(tile) for tile in tiles]

    def _check_growth(self, images: Sequence[Image.Image]) -> None:
        """Check that a process can hold what becomes of images before they are cropped, or once they are
        padded. 1 x 2,000 pixels whose shorter side is made 336 are 226 million."""
        edge = self.processor.size.shortest_edge if self.processor.do_resize else None
        for image in images:
            short, long = sorted(image.size)
            padded = getattr(self.processor, "do_pad", False)
            pixels = long * long if padded else edge * edge * long // short if edge else 0
            if pixels > MOST_PIXELS:
                raise SampleError(
                    f"its image of {image.width} x {image.height} would have {pixels} pixels, more than "
                    f"{MOST_PIXELS}, on the way to the tower's size"
                )

    def _tile(self, image: Image.Image) -> Tensor:
        """Return uint8 ``[c, H, W]``, of an image that isn't cut."""
        tile = self.steps.apply(image) if self.steps is not None else None
        return tile if tile is not None else _tensor(self._pixels(image))

    def _pixels(self, image: Image.Image) -> np.ndarray:
        """Return uint8 ``[c, H, W]``, or ``[tiles, c, H, W]`` of an image that is cut."""
        output = self.processor(image, do_rescale=False, do_normalize=False)
        return np.asarray(output["pixel_values"][0])

    def _several(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return uint8 ``[images, 1, c, H, W]``, of a sample with several images that aren't cut."""
        return np.stack(self.processor([images], do_rescale=False, do_normalize=False)["pixel_values"])

    def _check(self, directory: str) -> None:
        """Process one image both ways: an unusual processor must not train on other pixels unnoticed."""
        _, height, width = self.shape
        ramp = np.arange((height + 9) * (width + 5) * 3).reshape(height + 9, width + 5, 3)
        image = Image.fromarray((ramp % 251).astype(np.uint8))
        pixels = self._tile(image).numpy() if self.anyres is None else self._pixels(image)
        made: List[Tuple[np.ndarray, Tuple[int, ...]]] = [(pixels, self.shape)]
        if self.anyres is not None:
            pinpoints = tuple(map(tuple, getattr(self.processor, "image_grid_pinpoints", ())))
            if pinpoints != self.anyres.grid_pinpoints:
                raise ValueError(
                    f"{directory}: the image processor's image_grid_pinpoints are not those of the model's "
                    "config.json; give the folder of the model being trained"
                )
            area = best_resolution((image.height, image.width), pinpoints)
            made = [(pixels, (1 + area[0] * area[1] // (height * width), *self.shape))]
            if self.anyres.several_uncut:
                made.append((self._several([image, image]), (2, 1, *self.shape)))
        for array, shape in made:
            if array.shape != shape or array.dtype != np.uint8:
                raise ValueError(
                    f"{directory}: the image processor makes {array.dtype} images of {array.shape}, the "
                    f"vision tower takes uint8 {shape}; give the folder of the model being trained"
                )
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.mean, self.std))
        finished = (pixels.astype(np.float32) * np.float32(self.rescale) - mean) / std
        expected = np.asarray(self.processor(image)["pixel_values"][0])
        if not np.allclose(finished, expected, rtol=0, atol=1e-4):  # one uint8 level is over 1e-2
            raise ValueError(
                f"{os.path.basename(directory)}: {type(self.processor).__name__} does more than resize, "
                "crop, rescale and normalise; supported are the processors of CLIP, SigLIP and LLaVA"
            )


def _image_token(tokenizer: Any, folder: str, model: ModelConfig, override: int | None) -> tuple[int, str]:
    """Return the image token's id and text, checked to survive tokenisation."""
    image_token_id = model.image_token_id if override is None else override
    flag = "" if override is None else f"--image-token-id {override}: "
    if not 0 <= image_token_id < model.language.vocab_size:
        raise ValueError(f"{flag}the model embeds tokens 0 to {model.language.vocab_size - 1}")
    token = tokenizer.convert_ids_to_tokens(image_token_id) if image_token_id < len(tokenizer) else None
    # Added tokens are the ones that tokenisation never splits nor merges with their neighbours.
    if token is None or image_token_id not in tokenizer.added_tokens_decoder:
        candidate = tokenizer.convert_tokens_to_ids(IMAGE.marker)
        known = tokenizer.added_tokens_decoder.get(candidate)
        hint = (
            f"its {IMAGE.marker} is {candidate}, the model's {model.image_token_id}; "
            "give the folder that the model was built with"
            if known is not None and str(known) == IMAGE.marker
            else "give the Hugging Face folder that scripts/convert/build_llava_jp.py made"
        )
        raise ValueError(f"{flag}{folder}: token {image_token_id} of the tokenizer is no image token; {hint}")
    return image_token_id, token


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Raise PIL's errors as errors of a corrupt sample."""
    try:
        yield
    except UnidentifiedImageError:
        raise SampleError("its image is in no format that PIL knows", kind="corrupt") from None
    except (MemoryError, SampleError):
        raise
    except Exception as error:  # PIL's decoders fail with OSError, SyntaxError, struct.error, ...
        raise SampleError(f"its image can't be decoded ({error})", kind="corrupt") from None


@dataclass(frozen=True)
class ImageReader(MediaReader):
    """The reader of images, as uint8 ``pixels`` ``[tiles, c, H, W]``; their sizes are height and width.

    Attributes:
        transform: decodes, resizes and cuts.
        model: says how many placeholders stand for an image.
    """

    kind = IMAGE

    transform: ImageTransform
    model: ModelConfig
    token_id: int
    token: str

    @classmethod
    def load(cls, settings: ReaderSettings) -> ImageReader:
        """Read the image token of the tokenizer, and the folder's image processor."""
        model = settings.model
        token_id, token = _image_token(
            settings.tokenizer, settings.tokenizer_dir, model, settings.token_ids.get(IMAGE.name)
        )
        transform = ImageTransform.from_dir(
            settings.processor_dir,
            model.vision.image_size,
            model.vision.num_channels,
            model.anyres,
            settings.image_rule,
        )
        return cls(transform, model, token_id, token)

    def open(self, files: Sequence[bytes | Path]) -> List[Image.Image]:
        """Read the images' headers."""
        return self.transform.open(files)

    def sizes(self, opened: Sequence[Image.Image]) -> List[ItemSize]:
        """Return how each image is cut, as :meth:`ImageTransform.sizes`."""
        return list(self.transform.sizes(opened))

    def count_tokens(self, size: ItemSize) -> int:
        """Return the visual tokens of an image."""
        height, width = size
        return self.model.count_tokens((height, width))

    def decode(self, opened: Sequence[Image.Image]) -> Dict[str, Tensor]:
        """Return the images' tiles, ``pixels``."""
        tiles = self.transform.tiles(opened)
        return {"pixels": tiles[0].unsqueeze(0) if len(tiles) == 1 else torch.stack(tiles)}

    def finish(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Dict[str, Tensor]:
        """Return ``pixel_values``, normalised."""
        return {"pixel_values": normalize(tensors["pixels"], self.transform, dtype)}

    def write(self, text: str) -> str:
        """Return the text as it is: chat templates write images' placeholders themselves."""
        return text

    def varied(self, **options: str) -> ImageReader:
        """Return the reader with another ``image_aspect_ratio``."""
        ratio = options.get("image_aspect_ratio")
        return replace(self, transform=self.transform.with_aspect_ratio(ratio)) if ratio else self


def normalize(pixels: Tensor, images: ImageTransform, dtype: torch.dtype) -> Tensor:
    """Normalise uint8 ``[n, c, h, w]`` to the ``pixel_values`` that the image processor makes, in
    ``dtype``."""
    mean, std = (_by_channel(values, pixels.device) for values in (images.mean, images.std))
    return ((pixels.float() * images.rescale - mean) / std).to(dtype)


@functools.cache
def _by_channel(values: Tuple[float, ...], device: torch.device) -> Tensor:
    """Return ``values`` as ``[1, c, 1, 1]``, cached: each copy to a GPU from memory that isn't page-locked
    is waited for."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _per_channel(value: Any, num_channels: int) -> Tuple[float, ...]:
    values = value if isinstance(value, (list, tuple)) else [value] * num_channels
    return tuple(float(v) for v in values)
