"""Checkpoints of trained weights only: killed and resumed, trained on, exported, and their base moved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vlm.artifacts.checkpoint import checkpoint_layers, read_manifest
from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.hf.verify import verify
from tests.distributed import Pool
from tests.patience import wait_until
from tests.tiny import save_llava
from tests.training.conftest import Trainable
from tests.training.test_kill import lines
from tests.training.test_run import CHECKOUT, failure, script
from tests.workers import train

STAGE_1 = ["--stage", "1", "--save-optim"]
PROJECTOR = {f"vision_projection.encoder.linear_fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_stage_1_is_killed_and_resumed(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """From the projector alone, and at another layout; losses are a calm run's."""
    one, run = trainables["untied"], tmp_path / "killed"
    length = ["--train-iters", "40", "--save-interval", "4"]
    pool.run(1, train, one.flags(tmp_path, "calm", *STAGE_1, *length))

    flags = one.flags(tmp_path, "killed", *STAGE_1, *length, "--save-trained-only")
    command = [sys.executable, "-m", "megatron_vlm.training", *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=CHECKOUT) as started:
        wait_until(lambda: lines(run) >= 6 or started.poll() is not None, "6 iterations")
        started.kill()
    assert 6 <= lines(run) < 40
    left = max((run / "checkpoints").glob("iter_*"))
    assert set(read_manifest(left)["tensors"]) == PROJECTOR
    assert checkpoint_layers(left) == [one.checkpoint / "release", left]
    full = tmp_path / "calm" / "checkpoints" / left.name
    weights = [sum(file.stat().st_size for file in folder.glob("*.distcp")) for folder in (left, full)]
    assert weights[0] < weights[1] / 3

    pool.run(2, train, [*flags, "--tp", "2"])
    # As in test_layouts: 3e-7 was seen.
    assert losses(run) == pytest.approx(losses(tmp_path / "calm"), rel=1e-5)


def test_stage_2_and_export(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """Going on from a checkpoint of trained weights is going on from one of all weights, bit for bit."""
    one, only = trainables["tied"], "--save-trained-only"
    runs = {"all": [], "only": [only]}
    for name, more in runs.items():
        flags = one.flags(tmp_path, f"{name}-1", *STAGE_1, "--train-iters", "4", *more)
        pool.run(2, train, [*flags, "--pp", "2", "--dist-optim"])
        from_there = replace(one, checkpoint=tmp_path / f"{name}-1")
        both = from_there.flags(tmp_path, f"{name}-2", "--stage", "2", "--train-iters", "3", *more)
        pool.run(2, train, [*both, "--pp", "2"])
        # The projector of stage 1 isn't trained here: such a checkpoint lies over that of stage 1.
        language = ["--train-modules", "language.layers.1", "--train-iters", "3", *more]
        pool.run(2, train, [*from_there.flags(tmp_path, f"{name}-3", *language), "--tp", "2"])
        for stage in (1, 2, 3):
            export_hf(tmp_path / f"{name}-{stage}", tmp_path / f"hf-{name}-{stage}")
    for stage in (1, 2, 3):
        assert losses(tmp_path / f"only-{stage}") == losses(tmp_path / f"all-{stage}")
        assert verify(tmp_path / f"hf-all-{stage}", tmp_path / f"hf-only-{stage}") > 0
    last = {stage: checkpoint_layers(tmp_path / f"only-{stage}")[-1] for stage in (1, 2, 3)}
    release = one.checkpoint / "release"
    assert checkpoint_layers(last[2]) == [release, last[2]]
    assert checkpoint_layers(last[3]) == [release, last[1], last[3]]
    assert "vision_model.class_token" not in read_manifest(last[2])["tensors"]
    # With everything trained there is nothing to leave out.
    pool.run(1, train, one.flags(tmp_path, "whole", "--train-modules", "all", "--train-iters", "1", only))
    assert len(checkpoint_layers(tmp_path / "whole")) == 1


def test_the_base_has_moved(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    moved, other = tmp_path / "moved", tmp_path / "other"
    one = replace(trainables["untied"], checkpoint=tmp_path / "megatron")
    shutil.copytree(trainables["untied"].checkpoint, one.checkpoint)
    pool.run(1, train, one.flags(tmp_path, "run", *STAGE_1, "--train-iters", "2", "--save-trained-only"))
    one.checkpoint.rename(moved)
    # The same model converted again, for another layout, is the same base; one with other weights isn't.
    import_hf(one.hf, tmp_path / "again", tp=2, pp=1)
    save_llava(tmp_path / "hf", tie_word_embeddings=False, seed=6)
    import_hf(tmp_path / "hf", other, tp=1, pp=1)

    run = tmp_path / "run"
    for name in ("train/run.py", "convert/convert_megatron_to_hf.py"):
        argv = ["--megatron-dir", run, "--hf-dir", tmp_path / "lost"]
        if name == "train/run.py":
            argv = replace(one, checkpoint=run).flags(tmp_path, "next", "--train-iters", "1")
        answer = script(name, *argv)
        assert answer.returncode == 2
        (line,) = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
        assert "holds trained weights only" in line and "--base" in line and str(one.checkpoint) in line
    with pytest.raises(ValueError, match=r"was trained from other weights than .*; say with --base"):
        export_hf(run, tmp_path / "wrong", base=other)
    with pytest.raises(ValueError, match="holds trained weights only; give the checkpoint under it"):
        export_hf(run, tmp_path / "wrong", base=run)

    for number, base in enumerate((moved, tmp_path / "again")):
        export_hf(run, tmp_path / f"hf-{number}", base=base)
    assert verify(tmp_path / "hf-0", tmp_path / "hf-1") > 0

    flags = replace(one, checkpoint=run).flags(tmp_path, "next", *STAGE_1, "--train-iters", "1")
    assert "was trained from other weights" in failure(pool, 2, [*flags, "--base", str(other)])
    pool.run(2, train, [*flags, "--save-trained-only", "--base", str(moved)])
    assert checkpoint_layers(tmp_path / "next")[0] == moved / "release"


def test_retention_keeps_the_base(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """Whether it is a checkpoint of the run itself or of another one."""
    one = trainables["untied"]
    keeping = [*STAGE_1, "--save-interval", "1", "--keep-checkpoints", "1", "--train-iters"]
    flags = one.flags(tmp_path, "run", *keeping)
    pool.run(1, train, [*flags, "1"])
    over = replace(one, checkpoint=tmp_path / "run").flags(tmp_path, "other", *STAGE_1, "--train-iters", "1")
    pool.run(1, train, [*flags, "2"])  # what was loaded stays
    pool.run(1, train, [*over, "--save-trained-only"])
    # From here on its checkpoints lie over the second, of all weights; the third is loaded, then not.
    for length in ("3", "4"):
        pool.run(1, train, [*flags, length, "--save-trained-only"])
    names = [folder.name for folder in sorted((tmp_path / "run" / "checkpoints").glob("iter_*"))]
    assert names == ["iter_0000002", "iter_0000003", "iter_0000004"]
    pool.run(1, train, [*flags, "5", "--save-trained-only"])
    assert len(checkpoint_layers(tmp_path / "run")) == len(checkpoint_layers(tmp_path / "other")) == 2


def test_adapters(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """LoRA's checkpoints are adapters and projector, and go on and merge as those of all weights do."""
    one = trainables["untied"]
    for name, more in (("all", []), ("only", ["--save-trained-only"])):
        flags = one.flags(tmp_path, name, "--lora-rank", "2", "--save-optim", *more)
        pool.run(2, train, [*flags, "--train-iters", "2", "--pp", "2"])
        pool.run(2, train, [*flags, "--train-iters", "4", "--tp", "2"])
        export_hf(tmp_path / name, tmp_path / f"hf-{name}")
    tensors = read_manifest(tmp_path / "only")["tensors"]
    assert {name for name in tensors if "lora_" not in name} == PROJECTOR
    assert losses(tmp_path / "only") == losses(tmp_path / "all")
    assert verify(tmp_path / "hf-all", tmp_path / "hf-only") > 0
