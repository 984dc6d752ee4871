"""What reaches TensorBoard and Weights & Biases, read back with their own readers."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from megatron_vlm.config.run import RunConfig
from megatron_vlm.observe.sinks import Sinks
from tests.distributed import Pool
from tests.training.conftest import Trainable
from tests.training.test_run import metrics, user_error
from tests.workers import train


def wandb_records(file: Path) -> Iterator[Record]:
    """The records of a ``.wandb`` file: LevelDB's log format after a header of 7 bytes, each one a
    ``Record``. The Python package, whose own reader is a Go binary, has only the record's type."""
    data, at, pending = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header in this block
            at += 32768 - at % 32768
        length, kind = struct.unpack_from("<HB", data, at + 4)
        pending += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield Record.FromString(pending)
            pending = b""


def history(record: Record) -> dict[str, Any]:
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}


def test_a_run_and_its_resume(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """Killed after iteration 3, resumed from 2: every iteration once, in one run, with the config."""
    run = tmp_path / "run"
    flags = trainables["untied"].flags(tmp_path, "run", "--save-optim", "--save-interval", "2", "--freeze-lm")
    flags += ["--tensorboard", "--wandb", "--wandb-mode", "offline", "--wandb-project", "digits"]
    pool.run(2, train, [*flags, "--train-iters", "3"])
    shutil.rmtree(run / "checkpoints" / "iter_0000003")
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    pool.run(2, train, [*flags, "--train-iters", "5"])
    lines = metrics(run)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5]

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for name in ("loss", "lr", "grad_norm", "tokens_per_second"):
        seen = [(event.step, event.value) for event in board.Scalars(f"train/{name}")]
        assert [step for step, _ in seen] == [1, 2, 3, 4, 5]  # the first start's third one is gone
        assert [value for _, value in seen] == pytest.approx([line[name] for line in lines], rel=1e-6)
    config = board.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert '"global_batch_size": 4' in config and '"image_token_id"' in config

    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    starts = [list(wandb_records(file)) for file in files]
    (run_id,) = {record.run.run_id for records in starts for record in records if record.HasField("run")}
    assert {file.stem for file in files} == {f"run-{run_id}"}
    described = next(record.run for record in starts[0] if record.HasField("run"))
    assert (described.project, described.display_name) == ("digits", "run")
    sent = {item.key: json.loads(item.value_json) for item in described.config.update}
    assert sent["training"]["train_iters"] == 3 and sent["architecture"]["language"]["num_layers"] == 2
    rows = [[history(r) for r in records if r.HasField("history")] for records in starts]
    assert [[row["iteration"] for row in start] for start in rows] == [[1, 2, 3], [3, 4, 5]]
    assert [row["train/loss"] for row in rows[0][:2] + rows[1]] == [line["loss"] for line in lines]
    exits = [record.exit.exit_code for records in starts for record in records if record.HasField("exit")]
    assert exits == [0, 0]

    pool.run(1, train, [*flags, "--train-iters", "1", "--restart"])
    assert len(list(run.glob("wandb/offline-run-*"))) == 1
    assert (run / "wandb" / "id").read_text() != (run / "earlier" / "1" / "wandb" / "id").read_text()
    assert (run / "earlier" / "1" / "tensorboard").is_dir()


def train_logged_out(argv: list[str]) -> str:
    """Train without the login of whoever runs the tests."""
    with mock.patch.dict(os.environ, NETRC="/nonexistent"):
        os.environ.pop("WANDB_API_KEY", None)
        return user_error(argv)


def test_not_logged_in(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """Told by every rank alike before anything large is loaded, with what to do."""
    flags = trainables["untied"].flags(tmp_path, "run", "--train-iters", "1", "--no-save")
    (message,) = set(pool.run(2, train_logged_out, [*flags, "--wandb", "--wandb-mode", "online"]))
    assert message.startswith("--wandb: No API key") and "\n" not in message
    for way_out in ("wandb login", "WANDB_API_KEY", "--wandb-mode offline", "wandb sync"):
        assert way_out in message


class Failing:
    """Works once, then never again."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("the network\nis gone")

    def alert(self, iteration: int, title: str, text: str) -> None: ...

    def close(self, failed: bool) -> None: ...


def test_a_sink_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is left out with one warning; the others go on."""
    failing = Failing()
    flags = RunConfig.from_flags(["--tensorboard"]).logging
    with Sinks() as sinks:
        sinks.open(tmp_path, flags, "run", {}, 0)
        sinks.sinks["Elsewhere"] = failing
        for iteration in range(1, 5):
            sinks.log(iteration, {"loss": 1.0, "validation/loss": 2.0})
    assert failing.calls == 2
    assert capsys.readouterr().out == (
        "warning: Elsewhere failed and is left out from now on: the network is gone\n"
    )
    assert [line["iteration"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["train/loss", "validation/loss"]
    assert len(board.Scalars("validation/loss")) == 4


def test_a_failed_run_is_shown_as_failed(tmp_path: Path) -> None:
    flags = RunConfig.from_flags(["--wandb", "--wandb-mode", "offline"]).logging
    with pytest.raises(RuntimeError), Sinks() as sinks:
        sinks.open(tmp_path, flags, "run", {}, 0)
        sinks.alert(1, "spike", "loss 9 is above 2")
        raise RuntimeError
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(file))
    assert [record.alert.title for record in records if record.HasField("alert")] == ["spike"]
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]


@pytest.mark.parametrize("flag", ["--wandb-mode offline", "--wandb-project p", "--wandb-entity e"])
def test_flags_that_need_wandb(flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag.split()[0]} does nothing without --wandb"):
        RunConfig.from_flags(flag.split())
