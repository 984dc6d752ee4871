"""``--check`` names every damage that training would count or refuse, and nothing else."""

from __future__ import annotations

import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.dataset import prepare_command
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.data.prepare.build import Options, prepare
from megatron_vlm.data.prepare.check import check
from megatron_vlm.data.processing import load_processing
from tests.data.tiny_data import SCRIPT, jpeg, llava, samples_of, write_shards
from tests.data.tiny_data import prepare as energon_prepare

Trains = Callable[[Path], dict[str, int]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 conversations with an image each, in 5 shards."""
    root = tmp_path_factory.mktemp("check")
    for i in range(60):
        (root / f"{i}.jpg").write_bytes(jpeg(i))
    (root / "a.jsonl").write_text("\n".join(json.dumps(llava(i, f"{i}.jpg")) for i in range(60)))
    prepare(
        Options(input=(str(root / "a.jsonl"),), save_dir=str(root / "data"), split=(9, 1), shard_samples=15)
    )
    return root / "data"


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def spoil(shard: Path, old: bytes, new: bytes, times: int = 1) -> None:
    """Change bytes in place, as long as they were."""
    assert len(old) == len(new) and shard.read_bytes().count(old) >= times
    shard.write_bytes(shard.read_bytes().replace(old, new, times))


@pytest.fixture
def trains(open_loader: Any, folders: dict[str, Path], models: dict[str, ModelConfig]) -> Trains:
    """Reads the training split once; what was counted, unless it is refused."""
    processing = load_processing(str(folders["qwen"]), models["qwen"], seq_length=400)

    def read(data: Path) -> dict[str, int]:
        dataset = PreparedDataset.open(str(data))
        options = {"micro_batch_size": 1, "shuffle_buffer_size": 1, "max_corrupt_rate": 1.0}
        loader = open_loader(dataset, processing, 1, **options)
        for _ in range(dataset.num_samples):
            if loader.counts["seen"] < dataset.num_samples:
                next(loader)
        return {name: count for name, count in loader.counts.items() if count and name != "seen"}

    return read


def forget_hashes(data: Path) -> None:
    (data / ".nv-meta/prepare.json").unlink()


def forget_ends(data: Path) -> None:
    """Forget shards' ends, as after a change between a shard's first and last 64 KiB, or in an older
    folder."""
    path = data / ".nv-meta/prepare.json"
    prepared = json.loads(path.read_text())
    for shard in prepared["shards"].values():
        assert len(shard.pop("ends")) == 32
    path.write_text(json.dumps(prepared))


def test_nothing_is_wrong(whole: Path, trains: Trains) -> None:
    assert list(check(str(whole))) == [] and trains(whole) == {}


def test_every_corrupt_image_is_named(data: Path, trains: Trains, tmp_path: Path) -> None:
    forget_hashes(data)  # without them too
    unknown, broken = "in no format that PIL knows", "broken data stream when reading image file"
    found = {}
    for identity, why in (("7", unknown), ("30", unknown), ("12", broken)):
        sample = samples_of(data)[identity]
        (image,) = sample["data"]
        # A JPEG's Huffman table is looked at by its decoder alone, not where a file is opened.
        table = image.index(b"\xff\xc4")
        start, end = (table + 5, table + 21) if why == broken else (0, len(image))
        spoil(data / sample["shard"], image, image[:start] + b"\xff" * (end - start) + image[end:])
        found[identity] = sample["key"], sample["shard"], why
    assert sorted(check(str(data), workers=2)) == sorted(
        f"{shard}: sample {key}: image 0 can't be decoded ({why})" for key, shard, why in found.values()
    )
    held_out = sum(shard.startswith("val") for _, shard, _ in found.values())
    log = logging.FileHandler(tmp_path / "log")  # pytest keeps what a worker would say on stderr
    logging.getLogger("megatron_vlm").addHandler(log)
    assert trains(data) == {"corrupt": 3 - held_out}
    logging.getLogger("megatron_vlm").removeHandler(log)
    told = (tmp_path / "log").read_text()
    said = {unknown: f"its image is {unknown}", broken: f"its image can't be decoded ({broken})"}
    for identity, (key, shard, why) in found.items():
        line = f"sample {key} of {shard} (id {identity}) is skipped (corrupt): {said[why]}"
        assert shard.startswith("val") or line in told


def damaged(name: str) -> tuple[Callable[[Path], object], list[str], str | dict[str, int]]:
    """Return what damages a folder, what ``--check`` says, and what training says at its start, or counts."""
    first, second, third = (f"train-00000{i}.tar" for i in range(3))
    return {
        "cut off": (
            lambda data: os.truncate(data / first, 9000),
            [
                f"{first}: cut off, 9000 bytes in place of",
                f"{first}: sample # its image 0.jpg is missing",
                f"{first}: cut off or damaged after 4 of 15 samples (no header at byte 8704, and no end)",
            ],
            "train-000000.tar is truncated",
        ),
        "a damaged header": (
            lambda data: [forget_hashes(data), spoil(data / third, b".0.jpg\0", b".1.jpg\0")],
            [f"{third}: sample # its image 0.jpg is missing", f"{third}: cut off or damaged after 1 of"],
            "train-000002.tar is damaged at its sample .* of it",
        ),
        "missing": (
            lambda data: (data / second).unlink(),
            [f"{second}: missing"],
            "train-000001.tar is missing",
        ),
        "swapped for a shorter one": (
            lambda data: shutil.copy(data / "val-000000.tar", data / first),
            [f"{first}: cut off, ", f"{first}: swapped or changed since it was prepared"],
            "train-000000.tar is truncated",
        ),
        "swapped with another": (
            lambda data: [
                os.rename(data / first, data / "x"),
                os.rename(data / second, data / first),
                os.rename(data / "x", data / second),
            ],
            [
                f"{first}: not the file that was prepared: its content hash differs",
                f"{first}: swapped or changed since it was prepared",
                f"{second}: not the file that was prepared: its content hash differs",
                f"{second}: swapped or changed since it was prepared",
            ],
            "train-000000.tar is not the one that was prepared",
        ),
        "swapped for one with the same keys and sizes": (
            lambda data: spoil(data / first, b"Question", b"Answer??"),
            [f"{first}: not the file that was prepared: its content hash differs"],
            r"train-000000.tar is not the one that was prepared \(its first or last bytes are others\)",
        ),
        "text changed amid a shard": (
            lambda data: [forget_ends(data), spoil(data / first, b"Question", b"Answer??")],
            [f"{first}: not the file that was prepared: its content hash differs"],
            {},
        ),
        "bad JSON": (
            lambda data: [forget_hashes(data), spoil(data / third, b'{"messages"', b"{{messages'")],
            [f"{third}: sample # its json can't be read (JSONDecodeError"],
            {"corrupt": 1},
        ),
        "a key is missing": (
            lambda data: [forget_hashes(data), spoil(data / third, b'"messages"', b'"massages"')],
            [f"{third}: sample # its json[question] can't be read"],
            {"corrupt": 1},
        ),
        "an image is missing": (
            lambda data: [forget_hashes(data), spoil(data / third, b'["0.jpg"]', b'["9.jpg"]')],
            [f"{third}: sample # its image 9.jpg is missing"],
            {"corrupt": 1},
        ),
        "another tar": (
            lambda data: shutil.copy(data / first, data / "more.tar"),
            ["more.tar: in the folder, but not among the prepared shards"],
            {},
        ),
        "its index is missing": (
            lambda data: (data / f"{second}.idx").unlink(),
            [f"{second}: its index, the .idx beside it, is missing or of another file"],
            "train-000001.tar.idx, the shard's index, is missing or damaged; restore it, or run: ",
        ),
        "not in the split": (
            lambda data: (data / ".nv-meta/split.yaml").write_text(
                "split_parts:\n  train: []\n  val:\n  - val-000000.tar\n  - gone.tar\n"
            ),
            ["gone.tar: of the val split, but never indexed", "the train split is empty"],
            "its train split is empty",
        ),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "cut off",
        "a damaged header",
        "missing",
        "swapped for a shorter one",
        "swapped with another",
        "swapped for one with the same keys and sizes",
        "text changed amid a shard",
        "bad JSON",
        "a key is missing",
        "an image is missing",
        "another tar",
        "its index is missing",
        "not in the split",
    ],
)
def test_damage(name: str, data: Path, trains: Trains) -> None:
    keys = {sample["key"] for sample in samples_of(data).values()}
    damage, expected, training = damaged(name)
    damage(data)
    found = list(check(str(data)))
    assert len(found) == len(expected), found
    for line, start in zip(found, expected, strict=True):
        for key in keys:
            line = line.replace(f"sample {key}:", "sample #")
        assert line.startswith(start)
    if isinstance(training, str):
        with pytest.raises(ValueError, match=f"--data-path {data}: .*{training}"):
            trains(data)
    else:
        assert trains(data) == training


def test_a_shard_as_long_as_the_one_that_was_there(tmp_path: Path, trains: Trains) -> None:
    """Of samples as long as each other, as thumbnails with a word are; the index knows their names."""
    samples = [{"key": f"{i:03d}", "json": b'{"question": "?"}', "txt": b"7"} for i in range(12)]
    write_shards(tmp_path, samples, 3)
    energon_prepare(prepare_command(str(tmp_path), ratio="1,0,0"))
    assert trains(tmp_path) == {}
    os.rename(tmp_path / "000000.tar", tmp_path / "x")
    os.rename(tmp_path / "000001.tar", tmp_path / "000000.tar")
    os.rename(tmp_path / "x", tmp_path / "000001.tar")
    with pytest.raises(ValueError, match=r"000000\.tar is not the one that was prepared \(its last .* 003\)"):
        trains(tmp_path)


def test_training_compares_sizes_when_it_starts(data: Path) -> None:
    with open(data / "train-000001.tar", "ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(ValueError, match=r"train-000001\.tar is not the one that was prepared .* --check"):
        PreparedDataset.open(str(data))
    PreparedDataset.open(str(data), "val")


def test_questions_and_answers_in_shards_of_ones_own(tmp_path: Path) -> None:
    """The other layout, prepared with energon's command: checked by its index instead of hashes."""
    samples: list[dict[str, bytes | str]] = [
        {"key": f"{i:03d}", "jpg": jpeg(i), "json": b'{"question": "?"}', "txt": b"7"} for i in range(12)
    ]
    samples[2]["jpg"] = b"not a picture"
    del samples[5]["txt"]
    samples[7]["json"] = b'{"query": "?"}'
    write_shards(tmp_path, samples, 3)
    energon_prepare(prepare_command(str(tmp_path), ratio="1,0,0"))
    sound = [
        "000000.tar: sample 002: image 0 can't be decoded (in no format that PIL knows)",
        "000001.tar: sample 005: it has no txt",
        "000001.tar: sample 007: its json[question] can't be read (KeyError: 'question')",
    ]
    assert list(check(str(tmp_path))) == sound
    shutil.copy(tmp_path / "000002.tar", tmp_path / "000001.tar")  # as many samples, of other keys
    assert list(check(str(tmp_path))) == [
        sound[0],
        "000001.tar: swapped or changed since it was prepared: its samples are not those of the index",
    ]


def test_exit_codes(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main(["--check", str(whole), "--workers", "1"]) == 0
    assert capsys.readouterr().out == f"{whole}: nothing is wrong\n"
    data = Path(shutil.copytree(whole, tmp_path / "data"))
    (data / "val-000000.tar").unlink()
    assert main(["--check", str(data), "--workers", "1"]) == 2
    assert capsys.readouterr().out == f"val-000000.tar: missing\n{data}: 1 problem\n"
    done = subprocess.run([sys.executable, SCRIPT, "--check", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --check {tmp_path}: not prepared, it has no .nv-meta\n"


@pytest.mark.parametrize("name", ["split.yaml", "index.sqlite"])
@pytest.mark.parametrize("content", [None, b"\0" * 4096, b"\xff" * 50, b"no: [such"])
def test_destroyed_files_of_the_index(data: Path, name: str, content: bytes | None) -> None:
    file = data / ".nv-meta" / name
    file.write_bytes(content) if content is not None else file.unlink()
    found = list(check(str(data)))
    assert len(found) == 1 and found[0].startswith(f".nv-meta/{name} is ")
