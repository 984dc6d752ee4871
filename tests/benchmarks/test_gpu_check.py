"""``make gpu-check``: no step can take the others' results away, and each runs at tiny sizes on the CPU."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_check
from benchmarks.gpu import ceiling, digits, parity, specs, speed
from benchmarks.gpu.report import DONE, FAILED, NOT_RUN, bars, table
from benchmarks.gpu_check import INCOMPLETE, MISSED, STEPS, Step, check, rounds
from megatron_vlm import parallel
from megatron_vlm.config.run import RunConfig
from megatron_vlm.plan.rules import validate
from tests.distributed import Pool
from tests.patience import HANG, alive, wait_until

ROOT = Path(__file__).resolve().parents[2]
WRITE = "import json, sys; json.dump({'tiny': '--tiny' in sys.argv}, open(sys.argv[2], 'w'))"


def test_whatever_a_step_does_the_others_follow(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    outlives = f"import time; time.sleep(2); open({str(ended)!r}, 'w')"
    hangs = "import sys, time; open(sys.argv[2], 'w').write('{\"tiny\": false}'); time.sleep(3600)"
    forks = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {outlives!r}])"
    steps = [
        Step("good", ("-c", WRITE), HANG),
        Step("fails", ("-c", f"{WRITE}; print('what'); print(); raise SystemExit('went wrong')"), HANG),
        Step("hangs", ("-I", "-S", "-c", hangs), 1),  # a bare Python, which has written long before 2 s
        Step("silent", ("-c", forks), HANG),
        Step("long", ("-c", WRITE), 1e6),
        Step("last", ("-c", WRITE), HANG),
    ]
    noted: list[dict[str, Any]] = []
    check(steps, HANG, False, tmp_path, lambda found: noted.append(json.loads(json.dumps(found))))
    assert [len(found) for found in noted] == [1, 2, 3, 4, 5, 6]  # what was found is known after each step
    found = noted[-1]
    assert [found[step.name]["status"] for step in steps] == [DONE, FAILED, FAILED, FAILED, NOT_RUN, DONE]
    for name in ("good", "fails", "hangs", "last"):  # what one has found stays, whatever it did then
        assert found[name]["result"] == {"tiny": False}
    assert found["fails"]["reason"] == "exit code 1: went wrong"
    assert found["fails"]["output"] == "what\n\nwent wrong\n"
    assert found["hangs"]["reason"].startswith("no end after ")
    assert found["silent"]["reason"] == "it has written no result"
    assert "1000000" in found["long"]["reason"]
    assert "output" not in found["good"]
    time.sleep(2.5)
    assert not ended.exists()  # a step's own processes have ended with it


def test_what_is_not_timed_runs_at_once(tmp_path: Path) -> None:
    """Each of two waits for the other; what is timed has nothing beside it."""

    def meets(own: str, other: str) -> str:
        return (
            f"import os, time; open({str(tmp_path / own)!r}, 'w')\n"
            f"while not os.path.exists({str(tmp_path / other)!r}): time.sleep(0.01)\n{WRITE}"
        )

    alone = f"import os; assert not os.path.exists({str(tmp_path / 'a')!r}); {WRITE}"
    steps = [
        Step("before", ("-c", alone), HANG),
        Step("a", ("-c", meets("a", "b")), HANG, timed=False),
        Step("b", ("-c", meets("b", "a")), HANG, timed=False),
        Step("after", ("-c", WRITE), HANG),
    ]
    noted: list[list[str]] = []
    found = check(steps, HANG, False, tmp_path, lambda found: noted.append(list(found)))
    assert [found[step.name]["status"] for step in steps] == [DONE] * 4
    assert noted[-1] == ["before", "a", "b", "after"]  # in their order, whichever ended first
    assert [[step.name for step in at_once] for at_once in rounds(steps)] == [
        ["before"],
        ["a", "b"],
        ["after"],
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_check_that_is_killed_leaves_what_it_found(tmp_path: Path, number: signal.Signals) -> None:
    """And no step of it goes on."""
    pid = tmp_path / "pid"
    sleeps = f"import os, time; {WRITE}; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    script = (
        "import sys; from benchmarks import gpu_check; from benchmarks.gpu_check import Step\n"
        f"steps = [('ceiling', {WRITE!r}), ('digits', {sleeps!r})]\n"
        f"gpu_check.STEPS = tuple(Step(name, ('-c', code), {HANG}) for name, code in steps)\n"
        "gpu_check.end_on_sigterm(); sys.exit(gpu_check.main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, "--dry-run", "--output", tmp_path], cwd=ROOT)
    wait_until(lambda: pid.exists() and pid.read_text(), "the second step")
    process.send_signal(number)
    assert process.wait(HANG) == (128 + number if number == signal.SIGTERM else -number)
    wait_until(lambda: not alive(int(pid.read_text())), "its end")
    (written,) = tmp_path.glob("gpu-dry-run-*.json")
    steps = json.loads(written.read_text())["steps"]
    assert steps["ceiling"]["result"] == {"tiny": True}
    if number == signal.SIGTERM:
        assert steps["digits"]["status"] == FAILED and steps["digits"]["result"] == {"tiny": True}
        assert "| digits | failed |" in written.with_suffix(".md").read_text()


def test_a_dry_run_leaves_out_what_needs_cuda(tmp_path: Path) -> None:
    steps = [Step("any", ("-c", WRITE), 1e6), Step("cuda", ("-c", WRITE), 1, needs_cuda=True)]
    found = check(steps, 1, True, tmp_path, lambda found: None)
    assert found["any"]["result"] == {"tiny": True}
    assert found["cuda"] == {"status": NOT_RUN, "reason": "needs CUDA"}
    assert {step.name for step in STEPS if step.needs_cuda} == {"7B-fp8", "1B-fp8"}


def test_all_steps_fit() -> None:
    seconds = [max(step.expected for step in at_once) for at_once in rounds(STEPS)]
    assert sum(seconds) <= 6 * 60  # of eight minutes
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
        "digits": {
            "losses_apart": 0.015,
            "accuracy_apart": 0.02,
            "bf16_accuracy": 0.98,
            "fp8_accuracy": 0.96,
        },
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
    assert "dry run" not in text and "1300 TFLOP/s in FP8" in text
    assert all(bar.met is None for bar in bars({}))  # and a table of nothing at all
    assert table({**report, "dry_run": True, "steps": {}, "bars": []}).count("A dry run") == 1


FINDINGS: dict[str, list[dict[str, Any]]] = {
    "ceiling": [{"copy_gb_per_second": 3000.0}, {"bf16_tflops": 700.0}, {"fp8_tflops": 1300.0}],
    "digits": [{"bf16_losses": [1.0]}, {"bf16_accuracy": 0.98}],
    "specs": [
        {"tolerance": {"logits": 1.0, "gradients": 1.0}},
        {"judged": "x", "x": {"logits": 0.0, "gradients": 0.0}},
    ],
    "parity": [{"passed": 7, "failed": 0, "skipped": 1, "failures": {}}],
}


def test_what_a_failed_step_had_found_is_shown() -> None:
    """However far each came: the figures, and why there are no more."""
    for name, findings in FINDINGS.items():
        for count in range(len(findings) + 1):
            one = {"status": FAILED, "reason": "exit code 1: boom"}
            if count:
                one |= {"result": gpu.collect(findings[:count])}
            report = {
                "machine": "",
                "date": "",
                "commit": "",
                "command": "",
                "versions": {},
                "dry_run": False,
            }
            found = bars({name: one})
            text = table({**report, "steps": {name: one}, "bars": [vars(bar) for bar in found]})
            assert "exit code 1: boom" in text
            assert not any(bar.met for bar in found)  # of a part of the tests none can say that no test fails
            if name == "digits" and count == 2:
                assert "| digits | failed |  | bf16 98.0% right; exit code 1: boom |" in text.splitlines()


def test_findings_stay_where_the_next_fails(tmp_path: Path) -> None:
    def findings() -> Iterator[dict[str, Any]]:
        yield {"a": 1}
        yield {"b": 2}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        gpu.collect(findings(), tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1, "b": 2}


@pytest.mark.parametrize("broken", ["train", "accuracy"])
def test_bf16s_digits_stay_where_fp8_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    def train(folder: Path, name: str, *_: Any) -> list[float]:
        if (name, broken) == ("fp8", "train"):
            raise RuntimeError("no kernel")
        return [1.0] * 500

    def accuracy(folder: Path, name: str) -> float:
        if (name, broken) == ("fp8", "accuracy"):
            raise KeyError("no kernel")
        return 0.98

    for name, function in (("train", train), ("accuracy", accuracy)):
        monkeypatch.setattr(digits, name, function)
    for name in ("make_data", "make_model"):
        monkeypatch.setattr(digits, name, lambda folder: None)
    path = tmp_path / "digits.json"
    with pytest.raises(RuntimeError, match="no kernel"):
        gpu.collect(digits.measure(tmp_path, tiny=False), path)
    found = json.loads(path.read_text())
    assert found["bf16_losses"] == [1.0] * 500 and found["bf16_accuracy"] == 0.98
    assert ("losses_apart" in found) == (broken == "accuracy") and "accuracy_apart" not in found


def test_main_writes_both_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = (Step("ceiling", ("-c", WRITE.replace("'tiny': '--tiny' in sys.argv", CEILING)), 1),)
    monkeypatch.setattr(gpu_check, "STEPS", (*steps, Step("other", ("-c", "raise SystemExit(1)"), 1)))
    assert gpu_check.main(["--dry-run", "--output", str(tmp_path), "--steps", "ceiling"]) == 0
    (found,) = tmp_path.glob("gpu-dry-run-*.json")
    report = json.loads(found.read_text())
    assert report["dry_run"] and report["versions"]["torch"] == torch.__version__
    assert report["steps"]["ceiling"]["result"]["bf16_tflops"] == 1.0
    assert "1 TFLOP/s in BF16" in found.with_suffix(".md").read_text()
    assert gpu_check.main(["--dry-run", "--output", str(tmp_path)]) == INCOMPLETE  # the other one fails
    assert found.read_text() == json.dumps(report, indent=1) + "\n"  # an earlier command's file stays
    assert len(list(tmp_path.glob("gpu-dry-run-*-2.json"))) == 1


def test_the_exit_code_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inf = "'judged': 'x', 'x': {'logits': float('inf'), 'gradients': 0.0}, 'within': False"
    tolerance = "'tolerance': {'logits': 1.0, 'gradients': 1.0}"
    missed = Step("specs", ("-c", WRITE.replace("'tiny': '--tiny' in sys.argv", f"{inf}, {tolerance}")), 1)
    monkeypatch.setattr(gpu_check, "STEPS", (missed, Step("7B-fp8", ("-c", WRITE), 1, needs_cuda=True)))
    dry = ["--dry-run", "--output", str(tmp_path)]
    assert gpu_check.main(dry) == MISSED
    (written,) = tmp_path.glob("*.json")

    def no_number(constant: str) -> None:
        raise AssertionError(constant)

    report = json.loads(written.read_text(), parse_constant=no_number)  # Infinity is not JSON
    assert report["steps"]["specs"]["result"]["x"]["logits"] == "inf"
    assert gpu_check.main([*dry, "--minutes", "0"]) == INCOMPLETE  # no time for it
    assert gpu_check.main([*dry, "--steps", "7B-fp8"]) == 0  # a dry run has nothing to miss there


CEILING = "'bf16_tflops': 1.0, 'copy_gb_per_second': 2.0"


def test_the_ceiling_is_measured() -> None:
    found = gpu.collect(ceiling.measure(torch.device("cpu"), tiny=True))
    assert found["bf16_tflops"] == found["bf16_tflops_64"] > 0 and found["copy_gb_per_second"] > 0


def our_speed(workload: Any) -> dict[str, Any]:
    return gpu.collect(speed.measure(workload, "bf16", torch.device("cpu")))


def test_both_sides_train_the_same_batches(pool: Pool) -> None:
    """Of random weights both losses are that of a guess, and both fall as they see the same again."""
    workload = replace(speed.TINY, warmup=4, iterations=1)
    (ours,) = pool.run(1, our_speed, workload)
    theirs = gpu.collect(speed.measure(workload, "transformers", torch.device("cpu")))
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
    found = gpu.collect(speed.look_at(lambda: 2.5))
    assert found == {"waits": ["2.5"], "no kernels": "RuntimeError: CUPTI: insufficient privileges"}


def test_shapes_hold_an_image_and_an_answer() -> None:
    for workload in speed.SHAPES.values():
        assert workload.image_tokens == 576 and 2048 <= workload.sequence <= 4096
        assert 8 + workload.image_tokens + workload.answer <= workload.sequence
        assert workload.micro_batch * workload.sequence % 16 == 0  # what FP8 multiplies


def compare_specs(folder: Path) -> dict[str, Any]:
    return gpu.collect(specs.measure(parallel.initialize(), speed.TINY, folder))


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


@pytest.mark.parametrize("arm", ["--bf16", "--fp8"])
def test_digits_flags_are_the_launchers(arm: str) -> None:
    paths = ["--name", "x", "--save-dir", "x", "--data-path", "x", "--megatron-load-dir", "x"]
    config = RunConfig.from_flags([*digits.RUN[1:], *paths, "--train-iters", "100", arm])
    validate(config, world_size=1)
    assert config.training.global_batch_size == 48 and config.logging.log_interval == 1


def test_outcomes_are_counted_as_they_come(tmp_path: Path) -> None:
    """Of a session that is killed too, since nothing is written at its end."""
    tests = tmp_path / "test_x.py"
    tests.write_text(
        "import os, pytest\n"
        "def test_a(): pass\n"
        "def test_b(): pytest.skip()\n"
        "def test_c(): assert 1 + 1 == 3\n"
        "def test_d(): os._exit(9)\n"
    )
    script = (
        "import sys, pytest; from pathlib import Path; from benchmarks.gpu import parity\n"
        "sys.exit(pytest.main(sys.argv[2:], plugins=[parity.Outcomes(Path(sys.argv[1]))]))"
    )
    result = tmp_path / "parity.json"
    command = [
        sys.executable,
        "-c",
        script,
        str(result),
        "-q",
        f"--rootdir={tmp_path}",
        "--noconftest",
        str(tests),
    ]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 9
    found = json.loads(result.read_text())
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    ((name, said),) = found["failures"].items()
    assert name.endswith("test_x.py::test_c") and "assert (1 + 1) == 3" in said
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
