"""What is found wrong before torch is loaded."""

from __future__ import annotations

import json
import shlex

import pytest

from megatron_vlm.config.dataset import prepare_command
from megatron_vlm.launch import preflight


@pytest.fixture
def dataset(tmp_path):
    """A folder with one shard, prepared as far as the launcher looks."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "000.tar").touch()
    (tmp_path / ".nv-meta").mkdir()
    info = tmp_path / ".nv-meta" / ".info.json"
    info.write_text(json.dumps({"energon_version": "7", "shard_counts": {"shards/000.tar": 5}}))
    return tmp_path


def test_a_prepared_dataset(dataset) -> None:
    preflight.check_dataset(str(dataset))


def test_a_dataset_that_is_missing_empty_or_not_prepared(dataset, tmp_path) -> None:
    def message() -> str:
        with pytest.raises(ValueError) as error:
            preflight.check_dataset(str(dataset))
        assert "\n" not in str(error.value)
        return str(error.value)

    with pytest.raises(ValueError, match=r"--data-path .*none: no such folder"):
        preflight.check_dataset(str(tmp_path / "none"))
    shard, info = dataset / "shards" / "000.tar", dataset / ".nv-meta" / ".info.json"
    shard.unlink()
    assert "shards/000.tar is gone" in message()
    info.write_text(json.dumps({"shard_counts": {}}))
    assert "no samples" in message()
    info.write_text("{")
    assert "damaged" in message()
    info.unlink()
    assert "no .tar shards" in message()
    shard.touch()
    assert f"not prepared; run: {prepare_command(str(dataset))}" in message()


def test_a_dataset_without_held_out_samples(dataset) -> None:
    def check() -> None:
        preflight.check_held_out(str(dataset))

    check()  # no split to look at: told when training opens the data
    split = dataset / ".nv-meta" / "split.yaml"
    split.write_text("split_parts:\n  train:\n  - a.tar\n  val:\n  - b.tar\n  test: []\nexclude: []\n")
    check()
    for none in ("  val: []\n", ""):
        split.write_text(f"split_parts:\n  train:\n  - a.tar\n{none}  test: []\nexclude: []\n")
        with pytest.raises(
            ValueError, match=r"--eval-interval .* the val split of --data-path .* is empty; .*9,1,0"
        ):
            check()


def test_the_prepare_command_can_be_pasted_and_does_not_ask() -> None:
    command = shlex.split(prepare_command("/a b"))
    assert command[:3] == ["energon", "prepare", "--non-interactive"] and command[-1] == "/a b"
    assert json.loads(command[command.index("--field-map") + 1])["context"] == "json[question]"


def test_transformer_engine_has_to_be_installed(monkeypatch) -> None:
    monkeypatch.setattr(preflight, "_installed", lambda package: package != "transformer_engine")
    with pytest.raises(ValueError, match="does not have it; use local, or give --sif-path"):
        preflight.check_interpreter(transformer_impl="transformer_engine")
    preflight.check_interpreter("image.sif", "transformer_engine")
    preflight.check_interpreter()
