"""Equal to PIL's own resize, value by value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.data.resize import resized

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


def picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Noise, black and white, smooth, or stripes: whose rows are alike, as in drawings."""
    kind = rng.integers(4)
    shape = {2: (max(1, height // 9), max(1, width // 9), 3), 3: (1, width, 3)}.get(kind, (height, width, 3))
    values = rng.integers(0, 256, shape, dtype=np.uint8)
    if kind == 1:
        values = values // 128 * 255
    return Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("seed", range(4))
def test_values_equal_pillows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    done = 0
    for _ in range(150):
        # From a pixel to some hundred, larger and smaller, of all proportions.
        height, width, new_height, new_width = (int(side) for side in np.exp(rng.uniform(0, np.log(500), 4)))
        image = picture(rng, height, width)
        resample = BICUBIC if rng.integers(2) else BILINEAR
        expected = torch.from_numpy(np.array(image.resize((new_width, new_height), resample)))
        top, left = int(rng.integers(new_height)), int(rng.integers(new_width))
        bottom, right = int(rng.integers(top, new_height)) + 1, int(rng.integers(left, new_width)) + 1
        for box in (None, (top, left, bottom, right)):
            found = resized(image, (new_height, new_width), resample, box)
            if found is None:
                continue
            top, left, bottom, right = box or (0, 0, new_height, new_width)
            wanted = expected[top:bottom, left:right].permute(2, 0, 1)
            assert torch.equal(found, wanted), (seed, image.size, (new_width, new_height), resample, box)
            done += 1
    assert done > 60


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (300, 1000), (225, 225), (100, 450)])
def test_usual_pictures_are_not_left_to_pillow(size: tuple[int, int]) -> None:
    image = picture(np.random.default_rng(0), *size)
    found = resized(image, (224, 224), BICUBIC)
    assert found is not None
    assert torch.equal(found.permute(1, 2, 0), torch.from_numpy(np.array(image.resize((224, 224), BICUBIC))))


@pytest.mark.parametrize(
    "mode, size, new_size, resample",
    [
        ("L", (40, 40), (20, 20), BICUBIC),
        ("RGB", (40, 40), (20, 20), Image.Resampling.LANCZOS),
        ("RGB", (40, 40), (20, 40), BICUBIC),
        ("RGB", (300, 50), (20, 20), BICUBIC),  # Pillow 13 begins with the height
        ("RGB", (9000, 9000), (8, 8), BICUBIC),  # sums of many weights
    ],
)
def test_what_is_left_to_pillow(mode, size, new_size, resample) -> None:  # type: ignore[no-untyped-def]
    assert resized(Image.new(mode, size[::-1]), new_size, resample) is None
