"""What disks say about a run, held against torch's writer, the kernel and real links."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.hf.formats.native import NativeWriter
from megatron_vlm.hf.tables.ops import Chunk
from megatron_vlm.launch.preflight import storage
from tests.launch.conftest import CONFIG


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Two tensors in two files, as torch's own classes describe them."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    writer = NativeWriter(folder)
    whole = torch.arange(4000.0).view(40, 100)
    halves = [Chunk((0, 0), (20, 100)), Chunk((20, 0), (20, 100))]
    writer.write("a.weight", whole, halves)
    writer.write("b.weight", whole.bfloat16(), [Chunk((0, 0), (40, 100))])
    writer.close()
    return folder


def test_whole_missing_and_cut_off_shards(checkpoint) -> None:
    assert list(storage.shard_problems(checkpoint)) == []
    (file,) = checkpoint.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    (problem,) = storage.shard_problems(checkpoint)
    assert f"{file.name} is cut off ({len(content) - 1:,} of {len(content):,} bytes)" in problem
    file.unlink()
    (problem,) = storage.shard_problems(checkpoint)
    assert f"{file.name} is missing; copy or convert" in problem
    (checkpoint / ".metadata").write_bytes(b"\x80\x04nonsense")
    assert ".metadata: refused, not the metadata of a checkpoint" in next(storage.shard_problems(checkpoint))
    (checkpoint / ".metadata").unlink()
    assert "no .metadata" in next(storage.shard_problems(checkpoint))


def test_nothing_in_the_metadata_is_run(checkpoint, tmp_path) -> None:
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (checkpoint / ".metadata").write_bytes(pickle.dumps(Attack()))
    assert "refused, not the metadata" in next(storage.shard_problems(checkpoint))
    assert not (tmp_path / "ran").exists()


def test_links_that_lead_out_of_the_container(tmp_path) -> None:
    cache, blobs, far = tmp_path / "hub/snapshots/1", tmp_path / "hub/blobs", tmp_path / "far"
    for folder in (cache, blobs, far):
        folder.mkdir(parents=True)
    (blobs / "b0b").write_text("{}")
    (cache / "config.json").symlink_to("../../blobs/b0b")
    (cache / "near.json").symlink_to("config.json")
    (cache / "far.json").symlink_to(far / "x.json")
    (far / "x.json").touch()
    (cache / "dangling").symlink_to(far / "none")
    (tmp_path / "alias").symlink_to(cache)

    def lost(*binds: str, folder: Path = cache) -> dict[str, str]:
        command = [
            "apptainer",
            "exec",
            "--no-home",
            *(word for bind in binds for word in ("--bind", bind)),
            "x.sif",
        ]
        found = storage.unseen([str(folder), *storage.links_in(str(folder))], command)
        return {os.path.basename(path): os.path.relpath(target, tmp_path) for path, target in found}

    # As a Hugging Face cache has them: the files are not where the folder is.
    out = {"config.json": "hub/blobs/b0b", "near.json": "hub/blobs/b0b", "far.json": "far/x.json"}
    assert lost(str(cache)) == out
    assert lost(str(cache), str(blobs)) == {"far.json": "far/x.json"}
    assert lost(str(tmp_path / "hub"), f"{far}:{far}:ro") == {}
    assert lost(str(tmp_path)) == {}
    assert lost(str(tmp_path / "hub"), f"{far}:/elsewhere") == {"far.json": "far/x.json"}
    assert lost() == {"1": "hub/snapshots/1", **{name: f"hub/snapshots/1/{name}" for name in out}}
    # A folder that is bound by its link is a folder inside, where ../.. leads elsewhere.
    assert lost(str(tmp_path / "alias"), folder=tmp_path / "alias")["config.json"] == "../blobs/b0b"


def test_what_apptainer_mounts_by_itself(tmp_path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    command = ["apptainer", "exec", "--bind", "/somewhere", "x.sif"]
    assert storage.unseen([str(home)], command, None) == []  # /tmp is one
    assert storage.unseen(["/usr"], command) == [("/usr", "/usr")]
    contained = ["apptainer", "exec", "--containall", "x.sif"]
    assert storage.unseen([str(home)], contained, str(home)) == [(str(home), str(home))]


def test_local_file_systems(tmp_path) -> None:
    mounts = tmp_path / "mounts"
    shared, local = tmp_path / "my share", tmp_path / "my share/scratch"
    local.mkdir(parents=True)
    escaped = str(shared).replace(" ", "\\040")
    mounts.write_text(
        f"/dev/sda1 / ext4 rw 0 0\nserver:/x {escaped} nfs4 rw 0 0\n/dev/sdb {escaped}/scratch xfs rw 0 0\n"
    )
    kind = lambda path: storage.local_file_system(str(path), str(mounts))  # noqa: E731
    assert kind(shared / "runs") is None and kind(local / "not/yet") == "xfs" and kind(tmp_path) == "ext4"
    (tmp_path / "link").symlink_to(shared)
    assert kind(tmp_path / "link") is None
    assert storage.local_file_system("/", str(tmp_path / "none")) is None
    # This machine's own: what the kernel says of it.
    found = subprocess.run(
        ["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True
    )
    names = {"ext2/ext3": ("ext4", "ext3", "ext2"), "overlayfs": ("overlay",)}
    kernel = found.stdout.strip()
    assert storage.local_file_system(str(tmp_path)) in names.get(kernel, (kernel, None))


@pytest.mark.parametrize("interval", [1, 3, 4, 50])
@pytest.mark.parametrize("iterations", [1, 4, 12, 13])
@pytest.mark.parametrize("done", [0, 3, 12])
def test_saves(iterations, interval, done) -> None:
    written = {i for i in range(done + 1, iterations + 1) if i % interval == 0 or i == iterations}
    assert storage.number_of_saves(iterations, interval, done) == len(written)


def test_room(tmp_path) -> None:
    free = storage.free_bytes(str(tmp_path / "not/yet"))
    shown = subprocess.run(
        ["df", "--output=avail", "-B1", str(tmp_path)], capture_output=True, text=True, check=True
    )
    # Other processes write meanwhile.
    assert free == pytest.approx(int(shown.stdout.split()[1]), rel=0.05)


def test_the_size_of_a_checkpoint_with_few_trained_weights() -> None:
    model = ModelConfig.from_hf(CONFIG)

    def size(*argv: str) -> int:
        return storage.checkpoint_bytes(RunConfig.from_flags(argv), model, with_optimizer=True)

    assert size("--stage", "1") < size("--stage", "2") < 0.5 * size("--stage", "2", "--train-vision")
    assert size("--stage", "1", "--save-trained-only") < 0.1 * size("--stage", "1")
