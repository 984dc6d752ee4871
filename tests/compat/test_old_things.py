"""What commit 928f091 has written is read by the code of today, which computes from it what that commit did.

README.md says what is stored and how it was made. None of the numbers is of today's code.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.same_numbers import hash_hf, read_metrics
from tests.compat.make import ALL, HALF, HERE, KEPT, WORK, flags_of, flags_of_ranks
from tests.distributed import Pool
from tests.training.test_run import script
from tests.workers import train

COMMIT = "928f091"
RECORDED = json.loads((HERE / f"{COMMIT}.json").read_text(encoding="utf-8"))
# Another CPU's kernels sum in another order: a few ulp of float32, and a few more after five updates.
# On one machine, benchmarks/same_numbers.py compares to the last bit.
SUMS = 1e-6


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored files, and the first checkpoint as today's conversion makes it of the stored model."""
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(HERE / f"{COMMIT}.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    assert {path.name for path in folder.iterdir()} == set(KEPT)
    convert("hf_to_megatron", "--hf-dir", folder / "hf", "--megatron-dir", folder / "megatron")
    return folder


@pytest.fixture
def old(stored: Path, tmp_path: Path) -> Path:
    """A copy of the stored files that a run may go on in."""
    shutil.copytree(stored, tmp_path / "old")
    return tmp_path / "old"


def convert(direction: str, *flags: object) -> CompletedProcess[str]:
    ended = script(f"convert/convert_{direction}.py", *flags)
    assert ended.returncode == 0, ended.stderr
    return ended


def check(found: Mapping[str, Any], recorded: Mapping[str, Any], after: int) -> None:
    """Compare metrics of the iterations after one: sums up to :data:`SUMS`, all else exactly."""
    new = [name for name in recorded if int(name.split()[2].rstrip(",")) > after]
    assert len(new) > 10 * (ALL - HALF) or after == 0
    assert set(recorded) <= set(found)  # there may be more keys today
    for name in new:
        sums = name.endswith((", loss", ", grad_norm"))
        expected = pytest.approx(recorded[name], rel=SUMS, abs=0) if sums else recorded[name]
        assert found[name] == expected, name


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_goes_on(pool: Pool, old: Path, name: str) -> None:
    """With the weights, optimizer state, place in the data and, for dropout, random numbers that it had."""
    run = old / name / "run"
    before = (run / "metrics.jsonl").read_text(encoding="utf-8")
    pool.run(2, train, flags_of(old, name, ALL))
    assert (run / "metrics.jsonl").read_text(encoding="utf-8").startswith(before)
    check(read_metrics(run), RECORDED[name], after=HALF)
    assert not (run / "metrics.superseded.jsonl").exists()  # it did not begin again


def test_an_adapter_starts_a_run(pool: Pool, old: Path) -> None:
    more = ["--lora-load-dir", old / "adapter", "--name", "from-adapter", "--lora-dropout", "0"]
    pool.run(2, train, flags_of(old, "lora", 2, *more))
    check(read_metrics(old / "lora/from-adapter"), RECORDED["from the adapter"], after=0)


def test_a_checkpoint_converts(stored: Path, tmp_path: Path) -> None:
    """To the tensors that were converted then, to the last bit: nothing is computed."""
    convert("megatron_to_hf", "--megatron-dir", stored / "full/run", "--hf-dir", tmp_path / "hf")
    assert hash_hf(tmp_path / "hf") == RECORDED["full as Hugging Face"]
    verified = script("convert/verify.py", tmp_path / "hf", stored / "full/run")
    assert verified.returncode == 0, verified.stderr


def test_adapters_convert(stored: Path, tmp_path: Path) -> None:
    """To the same adapter to the last bit; and merged, as PEFT defines it."""
    run = stored / "lora/run"
    convert("megatron_to_hf", "--megatron-dir", run, "--hf-dir", tmp_path / "adapter", "--adapter-only")
    assert hash_hf(tmp_path / "adapter") == RECORDED["adapter"] == hash_hf(stored / "adapter")

    convert("megatron_to_hf", "--megatron-dir", run, "--hf-dir", tmp_path / "merged")
    merged, before = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", stored / "hf"))
    adapter = load_file(stored / "adapter/adapter_model.safetensors")
    config = json.loads((stored / "adapter/adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    name = "layers.1.self_attn.o_proj"
    a, b = (
        next(tensor for key, tensor in adapter.items() if key.endswith(f"{name}.lora_{part}.weight"))
        for part in "AB"
    )
    (weight,) = (
        key for key in before if key.endswith(f"language_model.{name}.weight") or f"model.{name}" in key
    )
    assert b.abs().max() > 0
    torch.testing.assert_close(merged[weight], before[weight] + scale * b @ a, rtol=SUMS, atol=1e-8)


def test_a_config_gives_the_same_flags(stored: Path, tmp_path: Path) -> None:
    """``--config`` alone, of a run that trained elsewhere: each flag has the name and value that it had."""
    config = tmp_path / "config.json"
    text = (stored / "full/run/config.json").read_text(encoding="utf-8")
    config.write_text(text.replace(str(WORK), str(stored)), encoding="utf-8")
    shown = script("train/run.py", "--config", config, "-g", "2", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert flags_of_ranks(shown.stdout, stored) == RECORDED["flags"]


def test_status_reads_a_run(stored: Path) -> None:
    shown = script("train/status.py", stored / "full/run", "--json")
    assert shown.returncode == 0, shown.stderr
    expected = {**RECORDED["status"], "run": str(stored / "full/run")}
    found = json.loads(shown.stdout)
    assert {name: found[name] for name in expected} == expected
    assert script("train/status.py", stored / "lora").stdout.count("done") == 1
