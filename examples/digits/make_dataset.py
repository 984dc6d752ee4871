"""Write scikit-learn's handwritten digits as webdataset shards: a train part and a held-out part.

Each sample is three files in a tar: ``[idx].jpg`` the image, ``[idx].txt`` the answer,
``[idx].json`` the question. The digits to train on are written ``COPIES`` times, the first time as they
are, then a little turned and shifted; idx modulo 1797 is the digit's number in ``load_digits``.
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
HELD_OUT_DIGITS = 297
COPIES = 4
MAX_TURN = 10.0  # degrees
MAX_SHIFT = 2  # pixels of the written image
TRAIN_SHARDS, HELD_OUT_SHARDS = 8, 2


def to_image(pixels: np.ndarray, turn: float, shift: tuple[int, int]) -> Image.Image:
    """An RGB picture of one digit, given as an 8x8 array of grey values from 0 to 16, turned and shifted."""
    grey = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
    grey = grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return grey.rotate(turn, Image.Resampling.BICUBIC, translate=shift).convert("RGB")


def write_shards(
    directory: Path, part: str, indices: np.ndarray, shards: int, random: np.random.Generator
) -> None:
    """Write the samples with these idx, dealt to ``<part>-000000.tar``, ``<part>-000001.tar``, ..."""
    digits = load_digits()
    for shard, members in enumerate(np.array_split(indices, shards)):
        with TarWriter(str(directory / f"{part}-{shard:06d}.tar")) as writer:
            for index in members:
                copy, digit = divmod(int(index), len(digits.target))
                turn, shift = 0.0, (0, 0)
                if copy:
                    turn = random.uniform(-MAX_TURN, MAX_TURN)
                    x, y = random.integers(-MAX_SHIFT, MAX_SHIFT, size=2, endpoint=True)
                    shift = (int(x), int(y))
                writer.write(
                    {
                        "__key__": f"{index:06d}",
                        "jpg": to_image(digits.images[digit], turn, shift),
                        "txt": str(digits.target[digit]),
                        "json": {"question": QUESTION},
                    }
                )
    print(f"{part}: {len(indices)} samples in {shards} shards under {directory}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="chooses which digits are held out (default: 0)")
    args = parser.parse_args()

    answers = load_digits().target
    total = len(answers)
    train, held_out = train_test_split(
        np.arange(total), test_size=HELD_OUT_DIGITS, stratify=answers, random_state=args.seed
    )
    copies = np.concatenate([train + copy * total for copy in range(COPIES)])
    random = np.random.default_rng(args.seed)
    args.save_dir.mkdir(parents=True, exist_ok=True)
    print(f"{total} digits: {len(train)} to train on, {COPIES} times each, and {len(held_out)} held out")
    write_shards(args.save_dir, "train", random.permutation(copies), TRAIN_SHARDS, random)
    write_shards(args.save_dir, "held-out", held_out, HELD_OUT_SHARDS, random)


if __name__ == "__main__":
    main()
