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
MAX_SHIFT = 2.0  # pixels of the written image
TRAIN_SHARDS, HELD_OUT_SHARDS = 8, 2


def to_image(pixels: np.ndarray, turn: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)) -> Image.Image:
    """An RGB picture of one digit, given as an 8x8 array of grey values from 0 to 16."""
    grey = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
    grey = grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return grey.rotate(turn, Image.Resampling.BICUBIC, translate=shift).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="chooses which digits are held out (default: 0)")
    args = parser.parse_args()

    digits = load_digits()
    total = len(digits.target)
    train, held_out = train_test_split(
        np.arange(total), test_size=HELD_OUT_DIGITS, stratify=digits.target, random_state=args.seed
    )
    random = np.random.default_rng(args.seed)
    # The copies of a digit are numbered `total` apart.
    train = random.permutation(np.concatenate([train + copy * total for copy in range(COPIES)]))

    args.save_dir.mkdir(parents=True, exist_ok=True)
    for part, indices, shards in (
        ("train", train, TRAIN_SHARDS),
        ("held-out", held_out, HELD_OUT_SHARDS),
    ):
        for shard, members in enumerate(np.array_split(indices, shards)):
            with TarWriter(str(args.save_dir / f"{part}-{shard:06d}.tar")) as writer:
                for index in members:
                    copy, digit = divmod(int(index), total)
                    turn, x, y = random.uniform(-1, 1, size=3) if copy else (0, 0, 0)
                    image = to_image(digits.images[digit], turn * MAX_TURN, (x * MAX_SHIFT, y * MAX_SHIFT))
                    writer.write(
                        {
                            "__key__": f"{index:06d}",
                            "jpg": image,
                            "txt": str(digits.target[digit]),
                            "json": {"question": QUESTION},
                        }
                    )
        different = len(np.unique(indices % total))
        print(
            f"{part}: {len(indices)} samples of {different} digits in {shards} shards under {args.save_dir}"
        )


if __name__ == "__main__":
    main()
