"""A run that is killed again and again ends as one that never was: losses, counts and weights bit for bit.

It packs a mixture of two datasets, with damaged images among them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.hf.formats.native import NativeReader
from tests.distributed import Pool
from tests.patience import HANG
from tests.training.conftest import Trainable
from tests.training.test_evaluate import without_times
from tests.workers import train

# A kill costs a start of the whole stack. `make kill-test` does 20.
KILLS = int(os.environ.get("KILLS", "3"))
ITERATIONS = 40 * KILLS  # a run that is left alone for a second does about 15
TARGETS = ["rank", "torchrun", "run.py"]
MOMENTS = ["saving", "training", "starting", "training"]
RUN = Path(__file__).parents[2] / "scripts" / "train" / "run.py"


def flags_of(trainable: Trainable, folder: Path, name: str) -> list[str]:
    mixture = folder / "mix.yaml"
    mixture.write_text(
        f"datasets:\n  pictures: {{path: {trainable.data}, weight: 2}}\n"
        f"  text: {{path: {trainable.text_only}, weight: 1, template: plain}}\n"
    )
    flags = trainable.flags(folder, name, "-g", "2", "--dist-optim", "--train-vision", "--save-optim")
    flags += ["--packing", "--packing-buffer-size", "12", "--data-path", str(mixture)]
    return [*flags, "--save-interval", "8", "--train-iters", str(ITERATIONS)]


def processes() -> dict[int, tuple[int, str]]:
    """Parent and command line of every process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            found[int(entry.name)] = parent, line
    return found


def find(started: subprocess.Popen[bytes], target: str) -> int | None:
    """Process id of run.py, of its torchrun or of one of its ranks."""
    if target == "run.py":
        return started.pid
    everyone = processes()
    torchrun = [pid for pid, (parent, _) in everyone.items() if parent == started.pid]
    if target == "torchrun":
        return torchrun[0] if torchrun else None
    ranks = [pid for pid, (parent, _) in everyone.items() if parent in torchrun]
    return random.choice(ranks) if ranks else None


def lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def changed(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # renamed meanwhile: the save is done
        return 0.0


def wait_for(moment: str, started: subprocess.Popen[bytes], run: Path) -> None:
    """Until the run is saving, has trained a little, or has merely been started."""
    begun = time.time()
    before = lines(run)
    if moment == "starting":
        time.sleep(random.uniform(0.5, 8.0))
        return
    while started.poll() is None:
        # An earlier kill may have left a folder behind; one of this start is newer.
        folders = run.glob("checkpoints/.iter_*.incomplete")
        if moment == "saving" and any(changed(folder) > begun for folder in folders):
            time.sleep(random.uniform(0.0, 0.1))
            return
        if moment == "training" and lines(run) > before:
            time.sleep(random.uniform(0.0, 1.0))
            return
        time.sleep(0.01)
    raise AssertionError(f"never got to {moment}: exit code {started.poll()}")


def logged(run: Path) -> list[dict[str, Any]]:
    entries = without_times([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert [entry["iteration"] for entry in entries] == list(range(1, ITERATIONS + 1))
    return entries


def test_killed_runs_go_on_exactly(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    pool.run(2, train, flags_of(trainables["untied"], tmp_path, "calm"))

    seed = int(os.environ.get("KILL_SEED", str(time.time_ns())))
    print(f"KILL_SEED={seed}")
    random.seed(seed)
    again = [sys.executable, str(RUN), *flags_of(trainables["untied"], tmp_path, "killed")]
    run = tmp_path / "killed"
    for number in range(KILLS):
        started = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        moment, target = MOMENTS[number % len(MOMENTS)], TARGETS[number % len(TARGETS)]
        wait_for(moment, started, run)
        while (victim := find(started, target)) is None:
            time.sleep(0.01)  # not started yet
        os.kill(victim, signal.SIGKILL)
        print(f"kill {number + 1}: {target} while {moment}, {lines(run)} iterations logged", flush=True)
        started.wait(timeout=HANG)
        assert started.returncode != 0
    assert lines(run) < ITERATIONS
    ended = subprocess.run(again, check=True, capture_output=True, text=True)
    assert f"resuming {run} from iter_" in ended.stdout

    expected = logged(tmp_path / "calm")
    assert expected[-1]["corrupt"] > 0
    for entry, calm_entry in zip(logged(run), expected, strict=True):
        assert entry == calm_entry
    last = f"checkpoints/iter_{ITERATIONS:07d}"
    killed, calm = NativeReader(run / last), NativeReader(tmp_path / "calm" / last)
    assert set(killed.names) == set(calm.names)
    for name in calm.names:
        assert torch.equal(killed.read(name), calm.read(name)), name
