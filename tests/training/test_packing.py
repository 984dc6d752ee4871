"""Training on packed sequences: the same as on their samples apart, at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import Pool
from tests.training.conftest import Trainable
from tests.training.test_evaluate import forget, position, validations, without_times
from tests.training.test_layouts import layout_flags, run
from tests.training.test_run import metrics
from tests.workers import Layout, packed_and_apart, train

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
    """Within 1e-5 of one rank, through the trainer, with interleaved stages too."""
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


def test_a_mixture_goes_on_at_another_data_parallel_size(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    """Every later global batch is the one that it would have been: the counts of samples, tokens and damaged
    images of each dataset tell."""
    one = trainables["untied"]
    (tmp_path / "mix.yaml").write_text(
        f"datasets:\n  pictures: {{path: {one.data}}}\n  text: {{path: {one.text_only}, epochs: 2}}\n"
    )
    flags = [*PACKING, "--data-path", str(tmp_path / "mix.yaml"), "--train-iters", "8"]
    flags += ["--save-optim", "--save-interval", "4"]
    pool.run(1, train, one.flags(tmp_path, "calm", *flags))
    expected = without_times(metrics(tmp_path / "calm"))
    unknown = [name for name, value in expected[0].items() if value is None]
    assert expected[-1]["corrupt"] > expected[3]["corrupt"] > 0
    calm = tmp_path / "calm/checkpoints/iter_0000008"
    run = tmp_path / "run"
    for world in (2, 4, 1):
        pool.run(world, train, one.flags(tmp_path, "run", *flags))
        for line, other in zip(without_times(metrics(run)), expected, strict=True):
            # fp32 sums in another order, as in test_layouts.py; what is counted is equal.
            assert all(line.pop(name) == other[name] for name in unknown)
            assert line == {name: pytest.approx(other[name], rel=1e-5) for name in line}
        assert position(run / "checkpoints/iter_0000008") == position(calm)
        forget(run, 8)


def test_evaluations_pack_nothing(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """Their losses are those of a run without packing."""
    one = trainables["untied"]
    flags = [
        "--train-iters",
        "1",
        "--lr",
        "0",
        "--eval-interval",
        "1",
        "--no-save",
        "--micro-batch-size",
        "3",
    ]
    flags += ["--global-batch-size", "6", "--seq-length", "200"]
    pool.run(1, train, one.flags(tmp_path, "apart", *flags))
    layout = Layout(pp=2)
    packed = [*flags, "--packing", "--packing-buffer-size", "20", *layout_flags(layout)]
    pool.run(layout.world, train, one.flags(tmp_path, "packed", *packed))
    (expected,), (found,) = (without_times(validations(tmp_path / name)) for name in ("apart", "packed"))
    assert metrics(tmp_path / "packed")[0]["samples"] > 6
    assert found == pytest.approx(expected, rel=1e-5)
