"""Checkpoints that were damaged, and weights that aren't finite: found before anything is made of them."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_vlm import parallel
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.train_modules import parse_train_modules
from megatron_vlm.artifacts.checkpoint import FILES, TRACKER, read_manifest, write_manifest
from megatron_vlm.hf.hashes import checks
from megatron_vlm.hf.verify import check_manifest
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.vlm import build_model
from megatron_vlm.models.weights import check_unchanged, load_sharded, load_weights, named_parameters
from megatron_vlm.parallel.optimizer import Optimizer, wrap_model
from megatron_vlm.training.checkpoint import find_not_finite
from megatron_vlm.training.freezing import set_trainable
from tests.distributed import Pool
from tests.training.conftest import Trainable
from tests.training.test_run import failure
from tests.workers import train

LAST = "iter_0000002"


@pytest.fixture(scope="module")
def run(pool: Pool, trainables: dict[str, Trainable], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations on two ranks, both saved."""
    folder = tmp_path_factory.mktemp("damage")
    pool.run(2, train, flags(trainables, folder, "2"))
    return folder / "run"


def flags(trainables: dict[str, Trainable], folder: Path, iterations: str, *more: str) -> list[str]:
    saving = ("--dist-optim", "--bf16", "--save-optim", "--save-interval", "1", "--train-iters", iterations)
    return trainables["untied"].flags(folder, "run", *saving, *more)


def copied(run: Path, folder: Path) -> Path:
    """The last checkpoint of a copy of the run."""
    shutil.copytree(run, folder / "run")
    return folder / "run" / "checkpoints" / LAST


def spoil(path: Path, at: int, count: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\xff" * count)


def test_a_save_has_hashes_of_all_its_files(run: Path) -> None:
    checkpoint = run / "checkpoints" / LAST
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    small = {name for name in files if name.startswith("hf/") and not name.endswith(".safetensors")}
    assert read_manifest(checkpoint)[FILES].keys() == files - small - {"manifest.json"}
    assert {"rng/rank_00001.pt", "data_state.json", "run_state.json", "common.pt"} <= files
    assert check_manifest(checkpoint) > 100
    for name in files - small - {"manifest.json", ".metadata"}:
        data = bytearray((checkpoint / name).read_bytes())
        data[len(data) // 2] ^= 1
        (checkpoint / name).write_bytes(data)
        (damage,) = (check.damage for check in checks(checkpoint, False) or [] if check.damage)
        assert damage.startswith(f"{checkpoint / name} is not what was written")
        data[len(data) // 2] ^= 1
        (checkpoint / name).write_bytes(data)


def test_a_run_does_not_go_on_from_damaged_weights(
    pool: Pool, trainables: dict[str, Trainable], run: Path, tmp_path: Path
) -> None:
    """Each rank names the file, and what is there stays as it is."""
    checkpoint = copied(run, tmp_path)
    damaged = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole = damaged.read_bytes()
    spoil(damaged, 200_000, 4096)
    way_on = (
        rf"; copy the checkpoint again, or move {checkpoint} away, and the run goes on from iter_0000001$"
    )
    message = failure(pool, 2, flags(trainables, tmp_path, "3"))
    assert re.match(rf"{damaged} is not what was written \([\w.]+\){way_on}", message)
    damaged.write_bytes(whole)
    state = checkpoint / "run_state.json"
    state.write_text(state.read_text().replace('"iteration": 2', '"iteration": 1'))
    message = failure(pool, 2, flags(trainables, tmp_path, "3"))
    assert re.match(rf"{state} is not what was written{way_on}", message)
    assert {path.name for path in checkpoint.parent.iterdir()} == {"iter_0000001", LAST, TRACKER}

    shutil.rmtree(checkpoint)  # what the message says
    pool.run(2, train, flags(trainables, tmp_path, "2"))
    assert check_manifest(checkpoint) > 100


def said_before_loading(folder: str, weights_only: bool) -> list[str]:
    parallel.initialize(1, 1)
    said: list[str] = []
    try:
        check_unchanged(Path(folder), None, weights_only, said.append)
    except ValueError as error:
        said.append(str(error))
    return said


def test_a_converted_checkpoint_is_compared_too(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    shutil.copytree(trainables["untied"].checkpoint, tmp_path / "megatron")
    release = tmp_path / "megatron" / "release"
    assert pool.run(2, said_before_loading, str(release), True) == [[], []]
    (file,) = release.glob("*.distcp")
    spoil(file, file.stat().st_size // 2, 64)
    one, two = pool.run(2, said_before_loading, str(release), True)
    assert one == two and re.search(r"language_model\..*; copy or convert the checkpoint again$", one[0])


@pytest.mark.parametrize("content", ["", "null", "{}", '{"sharded_backend": "zarr"}', None])
def test_a_checkpoint_of_no_known_format(
    trainables: dict[str, Trainable], tmp_path: Path, content: str | None
) -> None:
    """A conversion's hashes are of tensors alone."""
    shutil.copytree(trainables["untied"].checkpoint / "release", tmp_path / "release")
    file = tmp_path / "release" / "metadata.json"
    file.write_text(content) if content is not None else file.unlink()
    with pytest.raises(ValueError, match=rf"^{file}: damaged \(.+\); copy or convert the checkpoint again$"):
        load_sharded(tmp_path / "release", {})


def test_a_checkpoint_of_an_earlier_version(pool: Pool, run: Path, tmp_path: Path) -> None:
    checkpoint = copied(run, tmp_path)
    manifest = read_manifest(checkpoint)
    del manifest[FILES]
    write_manifest(checkpoint, manifest)
    for said in pool.run(2, said_before_loading, str(checkpoint), False):
        assert said == [
            f"{checkpoint} has no hashes, since an earlier version wrote it: damage in it isn't found"
        ]
    with pytest.raises(ValueError, match="its manifest has no hashes"):
        check_manifest(checkpoint)


def test_weights_that_are_not_finite_are_not_saved(
    pool: Pool, trainables: dict[str, Trainable], run: Path, tmp_path: Path
) -> None:
    """The gradients are, so that no iteration is left out: the update itself is too large."""
    checkpoint = copied(run, tmp_path)
    message = failure(
        pool, 2, [*flags(trainables, tmp_path, "3"), "--lr", "3e38", "--lr-decay-style", "constant"]
    )
    assert re.match(
        r"iteration 3: [\w.]+ holds NaN or infinite values, and is not saved; lower --lr, and the run goes "
        rf"on from {LAST}$",
        message,
    )
    assert {path.name for path in checkpoint.parent.iterdir()} == {"iter_0000001", LAST, TRACKER}
    assert json.loads((checkpoint.parent / TRACKER).read_text()) == 2
    assert check_manifest(checkpoint) > 100


def not_finite(checkpoint: str) -> list[str | None]:
    """Return what is found after each of three changes, of which each is on one rank."""
    layout = parallel.initialize(1, 1)
    model = ModelConfig.from_dict(read_manifest(checkpoint)["model"])
    chunks = build_model(model, layout, ModelOptions(torch.bfloat16))
    set_trainable(chunks, parse_train_modules("projector|language"), layout)
    load_weights(Path(checkpoint), chunks)
    models = wrap_model(chunks, distributed_optimizer=True, overlap_grad_reduce=False)
    optimizer = Optimizer(models, 0.0, 0.9, 0.999, 1e-8, 1.0, entries=2)
    found = [find_not_finite(chunks, optimizer, layout)]
    master = {id(parameter): tensor for parameter, tensor in optimizer.master_weights()}
    names = [name for name, parameter in named_parameters(chunks) if id(parameter) in master]
    changes = {  # a master weight alone, a frozen weight, and a trained one as it is computed with
        1: (1, master[id(dict(named_parameters(chunks))[names[-1]])]),
        2: (0, next(p for name, p in named_parameters(chunks) if "vision_model" in name)),
        3: (1, next(p for name, p in named_parameters(chunks) if "vision_projection" in name)),
    }
    for rank, tensor in changes.values():
        flat = tensor.data.view(-1)
        before = flat[-1:].clone()
        if layout.rank == rank:
            flat[-1] = math.nan if rank else math.inf
        found.append(find_not_finite(chunks, optimizer, layout))
        flat[-1:] = before
    return [*found, find_not_finite(chunks, optimizer, layout)]


def test_each_rank_finds_what_one_finds(pool: Pool, trainables: dict[str, Trainable]) -> None:
    one, two = pool.run(2, not_finite, str(trainables["untied"].checkpoint / "release"))
    assert one == two and one[0] is one[-1] is None
    assert [str(name).split(".")[0] for name in one[1:-1]] == [
        "language_model",
        "vision_model",
        "vision_projection",
    ]
