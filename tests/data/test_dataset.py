"""Prepared folders: what is read from them, and what is said about those that can't be."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from megatron_vlm.artifacts.dataset import prepare_command, split_parts, split_samples
from megatron_vlm.data.dataset import PreparedDataset, RawSample
from megatron_vlm.data.templates import SampleError, Turn
from megatron_vlm.launch.preflight.dataset_files import dataset_problems, held_out_problems
from tests.data.tiny_data import (
    asked,
    make_conversations,
    make_samples,
    prepare,
    prepare_as_a_user,
    write_shards,
)


@pytest.fixture
def copy(dataset_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset_dir, tmp_path / "copy"))


def raw(key: str = "0", **parts: bytes) -> RawSample:
    return RawSample(__key__=key, __restore_key__=(), parts=parts)


def test_open_reads_both_splits(dataset_dir: Path) -> None:
    train, val = PreparedDataset.open(str(dataset_dir)), PreparedDataset.open(str(dataset_dir), "val")
    assert (train.num_samples, val.num_samples) == (120, 20)
    assert not {shard.name for shard in train.shards} & {shard.name for shard in val.shards}
    assert train.fingerprint != val.fingerprint
    # The launcher reads the same without energon.
    parts = split_parts(str(dataset_dir))
    assert parts is not None and parts["train"] == [shard.name for shard in train.shards]
    assert [split_samples(str(dataset_dir), part) for part in ("train", "val")] == [120, 20]


def test_missing_or_unprepared_folder_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        PreparedDataset.open(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"no \.tar shards; make a dataset with scripts/data/prepare\.py"):
        PreparedDataset.open(str(tmp_path))
    write_shards(tmp_path, make_samples(1), shards=1)
    with pytest.raises(ValueError, match="not prepared; run: energon prepare --non-interactive"):
        PreparedDataset.open(str(tmp_path))


def test_the_command_that_is_suggested_mends_an_empty_split(tmp_path: Path) -> None:
    write_shards(tmp_path, make_samples(4), shards=1)
    prepare(prepare_command(str(tmp_path)))  # energon splits by shards, and puts the only one into val
    with pytest.raises(ValueError, match="train split is empty") as error:
        PreparedDataset.open(str(tmp_path))
    prepare_as_a_user(str(error.value).partition("prepare again: ")[2])
    assert PreparedDataset.open(str(tmp_path)).num_samples == 4


def test_damaged_shards_are_found_at_the_start(copy: Path) -> None:
    shard = copy / "000002.tar"
    os.truncate(shard, 20000)
    with pytest.raises(ValueError, match=r"shard 000002\.tar is truncated"):
        PreparedDataset.open(str(copy))
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard 000002\.tar is missing"):
        PreparedDataset.open(str(copy))
    # A prepare that met a truncated tar leaves its folder without .info.json.
    (copy / ".nv-meta" / ".info.json").unlink()
    with pytest.raises(ValueError, match="did not finish"):
        PreparedDataset.open(str(copy))


@pytest.mark.parametrize(
    "name, text, message",
    [
        (".info.json", "{", r"\.info\.json: damaged; run again: "),
        (".info.json", "[" * 100_000, r"\.info\.json: damaged; run again: "),
        (".info.json", '{"energon_version": 7, "shard_counts": {}}', r"\.info\.json: damaged; run again: "),
        (".info.json", '{"shard_counts": {"000000.tar": 2.5}}', r"\.info\.json: damaged; run again: "),
        (
            "split.yaml",
            "split_parts: [",
            r"the split in \.nv-meta can't be read \(.+\); mend split\.yaml, or run: ",
        ),
        ("split.yaml", "", r"the split in \.nv-meta can't be read"),
        ("split.yaml", "\0" * 9999, r"the split in \.nv-meta can't be read \(.{,200}\); mend split\.yaml"),
        ("split.yaml", "split_parts:\n  train:\n  - gone.tar\nexclude: []", r"can't be read \('gone\.tar'\)"),
        ("dataset.yaml", "field_map: {", r"dataset\.yaml: damaged; run: "),
        ("dataset.yaml", "- a list", r"dataset\.yaml: damaged; run: "),
        (
            "dataset.yaml",
            "field_map: {image: jpg, context: [1], answers: txt}",
            r"dataset\.yaml: damaged; run: ",
        ),
    ],
)
def test_a_damaged_description_is_one_line(name: str, text: str, message: str, copy: Path) -> None:
    (copy / ".nv-meta" / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        PreparedDataset.open(str(copy))
    assert "\n" not in str(error.value) and "energon prepare --non-interactive" in str(error.value)


@pytest.mark.parametrize("column", ["byte_offset = 'x'", "byte_offset = -1"])
def test_an_index_of_other_values_is_one_line(column: str, copy: Path) -> None:
    with closing(sqlite3.connect(copy / ".nv-meta" / "index.sqlite")) as index, index:
        index.execute(f"update samples set {column}")
    with pytest.raises(ValueError, match=r"index\.sqlite: damaged \(.+\); run: energon prepare") as error:
        PreparedDataset.open(str(copy))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", bytes(4096), None], ids=["empty", "zeroed", "gone"])
def test_a_sample_is_not_picked_by_a_damaged_index(content: bytes | None, copy: Path) -> None:
    index = copy / ".nv-meta" / "index.sqlite"
    index.write_bytes(content) if content is not None else index.unlink()
    dataset = PreparedDataset.open(str(copy))
    with pytest.raises(ValueError, match=r"index\.sqlite: damaged \([^\n]+\); run: energon prepare"):
        list(dataset.pick(["00000"]))
    assert len(list(dataset.pick([0]))) == 1


def test_an_index_of_a_shard_that_is_damaged(copy: Path) -> None:
    index = copy / "000002.tar.idx"
    whole = index.read_bytes()
    for content in (bytes(len(whole)), whole[: len(whole) // 2]):
        index.write_bytes(content)
        with pytest.raises(ValueError, match=r"000002\.tar\.idx, the shard's index, is missing or damaged"):
            PreparedDataset.open(str(copy))


def test_fingerprint_changes_with_the_data(copy: Path) -> None:
    before = PreparedDataset.open(str(copy)).fingerprint
    assert PreparedDataset.open(str(copy)).fingerprint == before
    with open(copy / "000003.tar", "ab") as file:
        file.write(b"\0" * 512)
    assert PreparedDataset.open(str(copy)).fingerprint != before
    os.truncate(copy / "000003.tar", (copy / "000003.tar").stat().st_size - 512)
    assert PreparedDataset.open(str(copy)).fingerprint == before
    (copy / ".nv-meta" / "index.uuid").write_bytes(b"\xff prepared again")
    assert PreparedDataset.open(str(copy)).fingerprint != before


def test_field_map_decides_what_is_read(copy: Path) -> None:
    config = {"field_map": {"image": "png,jpg", "context": "json[turns][0][q]", "answers": "json[a],txt"}}
    (copy / ".nv-meta" / "dataset.yaml").write_text(json.dumps(config))
    dataset = PreparedDataset.open(str(copy))
    sample = raw(jpg=b"image", txt=b"unused", json=b'{"turns": [{"q": "why?"}], "a": ["first", "second"]}')
    assert dataset.read(sample) == (asked("why?", "first"), {"image": [b"image"]})
    for config in ({"field_map": {"image": "jpg"}}, {"sample_loader": "sample_loader.py:sample_loader"}):
        (copy / ".nv-meta" / "dataset.yaml").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="run: energon prepare"):
            PreparedDataset.open(str(copy))
    # A folder for crude samples has no field map; it is read in the documented layout.
    crude = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (copy / ".nv-meta" / "dataset.yaml").write_text(json.dumps(crude))
    assert PreparedDataset.open(str(copy)).read(raw(txt=b"7", json=b'{"question": "?"}')) == (
        asked("?", "7"),
        {},
    )


def test_text_only_samples(dataset_dir: Path) -> None:
    dataset = PreparedDataset.open(str(dataset_dir))
    parts = {"txt": b"7", "json": b'{"question": "which?"}'}
    assert dataset.read(raw("1", **parts)) == (asked("which?", "7"), {})
    assert dataset.read(raw("1", jpg=b"image", **parts)) == (asked("which?", "7"), {"image": [b"image"]})
    assert dataset.read(raw("1-noimage", jpg=b"placeholder", **parts)) == (asked("which?", "7"), {})
    assert dataset.read(raw("1", jpg=b"image", txt=b"a caption")) == (
        asked("", "a caption"),
        {"image": [b"image"]},
    )


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"json": b'{"question": "?"}'}, "it has no txt"),
        ({"txt": b"7", "json": b"{"}, r"its json\[question\] can't be read \(JSONDecodeError"),
        (
            {"txt": b"7", "json": b'{"text": "?"}'},
            r"its json\[question\] can't be read \(KeyError: 'question'",
        ),
        ({"txt": b"7", "json": b'{"question": 7}'}, r"its json\[question\] is no text"),
        (
            {"txt": b"7", "json": b'{"question": "\\ud83d"}'},
            r"its json\[question\] holds half of a character",
        ),
        ({"txt": b"7", "json": b"[" * 100_000}, "its json"),
        ({"txt": b"\xff\xfe", "json": b'{"question": "?"}'}, r"its txt can't be read \(UnicodeDecodeError"),
    ],
)
def test_malformed_fields_are_corrupt(parts: dict[str, bytes], message: str, dataset_dir: Path) -> None:
    with pytest.raises(SampleError, match=message) as error:
        PreparedDataset.open(str(dataset_dir)).read(raw(**parts))
    assert error.value.kind == "corrupt"


def test_a_folder_of_conversations_is_known_without_a_flag(tmp_path: Path) -> None:
    """Also by the command that a message suggests for it."""
    samples = make_conversations(6)
    write_shards(tmp_path, samples, shards=2)
    with pytest.raises(ValueError, match=r"not prepared; run: .*--sample-type CrudeWebdataset") as error:
        PreparedDataset.open(str(tmp_path))
    assert [problem.partition("run: ")[2] for problem in dataset_problems(str(tmp_path))] == [
        str(error.value).partition("run: ")[2]
    ]
    prepare(prepare_command(str(tmp_path), "1,1,0"))
    assert not list(dataset_problems(str(tmp_path))) and not list(held_out_problems(str(tmp_path)))
    assert "CrudeWebdataset" in prepare_command(str(tmp_path))  # now that .nv-meta says so
    dataset = PreparedDataset.open(str(tmp_path))
    assert dataset.num_samples == 3 == split_samples(str(tmp_path))
    parts = {name: data for name, data in samples[5].items() if isinstance(data, bytes)}
    assert dataset.read(raw(**parts)) == (
        [
            Turn("system", "Be brief."),
            Turn("user", "<image>\n<image>\nQuestion 0 of 5?"),
            Turn("assistant", "Answer 0 of 5."),
            Turn("user", "Question 1 of 5?"),
            Turn("assistant", "Answer 1 of 5."),
            Turn("user", "Question 2 of 5?"),
            Turn("assistant", "Answer 2 of 5."),
        ],
        {"image": [parts["0.jpg"], parts["1.png"]]},
    )
