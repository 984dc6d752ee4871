"""The demo model of examples/digits, trained for a few iterations: inputs, flags, and what a run leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import Host

CHECKOUT = Path(__file__).parents[2]
RUN = CHECKOUT / "scripts" / "train" / "run.py"
ITERATIONS = 40  # four seconds and a start of ten, where nothing else runs
SAVE_INTERVAL = 5
# What an engineer has on a login node: some Python, and nothing installed in it.
LOGIN_PYTHON = (sys.executable, "-I", "-S")
PARALLEL = ("--tp", "2", "--pp", "2")


@dataclass(frozen=True)
class Demo:
    """The digits of examples/digits: what run.py reads, and what it writes."""

    checkpoint: Path
    hf: Path
    data: Path

    def flags(self, save_dir: Path, name: str, *more: object) -> list[str]:
        """A short run of the demo model on CPUs, with a few checkpoints."""
        return [
            *("--name", name, "--save-dir", str(save_dir), "--data-path", str(self.data), "--lang", "en"),
            *("--megatron-load-dir", str(self.checkpoint), "--tokenizer-load-dir", str(self.hf)),
            *("--stage", "2", "--train-vision", "--fp32", "--seq-length", "64", "--device", "cpu"),
            *("--micro-batch-size", "6", "--global-batch-size", "12", "--lr", "1e-3"),
            *("--lr-warmup-iters", "0", "--train-iters", str(ITERATIONS), "--save-optim"),
            *("--save-interval", str(SAVE_INTERVAL), *PARALLEL, *map(str, more)),
        ]


def make_demo(folder: Path) -> Demo:
    """Dataset and model, made by the demo's own commands."""
    data, hf, megatron = folder / "data", folder / "llava", folder / "megatron"

    def run(*command: object) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            list(map(str, command)), cwd=CHECKOUT, env=os.environ | {"PATH": path}, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()

    run("python", "examples/digits/make_dataset.py", "--save-dir", data)
    run(
        *("energon", "prepare", "--non-interactive", "--no-progress", "--num-workers", "2"),
        *("--split-parts", "train:train-.*", "--split-parts", "val:held-out-.*"),
        *("--sample-type", "VQASample"),
        *("--field-map", '{"image": "jpg", "context": "json[question]", "answers": "txt"}', data),
    )
    run("python", "examples/digits/make_models.py", "--save-dir", folder)
    run(
        *("python", "scripts/convert/build_llava_jp.py", "--save-dir", hf, "--lang", "en"),
        *("--text-model", folder / "text-model", "--vision-model", folder / "vision-model"),
    )
    run("python", "scripts/convert/convert_hf_to_megatron.py", "--hf-dir", hf, "--megatron-dir", megatron)
    return Demo(megatron, hf, data)


def submit(login: Host, demo: Demo, save_dir: Path, *more: object) -> list[str]:
    """Train the demo as ``<save_dir>/run`` on two nodes, with --submit on the login host.

    Returns:
        The ids of the jobs.
    """
    flags = demo.flags(save_dir, "run", "--node", 2, *more, "--submit")
    # Without an image the nodes need what this Python has.
    python = LOGIN_PYTHON if "--sif-path" in more else [sys.executable]
    done = login.run(*python, RUN, *flags, check=False)
    assert done.returncode == 0, done.stderr
    run = login.path(save_dir / "run")
    script = max((run / "slurm").glob("*.sh"))
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    status = json.loads((run / "status.json").read_text())
    return [status["job_id"], *status["more_jobs"]]


def output(run: Path, job: str) -> str:
    """Return what a submitted job has printed."""
    return (run / f"slurm/{job}.log").read_text()


def logged(run: Path) -> int:
    """Return how many iterations a run has logged."""
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def losses(run: Path) -> list[float]:
    """The loss of every iteration that a run has logged, in order and without a gap."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]
