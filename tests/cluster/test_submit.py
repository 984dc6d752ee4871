"""run.py --submit to a real SLURM: two nodes as one, in a container, through signals and chains of jobs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cluster import apptainer
from tests.cluster.demo import (
    CHECKOUT,
    ITERATIONS,
    LOGIN_PYTHON,
    RUN,
    SAVE_INTERVAL,
    Demo,
    logged,
    losses,
    output,
    submit,
)
from tests.cluster.slurm import GPUS, Slurm
from tests.patience import HANG

pytestmark = pytest.mark.cluster

STATUS = CHECKOUT / "scripts/train/status.py"


def status(cluster: Slurm, folder: Path) -> dict[str, object]:
    """Return what the status command says on the login node, from the folder alone."""
    return json.loads(cluster.login.run(*LOGIN_PYTHON, STATUS, folder / "run", "--json").stdout)


def interrupt(cluster: Slurm, job: str, run: Path) -> None:
    """Send what SLURM sends before the time limit, once the run has a checkpoint and is beyond it."""
    cluster.wait_while_it_runs(job, lambda: logged(run) >= SAVE_INTERVAL + 2)
    cluster.login.run("scancel", "--signal=USR1", job)


def test_two_nodes_in_a_container(
    cluster: Slurm, demo: Demo, expected: list[float], cpu_image: Path, tmp_path: Path
) -> None:
    """TP 2 on each node, PP 2 between them, in the image of the CPU recipe; and the status all along."""
    nodes = ",".join(node.name for node in cluster.site.nodes)
    cluster.login.run("scontrol", "update", f"NodeName={nodes}", "State=DRAIN", "Reason=test")
    command = ["--container-command", apptainer.find_apptainer(), "--sif-path", cpu_image]
    (job,) = submit(cluster.login, demo, tmp_path, *command)
    (script,) = (tmp_path / "run/slurm").glob("*.sh")
    assert "gres" not in script.read_text()  # for CPUs it asks for no GPU
    assert status(cluster, tmp_path)["state"] == "queued"
    cluster.login.run("scontrol", "update", f"NodeName={nodes}", "State=RESUME")
    cluster.wait_while_it_runs(job, lambda: logged(tmp_path / "run") >= 2)
    assert status(cluster, tmp_path)["state"] == "running"
    assert cluster.wait_for(job)["JobState"] == "COMPLETED", output(tmp_path / "run", job)
    ended = status(cluster, tmp_path)
    assert (ended["state"], ended["iteration"]) == ("done", ITERATIONS)
    assert losses(tmp_path / "run") == expected
    logs = {path.name for path in (tmp_path / "run/logs").glob("*.log")}
    assert {f"slurm-{job}-node0.log", f"slurm-{job}-node1.log"} <= logs


def test_a_signal_before_the_time_limit(
    cluster: Slurm, demo: Demo, expected: list[float], tmp_path: Path
) -> None:
    """Saved, queued again, resumed: the losses of the whole are those of an undisturbed run, bit for bit."""
    (job,) = submit(cluster.login, demo, tmp_path)
    interrupt(cluster, job, tmp_path / "run")
    ended = cluster.wait_for(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output(tmp_path / "run", job)
    assert "saved; requeued, 1 of at most" in output(tmp_path / "run", job)
    assert f"resuming {tmp_path}/run from iter_" in output(tmp_path / "run", job)
    assert losses(tmp_path / "run") == expected
    assert not (tmp_path / "run/metrics.superseded.jsonl").exists(), "nothing was done twice"


def test_a_chain(cluster: Slurm, demo: Demo, expected: list[float], tmp_path: Path) -> None:
    """The next job carries on, and when the run is done those that are left have nothing to do."""
    first, second, third = submit(cluster.login, demo, tmp_path, "--chain", 3)
    interrupt(cluster, first, tmp_path / "run")
    states = [cluster.wait_for(job)["JobState"] for job in (first, second, third)]
    assert states == ["FAILED", "COMPLETED", "COMPLETED"], output(tmp_path / "run", first)
    assert losses(tmp_path / "run") == expected
    assert "the run has ended before" in output(tmp_path / "run", third)


def test_typed_inside_salloc(cluster: Slurm, demo: Demo, expected: list[float], tmp_path: Path) -> None:
    """On the login node, with an allocation: run.py finds the nodes and starts itself there."""
    command = ["salloc", "--nodes", 2, sys.executable, RUN, *demo.flags(tmp_path, "run")]
    done = cluster.login.run(*command, cwd=tmp_path, timeout=HANG, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == expected


def test_gpus_and_the_container(cluster: Slurm, demo: Demo, tmp_path: Path) -> None:
    """Make-believe GPUs: what SLURM gives each node reaches the container, here a stub, and torchrun."""
    stub, image = tmp_path / "apptainer", tmp_path / "image.sif"
    # A file for each node: what two nodes print at once is mixed within a line of the job's log now and then.
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/$(hostname).given"\n')
    stub.chmod(0o755)
    image.write_bytes(b"hsqs")  # how a squashfs image begins
    flags = ["--device", "cuda", "--gpus", GPUS, "--container-command", stub, "--sif-path", image]
    (job,) = submit(cluster.login, demo, tmp_path, *flags)
    assert cluster.wait_for(job)["JobState"] == "COMPLETED", output(tmp_path / "run", job)
    for rank, node in enumerate(cluster.site.nodes):
        words = (tmp_path / f"{node.name}.given").read_text().splitlines()
        assert words[0] == "exec"
        assert {"--nv", "CUDA_VISIBLE_DEVICES=0,1,2,3"} <= set(words)
        given = [
            words[words.index(flag) + 1] for flag in ("--node-rank", "--nproc-per-node", "--master-addr")
        ]
        assert given == [str(rank), str(GPUS), "node1"]
