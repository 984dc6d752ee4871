"""Losses that aren't finite, losses that jump, ranks that hang."""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

from megatron_vlm.config.run import RunConfig
from megatron_vlm.hf.convert import import_hf
from megatron_vlm.hf.formats.native import NativeReader
from megatron_vlm.observe.sinks import Sinks
from megatron_vlm.training.batch import BatchReader, GlobalBatch
from megatron_vlm.training.checkpoint import RunState
from megatron_vlm.training.hooks.guards import HUNG, LossGuard
from megatron_vlm.training.step import NonFiniteError, StepResult
from tests.distributed import Pool
from tests.patience import HANG
from tests.training.conftest import Trainable
from tests.training.test_layouts import layout_flags
from tests.training.test_run import CHECKOUT, failure, metrics
from tests.workers import Layout, train

LAYOUTS = [
    Layout(),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2),
    Layout(dp=2),
    Layout(tp=2, dp=2, distributed_optimizer=True),
]


def train_with_a_bad_image(argv: list[str], iteration: int) -> None:
    """Train; the first image of one global batch is not a number."""
    read, calls = BatchReader.next, 0

    def spoil(self: BatchReader) -> GlobalBatch:
        nonlocal calls
        calls += 1
        batch = read(self)
        if calls == iteration and self.layout.dp_rank == 0 and self.layout.is_first_stage:
            batch.microbatches[0].media["image"].inputs["pixel_values"][0] = math.nan
        return batch

    with mock.patch.object(BatchReader, "next", spoil):
        train(argv)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint, the optimizer's moments too."""
    reader = NativeReader(checkpoint)
    return {name: reader.read(name) for name in reader.names}


def test_one_update_left_out(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """Of weights and optimizer not a bit changes, and the run goes on as every layout does."""
    losses = {}
    for layout in LAYOUTS:
        name = str(layout)
        flags = trainables["untied"].flags(tmp_path, name, *layout_flags(layout), "--train-iters", "6")
        flags += ["--nan-policy", "skip", "--train-vision", "--save-optim", "--save-interval", "1"]
        pool.run(layout.world, train_with_a_bad_image, flags, 3)
        lines = metrics(tmp_path / name)
        assert [line["not_finite"] for line in lines] == [0, 0, 1, 1, 1, 1]
        assert [line["loss"] is None for line in lines] == [False, False, True, False, False, False]
        assert lines[2]["grad_norm"] is None and lines[2]["trained_tokens"] > 0
        assert [line["consumed_samples"] for line in lines] == [4, 8, 12, 16, 20, 24]
        losses[name] = [line["loss"] for line in lines if line["loss"] is not None]

        before, left_out, after = (
            tensors(tmp_path / name / "checkpoints" / f"iter_{number:07d}") for number in (2, 3, 4)
        )
        assert before.keys() == left_out.keys() and any("exp_avg_sq" in key for key in before)
        assert all(torch.equal(before[key], left_out[key]) for key in before)
        assert not any(torch.equal(left_out[key], after[key]) for key in before if "exp_avg." in key)
    for name, values in losses.items():
        assert values == pytest.approx(losses["tp1-pp1-dp1"], rel=1e-5), name  # as in test_layouts


def test_always_left_out(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """Ten times in a row is no bad luck."""
    net = transformers.LlavaForConditionalGeneration.from_pretrained(trainables["untied"].hf)
    with torch.no_grad():
        net.lm_head.weight.mul_(3e38)
    shutil.copytree(trainables["untied"].hf, tmp_path / "hf")
    net.save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "megatron", tp=1, pp=1)
    broken = Trainable(tmp_path / "megatron", tmp_path / "hf", trainables["untied"].data, tmp_path)
    flags = broken.flags(tmp_path, "run", "--train-iters", "20", "--nan-policy", "skip")
    message = failure(pool, 2, flags)
    assert "iteration 10: the loss is not finite, like those of the 9 before it" in message
    assert message.partition("samples: ")[2]
    assert [line["not_finite"] for line in metrics(tmp_path / "run")] == list(range(1, 10))


class Alerts:
    """A sink that keeps alerts."""

    def __init__(self) -> None:
        self.iterations: list[int] = []

    def log(self, *args: Any) -> None: ...

    def alert(self, iteration: int, title: str, text: str) -> None:
        self.iterations.append(iteration)

    def close(self, failed: bool) -> None: ...


def watch(losses: list[float], state: RunState, *flags: str) -> list[int]:
    """Iterations at which there was an alert."""
    sinks, alerts = Sinks(), Alerts()
    sinks.sinks["alerts"] = alerts
    layout: Any = SimpleNamespace(rank=0)
    guard = LossGuard(RunConfig.from_flags(flags).logging, layout, state, sinks)
    for loss in losses:
        state.iteration += 1
        guard.watch(StepResult(loss, 1, 1.0))
    assert not sinks.sinks or "alerts" in sinks.sinks  # it has not failed
    return alerts.iterations


def test_spikes(capsys: pytest.CaptureFixture[str]) -> None:
    falling = [10.0 * 0.9**i for i in range(30)]
    assert watch(falling, RunState(), "--alert-spike") == []
    usual = [1.0, 1.2, 0.8] * 10
    jumping = [*usual, 2.1, 2.5, 1.0, 1.9, 2.1]
    assert watch(jumping, RunState()) == []
    state = RunState()
    assert watch(jumping, state, "--alert-spike") == [31, 35]  # once until it is back
    assert state.spikes == 2
    told = "alert: iteration 31: the loss 2.1000 is above 2 x 1.0000, the median of the last 30\n"
    assert told in capsys.readouterr().out
    assert watch(jumping, RunState(), "--alert-spike", "--spike-threshold", "2.3") == [32]
    assert watch([1.0] * 9 + [5.0], RunState(), "--alert-spike") == []  # too few to know what is usual
    # What is usual goes on with a resumed run, and a level that stays is usual in the end.
    resumed = RunState(**{**vars(state), "recent_losses": list(usual)})
    assert watch([2.1, 1.0, 2.1], resumed, "--alert-spike") == [38]  # the last one before was told already
    assert watch([3.0] * 120 + [5.0], RunState(recent_losses=usual), "--alert-spike") == [1]
    assert len(state.recent_losses) <= 100


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--spike-threshold 1", "--spike-threshold 1: must be above 1"),
        ("--watchdog-minutes -1", "--watchdog-minutes -1.0: must be 0 or more"),
        ("--peak-tflops 0", "--peak-tflops 0.0: must be above 0"),
    ],
)
def test_flags(flag: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_flags(flag.split())


@pytest.mark.parametrize("how", ["python", "interpreter"])
def test_a_rank_that_hangs(trainables: dict[str, Trainable], tmp_path: Path, how: str) -> None:
    """Under torchrun. The rank that reads the data hangs, the other one waits for it in a collective."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = trainables["untied"].flags(tmp_path, "run", "--tp", "2", "--train-iters", "4", "--no-save")
    torchrun = [sys.executable, "-m", "megatron_vlm.launch.torchrun", "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(port), "-m", "--", "tests.training.hanging", how, "0"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(
        [*torchrun, *flags], cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=HANG
    )
    stacks = tmp_path / "run" / "logs" / "stacks"
    waiting = (stacks / "rank_1.txt").read_text()
    assert "in share" in waiting and "in broadcast" in waiting
    assert f"the stacks of all its threads are in {stacks / 'rank_1.txt'}" in ended.stderr
    if how == "python":
        stuck = (stacks / "rank_0.txt").read_text()
        assert "in stuck_in_python" in stuck
        assert ended.returncode == HUNG
    else:  # told by the interpreter's own thread, unless torchrun ends the rank before
        assert not (stacks / "rank_0.txt").exists()
        assert ended.returncode != 0
    assert len(metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_broken_weights_are_named_instead_of_the_data(policy: str) -> None:
    """Whatever the policy: without finite weights no sample could be to blame."""
    state = RunState(iteration=4)
    layout: Any = SimpleNamespace(rank=0)
    flags = RunConfig.from_flags(["--nan-policy", policy]).logging
    guard = LossGuard(flags, layout, state, mock.Mock(spec=Sinks), lambda: "language_model.a.weight")
    error = NonFiniteError("loss", [0], StepResult(math.nan, 5, math.nan, updated=False))
    batch: Any = None
    why = "iteration 5: the loss is not finite, since language_model.a.weight holds NaN or infinite values"
    with pytest.raises(ValueError, match=f"^{why}, whatever the data; lower --lr, or go on from an earlier"):
        guard.not_finite(error, batch)
    assert state.not_finite == 0
