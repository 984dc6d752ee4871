"""Loss and counts of a mixture by dataset: parts of a whole, as each has alone, equal at every layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import Pool
from tests.training.conftest import Trainable
from tests.training.test_layouts import layout_flags
from tests.workers import Layout, train

NAMES = ("pictures", "text")
FLAGS = ["--train-iters", "4", "--no-save", "--data-workers", "4", "--global-batch-size", "8", "--lr", "0"]
LAYOUTS = [Layout(dp=2), Layout(tp=2, pp=2, sequence_parallel=True)]


@pytest.fixture
def mixture(trainables: dict[str, Trainable], tmp_path: Path) -> str:
    data = trainables["deep"]
    lines = [
        f"  pictures: {{path: {data.data}, weight: 2}}",
        f"  text: {{path: {data.text_only}, weight: 1}}",
    ]
    (tmp_path / "mix.yaml").write_text("\n".join(["datasets:", *lines]))
    return str(tmp_path / "mix.yaml")


def read(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def of_sources(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key.startswith("source/")}


def add_up(line: Mapping[str, Any]) -> None:
    """The datasets' parts are the whole."""
    for name in ("samples", "tokens", "trained_tokens"):
        assert sum(line[f"source/{source}/{name}"] for source in NAMES) == line[name]
    losses = [
        line[f"source/{source}/loss"] * line[f"source/{source}/trained_tokens"]
        for source in NAMES
        if line[f"source/{source}/trained_tokens"]
    ]
    # The whole is summed in fp32 within a micro batch.
    assert sum(losses) / line["trained_tokens"] == pytest.approx(line["loss"], rel=1e-5)


def test_losses_by_dataset(
    pool: Pool, trainables: dict[str, Trainable], mixture: str, tmp_path: Path
) -> None:
    deep = trainables["deep"]
    flags = [*FLAGS, "--data-path", mixture, "--eval-interval", "4"]
    pool.run(1, train, deep.flags(tmp_path, "one", *flags))
    one, (held_out,) = read(tmp_path / "one"), read(tmp_path / "one", "validation")
    for line in one:
        add_up(line)
        assert line["source/pictures/samples"] > 0
    assert sum(line["source/text/samples"] for line in one) > 0
    for layout in LAYOUTS:
        pool.run(layout.world, train, deep.flags(tmp_path, str(layout), *flags, *layout_flags(layout)))
        for line, expected in zip(read(tmp_path / str(layout)), one, strict=True):
            assert of_sources(line) == pytest.approx(of_sources(expected), rel=1e-5)
        (other,) = read(tmp_path / str(layout), "validation")
        assert of_sources(other) == pytest.approx(of_sources(held_out), rel=1e-5)

    # Weights don't change with --lr 0: what is held out of a dataset has the loss that it has alone.
    for name, path in zip(NAMES, (deep.data, deep.text_only), strict=True):
        alone = [*FLAGS, "--data-path", str(path), "--eval-interval", "4", "--train-iters", "4"]
        pool.run(1, train, deep.flags(tmp_path, name, *alone))
        (expected,) = read(tmp_path / name, "validation")
        assert not of_sources(expected) and not of_sources(read(tmp_path / name)[0])
        for value in ("samples", "trained_tokens"):
            assert held_out[f"source/{name}/{value}"] == expected[value]
        assert held_out[f"source/{name}/loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_several_iterations_make_one_line(
    pool: Pool, trainables: dict[str, Trainable], mixture: str, tmp_path: Path
) -> None:
    """And with packing, on the last of several stages."""
    deep = trainables["deep"]
    flags = [
        *FLAGS,
        "--data-path",
        mixture,
        "--packing",
        "--seq-length",
        "200",
        "--packing-buffer-size",
        "20",
    ]
    pool.run(1, train, deep.flags(tmp_path, "each", *flags))
    layout = Layout(pp=2)
    pool.run(
        layout.world,
        train,
        deep.flags(tmp_path, "fours", *flags, "--log-interval", "4", *layout_flags(layout)),
    )
    each, (fours,) = read(tmp_path / "each"), read(tmp_path / "fours")
    for line in each:
        add_up(line)
        assert line["samples"] > 8
    for name in NAMES:
        for value in ("samples", "tokens", "trained_tokens"):
            assert fours[f"source/{name}/{value}"] == sum(line[f"source/{name}/{value}"] for line in each)
        trained = [line[f"source/{name}/trained_tokens"] for line in each]
        losses = [line[f"source/{name}/loss"] or 0.0 for line in each]
        mean = sum(map(float.__mul__, losses, map(float, trained))) / sum(trained)
        assert fours[f"source/{name}/loss"] == pytest.approx(mean, rel=1e-5)
