"""``make gpu-check``: no step can take the others' results away, and each runs at tiny sizes on the CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import ceiling, digits, parity, specs, speed
from benchmarks.gpu.report import bars, table
from benchmarks.gpu_check import DONE, FAILED, NOT_RUN, STEPS, Step, check
from megatron_vlm import parallel
from megatron_vlm.config.run import RunConfig
from tests.distributed import Pool

ROOT = Path(__file__).resolve().parents[2]
WRITE = "import json, sys; json.dump({'tiny': '--tiny' in sys.argv}, open(sys.argv[2], 'w'))"


def test_whatever_a_step_does_the_others_follow(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    outlives = f"import time; time.sleep(2); open({str(ended)!r}, 'w')"
    forks = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {outlives!r}])"
    steps = [
        Step("good", ("-c", WRITE), 5),
        Step("fails", ("-c", "print('what went wrong'); raise SystemExit(3)"), 5),
        Step("hangs", ("-c", f"{WRITE}; import time; time.sleep(60)"), 0.8),
        Step("silent", ("-c", forks), 5),
        Step("long", ("-c", WRITE), 1e6),
        Step("last", ("-c", WRITE), 5),
    ]
    noted: list[dict[str, Any]] = []
    begun = time.monotonic()
    check(steps, 1, False, tmp_path, lambda found: noted.append(json.loads(json.dumps(found))))
    assert time.monotonic() - begun < 30
    assert [len(found) for found in noted] == [1, 2, 3, 4, 5, 6]  # what was found is known after each step
    found = noted[-1]
    assert [found[step.name]["status"] for step in steps] == [DONE, FAILED, FAILED, FAILED, NOT_RUN, DONE]
    assert found["good"]["result"] == found["last"]["result"] == {"tiny": False}
    assert found["fails"]["reason"] == "exit code 3" and found["fails"]["output"] == "what went wrong\n"
    assert found["hangs"]["reason"] == "no end after 2 s" and found["hangs"]["result"] == {"tiny": False}
    assert found["silent"]["reason"] == "it has written no result"
    assert "1000000" in found["long"]["reason"]
    assert "output" not in found["good"]
    time.sleep(2.5)
    assert not ended.exists()  # a step's own processes have ended with it


def test_a_dry_run_leaves_out_what_needs_cuda(tmp_path: Path) -> None:
    steps = [Step("any", ("-c", WRITE), 1e6), Step("cuda", ("-c", WRITE), 1, needs_cuda=True)]
    found = check(steps, 1, True, tmp_path, lambda found: None)
    assert found["any"]["result"] == {"tiny": True}
    assert found["cuda"] == {"status": NOT_RUN, "reason": "needs CUDA"}
    assert {step.name for step in STEPS if step.needs_cuda} == {"7B-fp8", "1B-fp8"}


def test_all_steps_fit() -> None:
    assert sum(step.expected for step in STEPS) <= 8 * 60
    for step in STEPS:
        assert step.arguments[0] == "-m"
        assert (ROOT / step.arguments[1].replace(".", "/")).with_suffix(".py").is_file()


def made_up() -> dict[str, Any]:
    """Steps of which one bar is missed and one is not measured."""
    fast = dict(
        layers="x",
        step_seconds=1.0,
        tflops=400.0,
        tflops_without_tower=380.0,
        peak_gib=20.5,
        waits=["a:1 x3"],
    )
    results: dict[str, Any] = {
        "ceiling": {"bf16_tflops": 700.0, "fp8_tflops": 1300.0, "copy_gb_per_second": 3000.0},
        "7B-bf16": {**fast, "tokens_per_second": 1000.0},
        "7B-fp8": {**fast, "tokens_per_second": 1290.0},
        "7B-transformers": {**fast, "tokens_per_second": 700.0},
        "specs": {
            "judged": "one beside another",
            "tolerance": {"logits": 0.04, "gradients": 0.07},
            "one beside another": {"logits": 0.01, "gradients": 0.02},
            "within": True,
            "saved with": "transformer_engine",
            "loads with local": True,
        },
        "digits": {"losses_apart": 0.015, "accuracy_apart": 0.02, "accuracy": {"bf16": 0.98, "fp8": 0.96}},
    }
    steps = {name: {"status": DONE, "seconds": 9.0, "result": result} for name, result in results.items()}
    return {**steps, "parity": {"status": NOT_RUN, "reason": "3 s were left"}}


def test_bars_and_table() -> None:
    judged = {bar.text.split(":")[0] + bar.found: bar.met for bar in bars(made_up())}
    assert judged == {
        "7B, BF1657 %": True,
        "7B1.29 x": False,
        "7B, BF161.43 x": True,
        "one beside another1.00%, 2.00%": True,
        "a checkpoint of transformer_engine layers loads with local ones, to the bit": True,
        "digits1.50%": True,
        "digits2.00%": False,
        "parity": None,
    }
    report = {
        "machine": "a GPU",
        "date": "2026-01-01",
        "commit": "abc",
        "command": "python -m benchmarks.gpu_check",
        "versions": {"torch": "2.11"},
        "dry_run": False,
        "steps": made_up(),
        "bars": [vars(bar) for bar in bars(made_up())],
    }
    text = table(report)
    for line in (
        "| 7B: FP8 at least 1.3 x BF16 | 1.29 x | **not met** |",
        "| 7B, BF16: at least 1.3 x transformers with SDPA | 1.43 x | met |",
        "| parity: no test fails |  | not measured |",
        "| 7B-bf16 | x | 1,000 | 400 | 57.1% | 54.3% | 1000.0 | 20.5 | 1 |",
        "| parity | not run |  | 3 s were left |",
    ):
        assert line in text.splitlines(), line
    assert "dry run" not in text and "1300 in FP8" in text
    assert all(bar.met is None for bar in bars({}))  # and a table of nothing at all
    assert table({**report, "dry_run": True, "steps": {}, "bars": []}).count("A dry run") == 1


def test_main_writes_both_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = (Step("ceiling", ("-c", WRITE.replace("'tiny': '--tiny' in sys.argv", CEILING)), 1),)
    monkeypatch.setattr(gpu_check, "STEPS", (*steps, Step("other", ("-c", "raise SystemExit(1)"), 1)))
    assert gpu_check.main(["--dry-run", "--output", str(tmp_path), "--steps", "ceiling"]) == 0
    (found,) = tmp_path.glob("gpu-dry-run-*.json")
    report = json.loads(found.read_text())
    assert report["dry_run"] and report["versions"]["torch"] == torch.__version__
    assert report["steps"]["ceiling"]["result"]["bf16_tflops"] == 1.0
    assert "1 TFLOP/s in BF16" in found.with_suffix(".md").read_text()
    assert gpu_check.main(["--dry-run", "--output", str(tmp_path)]) == 1  # the other one fails


CEILING = "'bf16_tflops': 1.0, 'copy_gb_per_second': 2.0"


def test_the_ceiling_is_measured() -> None:
    found = ceiling.measure(torch.device("cpu"), tiny=True)
    assert found["bf16_tflops"] == found["bf16_tflops_64"] > 0 and found["copy_gb_per_second"] > 0


def our_speed(workload: Any) -> dict[str, Any]:
    return speed.measure(workload, "bf16", torch.device("cpu"))


def test_both_sides_train_the_same_batches(pool: Pool) -> None:
    """Of random weights both losses are that of a guess, and both fall as they see the same again."""
    workload = replace(speed.TINY, warmup=4, iterations=1)
    (ours,) = pool.run(1, our_speed, workload)
    theirs = speed.measure(workload, "transformers", torch.device("cpu"))
    for found in (ours, theirs):
        assert found["tokens_per_second"] * found["step_seconds"] == pytest.approx(4 * 48)
        assert 0 < found["tflops_without_tower"] < found["tflops"]
        first, *_, last = found["first_losses"]
        assert first == pytest.approx(math.log(workload.vocab_size), rel=0.02) and last < first
    assert ours["tflops"] * ours["step_seconds"] == pytest.approx(theirs["tflops"] * theirs["step_seconds"])


def test_a_profiler_that_may_not_run_takes_no_times_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(step: Any) -> Any:
        raise RuntimeError("CUPTI: insufficient privileges")

    monkeypatch.setattr(speed, "find_kernels", refused)
    monkeypatch.setattr(speed, "find_waits", lambda step: [str(step())])
    found = speed.look_at(lambda: 2.5)
    assert found == {"waits": ["2.5"], "no kernels": "RuntimeError: CUPTI: insufficient privileges"}


def test_shapes_hold_an_image_and_an_answer() -> None:
    for workload in speed.SHAPES.values():
        assert workload.image_tokens == 576 and 2048 <= workload.sequence <= 4096
        assert 8 + workload.image_tokens + workload.answer <= workload.sequence
        assert workload.micro_batch * workload.sequence % 16 == 0  # what FP8 multiplies


def compare_specs(folder: Path) -> dict[str, Any]:
    return specs.measure(parallel.initialize(), speed.TINY, folder)


def test_specs_are_compared(pool: Pool, tmp_path: Path) -> None:
    (found,) = pool.run(1, compare_specs, tmp_path)
    assert found["within"] and found["loads with local"]
    apart = found["local in BF16 beside float32"]
    for kind, allowed in found["tolerance"].items():
        assert 1e-3 < apart[kind] <= allowed < 0.1  # BF16 shows, and a tenth of a value would not be let pass


def test_a_wrong_gradient_shows() -> None:
    one = {f"{n} {what}": torch.ones(4) for n in (0, 1) for what in ("logits", "gradient a", "gradient b")}
    assert specs.compare(one, one) == {"logits": 0.0, "gradients": 0.0}
    other = {**one, "1 gradient b": torch.tensor([1.0, 1.0, 1.0, 1.2])}
    assert specs.compare(other, one) == pytest.approx({"logits": 0.0, "gradients": 0.1})
    assert specs.compare({**one, "0 logits": torch.full((4,), math.nan)}, one)["logits"] == math.inf
    with pytest.raises(ValueError, match="gradient c"):
        specs.compare({**one, "1 gradient c": torch.ones(1)}, one)


def test_curves_are_compared_smoothed() -> None:
    flat = [2.0] * digits.COMPARED
    assert digits.apart(flat, flat) == 0.0
    noisy = [2.0 + 0.2 * (-1) ** i for i in range(digits.COMPARED)]
    assert digits.apart(noisy, flat) == pytest.approx(0.0, abs=1e-9)
    for other in (2.1, 1.9):
        assert digits.apart([other] * 100, flat) == pytest.approx(0.05)
    above_and_below = [2.1] * 50 + [1.9] * 50
    assert digits.apart(above_and_below, flat) > 0.04
    assert digits.apart(flat + [9.0], flat + [1.0]) == 0.0  # what comes later is told by the accuracy


def test_digits_flags_are_the_launchers() -> None:
    paths = ["--name", "x", "--save-dir", "x", "--data-path", "x", "--megatron-load-dir", "x"]
    config = RunConfig.from_flags([*digits.RUN[1:], *paths, "--train-iters", "100", "--bf16"])
    assert config.training.global_batch_size == 48 and config.logging.log_interval == 1


def test_junit_counts(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_text(
        "<testsuites><testsuite><testcase classname='a' name='b'/><testcase classname='a' name='c'>"
        "<skipped/></testcase><testcase classname='a' name='d'><failure/></testcase></testsuite></testsuites>"
    )
    counts = dict(passed=1, failed=1, skipped=1, failures=["a::d"])
    assert parity.read_junit(tmp_path / "x.xml") == counts
    assert all((ROOT / path).is_file() for path in (*parity.TESTS, *parity.ON_SEVERAL, *parity.TINY))


def test_make_takes_any_python(tmp_path: Path) -> None:
    """Where a machine's own Python has torch and Transformer Engine, no .venv is made."""
    # Not what this was itself made with: make test ARGS=... hands it on.
    ours = ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if name not in ours}

    def says(*words: str) -> str:
        command = ["make", "-n", "gpu-check", f"VENV={tmp_path}/venv", *words]
        said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return said.stdout.strip()

    given = says(f"PYTHON={sys.executable}", "ARGS=--dry-run")
    assert given == f"{sys.executable} -m benchmarks.gpu_check --dry-run"
    # The machine's python3, with packages that are folders here.
    own = tmp_path / "bin/python3"
    own.parent.mkdir()
    own.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/packages exec {sys.executable} -S "$@"\n')
    own.chmod(0o755)
    environment["PATH"] = f"{own.parent}:{environment['PATH']}"
    (tmp_path / "packages/torch").mkdir(parents=True)
    assert says().endswith("venv/bin/python -m benchmarks.gpu_check")
    (tmp_path / "packages/transformer_engine").mkdir()
    assert says() == "python3 -m benchmarks.gpu_check"
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").touch()
    assert says().endswith("venv/bin/python -m benchmarks.gpu_check")
