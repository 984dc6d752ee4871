"""Where a start of a run begins, what it may change, and what it needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_vlm.artifacts.checkpoint import FILES, RUN_CONFIG, read_manifest, write_manifest
from megatron_vlm.artifacts.image_rule import FIRST_RULE
from megatron_vlm.config.run import RunConfig
from megatron_vlm.launch import preflight
from megatron_vlm.launch.launch_plan import make_plan
from megatron_vlm.plan.start import Start, check_same_run, first_image_rule
from tests.distributed import Pool
from tests.training.conftest import Trainable
from tests.training.test_evaluate import state
from tests.training.test_run import failure, metrics
from tests.workers import train


def compare(folder: Path, before: list[str], after: list[str], resumes: bool = True) -> str:
    RunConfig.from_flags(before).save(str(folder / "run_config.json"))
    start = Start(folder, True, "", with_position=True, resumes=resumes)
    return check_same_run(RunConfig.from_flags(after), start)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--seed", "7"],
            "--seed 7 would change the order of the data within the run; go on with --seed 1234",
        ),
        (
            ["--global-batch-size", "256"],
            "--global-batch-size 256 would .* go on with --global-batch-size 128",
        ),
        (["--micro-batch-size", "2"], "--micro-batch-size 2 would change the order"),
        (["--shuffle-buffer-size", "5"], "--shuffle-buffer-size 5 would change the order"),
        (["--packing"], "--packing would change .* go on with --no-packing"),
        (["--group-by-length"], "--group-by-length would change .* go on with --no-group-by-length"),
        (["--stage", "1"], "--stage 1 trains other parts of the model than --stage 2, with which"),
        (["--freeze-lm"], "--freeze-lm trains other parts of the model than --no-freeze-lm"),
    ],
)
def test_what_a_run_keeps(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*, or start a new run from its weights: another --name"):
        compare(tmp_path, [], flags)


def test_the_other_precision(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its optimizer state is of --bf16; go on with that"):
        compare(tmp_path, ["--bf16"], ["--fp32"])
    compare(tmp_path, ["--fp32"], [])  # the weights will tell


def test_the_other_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--stage 2 trains other parts of the model than --stage 1"):
        compare(tmp_path, ["--stage", "1"], ["--stage", "2"])
    assert compare(tmp_path, [], ["--stage", "2"]) == ""
    vision = ["--train-modules", "projector|language|vision"]
    slower = ["--train-modules", "projector|language|vision:1e-6"]
    assert compare(tmp_path, vision, slower).startswith("changed")
    with pytest.raises(
        ValueError,
        match=r"--train-modules projector.* trains other parts of the model than no --train-modules",
    ):
        compare(tmp_path, [], vision)
    # A new run may train other parts with the optimizer state that there is.
    batches = ["--micro-batch-size", "1", "--global-batch-size", "128", "--lr", "2e-5"]
    assert "--stage 2 -> 1" in compare(tmp_path, [], ["--stage", "1", *batches], resumes=False)


def test_what_a_run_may_change(tmp_path: Path) -> None:
    flags = ["--template", "v1", "--seq-length", "2048", "--lang", "en", "--lr", "1e-5", "--tp", "2"]
    assert compare(tmp_path, ["--lr", "1e-4"], [*flags, "--save-dir", "elsewhere"]) == (
        "changed since the checkpoint: --seq-length 1024 -> 2048, --template None -> v1, --lang jp -> en, "
        "--lr 0.0001 -> 1e-05"
    )


def test_how_a_run_reads_images(tmp_path: Path) -> None:
    """One that was begun before there was a choice goes on as it began, unless the flags say otherwise."""
    assert compare(tmp_path, [], []) == ""
    assert compare(tmp_path, [], ["--image-orientation", "stored", "--image-alpha", "white"]) == ""
    turned = ["--image-orientation", "exif"]
    assert compare(tmp_path, [], turned) == (
        "changed since the checkpoint: --image-orientation stored -> exif"
    )
    assert compare(tmp_path, turned, ["--image-alpha", "drop"]) == (
        "changed since the checkpoint: --image-alpha white -> drop"
    )
    packing = ["--packing", "--train-iters", "10"]
    with pytest.raises(ValueError, match="--image-orientation exif would change the order of the data"):
        compare(tmp_path, packing, [*packing, *turned])


def test_a_run_outlives_what_it_started_from(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    one = trainables["untied"]
    shutil.copytree(one.checkpoint, tmp_path / "source")
    flags = one.flags(tmp_path, "run", "--save-optim", "--megatron-load-dir", str(tmp_path / "source"))
    pool.run(1, train, [*flags, "--train-iters", "1"])
    shutil.rmtree(tmp_path / "source")
    # A run of before there was a choice of how images are read, which it keeps.
    saved_config = next((tmp_path / "run").glob(f"checkpoints/*/{RUN_CONFIG}"))
    values = json.loads(saved_config.read_text())
    assert values["data"].pop("image_orientation") == "exif" and values["data"].pop("image_alpha") == "drop"
    saved_config.write_text(json.dumps(values))
    manifest = read_manifest(saved_config.parent)  # nor had it hashes
    write_manifest(saved_config.parent, {key: manifest[key] for key in manifest if key != FILES})
    config = RunConfig.from_flags([*flags, "--train-iters", "2"])
    assert preflight.inspect(make_plan(config, {"CUDA_VISIBLE_DEVICES": ""})).problems == []
    pool.run(1, train, config.to_flags())
    assert [line["iteration"] for line in metrics(tmp_path / "run")] == [1, 2]
    data = RunConfig.load(str(tmp_path / "run" / "config.json")).data
    assert (data.image_orientation, data.image_alpha) == ("stored", "white")
    assert first_image_rule(config) == FIRST_RULE  # what a preview of it shows
    message = failure(pool, 1, [*flags, "--train-iters", "2", "--restart"])
    assert message == f"--megatron-load-dir {tmp_path / 'source'}: no such checkpoint folder"
    restart = RunConfig.from_flags([*flags, "--restart"])
    assert message in preflight.inspect(make_plan(restart, {"CUDA_VISIBLE_DEVICES": ""})).problems


def test_optimizer_state_for_other_data(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """Moments and step count go on; iterations, schedule and data begin anew."""
    one = trainables["untied"]
    pool.run(1, train, one.flags(tmp_path, "run", "--save-optim", "--train-iters", "3"))
    flags = ["--megatron-load-dir", str(tmp_path / "run"), "--data-path", str(one.text_only)]
    flags += ["--train-iters", "2", "--save-optim"]
    losses = []
    for name, more in (("cold", []), ("warm", ["--load-optim"])):
        pool.run(1, train, one.flags(tmp_path, name, *flags, *more))
        lines = metrics(tmp_path / name)
        assert [line["iteration"] for line in lines] == [1, 2]
        assert [line["consumed_samples"] for line in lines] == [4, 8]
        losses.append([line["loss"] for line in lines])
        assert state(tmp_path / name, 2)["optimizer_steps"] == (5 if more else 2)
    cold, warm = losses
    assert cold[0] == warm[0] and cold[1] != warm[1]
