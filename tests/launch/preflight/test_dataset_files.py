"""Datasets that are missing, empty, not prepared or damaged."""

from __future__ import annotations

import json
import os
import re
import shlex

import pytest

from megatron_vlm.artifacts.dataset import prepare_command
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.launch.preflight import dataset_files
from tests.data.tiny_data import make_samples, prepare, write_shards
from tests.launch.conftest import write_shard


@pytest.fixture
def dataset(tmp_path):
    """A folder with one shard, prepared as far as the launcher looks."""
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "000.tar", 5)
    (tmp_path / ".nv-meta").mkdir()
    info = tmp_path / ".nv-meta" / ".info.json"
    info.write_text(json.dumps({"energon_version": "7", "shard_counts": {"shards/000.tar": 5}}))
    (tmp_path / ".nv-meta" / "split.yaml").write_text(
        "split_parts:\n  train:\n  - shards/000.tar\nexclude: []\n"
    )
    return tmp_path


def test_a_prepared_dataset(dataset) -> None:
    assert list(dataset_files.dataset_problems(str(dataset))) == []


def test_a_dataset_that_is_missing_empty_or_not_prepared(dataset, tmp_path) -> None:
    def message() -> str:
        (problem,) = dataset_files.dataset_problems(str(dataset))
        assert "\n" not in problem
        return problem

    (problem,) = dataset_files.dataset_problems(str(tmp_path / "none"))
    assert problem.startswith("--data-path") and "none: no such folder" in problem
    shard, info = dataset / "shards" / "000.tar", dataset / ".nv-meta" / ".info.json"
    shard.unlink()
    assert "shards/000.tar is gone" in message()
    info.write_text(json.dumps({"shard_counts": {}}))
    assert "no samples" in message()
    info.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        message()
    info.unlink()
    assert "no .tar shards" in message()
    shard.touch()
    assert f"not prepared; run: {prepare_command(str(dataset))}" in message()


@pytest.mark.parametrize("name", ["a b.json", "x.jsonl", "x.jsonl.gz", "x.parquet", "x.arrow", "x.tar"])
def test_records_that_are_not_prepared(tmp_path, name) -> None:
    """The command is the one that prepares them, and the folder that it makes is no other."""
    (tmp_path / name).write_text("[]")
    (problem,) = dataset_files.dataset_problems(str(tmp_path / name))
    with pytest.raises(ValueError, match=re.escape(problem)):
        PreparedDataset.open(str(tmp_path / name))
    command, made = re.search(r"run: python (.*), and give (.*)", problem).groups()
    script, *flags = shlex.split(command)
    assert (script, flags[:3]) == ("scripts/data/prepare.py", ["--input", str(tmp_path / name), "--save-dir"])
    assert flags[3:] == shlex.split(made) == [str(tmp_path / name.partition(".")[0]) + "-prepared"]


def test_folders_of_records_that_are_not_prepared(tmp_path) -> None:
    def command() -> list[str]:
        (problem,) = dataset_files.dataset_problems(f"{tmp_path}/")
        return shlex.split(re.search(r"run: python (.*), and give ", problem)[1])

    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "train.json").write_text("[]")
    assert command() == f"scripts/data/prepare.py --input {tmp_path}/ --save-dir {tmp_path}-prepared".split()
    (tmp_path / "more" / "train.json").unlink()
    for split in ("test", "train"):  # as save_to_disk of Hugging Face's datasets writes them
        (tmp_path / split).mkdir()
        for name in ("data-00000-of-00001.arrow", "state.json", "dataset_info.json"):
            (tmp_path / split / name).write_text("{}")
    assert command()[2] == f"{tmp_path}/"
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    assert command()[1:] == ["--input", f"{tmp_path}/train", "--save-dir", f"{tmp_path}-prepared"]
    (tmp_path / "text.txt").write_text("a")
    (problem,) = dataset_files.dataset_problems(str(tmp_path / "text.txt"))
    assert "text.txt: no folder; give one that scripts/data/prepare.py" in problem


def test_shards_that_are_cut_off_or_gone_are_all_told(dataset) -> None:
    shards = dataset / "shards"
    for number in range(1, 5):
        write_shard(shards / f"00{number}.tar", 5)
    counts = {f"shards/00{number}.tar": 5 for number in range(1, 5)}
    (dataset / ".nv-meta" / ".info.json").write_text(json.dumps({"shard_counts": counts}))
    split = "split_parts:\n  train:\n  - shards/{001..004}.tar\nexclude: []\n"
    (dataset / ".nv-meta" / "split.yaml").write_text(split)
    assert list(dataset_files.dataset_problems(str(dataset))) == []
    for number in (1, 3):
        (shards / f"00{number}.tar").write_bytes(b"x" * 99)
    (shards / "004.tar").unlink()
    cut, gone = dataset_files.dataset_problems(str(dataset))
    assert "shard shards/001.tar and 1 more are cut off since it was prepared" in cut
    assert "shard shards/004.tar is gone since it was prepared" in gone


def test_a_shard_of_another_size_is_not_the_prepared_one(dataset) -> None:
    listed = {"shards/000.tar": {"samples": 5, "bytes": 100, "hash": "0"}}
    prepared = dataset / ".nv-meta" / "prepare.json"
    prepared.write_text(json.dumps({"shards": listed}))
    assert list(dataset_files.dataset_problems(str(dataset))) == []
    listed["shards/000.tar"]["bytes"] = 99
    prepared.write_text(json.dumps({"shards": listed}))
    (problem,) = dataset_files.dataset_problems(str(dataset))
    assert "shard shards/000.tar is not the file that was prepared; bring it back" in problem
    prepared.write_text("{")
    assert list(dataset_files.dataset_problems(str(dataset))) == []


def test_a_real_dataset_cut_off(tmp_path) -> None:
    """As energon writes its index."""
    write_shards(tmp_path, make_samples(6), shards=2)
    prepare(prepare_command(str(tmp_path), ratio="1,0,0"))
    assert list(dataset_files.dataset_problems(str(tmp_path))) == []
    shard = tmp_path / "000001.tar"
    # What ends a tar is padding; its last sample ends before that.
    os.truncate(shard, os.path.getsize(shard) // 2)
    (problem,) = dataset_files.dataset_problems(str(tmp_path))
    assert "shard 000001.tar is cut off" in problem


def test_files_of_energon_that_are_gone_or_destroyed(tmp_path) -> None:
    """What a loader refuses, the launcher does; each in a folder that energon itself prepared."""
    write_shards(tmp_path, make_samples(6), shards=2)
    prepare(prepare_command(str(tmp_path), ratio="1,0,0"))
    meta = tmp_path / ".nv-meta"
    zeros, cut = bytes(4096), (meta / "dataset.yaml").read_bytes()[:5]
    cases = [(meta / name, content) for name in ("split.yaml", "dataset.yaml") for content in (zeros, b"{[")]
    cases += [(meta / "dataset.yaml", cut), (meta / "split.yaml", None)]
    cases += [(tmp_path / "000001.tar.idx", None), (tmp_path / "000001.tar.idx", b"123")]
    cases += [(tmp_path / "000001.tar.idx", bytes(32)), (tmp_path / "000001.tar.idx", bytes(16))]
    cases += [(meta / "split.yaml", b"split_parts:\n  train:\n  - 7.tar\nexclude: []\n")]
    for file, content in cases:
        whole = file.read_bytes()
        file.write_bytes(content) if content is not None else file.unlink()
        with pytest.raises(ValueError):
            PreparedDataset.open(str(tmp_path))
        problems = list(dataset_files.dataset_problems(str(tmp_path)))
        assert (problems and "7.tar" in problems[0]) or file.name.removesuffix(".idx") in problems[0]
        file.write_bytes(whole)
    # What a person may write is left to who can read it.
    for name, text in (("split.yaml", "split_parts: {train: [000000.tar], val: []}"), ("dataset.yaml", "")):
        whole = (meta / name).read_bytes()
        (meta / name).write_text(text)
        assert PreparedDataset.open(str(tmp_path)).num_samples
        assert list(dataset_files.dataset_problems(str(tmp_path))) == []
        (meta / name).write_bytes(whole)


def test_an_empty_train_split(dataset) -> None:
    split = "split_parts:\n  train: []\n  val:\n  - shards/000.tar\nexclude: []\n"
    (dataset / ".nv-meta" / "split.yaml").write_text(split)
    (problem,) = dataset_files.dataset_problems(str(dataset))
    assert "its train split is empty (1 shards" in problem and "1,0,0" in problem


def test_a_dataset_without_held_out_samples(dataset) -> None:
    def problems() -> list[str]:
        return list(dataset_files.held_out_problems(str(dataset)))

    (dataset / ".nv-meta" / "split.yaml").unlink()
    assert problems() == []  # no split to look at: told when training opens the data
    split = dataset / ".nv-meta" / "split.yaml"
    split.write_text("split_parts:\n  train:\n  - a.tar\n  val:\n  - b.tar\n  test: []\nexclude: []\n")
    assert problems() == []
    for none in ("  val: []\n", ""):
        split.write_text(f"split_parts:\n  train:\n  - a.tar\n{none}  test: []\nexclude: []\n")
        (problem,) = problems()
        assert "the val split of --data-path" in problem and "9,1,0" in problem


def test_the_prepare_command_can_be_pasted_and_does_not_ask() -> None:
    command = shlex.split(prepare_command("/a b"))
    assert command[:3] == ["energon", "prepare", "--non-interactive"] and command[-1] == "/a b"
    assert json.loads(command[command.index("--field-map") + 1])["context"] == "json[question]"
