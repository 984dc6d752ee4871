"""Hashes of a checkpoint's files: no changed byte is missed, and what is changed is named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import xxhash

from megatron_vlm.artifacts.checkpoint import FILES, read_manifest, write_manifest
from megatron_vlm.hf import Difference
from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.hf.formats.native import NativeReader, NativeWriter
from megatron_vlm.hf.hashes import checks, hash_file, share, tensors_by_place
from megatron_vlm.hf.tables.ops import REPLICATED
from megatron_vlm.hf.verify import check_manifest
from tests.tiny import save_tiny_llava

HASHED = (".metadata", "__0_0.distcp", "common.pt", "metadata.json")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    save_tiny_llava(folder / "hf", "clip-llama")
    return import_hf(folder / "hf", folder / "megatron", tp=2, pp=1)


@pytest.fixture
def trained(release: Path, tmp_path: Path) -> Path:
    """A checkpoint with the hashes that training writes, and a tensor of the optimizer."""
    folder = tmp_path / "trained"
    shutil.copytree(release, folder)
    reader, writer = NativeReader(release), NativeWriter(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    tensors["optimizer.state.exp_avg.x"] = torch.ones(1000)
    for name, tensor in tensors.items():
        writer.write(name, tensor, REPLICATED.chunks(tuple(tensor.shape), 1))
    writer.close()
    places = tensors_by_place(folder)
    files = {file: hash_file(folder, file, places.get(file, ())) for file in HASHED}
    write_manifest(folder, {**read_manifest(folder), FILES: files})
    return folder


def damages(folder: Path, weights_only: bool = False) -> list[str]:
    return [damage for damage in (check.damage for check in checks(folder, weights_only) or []) if damage]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_the_hashes_are_of_the_bytes(trained: Path) -> None:
    (part,) = read_manifest(trained)[FILES]["common.pt"]["xxh3_128"].values()
    assert part == xxhash.xxh3_128((trained / "common.pt").read_bytes()).hexdigest()
    entry = read_manifest(trained)[FILES]["__0_0.distcp"]
    assert len(entry["xxh3_128"]) == len(NativeReader(trained).names)
    first, second, *_ = map(int, entry["xxh3_128"])
    data = (trained / "__0_0.distcp").read_bytes()
    assert entry["xxh3_128"]["0"] == xxhash.xxh3_128(data[first:second]).hexdigest()
    assert first == 0 and entry["bytes"] == len(data)


@pytest.mark.parametrize("file", HASHED[1:])
def test_each_byte_counts(trained: Path, file: str) -> None:
    path = trained / file
    size = path.stat().st_size
    assert damages(trained) == []
    for at in sorted({0, 1, size - 1, *range(7, size, max(1, size // 40))}):
        flip(path, at)
        (damage,) = damages(trained)
        assert damage.startswith(f"{path} is not what was written"), at
        flip(path, at)
    assert damages(trained) == []


def test_a_tensor_is_named(trained: Path) -> None:
    path = trained / "__0_0.distcp"
    start, name = next(
        (start, name) for start, name in tensors_by_place(trained)[path.name].items() if "fc1" in name
    )
    with open(path, "r+b") as file:
        file.seek(start + 200)
        file.write(b"\xff" * 16)
    assert damages(trained) == [f"{path} is not what was written ({name})"]
    with pytest.raises(Difference, match=rf"not what was written \({name}\); 1 of \d+ parts differ$"):
        check_manifest(trained)
    with pytest.raises(ValueError, match=rf"__0_0\.distcp is not what was written \({name}\)"):
        export_hf(trained, trained.with_name("exported"))
    assert not trained.with_name("exported").exists()


def test_files_that_are_missing_cut_or_longer(trained: Path) -> None:
    path = trained / "__0_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    assert damages(trained) == [f"{path} is not what was written"]
    path.write_bytes(data[:-1])
    assert set(damages(trained)) == {f"{path} is not what was written", f"{path}: cut off"}
    path.unlink()
    assert set(damages(trained)) == {f"{path}: No such file or directory"}


def test_a_pipe_in_a_files_place(trained: Path) -> None:
    """Nobody writes into it: reading it would take for ever."""
    (trained / "common.pt").unlink()
    os.mkfifo(trained / "common.pt")
    assert f"{trained / 'common.pt'}: a pipe, a device or a link to nothing; move it away" in damages(trained)


def test_optimizer_state_is_read_by_runs_that_go_on_only(trained: Path) -> None:
    path = trained / "__0_0.distcp"
    flip(path, path.stat().st_size - 1)
    assert damages(trained, weights_only=True) == []
    assert damages(trained) == [f"{path} is not what was written (optimizer.state.exp_avg.x)"]


def test_of_a_conversion_each_tensor_is_compared(release: Path, tmp_path: Path) -> None:
    shutil.copytree(release, tmp_path / "copy")
    assert damages(tmp_path / "copy", weights_only=True) == []
    path = tmp_path / "copy" / "__0_0.distcp"
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 64)
    found = damages(tmp_path / "copy", weights_only=True)
    assert len(found) == 1 and any(name in found[0] for name in NativeReader(release).names)


def test_a_checkpoint_without_hashes(release: Path, tmp_path: Path) -> None:
    shutil.copytree(release, tmp_path / "old")
    manifest = read_manifest(release)
    tensors = {
        name: {key: value for key, value in entry.items() if key != "xxh3_128"}
        for name, entry in manifest["tensors"].items()
    }
    write_manifest(tmp_path / "old", {**manifest, "tensors": tensors})
    assert checks(tmp_path / "old", weights_only=False) is None


@pytest.mark.parametrize(
    "hashes",
    [None, {}, {"x": ""}, {"5": ""}, {"0": "", "9": "", "5": ""}, {"0": "", "9999": ""}],
    ids=["none", "empty", "no numbers", "not from the start", "out of order", "behind the end"],
)
def test_a_damaged_manifest(trained: Path, hashes: dict[str, str] | None) -> None:
    entry = {"bytes": 300, "xxh3_128": hashes}
    write_manifest(trained, {**read_manifest(trained), FILES: {"common.pt": entry}})
    with pytest.raises(ValueError, match=r"manifest\.json: files is damaged at common\.pt"):
        checks(trained, weights_only=False)


def test_ranks_share_the_work(trained: Path) -> None:
    found = checks(trained, weights_only=False)
    assert found is not None
    shares = [share(found, rank, 3) for rank in range(3)]
    assert sorted(id(check) for part in shares for check in part) == sorted(map(id, found))
    sizes = [sum(check.nbytes for check in part) for part in shares]
    assert max(sizes) - min(sizes) <= max(check.nbytes for check in found)
