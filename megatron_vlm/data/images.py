"""Images as the model folder's own Hugging Face image processor makes them, short of normalisation."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any, Tuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from megatron_vlm.data.templates import SampleError


@dataclass(frozen=True)
class ImageTransform:
    """Image bytes to uint8 pixels, and the constants that finish the job on the device.

    ``(pixels * rescale - mean) / std`` equals the processor's ``pixel_values``, at a quarter of the bytes.

    Attributes:
        processor: a transformers image processor of the PIL backend.
        shape: ``(c, H, W)`` of every image.
        rescale: factor from uint8 to the processor's range, usually 1/255.
        mean, std: one per channel, after rescaling.
    """

    processor: Any
    shape: Tuple[int, int, int]
    rescale: float
    mean: Tuple[float, ...]
    std: Tuple[float, ...]

    @classmethod
    def from_dir(cls, directory: str, image_size: int, num_channels: int) -> ImageTransform:
        """Read the image processor of a Hugging Face folder.

        Args:
            directory: holds ``preprocessor_config.json`` or ``processor_config.json``.
            image_size, num_channels: what the vision tower takes.

        Raises:
            ValueError: there is no usable processor, or its images are not what the tower takes.
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
        )
        transform._check(directory)
        return transform

    def __call__(self, data: bytes) -> Tensor:
        """Decode, resize and crop.

        Args:
            data: an encoded image, in any format that PIL reads.

        Returns:
            uint8 ``[c, H, W]``.

        Raises:
            SampleError: it can't be decoded; of kind ``corrupt``.
        """
        try:
            with Image.open(io.BytesIO(data)) as image:
                pixels = self._pixels(image)
        except UnidentifiedImageError:
            raise SampleError("its image is in no format that PIL knows", kind="corrupt") from None
        except MemoryError:
            raise
        except Exception as error:  # PIL's decoders fail with OSError, SyntaxError, struct.error, ...
            raise SampleError(f"its image can't be decoded ({error})", kind="corrupt") from None
        return torch.from_numpy(pixels)

    def _pixels(self, image: Image.Image) -> np.ndarray:
        output = self.processor(image, do_rescale=False, do_normalize=False)
        return np.ascontiguousarray(output["pixel_values"][0])

    def _check(self, directory: str) -> None:
        """Process one image both ways: an unusual processor must not train on other pixels unnoticed."""
        _, height, width = self.shape
        ramp = np.arange((height + 9) * (width + 5) * 3).reshape(height + 9, width + 5, 3)
        image = Image.fromarray((ramp % 251).astype(np.uint8))
        pixels = self._pixels(image)
        if pixels.shape != self.shape or pixels.dtype != np.uint8:
            raise ValueError(
                f"{directory}: the image processor makes {pixels.dtype} images of {pixels.shape}, "
                f"the vision tower takes uint8 {self.shape}; give the folder of the model being trained"
            )
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.mean, self.std))
        finished = (pixels.astype(np.float32) * np.float32(self.rescale) - mean) / std
        expected = np.asarray(self.processor(image)["pixel_values"][0])
        if not np.allclose(finished, expected, rtol=0, atol=1e-4):  # one uint8 level is over 1e-2
            raise ValueError(
                f"{os.path.basename(directory)}: {type(self.processor).__name__} does more than resize, "
                "crop, rescale and normalise; supported are the processors of CLIP, SigLIP and LLaVA"
            )


def normalize(pixels: Tensor, images: ImageTransform, dtype: torch.dtype) -> Tensor:
    """uint8 ``[n, c, h, w]`` to the ``pixel_values`` that the image processor makes, in ``dtype``."""
    mean = torch.tensor(images.mean, device=pixels.device).view(1, -1, 1, 1)
    std = torch.tensor(images.std, device=pixels.device).view(1, -1, 1, 1)
    return ((pixels.float() * images.rescale - mean) / std).to(dtype)


def _per_channel(value: Any, num_channels: int) -> Tuple[float, ...]:
    values = value if isinstance(value, (list, tuple)) else [value] * num_channels
    return tuple(float(v) for v in values)
