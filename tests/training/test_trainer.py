"""Iterations that are left out, and checkpoints that are deleted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_vlm import parallel
from megatron_vlm.config.run import RunConfig
from megatron_vlm.observe.sinks import Sinks
from megatron_vlm.training import run_folder
from megatron_vlm.training.build import begin, build
from megatron_vlm.training.hooks.guards import Watchdog
from megatron_vlm.training.signals import StopRequest
from megatron_vlm.training.step import train_step
from tests.distributed import Pool
from tests.training.conftest import Trainable
from tests.training.test_evaluate import forget
from tests.training.test_layouts import layout_flags
from tests.training.test_run import metrics
from tests.workers import Layout, train

SKIP = ["--skip-train-iteration-range", "7-7", "3-4"]


def losses_without(argv: list[str], dropped: set[int]) -> list[float]:
    """Losses of a run on one rank whose global batches ``dropped`` (0 is the first) never come."""
    config = RunConfig.from_flags(argv)
    layout = parallel.initialize()
    start = run_folder.choose_start(config, Path(config.checkpoint.run_dir))
    run = begin(config, layout, start, Sinks(), Watchdog(Path(), 0, 0.0), StopRequest())
    with closing(build(run)) as parts:
        source = parts.reader.source
        assert source is not None

        def others() -> Iterator[Any]:
            for number, microbatch in enumerate(source):
                if number // parts.reader.num_microbatches not in dropped:
                    yield microbatch

        parts.reader.source = others()
        losses = []
        for iteration in range(1, run.total_iterations + 1):
            batch, rates = parts.reader.next(), parts.rates(iteration)
            losses.append(train_step(parts.models, parts.optimizer, batch, layout, rates).loss)
    return losses


def test_skipped_iterations(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """As if their batches had been taken out by hand, at other layouts and after a resume too."""
    one = trainables["untied"]
    constant = ["--lr-decay-style", "constant"]
    (expected,) = pool.run(
        1, losses_without, one.flags(tmp_path, "dropped", *constant, "--train-iters", "6"), {2, 3, 6}
    )
    flags = [*constant, *SKIP, "--train-iters", "9", "--save-optim", "--save-interval", "3"]
    for layout in (Layout(), Layout(pp=2), Layout(dp=2, distributed_optimizer=True)):
        argv = one.flags(tmp_path, str(layout), *flags, *layout_flags(layout))
        run = tmp_path / str(layout)
        pool.run(layout.world, train, argv)
        if layout.world == 1:  # go on from within the first range
            forget(run, 9)
            forget(run, 6)
            pool.run(1, train, argv)
        lines = metrics(run)
        assert [line["iteration"] for line in lines] == [1, 2, 5, 6, 8, 9]
        assert [line["skipped"] for line in lines] == [0, 0, 2, 2, 3, 3]
        assert [line["consumed_samples"] for line in lines] == [4, 8, 20, 24, 32, 36]
        # One rank takes the same steps; other layouts as in test_layouts.py.
        allowed = 0.0 if layout.world == 1 else 1e-5
        assert [line["loss"] for line in lines] == pytest.approx(expected, rel=allowed, abs=0)


def test_learning_rates_of_parts(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """They are in the metrics where one has a rate of its own."""
    flags = ["--train-modules", "projector:1e-3|language", "--train-iters", "2", "--no-save"]
    flags += ["--min-lr", "0", "--lr-decay-style", "linear", "--lr-decay-iters", "2"]
    pool.run(1, train, trainables["untied"].flags(tmp_path, "run", *flags))
    lines = metrics(tmp_path / "run")
    assert [line["lr"] for line in lines] == [2e-3, 1e-3]
    assert [line["lr/language"] for line in lines] == [2e-3, 1e-3]
    assert [line["lr/projector"] for line in lines] == [1e-3, 5e-4]
    pool.run(1, train, trainables["untied"].flags(tmp_path, "one rate", *flags[2:]))
    assert not any(name.startswith("lr/") for name in metrics(tmp_path / "one rate")[0])


def beats(argv: list[str]) -> int:
    with mock.patch.object(Watchdog, "beat") as beat:
        train(argv)
    return beat.call_count


def test_the_watchdog_hears_of_skipped_iterations(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    """Reading what thousands of them would have trained on takes a while."""
    flags = trainables["untied"].flags(tmp_path, "run", "--train-iters", "5", "--no-save")
    (calm,), (skipping,) = (pool.run(1, beats, [*flags, *more]) for more in ([], [*SKIP, "1-2"]))
    assert skipping == calm


def test_the_schedule_goes_on_over_skipped_iterations(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    """The last iteration of a range is also saved, and the last one of a run."""
    one, run = trainables["untied"], tmp_path / "skipping"
    flags = ["--train-iters", "8", "--save-optim", "--save-interval", "4"]
    pool.run(1, train, one.flags(tmp_path, "all", *flags, "--no-save-optim", "--no-save"))
    pool.run(1, train, one.flags(tmp_path, "skipping", *flags, *SKIP, "8-8"))
    rates = {line["iteration"]: line["lr"] for line in metrics(tmp_path / "all")}
    assert [line["lr"] for line in metrics(run)] == [rates[i] for i in (1, 2, 5, 6)]
    for iteration, steps in ((4, 2), (8, 4)):
        saved = run / "checkpoints" / f"iter_{iteration:07d}" / "run_state.json"
        found = json.loads(saved.read_text())
        assert (found["optimizer_steps"], found["skipped"]) == (steps, iteration - steps)


def test_old_checkpoints_are_deleted(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    one, root = trainables["untied"], tmp_path / "run" / "checkpoints"

    def kept() -> list[int]:
        return sorted(int(path.name[5:]) for path in root.glob("iter_*"))

    flags = one.flags(tmp_path, "run", "--save-optim", "--save-interval", "1", "--keep-checkpoints", "2")
    pool.run(1, train, [*flags, "--train-iters", "4"])
    assert kept() == [3, 4]
    # What was loaded stays while the run may need it, and what the run can go on from.
    pool.run(1, train, [*flags, "--train-iters", "8", "--no-save-optim"])
    assert kept() == [4, 7, 8]
    pool.run(1, train, [*flags, "--train-iters", "6"])
    assert not list(root.glob(".iter_*"))
