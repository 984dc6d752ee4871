"""What SLURM says about the job that this process runs in."""

from __future__ import annotations

import dataclasses
import re
from typing import Mapping

from megatron_vlm.config.run import RunConfig


def with_cluster_defaults(config: RunConfig, environ: Mapping[str, str]) -> RunConfig:
    """Fill in node count, rank, master address and job id: from SLURM where a flag leaves them out.

    Inside a job this process is expected to be started by srun once per node; a single node needs no
    srun.

    Raises:
        ValueError: several nodes, and no way to know which one this is.
    """
    launch = config.launch
    job_id = launch.slurm_job_id or environ.get("SLURM_JOB_ID")
    node, rank, master_addr = launch.node, launch.rank, launch.master_addr
    step_nodes = _number(environ, "SLURM_STEP_NUM_NODES") if "SLURM_STEP_NODELIST" in environ else 0
    if step_nodes > 1 and node in (None, step_nodes):
        if _number(environ, "SLURM_STEP_NUM_TASKS") > step_nodes:
            raise ValueError(
                "srun starts run.py several times on a node; it starts the processes of a node itself: "
                "use srun --ntasks-per-node 1"
            )
        node = step_nodes
        rank = _number(environ, "SLURM_NODEID") if rank is None else rank
        master_addr = master_addr or first_host(environ["SLURM_STEP_NODELIST"])
    elif node is None and not step_nodes and _number(environ, "SLURM_JOB_NUM_NODES") > 1:
        raise ValueError(
            f"this SLURM job has {environ['SLURM_JOB_NUM_NODES']} nodes, but run.py was started on one; "
            "start it with srun --ntasks-per-node 1, or use one node with --node 1"
        )
    node = node or 1
    if node > 1 and rank is None:
        raise ValueError(f"--node {node} needs --rank: the number of this node, 0 to {node - 1}")
    if node > 1 and master_addr is None:
        raise ValueError(f"--node {node} needs --master-addr: the host name or IP of node 0")
    rank = rank or 0
    if rank >= node:
        raise ValueError(f"--rank {rank} is not one of --node {node}; use 0 to {node - 1}")
    launch = dataclasses.replace(launch, node=node, rank=rank, master_addr=master_addr, slurm_job_id=job_id)
    return dataclasses.replace(config, launch=launch)


def first_host(node_list: str) -> str:
    """First host of a SLURM node list: ``rack[1-2]node[03-04,7],login`` -> ``rack1node03``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group(0)) if first else node_list


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdigit() else 0
