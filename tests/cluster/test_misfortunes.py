"""What ends a run on a cluster: a clear message, an intact last checkpoint, and the same script goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.cluster.demo import ITERATIONS, SAVE_INTERVAL, Demo, logged, losses, output, submit
from tests.cluster.hosts import Host
from tests.cluster.slurm import ENDED, Slurm
from tests.patience import wait_until

pytestmark = pytest.mark.cluster

# One process on each node, which starts sooner than two. What is lost and done again has the same bits,
# but the reference has another layout: see tests/training/test_layouts.py.
LAYOUT = ("--tp", "1", "--pp", "2")
TOLERANCE = 1e-5


def ranks(node: Host) -> list[int]:
    """Process ids of a node's ranks."""
    found = node.processes().items()
    return sorted(pid for pid, words in found if words[1:4] == ["-u", "-m", "megatron_vlm.training"])


def start(cluster: Slurm, demo: Demo, folder: Path) -> str:
    """Submit the run and wait until it has trained beyond a checkpoint; returns the job's id."""
    (job,) = submit(cluster.login, demo, folder, *LAYOUT)
    run = cluster.login.path(folder / "run")
    cluster.wait_while_it_runs(job, lambda: logged(run) >= SAVE_INTERVAL + 2)
    assert logged(run) < ITERATIONS
    return job


def go_on(cluster: Slurm, demo: Demo, folder: Path, expected: list[float]) -> None:
    """Give the same command again: it resumes, and the whole is what it would have been."""
    (job,) = submit(cluster.login, demo, folder, *LAYOUT)
    ended, run = cluster.wait_for(job), cluster.login.path(folder / "run")
    assert ended["JobState"] == "COMPLETED", output(run, job)
    assert f"resuming {folder}/run from iter_" in output(run, job)
    assert losses(run) == pytest.approx(expected, rel=TOLERANCE)


def test_a_killed_rank(cluster: Slurm, demo: Demo, expected: list[float], tmp_path: Path) -> None:
    job = start(cluster, demo, tmp_path)
    (rank,) = ranks(cluster.site.nodes[1])
    os.kill(rank, signal.SIGKILL)
    assert cluster.wait_for(job)["JobState"] == "FAILED"
    assert "rank 1 was ended by SIGKILL" in output(tmp_path / "run", job)
    go_on(cluster, demo, tmp_path, expected)


def test_scancel(cluster: Slurm, demo: Demo, expected: list[float], tmp_path: Path) -> None:
    """The run saves, and the job is not queued again: it would come back whenever it is cancelled."""
    job = start(cluster, demo, tmp_path)
    cluster.login.run("scancel", job)
    assert cluster.wait_for(job, *ENDED, "PENDING")["JobState"] == "CANCELLED", output(tmp_path / "run", job)
    wait_until(lambda: not any(map(ranks, cluster.site.nodes)), "no rank is left")
    go_on(cluster, demo, tmp_path, expected)


def test_a_node_that_stands_still(cluster: Slurm, demo: Demo, expected: list[float], tmp_path: Path) -> None:
    """Its daemon is gone and its ranks answer no more: SLURM gives it up and queues the job again."""
    job, node = start(cluster, demo, tmp_path), cluster.site.nodes[1]
    cluster.stop_node(node)
    frozen = [pid for pid in node.processes() if pid != node.pid]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    cluster.give_up_node(node)
    cluster.wait_for(job, "PENDING")
    for pid in frozen:  # it boots
        os.kill(pid, signal.SIGKILL)
    cluster.start_node(node)
    assert cluster.wait_for(job)["JobState"] == "COMPLETED", output(tmp_path / "run", job)
    assert "DUE TO NODE FAILURE" in output(tmp_path / "run", job)
    assert f"resuming {tmp_path}/run from iter_" in output(tmp_path / "run", job)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=TOLERANCE)


def test_a_full_disk(cluster: Slurm, demo: Demo, expected: list[float], tmp_path: Path) -> None:
    """Others leave space for the log, and none for a checkpoint."""
    disk, login = cluster.site.small_disk, cluster.login
    job = start(cluster, demo, disk)
    login.run(
        "sh", "-c", f"dd if=/dev/zero of={disk}/others bs=1M; truncate --size=-3M {disk}/others", check=False
    )
    assert cluster.wait_for(job)["JobState"] == "FAILED"
    said = output(login.path(disk / "run"), job)
    assert "No space left on device" in said and "Traceback" not in said
    login.run("rm", disk / "others")
    go_on(cluster, demo, disk, expected)
