"""A work folder with all that a run needs, and what the preflight finds there."""

from __future__ import annotations

import pytest

from megatron_vlm.config.run import RunConfig
from megatron_vlm.launch import container, machine, preflight
from megatron_vlm.launch.launch_plan import make_plan

BASE = ["--name", "run", "--save-dir", "runs", "--data-path", "data", "--megatron-load-dir", "ckpt"]
BASE += ["--train-iters", "10"]


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(machine, "network_interfaces", lambda: ["lo", "eth0"])
    monkeypatch.setattr(machine, "knows_host", lambda name: name in ("node0", "localhost"))
    monkeypatch.setattr(container, "find_runtime", lambda wanted: "apptainer")
    return workplace


def inspect(*argv: str) -> preflight.Inspection:
    config = RunConfig.from_flags([*BASE, *argv])
    problems: list[str] = []
    plan = make_plan(config, {"CUDA_VISIBLE_DEVICES": ""}, problems)
    return preflight.inspect(plan, problems)


def problem(*argv: str) -> str:
    found = inspect(*argv)
    (only,) = found.problems
    assert "\n" not in only
    return only


def warning(*argv: str) -> str:
    found = inspect(*argv)
    assert found.problems == []
    (only,) = found.warnings
    assert "\n" not in only
    return only
