"""Evaluation while training changes nothing, finds what transformers finds, and a run can decide by it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import resolve_checkpoint
from megatron_vlm.artifacts.dataset import split_parts
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.batch import IGNORE_INDEX
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.data.loading.loader import ValidationLoader
from megatron_vlm.data.processing import build_processing
from megatron_vlm.hf.convert import export_hf
from megatron_vlm.plan.data_order import held_out_identity
from tests.distributed import Pool
from tests.media import pixels as pixels_of
from tests.training.conftest import Trainable
from tests.training.test_layouts import layout_flags
from tests.training.test_run import failure, metrics
from tests.workers import Layout, train

# Not a divisor of the 20 samples of the val split, of which one is damaged: the last rows are padding.
EVALUATE = ["--eval-interval", "2", "--micro-batch-size", "3", "--global-batch-size", "12"]
SAVE = ["--save-optim", "--save-interval", "2"]


def validations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = re.compile("second|tflops|memory|hours")
    return [{k: v for k, v in line.items() if not timed.search(k)} for line in lines]


def forget(run: Path, iteration: int) -> None:
    """Leave a run folder as after a kill before ``iteration`` was saved."""
    shutil.rmtree(run / "checkpoints" / f"iter_{iteration:07d}")


def state(run: Path, iteration: int) -> dict[str, Any]:
    file = run / "checkpoints" / f"iter_{iteration:07d}" / "run_state.json"
    return without_times([json.loads(file.read_text())])[0]


def position(checkpoint: Path) -> dict[str, Any]:
    """Return where each loader worker is; not how it notes that."""
    workers = json.loads((checkpoint / "data_state.json").read_text())
    return {worker: (of["microbatches"], of["counts"]) for worker, of in workers.items()}


def test_training_is_the_same_with_and_without(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    """Losses bit for bit, random state and data position, also across a resume."""
    one = trainables["untied"]
    flags = [*SAVE, "--save-interval", "3", "--train-iters", "7"]
    batches = EVALUATE[2:]
    pool.run(2, train, one.flags(tmp_path, "without", *flags, *batches))
    pool.run(2, train, one.flags(tmp_path, "with", *flags, *EVALUATE))
    resumed = one.flags(tmp_path, "resumed", *flags, *EVALUATE)
    pool.run(2, train, resumed)
    forget(tmp_path / "resumed", 7)
    forget(tmp_path / "resumed", 6)
    pool.run(2, train, resumed)

    calm = without_times(metrics(tmp_path / "without"))
    assert [line["iteration"] for line in calm] == list(range(1, 8))
    for name in ("with", "resumed"):
        assert without_times(metrics(tmp_path / name)) == calm
        end, expected = (tmp_path / run / "checkpoints" / "iter_0000007" for run in (name, "without"))
        assert position(end) == position(expected)
        for rank in ("rank_00000.pt", "rank_00001.pt"):
            own, other = (torch.load(run / "rng" / rank) for run in (end, expected))
            assert torch.equal(own["torch"], other["torch"]) and own["python"] == other["python"]
            assert all(torch.equal(own["tracker"][key], other["tracker"][key]) for key in other["tracker"])

    found = without_times(validations(tmp_path / "with"))
    assert [line["iteration"] for line in found] == [2, 4, 6, 7]
    assert {line["samples"] for line in found} == {19}
    assert without_times(validations(tmp_path / "resumed")) == found
    assert state(tmp_path / "resumed", 7) == state(tmp_path / "with", 7)
    assert state(tmp_path / "with", 7)["best_iteration"] == 7


def reference_loss(hf: Path, data: Path, samples: int | None) -> tuple[float, int]:
    """transformers' mean loss per trained token over the val split, sample by sample; and their number."""
    flags = ["--tokenizer-load-dir", str(hf), "--data-path", str(data), "--seq-length", "96", "--lang", "en"]
    processing = build_processing(RunConfig.from_flags(flags), ModelConfig.from_hf_dir(str(hf)))
    processor = transformers.AutoImageProcessor.from_pretrained(hf, use_fast=False)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(hf).eval()
    loader = ValidationLoader(
        PreparedDataset.open(str(data), "val"),
        processing,
        dp_rank=0,
        dp_size=1,
        micro_batch_size=1,
        max_samples=samples,
    )
    total, trained = 0.0, 0
    for microbatch in loader:
        pixels = None
        if microbatch.media:  # cropped already: what is left is to scale and to normalise
            pixels = processor(
                list(pixels_of(microbatch)), do_resize=False, do_center_crop=False, return_tensors="pt"
            )["pixel_values"]
        with torch.no_grad():
            logits = model(input_ids=microbatch.input_ids, pixel_values=pixels).logits
        labels = microbatch.labels.flatten()
        total += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).double(), labels, ignore_index=IGNORE_INDEX, reduction="sum"
            )
        )
        trained += int((labels != IGNORE_INDEX).sum())
    loader.close()
    return total / trained, trained


def test_equals_transformers_and_the_best_is_kept(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    """``best`` exports to the model whose loss it names, whatever is saved or deleted besides."""
    one, run = trainables["untied"], tmp_path / "run"
    flags = ["--train-iters", "7", "--save-interval", "4", "--keep-checkpoints", "1"]
    flags += ["--lr", "2e-1", "--lr-decay-style", "constant"]  # the loss goes up and down
    pool.run(1, train, one.flags(tmp_path, "run", *EVALUATE, *flags, "--eval-interval", "1"))
    found = validations(run)
    best = min(found, key=lambda line: line["loss"])
    assert best["iteration"] < 7 and best["iteration"] % 4 != 0, "choose another --lr"
    assert json.loads((run / "best" / "best.json").read_text()) == {
        "iteration": best["iteration"],
        "loss": best["loss"],
    }
    assert resolve_checkpoint(run / "best").name == f"iter_{best['iteration']:07d}"
    assert [path.name for path in (run / "best").glob("*iter_*")] == [resolve_checkpoint(run / "best").name]
    assert [path.name for path in (run / "checkpoints").glob("*iter_*")] == ["iter_0000007"]

    for name, line in ((run / "best", best), (run, found[-1])):
        hf = tmp_path / f"hf-{line['iteration']}"
        export_hf(name, hf)
        loss, trained = reference_loss(hf, one.data, None)
        assert line["trained_tokens"] == trained and line["samples"] == 19
        # fp32 against fp32 with sums in another order.
        assert line["loss"] == pytest.approx(loss, rel=1e-5)

    again = one.flags(tmp_path, "again", *EVALUATE, "--train-iters", "2", "--lr", "0", "--no-save")
    pool.run(1, train, [*again, "--megatron-load-dir", str(run / "best"), "--eval-iters", "1"])
    loss, trained = reference_loss(tmp_path / f"hf-{best['iteration']}", one.data, 12)
    (line,) = validations(tmp_path / "again")
    assert (line["trained_tokens"], line["samples"]) == (trained, 11)
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert not (tmp_path / "again" / "best").exists()


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, sequence_parallel=True),
        Layout(pp=2),
        Layout(dp=2, distributed_optimizer=True),
        Layout(dp=4),
        Layout(pp=2, dp=2),
        Layout(pp=2, vpp=2),
    ],
    ids=str,
)
def test_layouts(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path, layout: Layout) -> None:
    """Whatever the shares of the ranks are: the same samples, tokens and loss as one rank's."""
    one = trainables["untied" if layout.vpp == 1 else "deep"]
    for iters in ("0", "1"):
        flags = [*EVALUATE, "--eval-iters", iters, "--train-iters", "2", "--no-save", "--data-workers", "4"]
        runs = []
        for at in (Layout(), layout):
            name = f"{at}-{iters}"
            pool.run(at.world, train, one.flags(tmp_path, name, *flags, *layout_flags(at)))
            runs.append(validations(tmp_path / name)[0])
        expected, found = runs
        assert (found["samples"], found["trained_tokens"]) == (
            expected["samples"],
            expected["trained_tokens"],
        )
        # As in test_layouts.py.
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def train_without_loading(argv: list[str]) -> None:
    with mock.patch("megatron_vlm.training.build.load_weights", side_effect=AssertionError):
        train(argv)


def test_early_stopping(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """With learning rate 0 nothing improves: a patience of 2 ends at the third evaluation, resumed or not."""
    run = tmp_path / "run"
    flags = [*SAVE, "--train-iters", "20", "--lr", "0", "--eval-interval", "1", "--eval-iters", "1"]
    flags = trainables["untied"].flags(tmp_path, "run", *flags, "--early-stopping-patience")
    pool.run(1, train, [*flags, "2"])
    assert [line["iteration"] for line in validations(run)] == [1, 2, 3]
    assert json.loads((run / "best" / "best.json").read_text())["iteration"] == 1
    before = state(run, 3)
    forget(run, 3)
    pool.run(1, train, [*flags, "2"])
    assert state(run, 3) == before and before["evaluations_without_improvement"] == 2
    lines = (run / "metrics.jsonl").read_bytes()
    pool.run(1, train_without_loading, [*flags, "2"])
    assert (run / "metrics.jsonl").read_bytes() == lines
    pool.run(1, train, [*flags, "3"])
    assert [line["iteration"] for line in metrics(run)] == [1, 2, 3, 4]


def test_iterations_without_an_update_are_no_reason_to_stop(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    """The weights are as they were at the last evaluation, so there is nothing to evaluate."""
    flags = ["--train-iters", "8", "--eval-interval", "1", "--eval-iters", "1", "--lr", "0"]
    flags += ["--early-stopping-patience", "2", "--skip-train-iteration-range", "1-1", "3-7", *SAVE]
    argv = trainables["untied"].flags(tmp_path, "run", *flags)
    pool.run(1, train, argv)
    assert [line["iteration"] for line in validations(tmp_path / "run")] == [1, 2, 8]
    for iteration in (8, 6):
        forget(tmp_path / "run", iteration)
    pool.run(1, train, argv)
    assert [line["iteration"] for line in validations(tmp_path / "run")] == [1, 2, 8]


def test_without_held_out_samples(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    shutil.copytree(trainables["untied"].data, tmp_path / "data")
    split = tmp_path / "data" / ".nv-meta" / "split.yaml"
    text = split.read_text()
    split.write_text(text[: text.index("  val:")] + "  val: []\n" + text[text.index("  test:") :])
    flags = trainables["untied"].flags(tmp_path, "run", "--train-iters", "1", "--eval-interval", "1")
    message = failure(pool, 2, [*flags, "--data-path", str(tmp_path / "data")])
    assert message.startswith("--eval-interval needs held-out samples. --data-path ")
    assert "its val split is empty" in message and "energon prepare" in message


def test_other_held_out_samples(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """A run that goes on would compare losses that can't be compared: another shard, or a dataset less."""
    one = trainables["untied"]
    data = shutil.copytree(one.data, tmp_path / "data")

    def write(text: str) -> None:
        mixture = f"datasets:\n  pictures: {{path: data}}\n  text: {{path: {one.text_only}{text}}}\n"
        (tmp_path / "mix.yaml").write_text(mixture)

    write("")
    flags = [*SAVE, "--eval-interval", "1", "--eval-iters", "1", "--data-path", str(tmp_path / "mix.yaml")]
    pool.run(1, train, one.flags(tmp_path, "run", *flags, "--train-iters", "2"))
    flags = one.flags(tmp_path, "run", *flags, "--train-iters", "4")
    saved = json.loads((tmp_path / "run/checkpoints/iter_0000002/run_state.json").read_text())
    assert saved["held_out"] == held_out_identity(str(tmp_path / "mix.yaml"))  # as the launcher knows it
    write(", val: false")
    message = failure(pool, 2, flags)
    assert message.startswith(
        "the held-out samples changed since the checkpoint (dataset text (epochs 1) is gone)"
    )
    assert "go on with the old ones, or start a new run" in message
    write("")
    (shard,) = [data / name for name in split_parts(str(data))["val"]]
    with open(shard, "ab") as file:
        file.write(b"\0" * 512)
    assert "(other shards, or prepared again)" in failure(pool, 2, flags)
    os.truncate(shard, shard.stat().st_size - 512)
    pool.run(2, train, flags)
    assert [line["iteration"] for line in validations(tmp_path / "run")] == [1, 2, 3, 4]
