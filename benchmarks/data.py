"""The loader beside webdataset with PIL, and saving its state: ``python -m benchmarks.data``.

Images are JPEGs of 336x336, fed as 224x224. The loader also tokenises, shuffles, counts and hands batches
from one process to another; the other side only reads, decodes, resizes and stacks, in one process. Both
have to make the same pixels. Images per second are of processor time, of all processes together, and
without what a start takes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from benchmarks.workload import Workload, save_model, save_shards
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.data.loader import TrainLoader
from megatron_vlm.data.packing import Packing
from megatron_vlm.data.processing import load_processing

WORKLOAD = Workload(  # of which only the tokenizer and the image processor are used
    num_layers=1,
    hidden_size=64,
    ffn_hidden_size=128,
    vision_layers=1,
    vision_hidden_size=64,
    vision_ffn_hidden_size=128,
    vision_heads=4,
    image_size=224,
)
ON_DISK = 336
SHARDS = 4
BATCH = 8


def save_dataset(folder: Path, images: int) -> None:
    """Write and prepare shards of smooth pictures with some noise, each with a question and an answer."""
    random = np.random.default_rng(0)

    def parts(index: int) -> dict[str, bytes]:
        small = random.integers(0, 256, (21, 21, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(small).resize((ON_DISK, ON_DISK)), dtype=np.int16)
        noisy = (smooth + random.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        picture = io.BytesIO()
        Image.fromarray(noisy).save(picture, "JPEG", quality=85)
        question = json.dumps({"question": "tree " * 10}).encode()
        return {"jpg": picture.getvalue(), "txt": b"bird " * 40, "json": question}

    save_shards(folder, SHARDS, images, parts)


def by_pil(jpeg: bytes) -> Tensor:
    """What CLIP's image processor does to a square picture: uint8 ``[3, 224, 224]``."""
    edge = WORKLOAD.image_size
    image = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((edge, edge), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def webdataset_batches(folder: Path) -> Iterator[Tensor]:
    """Pixels of batch after batch, read by webdataset."""
    shards = sorted(str(shard) for shard in (folder / "data").glob("*.tar"))
    batch = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        batch.append(by_pil(sample["jpg"]))
        if len(batch) == BATCH:
            yield torch.stack(batch)
            batch = []


def make_loader(folder: Path, packing: bool = False) -> TrainLoader:
    """The loader of a run with one loader worker."""
    model = ModelConfig.from_hf_dir(str(folder / "hf"))
    processing = load_processing(str(folder / "hf"), model, seq_length=WORKLOAD.sequence)
    return TrainLoader(
        PreparedDataset.open(str(folder / "data")),
        processing,
        dp_rank=0,
        dp_size=1,
        data_workers=1,
        micro_batch_size=BATCH,
        grouping=Packing(200, WORKLOAD.sequence) if packing else None,
    )


def images_per_second(
    start: Callable[[], tuple[Callable[[], Tensor], Callable[[], None]]], images: int
) -> float:
    """Of processor time, of this process and those that end with it: a long run less a short one.

    Args:
        start: gives what takes a batch of pixels, and what ends it.
        images: that the long run takes; the short one takes a quarter.
    """
    seconds = []
    for batches in (images // BATCH, images // 4 // BATCH):
        before = sum(os.times()[:4])
        take, close = start()
        for _ in range(batches):
            assert len(take()) == BATCH
        close()
        seconds.append(sum(os.times()[:4]) - before)
    return BATCH * (images // BATCH - images // 4 // BATCH) / (seconds[0] - seconds[1])


def measure(folder: Path, images: int) -> tuple[float, float]:
    """Images per second of the loader, and of webdataset."""

    def loader() -> tuple[Callable[[], Tensor], Callable[[], None]]:
        made = make_loader(folder)
        return lambda: next(made).pixels, made.close

    def other() -> tuple[Callable[[], Tensor], Callable[[], None]]:
        batches = webdataset_batches(folder)
        return lambda: next(batches), lambda: None

    return images_per_second(loader, images), images_per_second(other, images)


def save_seconds(folder: Path, packing: bool) -> list[float]:
    """How long ten saves of the loader's state took, a batch apart."""
    loader = make_loader(folder, packing)
    seconds = []
    for _ in range(10):
        next(loader)
        start = time.perf_counter()
        json.dumps(loader.state_dict())
        seconds.append(time.perf_counter() - start)
    loader.close()
    return seconds


def levels_apart(folder: Path) -> int:
    """The most that the two differ by in a value."""
    images = load_processing(
        str(folder / "hf"), ModelConfig.from_hf_dir(str(folder / "hf")), seq_length=WORKLOAD.sequence
    ).images
    most = 0
    with tarfile.open(folder / "data" / "000000.tar") as tar:
        for name in [name for name in tar.getnames() if name.endswith(".jpg")][:50]:
            file = tar.extractfile(name)
            assert file is not None
            jpeg = file.read()
            (pixels,) = images.tiles(images.open([jpeg]))
            most = max(most, int((pixels.short() - by_pil(jpeg).short()).abs().max()))
    return most


def main() -> None:
    """Measure in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=1600, help="per turn (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="turns (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_model(WORKLOAD, folder)
        save_dataset(folder / "data", args.images)
        apart = levels_apart(folder)
        if apart > 1:
            sys.exit(f"error: pixels differ by {apart} levels")
        turns = []
        for turn in range(args.repetitions):
            turns.append(measure(folder, args.images))
            ours, other = turns[-1]
            print(f"{turn + 1}/{args.repetitions}: {ours:.0f} and {other:.0f} images/s", flush=True)
        saves = {packing: save_seconds(folder, packing) for packing in (False, True)}
    ours, other = (statistics.median(speeds) for speeds in zip(*turns, strict=True))
    ratios = [ours / other for ours, other in turns]
    print(
        f"\nload average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; pixels differ by {apart} levels"
    )
    print("\n| | the loader | webdataset with PIL | ratio (lowest, highest) |")
    print("|---|---|---|---|")
    print(
        f"| images/s of a core | {ours:.0f} | {other:.0f} | {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f}, {max(ratios):.2f}) |"
    )
    print("\n| saving the loader's state | median | slowest of 10 |")
    print("|---|---|---|")
    for packing, seconds in saves.items():
        title = "with packing" if packing else "without packing"
        print(f"| {title} | {1e3 * statistics.median(seconds):.1f} ms | {1e3 * max(seconds):.1f} ms |")


if __name__ == "__main__":
    main()
