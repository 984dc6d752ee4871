"""Where a run is, from its folder: ``scripts/train/status.py`` under a bare Python."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.artifacts.checkpoint import BEST, CHECKPOINTS, write_best, write_manifest
from megatron_vlm.launch import status
from megatron_vlm.launch.container import CHECKOUT
from megatron_vlm.launch.progress import closing, describe
from tests.launch.test_run_script import find_python39
from tests.patience import HANG

STATUS_SCRIPT = str(CHECKOUT / "scripts" / "train" / "status.py")


def ask(
    *argv: object, python: str = sys.executable, path: str = "/nowhere"
) -> subprocess.CompletedProcess[str]:
    command = [python, "-I", "-S", STATUS_SCRIPT, *map(str, argv)]
    environment = {**os.environ, "PATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG, check=False)


def found(run: Path, **options: Any) -> dict[str, Any]:
    answer = ask(run, "--json", **options)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def squeue(folder: Path, script: str) -> str:
    """A PATH with an squeue that does as ``script`` says."""
    folder.mkdir()
    (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "squeue").chmod(0o755)
    return str(folder)


def log(run: Path, iteration: int, **more: object) -> str:
    known = {"loss": 2.5, "tokens_per_second": 1234.5, "images_per_second": 6.0, "seconds_left": 3600}
    return json.dumps({"iteration": iteration, **known, **more}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 20 iterations that has done 7, with checkpoints and an evaluation."""
    run = tmp_path / "runs" / "it's one"
    for iteration, has_optimizer in ((5, True), (6, False)):
        folder = run / CHECKPOINTS / f"iter_{iteration:07d}"
        folder.mkdir(parents=True)
        manifest = {"format": "torch_dist", "iteration": iteration, "model": {}, "layout": {}, "tensors": {}}
        write_manifest(folder, {**manifest, "has_optimizer": has_optimizer})
    (run / CHECKPOINTS / ".iter_0000007.incomplete").mkdir()
    (run / BEST).mkdir()
    write_best(run / BEST, 6, 2.25)
    (run / "config.json").write_text(json.dumps({"training": {"train_iters": 20}}))
    (run / "metrics.jsonl").write_text(log(run, 6) + log(run, 7) + '{"iteration": 8, "lo')
    return run


@pytest.mark.parametrize("version", ["this Python", "Python 3.9"])
def test_a_run_that_trains(run: Path, version: str) -> None:
    python = sys.executable if version == "this Python" else find_python39()
    if python is None:
        pytest.skip("no Python 3.9 is installed")
    status.note_running(str(run), ["torchrun"], None, str(run / "a.log"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    answer = ask(run.parent, python=python)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    lines = answer.stdout.splitlines()
    assert (answer.returncode, answer.stderr) == (0, "")
    assert lines[0].startswith(f"{run}: running on ") and "last sign 0:00:0" in lines[0]
    assert lines[1] == "  iteration 7/20 (35.0%), loss 2.5000, 1,234 tokens/s, 6.0 images/s"
    assert lines[2].startswith("  1:00:00 left, until 2")
    assert lines[3] == "  last checkpoint iter_0000006; resumes from iter_0000005"
    assert lines[4:] == ["  lowest validation loss 2.2500, iteration 6"]


def test_a_launcher_that_was_killed(run: Path) -> None:
    code = (
        "import sys; from megatron_vlm.launch import status; status.note_running(sys.argv[1], [], None, '')"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(run)], cwd=CHECKOUT, check=True)
    answer = found(run)
    assert (answer["state"], answer["restarts"]) == ("gone", 1)
    assert describe(answer).endswith("  started again once")
    assert "killed on" in answer["says"] and "The same command resumes it" in answer["says"]


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [
        (0, "done", "done since 20"),
        (75, "continues", "ended by a signal, to be continued by the same command"),
        (2, "failed", "the message names, 20"),
        (3, "failed", "a rank hung"),
        (128 + signal.SIGKILL, "failed", "ended by SIGKILL"),
        (1, "failed", "failed with exit code 1"),
    ],
)
def test_a_run_that_has_ended(run: Path, code: int, state: str, words: str) -> None:
    status.note_running(str(run), [], "7", "")
    status.note_ended(str(run), code, "these were its last words")
    answer = found(run)
    assert (answer["state"], answer["iteration"], answer["resumable"]) == (state, 7, "iter_0000005")
    assert words in answer["says"]
    assert code == 0 or answer["says"].endswith(": these were its last words")


def test_a_job_in_the_queue(tmp_path: Path) -> None:
    run = tmp_path / "run"
    status.note_queued(str(run), "17", ["run.py"], more_jobs=["18"])
    assert found(run)["says"] == "queued as job 17"  # no SLURM on this machine
    path = squeue(tmp_path / "a", '[ "$4" = --format ] && echo "PENDING Resources"')
    assert found(run, path=path)["says"] == "queued as job 17 (PENDING Resources)"
    path = squeue(tmp_path / "b", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert found(run, path=path)["state"] == "gone"
    path = squeue(tmp_path / "c", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert found(run, path=path)["state"] == "queued"
    status.note_running(str(run), [], "17", "")
    status.note_ended(str(run), 75, "")
    assert found(run)["says"].endswith("; job 18 carries on")


def test_on_another_host_the_queue_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(status.socket, "gethostname", lambda: "node9")
    status.note_running(str(run), [], "17", "")
    assert "running on node9, job 17, as far as can be seen from here" in found(run)["says"]
    assert found(run, path=squeue(tmp_path / "a", "echo 'RUNNING None'"))["state"] == "running"
    assert found(run, path=squeue(tmp_path / "b", "exit 0"))["state"] == "gone"


def test_folders_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in [("none", "no such folder"), ("empty", "neither a run folder nor a folder of runs")]:
        answer = ask(tmp_path / folder)
        assert answer.returncode == 2
        assert answer.stderr.startswith(f"error: {tmp_path / folder}: {words}")
    (tmp_path / "new" / CHECKPOINTS).mkdir(parents=True)
    assert found(tmp_path / "new")["says"] == "never started"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("status.json", "{"),
        ("status.json", '{"state": "ended", "exit_code": "x"}'),
        ("metrics.jsonl", "\n\n[1]\n"),
        ("config.json", "]"),
        ("best/best.json", '{"loss": "x"}'),
        ("checkpoints/iter_0000006/manifest.json", "{}"),
    ],
)
def test_damaged_files_are_one_line(run: Path, file: str, text: str) -> None:
    (run / file).write_text(text)
    answer = ask(run)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith(f"error: {run / file}") and answer.stderr.count("\n") == 1


def test_what_a_finished_run_leaves(run: Path) -> None:
    script = str(CHECKOUT / "scripts/train/run.py")
    done, best, weights, *commands = closing(str(run), script, "an image.sif").splitlines()
    assert done == f"done     {run}: 7 iterations, last loss 2.5000"
    found = found_best(run)
    assert best == f"best     validation loss {found['loss']:.4f}, iteration {found['iteration']}: {run}/best"
    assert weights == f"weights  {run}/checkpoints/iter_0000006"
    convert, generate = (shlex.split(line.removeprefix("next")) for line in commands)
    for python, path, *_ in (convert, generate):
        assert shutil.which(python) and Path(path).is_file()
    image = ["--sif-path", "an image.sif"]
    assert convert[2:] == ["--megatron-dir", f"{run}/best", "--hf-dir", f"{run}/hf", *image]
    assert generate[2:] == ["--megatron-dir", f"{run}/best", "--prompt", "Hello", *image]
    shutil.rmtree(run / "best")
    without = closing(str(run), script)
    assert "best" not in without and f"--megatron-dir {shlex.quote(str(run))} " in without


def test_next_commands_are_as_the_run_was_started(run: Path) -> None:
    *_, convert, generate = closing(str(run), "scripts/train/run.py").splitlines()
    assert convert.split()[2] == "scripts/convert/convert_megatron_to_hf.py"
    assert generate.split()[1] == "scripts/inference/generate.py"


def test_a_run_that_stopped_early_says_so(run: Path) -> None:
    """And one without --train-iters shows its total."""
    training = {"train_samples": 83, "global_batch_size": 4, "early_stopping_patience": 2}
    (run / "config.json").write_text(json.dumps({"training": training}))
    status.note_running(str(run), [], None, "")
    status.note_ended(str(run), 0, "")
    file = run / "checkpoints" / "iter_0000006" / "run_state.json"
    state = {"iteration": 6, "evaluations_without_improvement": 2}
    file.write_text(json.dumps(state))
    answer = found(run)
    assert (answer["state"], answer["total"]) == ("done", 20)
    early = "; stopped early at iteration 6, 2 evaluations without an improvement; the best checkpoint is "
    assert answer["says"].endswith(f"{early}{run / BEST}")
    for other in ({"evaluations_without_improvement": 1}, {"iteration": 20}):
        file.write_text(json.dumps({**state, **other}))
        assert found(run)["says"].partition(" since ")[0] == "done" and "early" not in found(run)["says"]


def found_best(run: Path) -> dict[str, float]:
    best: dict[str, float] = json.loads((run / "best/best.json").read_text())
    return best
