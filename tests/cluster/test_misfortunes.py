"""What ends a run on a cluster: a clear message, an intact last checkpoint, and the same script goes on."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.cluster.demo import ITERATIONS, RUN, SAVE_INTERVAL, Demo, logged, losses
from tests.cluster.hosts import Host
from tests.cluster.slurm import Slurm, wait_until

pytestmark = pytest.mark.cluster

# One process on each node, which starts sooner than two. What is lost and done again has the same bits,
# but the reference has another layout: see tests/training/test_layouts.py.
LAYOUT = ("--tp", "1", "--pp", "2")
TOLERANCE = 1e-5
BATCH = """#!/bin/bash
#SBATCH --nodes 2 --job-name train --open-mode append --output {folder}/%x.log
srun --ntasks-per-node 1 --kill-on-bad-exit=1 {python} {run} {flags}
"""


def batch_script(folder: Path, flags: list[str]) -> Path:
    script = folder / "train.sh"
    script.write_text(BATCH.format(folder=folder, python=sys.executable, run=RUN, flags=" ".join(flags)))
    return script


def ranks(node: Host) -> list[int]:
    """Process ids of a node's ranks."""
    found = node.processes().items()
    return sorted(pid for pid, words in found if words[1:4] == ["-u", "-m", "megatron_vlm.training"])


def wait_for_a_checkpoint(cluster: Slurm, job: str, run: Path) -> None:
    """Until the run has one, and has trained beyond it."""
    cluster.wait_for(job, "RUNNING")
    cluster.wait_while_it_runs(job, lambda: logged(run) >= SAVE_INTERVAL + 2)
    assert logged(run) < ITERATIONS


def go_on(cluster: Slurm, script: Path, run: Path, expected: list[float]) -> None:
    """Submit the same script again: it resumes, and the whole is what it would have been."""
    job = cluster.submit(script)
    assert cluster.wait_for(job)["JobState"] == "COMPLETED", (script.parent / "train.log").read_text()
    assert f"resuming {run} from iter_" in (script.parent / "train.log").read_text()
    assert losses(run) == pytest.approx(expected, rel=TOLERANCE)


def test_a_killed_rank(cluster: Slurm, demo: Demo, expected: list[float], tmp_path: Path) -> None:
    script = batch_script(tmp_path, demo.flags(tmp_path, "run", *LAYOUT))
    job = cluster.submit(script)
    wait_for_a_checkpoint(cluster, job, tmp_path / "run")
    (rank,) = ranks(cluster.site.nodes[1])
    os.kill(rank, signal.SIGKILL)
    assert cluster.wait_for(job)["JobState"] == "FAILED"
    assert "rank 1 was ended by SIGKILL" in (tmp_path / "train.log").read_text()
    go_on(cluster, script, tmp_path / "run", expected)


def test_scancel(cluster: Slurm, demo: Demo, expected: list[float], tmp_path: Path) -> None:
    script = batch_script(tmp_path, demo.flags(tmp_path, "run", *LAYOUT))
    job = cluster.submit(script)
    wait_for_a_checkpoint(cluster, job, tmp_path / "run")
    cluster.login.run("scancel", job)
    assert cluster.wait_for(job)["JobState"] == "CANCELLED"
    wait_until(lambda: not any(map(ranks, cluster.site.nodes)), "no rank is left")
    go_on(cluster, script, tmp_path / "run", expected)


def test_a_node_that_stands_still(cluster: Slurm, demo: Demo, expected: list[float], tmp_path: Path) -> None:
    """Its daemon is gone and its ranks answer no more: SLURM gives it up and queues the job again."""
    node = cluster.site.nodes[1]
    script = batch_script(tmp_path, demo.flags(tmp_path, "run", *LAYOUT))
    job = cluster.submit(script)
    wait_for_a_checkpoint(cluster, job, tmp_path / "run")
    cluster.stop_node(node)
    frozen = [pid for pid in node.processes() if pid != node.pid]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    cluster.wait_for(job, "PENDING")
    for pid in frozen:  # it boots
        os.kill(pid, signal.SIGKILL)
    cluster.start_node(node)
    assert cluster.wait_for(job)["JobState"] == "COMPLETED"
    log = (tmp_path / "train.log").read_text()
    assert "DUE TO NODE FAILURE" in log and f"resuming {tmp_path}/run from iter_" in log
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=TOLERANCE)


def test_a_full_disk(cluster: Slurm, demo: Demo, expected: list[float], tmp_path: Path) -> None:
    disk, login = cluster.site.small_disk, cluster.login
    run = login.path(disk / "run")
    script = batch_script(tmp_path, demo.flags(disk, "run", *LAYOUT))
    job = cluster.submit(script)
    wait_for_a_checkpoint(cluster, job, run)
    login.run("dd", "if=/dev/zero", f"of={disk}/others", "bs=1M", check=False)  # until nothing is left
    assert cluster.wait_for(job)["JobState"] == "FAILED"
    log = (tmp_path / "train.log").read_text()
    assert "No space left on device" in log
    login.run("rm", disk / "others")
    job = cluster.submit(script)
    assert cluster.wait_for(job)["JobState"] == "COMPLETED", (tmp_path / "train.log").read_text()
    assert losses(run) == pytest.approx(expected, rel=TOLERANCE)
