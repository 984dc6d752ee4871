"""Runs under a real SLURM."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cluster.demo import RUN, Demo, losses
from tests.cluster.slurm import GPUS, Slurm

pytestmark = pytest.mark.cluster


def test_a_job_sees_nodes_and_gpus(cluster: Slurm) -> None:
    """The GPUs are make-believe, the variables are not."""
    words = "$(hostname) $CUDA_VISIBLE_DEVICES $SLURM_GPUS_ON_NODE"
    srun = ["srun", "--nodes", "2", f"--gres=gpu:{GPUS}", "sh", "-c", f"echo {words}"]
    output = cluster.login.run(*srun).stdout
    assert sorted(output.splitlines()) == ["node1 0,1,2,3 4", "node2 0,1,2,3 4"]


def test_a_batch_script_of_ones_own(
    cluster: Slurm, demo: Demo, expected: list[float], tmp_path: Path
) -> None:
    """srun tells run.py the number of nodes, which of them this is, and which is the first."""
    script = tmp_path / "mine.sh"
    flags = " ".join(demo.flags(tmp_path, "run"))
    script.write_text(
        f"#!/bin/bash\n#SBATCH -N 2 -o out\nsrun --ntasks-per-node 1 {sys.executable} {RUN} {flags}\n"
    )
    job = cluster.submit(script)
    ended = cluster.wait_for(job)
    assert ended["JobState"] == "COMPLETED", (tmp_path / "out").read_text()
    assert losses(tmp_path / "run") == expected
    logs = {path.name for path in (tmp_path / "run/logs").iterdir()}
    assert {f"slurm-{job}-node0.log", f"slurm-{job}-node1.log"} <= logs
