"""A run goes on with the other layer spec, optimizer state included, as if it had always had it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.distributed import Pool
from tests.te.ranks import with_engine
from tests.training.conftest import Trainable
from tests.training.test_layouts import ITERATIONS, reloaded, run
from tests.workers import Layout, train

SAVING = ["--save-optim", "--save-interval", str(ITERATIONS // 2)]
LORA = ["--lora-rank", "4", "--lora-targets", "all-linear", "vision.q_proj"]
ENGINE = Layout(tp=2, sequence_parallel=True)


@pytest.mark.parametrize("flags", [["--stage", "2", "--train-vision"], LORA], ids=["weights", "LoRA"])
def test_from_one_spec_to_the_other(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path, flags: list[str]
) -> None:
    engine, trainable = partial(with_engine, train), trainables["untied"]
    expected = pytest.approx(run(pool, Layout(), trainable, tmp_path, "local", *flags, *SAVING), rel=1e-5)
    assert run(pool, ENGINE, trainable, tmp_path, "engine", *flags, *SAVING, worker=engine) == expected
    there, back = tmp_path / "there", tmp_path / "back"
    assert reloaded(pool, ENGINE, trainable, tmp_path / "local", there, *flags, worker=engine) == expected
    assert reloaded(pool, Layout(), trainable, tmp_path / "engine", back, *flags) == expected
