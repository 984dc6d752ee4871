"""Training on packed sequences: the same as on their samples apart, at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import Pool
from tests.training.conftest import Trainable
from tests.training.test_layouts import layout_flags, run
from tests.training.test_run import metrics
from tests.workers import Layout, packed_and_apart

# An iteration has 4 micro batches of 2 sequences each, of samples with and without images.
PACKING = [
    "--packing",
    "--packing-buffer-size",
    "20",
    "--seq-length",
    "200",
    "--stage",
    "2",
    "--train-vision",
]
PACKING += ["--global-batch-size", "8", "--data-workers", "4"]
LAYOUTS = [
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2),
    Layout(pp=4),
    Layout(dp=2, distributed_optimizer=True),
    Layout(tp=2, pp=2, sequence_parallel=True, recompute="full"),
    Layout(pp=2, dp=2),
    Layout(tp=2, dp=2, sequence_parallel=True, distributed_optimizer=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_samples_train_like_samples_apart(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path, layout: Layout
) -> None:
    """Loss and every gradient, from what the loader gives: nothing is seen across samples, on any stage."""
    trainable = trainables["deep"]
    argv = trainable.flags(tmp_path, "run", *PACKING, *layout_flags(layout), "--train-iters", "1")
    for packed, apart in pool.run(layout.world, packed_and_apart, argv):
        assert packed[0] == pytest.approx(apart[0], rel=1e-6)
        assert packed[1] == apart[1] > 100
        total = torch.stack([gradient.norm() for gradient in apart[2].values()]).norm()
        for name, expected in apart[2].items():
            # fp32 sums in another order; relative to the rank's gradients, of which some are zero in theory.
            allowed = 1e-5 * max(float(expected.norm()), 1e-2 * float(total))
            assert float((packed[2][name] - expected).norm()) <= allowed, name


def test_every_layout_trains_alike_on_packed_sequences(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    """20 iterations within 1e-5 of one rank, through the trainer, with interleaved stages too."""
    trainable = trainables["deep"]
    expected = run(pool, Layout(), trainable, tmp_path, "one", *PACKING, "--no-save")
    for layout in (
        Layout(dp=4, distributed_optimizer=True),
        Layout(tp=2, pp=2, vpp=2, sequence_parallel=True, recompute="selective"),
    ):
        losses = run(pool, layout, trainable, tmp_path, str(layout), *PACKING, "--no-save")
        assert losses == pytest.approx(expected, rel=1e-5)
    for line in metrics(tmp_path / "one"):
        assert line["samples"] > 12 and line["samples_per_sequence"] == line["samples"] / 8
        assert line["tokens"] <= 8 * 200
    last = metrics(tmp_path / "one")[-1]
    assert last["consumed_samples"] == sum(line["samples"] for line in metrics(tmp_path / "one"))
    assert last["padding"] == 0.0
    # Stages take micro batches of one length: the shorter ones are padded.
    assert 0.0 < metrics(tmp_path / str(layout))[-1]["padding"] < 0.3
