"""Write scikit-learn's handwritten digits as webdataset shards: a train part and a held-out part.

Each sample is three files in a tar: ``[idx].jpg`` the image, ``[idx].txt`` the answer,
``[idx].json`` the question, where idx is the digit's number in ``sklearn.datasets.load_digits``.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from webdataset import TarWriter

QUESTION = "Which digit is this?"
IMAGE_SIZE = 32
HELD_OUT_SAMPLES = 297
SHARDS = {"train": 8, "held-out": 2}


def to_image(pixels: np.ndarray) -> Image.Image:
    """An RGB picture of one digit, given as an 8x8 array of grey values from 0 to 16."""
    grey = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
    return grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="chooses which digits are held out (default: 0)")
    args = parser.parse_args()

    digits = load_digits()
    train, held_out = train_test_split(
        np.arange(len(digits.target)),
        test_size=HELD_OUT_SAMPLES,
        stratify=digits.target,
        random_state=args.seed,
    )
    args.save_dir.mkdir(parents=True, exist_ok=True)
    for part, indices in {"train": train, "held-out": held_out}.items():
        for shard, members in enumerate(np.array_split(indices, SHARDS[part])):
            with TarWriter(str(args.save_dir / f"{part}-{shard:06d}.tar")) as writer:
                for index in members:
                    writer.write(
                        {
                            "__key__": f"{index:06d}",
                            "jpg": to_image(digits.images[index]),
                            "txt": str(digits.target[index]),
                            "json": {"question": QUESTION},
                        }
                    )
        print(f"{part}: {len(indices)} samples in {SHARDS[part]} shards under {args.save_dir}")


if __name__ == "__main__":
    main()
