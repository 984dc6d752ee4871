"""The loader beside webdataset with PIL, and saving its state: ``python -m benchmarks.data``.

Images are JPEGs of 336x336, fed as 224x224. Three sides, on the same shards:

- the loader of a run with one worker: reads at random, shuffles, tokenises, makes labels, decodes, resizes,
  pads, counts, can resume, and hands batches from the worker to this process;
- a plain loader for the same samples, written with webdataset, PIL, transformers' tokenizer and torch's
  DataLoader with one worker: reads in order, shuffles, tokenises, makes labels, decodes, resizes, pads and
  hands batches over. It neither counts nor resumes;
- pixels alone: webdataset and PIL in this process. It reads in order, decodes, resizes and stacks.

The first two have to make the same ids, labels and pixels of a sample. Images per second are of processor
time, of all processes together, and without what a start takes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import webdataset
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.workload import IGNORE, Workload, save_model, save_shards
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.data.loading.loader import TrainLoader
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.data.processing import load_processing
from megatron_vlm.plan.grouping import Packing

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
SHUFFLED = 1000  # samples that are drawn from; the default of a run
SIDES = ("the loader", "a plain loader for the same batches", "pixels alone, in one process")


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
    """Process a square picture as CLIP's image processor does: uint8 ``[3, 224, 224]``."""
    edge = WORKLOAD.image_size
    image = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((edge, edge), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_samples(folder: Path) -> Any:
    """Return the files of sample after sample, in order, by webdataset."""
    shards = sorted(str(shard) for shard in (folder / "data").glob("*.tar"))
    return webdataset.WebDataset(shards, shardshuffle=False)


def pixels_alone(folder: Path) -> Generator[int, None, None]:
    """Pixels of batch after batch; gives their number."""
    batch = []
    for sample in read_samples(folder):
        batch.append(by_pil(sample["jpg"]))
        if len(batch) == BATCH:
            yield len(torch.stack(batch))
            batch = []


class PlainLoader(IterableDataset[dict[str, Any]]):
    """Batches as a short script for one model makes them."""

    def __init__(self, folder: Path) -> None:
        self.samples = read_samples(folder).repeat().shuffle(SHUFFLED)
        self.processor = transformers.AutoProcessor.from_pretrained(folder / "hf", backend="pil")
        self.tokenizer = self.processor.tokenizer

    def encode(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Ids, labels, already shifted, and pixels of a sample."""
        question = json.loads(sample["json"])["question"]
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        answer = [{"type": "text", "text": sample["txt"].decode()}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        prompt, text = (
            self.tokenizer.apply_chat_template(
                said,
                chat_template=self.processor.chat_template,
                tokenize=False,
                add_generation_prompt=len(said) == 1,
            ).replace("<image>", "<image>" * WORKLOAD.image_tokens)
            for said in (messages[:1], messages)
        )
        encoding = self.tokenizer(text, return_offsets_mapping=True)
        ids, ends = encoding["input_ids"], [end for _, end in encoding["offset_mapping"]]
        labels = [token if end > len(prompt) else IGNORE for token, end in zip(ids, ends, strict=True)]
        return {
            "key": sample["__key__"],
            "ids": torch.tensor(ids),
            "labels": torch.tensor([*labels[1:], IGNORE]),
            "pixels": by_pil(sample["jpg"]),
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batch = []
        for sample in self.samples:
            batch.append(self.encode(sample))
            if len(batch) == BATCH:
                yield {
                    "keys": [one["key"] for one in batch],
                    "ids": pad_sequence([one["ids"] for one in batch], batch_first=True),
                    "labels": pad_sequence([one["labels"] for one in batch], True, IGNORE),
                    "pixels": torch.stack([one["pixels"] for one in batch]),
                }
                batch = []


def make_loader(folder: Path, packing: bool = False) -> TrainLoader:
    """Return the loader of a run with one loader worker."""
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


def images_per_second(start: Callable[[], Generator[Any, None, None]], images: int) -> float:
    """Return images per second of processor time, of this process and those that end with it: a long run less
    a short one.

    Args:
        start: begins to give batches; what is given ends with its workers where it has any.
        images: that the long run takes; the short one takes a quarter.
    """
    seconds = []
    for batches in (images // BATCH, images // 4 // BATCH):
        before = sum(os.times()[:4])
        batch = start()
        for _ in range(batches):
            next(batch)
        batch.close()
        seconds.append(sum(os.times()[:4]) - before)
    return BATCH * (images // BATCH - images // 4 // BATCH) / (seconds[0] - seconds[1])


def from_loader(folder: Path) -> Generator[Any, None, None]:
    """Batches of the loader."""
    with contextlib.closing(make_loader(folder)) as loader:
        yield from loader


def from_plain_loader(folder: Path) -> Generator[Any, None, None]:
    """Batches of the plain loader, from a worker."""
    loader = DataLoader(PlainLoader(folder), batch_size=None, num_workers=1)
    batches = iter(loader)
    try:
        yield from batches
    finally:
        batches._shutdown_workers()  # type: ignore[attr-defined]


def measure(folder: Path, images: int) -> list[float]:
    """Images per second of each side."""
    sides = (from_loader, from_plain_loader, pixels_alone)
    return [images_per_second(functools.partial(side, folder), images) for side in sides]


def differences(folder: Path) -> int:
    """Return the most levels that loader and plain loader differ by in a value of 100 samples.

    Raises:
        SystemExit: they have other ids or labels.
    """
    plain: dict[str, dict[str, Any]] = {}
    encoder = PlainLoader(folder)
    for sample in itertools.islice(read_samples(folder), 400):
        plain[sample["__key__"]] = sample
    most = compared = 0
    with contextlib.closing(make_loader(folder)) as loader:
        while compared < 100:
            batch = next(loader)
            for row, key in enumerate(batch.keys):
                if key not in plain:
                    continue
                length, expected = int(batch.lengths[row]), encoder.encode(plain.pop(key))
                for name, own in (("ids", batch.input_ids), ("labels", batch.labels)):
                    if not torch.equal(own[row, :length], expected[name]):
                        sys.exit(f"error: the {name} of {key} differ")
                pixels = batch.media[IMAGE.name].tensors["pixels"][row]
                most = max(most, int((pixels.short() - expected["pixels"].short()).abs().max()))
                compared += 1
    return most


def save_seconds(folder: Path, packing: bool) -> list[float]:
    """Return the seconds of a hundred saves of the loader's state, a batch apart."""
    loader = make_loader(folder, packing)
    seconds = []
    for _ in range(100):
        next(loader)
        start = time.perf_counter()
        json.dumps(loader.state_dict())
        seconds.append(time.perf_counter() - start)
    loader.close()
    return seconds


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
        apart = differences(folder)
        if apart > 1:
            sys.exit(f"error: pixels differ by {apart} levels")
        turns = []
        for turn in range(args.repetitions):
            turns.append(measure(folder, args.images))
            measured = ", ".join(f"{speed:.0f}" for speed in turns[-1])
            print(f"{turn + 1}/{args.repetitions}: {measured} images/s", flush=True)
        saves = {packing: save_seconds(folder, packing) for packing in (False, True)}
    print(
        f"\nload average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; pixels differ by {apart} levels"
    )
    print("\n| images/s of a core | median | the loader's, in relation (lowest, highest) |")
    print("|---|---|---|")
    for title, speeds in zip(SIDES, zip(*turns, strict=True), strict=True):
        ratios = [turn[0] / speed for turn, speed in zip(turns, speeds, strict=True)]
        relation = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        print(f"| {title} | {statistics.median(speeds):.0f} | {relation} |")
    print("\n| saving the loader's state | median | slowest of 100 |")
    print("|---|---|---|")
    for packing, seconds in saves.items():
        title = "with packing" if packing else "without packing"
        print(f"| {title} | {1e3 * statistics.median(seconds):.1f} ms | {1e3 * max(seconds):.1f} ms |")


if __name__ == "__main__":
    main()
