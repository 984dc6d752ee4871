"""``.metadata`` as two readers see it: with torch's classes where those are admitted, and without torch."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.artifacts.torch_dist import METADATA, check_shards, inert, load_metadata
from megatron_vlm.hf.formats.native import NativeWriter, check_before_loading, read_metadata
from megatron_vlm.hf.tables.ops import Chunk


class Exploit:
    """Runs a command when it is unpickled, or gives one as its state."""

    def __reduce__(self) -> Any:
        return os.system, ("touch exploited",)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    writer = NativeWriter(tmp_path)
    for name in ("a.weight", "b.weight"):
        writer.write(name, torch.arange(400.0).view(4, 100), [Chunk((0, 0), (4, 100))])
    writer.close()
    return tmp_path


def test_both_readers_see_the_same_places(checkpoint: Path) -> None:
    plain, with_torch = load_metadata(checkpoint), read_metadata(checkpoint)
    places = [
        {(p.relative_path, p.offset, p.length) for p in loaded.storage_data.values()}
        for loaded in (plain, with_torch)
    ]
    assert places[0] == places[1] and len(places[0]) == 2
    check_shards(checkpoint, plain)
    check_before_loading(checkpoint)


@pytest.mark.parametrize("how", ["cut off", "missing"])
def test_both_say_the_same_of_damaged_files(checkpoint: Path, how: str) -> None:
    (file,) = checkpoint.glob("*.distcp")
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{file.name} is {how}.*; copy or convert") as first:
        check_shards(checkpoint, load_metadata(checkpoint))
    with pytest.raises(ValueError, match=re.escape(str(first.value))):
        check_before_loading(checkpoint)


@pytest.mark.parametrize("content", [Exploit(), {"a": Exploit()}, [1], "x", None])
def test_what_is_no_metadata_is_refused_and_not_run(checkpoint: Path, content: object) -> None:
    (checkpoint / METADATA).write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="refused"):
        read_metadata(checkpoint)
    with pytest.raises(ValueError, match="refused"):
        check_shards(checkpoint, load_metadata(checkpoint))
    assert not Path("exploited").exists()


def test_a_places_values_are_not_trusted(checkpoint: Path) -> None:
    loaded = read_metadata(checkpoint)
    place = next(iter(loaded.storage_data.values()))
    place.relative_path = f"../{checkpoint.name}/elsewhere"
    with pytest.raises(ValueError, match="elsewhere is missing"):
        check_shards(checkpoint, loaded)
    place.offset = "3"
    with pytest.raises(ValueError, match="refused"):
        check_shards(checkpoint, loaded)


def test_a_pipe_and_nothing(checkpoint: Path) -> None:
    (checkpoint / METADATA).unlink()
    with pytest.raises(ValueError, match=r"no \.metadata; not a torch_dist checkpoint"):
        load_metadata(checkpoint)
    (checkpoint / "mp_rank_00").mkdir()
    with pytest.raises(ValueError, match=f"reshard.py --megatron-dir {checkpoint} writes it"):
        load_metadata(checkpoint)
    os.mkfifo(checkpoint / METADATA)
    with pytest.raises(ValueError, match="a pipe"):
        load_metadata(checkpoint)


def test_no_class_is_imported(checkpoint: Path) -> None:
    assert inert("os", "system") is not os.system
    code = (
        "import sys; from pathlib import Path; from megatron_vlm.artifacts.torch_dist import *\n"
        "check_shards(Path('.'), load_metadata(Path('.'))); assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)})
