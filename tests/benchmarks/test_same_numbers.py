"""``make same-numbers``: the same tree has the same numbers, and the smallest change of one is found."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import same_numbers
from benchmarks.same_numbers import (
    CHECKOUT,
    RUNS,
    Case,
    Tree,
    both,
    compare,
    copy_of_checkout,
    first_difference,
    plan,
    read_metrics,
    sha256,
    train,
)

STAGE_1 = {name: RUNS[name] for name in ("stage 1 tp2",)}


def test_a_tiny_change_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of Adam's epsilon, 1e-8: the plan is the same and the first loss is, what follows isn't."""
    monkeypatch.setattr(same_numbers, "ITERATIONS", 4)
    (tmp_path / "current").mkdir()
    current = copy_of_checkout(tmp_path / "current")
    shutil.copytree(current.folder, tmp_path / "reference")
    reference = Tree(tmp_path / "reference", "other")
    ranks = reference.folder / "megatron_vlm/training/__main__.py"
    ranks.write_text(f"import sys\nsys.argv += ['--adam-eps', '2e-8']\n{without_future(ranks.read_text())}")
    cases = [
        Case("plan", "lines", partial(both, partial(plan, STAGE_1))),
        Case("losses", "metrics", partial(both, partial(train, *RUNS["stage 1 tp2"]))),
    ]
    (_, lines, same, _), (_, values, changed, _) = compare(cases, reference, current, tmp_path)
    assert lines > 8 and values > 4 * 10
    assert same == ""
    assert re.match(r"metrics, iteration [234], (loss|grad_norm): [0-9.]+ was, [0-9.]+ is$", changed), changed


def without_future(source: str) -> str:
    """An import from ``__future__`` may only come first."""
    return source.replace("from __future__ import annotations\n", "")


def test_the_smallest_differences() -> None:
    one = {"a": 0.1, "b": math.nan, "c": None, "d": 1}
    assert first_difference(one, dict(one)) == ""
    assert first_difference(one, {**one, "a": math.nextafter(0.1, 1)}).startswith(
        "a: 0.1 was, 0.1000000000000000"
    )
    assert first_difference(one, {**one, "d": 1.0}) == "d: 1 was, 1.0 is"
    assert first_difference({"a": 1}, one) == "a: 1 was, 0.1 is"
    assert first_difference({}, {"a": None}) == "a: nothing was, null is"
    assert first_difference({"a": None}, {}) == "a: null was, nothing is"


def test_hashes_of_tensors() -> None:
    zero = torch.zeros(2, 3)
    others = [-zero, zero.reshape(3, 2), zero.bfloat16(), torch.zeros(2, 3, dtype=torch.int32), zero + 1e-45]
    assert sha256(zero) == sha256(torch.zeros(3, 2).T)
    assert len({sha256(tensor) for tensor in [zero, *others]}) == 6


def test_what_a_clock_has_a_part_in_is_left_out(tmp_path: Path) -> None:
    measured = ["tokens_per_second", "tflops_per_gpu_without_vision", "mfu", "data_seconds", "gpu_hours"]
    counted = ["loss", "grad_norm", "lr/projector", "tokens", "trained_tokens", "images", "source/a/loss"]
    line = {"iteration": 3, **dict.fromkeys(measured + counted, 1)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "validation.jsonl").write_text('{"iteration": 3, "loss": 2, "seconds": 4}\n')
    found = read_metrics(tmp_path)
    expected = {f"metrics, iteration 3, {name}" for name in ["iteration", *counted]}
    assert found.keys() == expected | {f"validation, iteration 3, {name}" for name in ("iteration", "loss")}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ref", "no-such-commit"], "error: --ref: git knows no commit no-such-commit"),
        (["--ref", "HEAD", "--only", "no-such-case"], "no case begins so; there are stage 1 tp2, "),
        (["--ref", "HEAD", "--only", "demo"], "(the demo with --demo)"),
    ],
)
def test_mistakes(argv: list[str], message: str) -> None:
    command = [sys.executable, "-m", "benchmarks.same_numbers", *argv]
    ended = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert message in ended.stderr
