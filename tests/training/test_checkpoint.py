"""What a run takes over from a checkpoint of another machine."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_vlm.training import checkpoint

CPU, GPU = torch.Generator().manual_seed(7).get_state(), torch.zeros(16, dtype=torch.uint8)


@pytest.mark.parametrize("state", [CPU, GPU], ids=["CPU", "GPU"])
def test_generators_are_of_one_kind_of_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: torch.Tensor
) -> None:
    """A run on CPUs goes on from a GPU's checkpoint, whose generators can't be restored there."""
    layout: Any = SimpleNamespace(tp=1, pp=1, dp=1, rank=0, device=torch.device("cpu"))
    monkeypatch.setattr(checkpoint, "read_manifest", lambda _: {"layout": {"tp": 1, "pp": 1, "dp": 1}})
    tracker, own, python = get_cuda_rng_tracker(), torch.get_rng_state(), random.getstate()
    monkeypatch.setattr(tracker, "states_", {"model-parallel-rng": state})
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    checkpoint._save_rng(tmp_path, layout)
    torch.manual_seed(8)
    random.seed(8)
    tracker.set_states({})
    here = torch.get_rng_state(), random.getstate(), tracker.get_states()
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    try:
        checkpoint.load_rng(tmp_path, layout)
        now = torch.get_rng_state(), random.getstate(), tracker.get_states()
        restored = [bool(a != b) for a, b in zip(here[1:], now[1:], strict=True)]
        restored.append(not torch.equal(here[0], now[0]))
        assert restored == [state is CPU] * 3
    finally:
        torch.set_rng_state(own)
        random.setstate(python)


COUNTS = {"iteration": 3, "consumed_samples": 12, "optimizer_steps": 3}
RUN_STATE = {**COUNTS, "best_loss": 1, "recent_losses": [2.0]}
WORKER = {"identity": {"mixture": {}}, "microbatches": 3, "counts": {"seen": 2}, "position": None, "since": 0}


@pytest.mark.parametrize(
    "content",
    ["", "[1]", "3", *(json.dumps({**RUN_STATE, name: "x"}) for name in RUN_STATE)]
    + ["[" * 100_000, "{}", json.dumps({**RUN_STATE, "iterations": 3})]
    + [json.dumps({key: RUN_STATE[key] for key in RUN_STATE if key != name}) for name in COUNTS],
)
def test_a_damaged_run_state_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / checkpoint.RUN_STATE
    file.write_text(json.dumps(RUN_STATE))
    assert checkpoint.load_run_state(tmp_path).iteration == 3
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"^{file}: .*; move the checkpoint's folder away, and the run"):
        checkpoint.load_run_state(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "{}",
        '{"x": {}}',
        '{"0": {"identity": {"data_workers": [1]}}}',
        '{"0": 5}',
        '{"0": {"counts": {"seen": "x"}}}',
        '{"0": {"identity": {"mixture": 3}}}',
        *(json.dumps({"0": {**WORKER, name: [1]}}) for name in WORKER),
    ],
)
def test_a_damaged_loader_state_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / checkpoint.DATA_STATE
    file.write_text(json.dumps({"0": WORKER}))
    assert checkpoint.load_data_state(tmp_path) == {"0": WORKER}
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"^{file}: .*; move the checkpoint's folder away, and the run"):
        checkpoint.load_data_state(tmp_path)


@pytest.mark.parametrize("content", [b"", bytes(4096), b"PK"], ids=["empty", "zeroed", "cut off"])
def test_a_damaged_generator_state_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    layout: Any = SimpleNamespace(tp=1, pp=1, dp=1, rank=0, device=torch.device("cpu"))
    monkeypatch.setattr(checkpoint, "read_manifest", lambda _: {"layout": {"tp": 1, "pp": 1, "dp": 1}})
    file = tmp_path / checkpoint.RNG_FOLDER / "rank_00000.pt"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^{file}: damaged \(.+\); move the checkpoint's folder away"
    ) as error:
        checkpoint.load_rng(tmp_path, layout)
    assert "\n" not in str(error.value)
