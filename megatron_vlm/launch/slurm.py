"""The SLURM job that this process runs in, as SLURM tells of it, and the step that it starts there."""

from __future__ import annotations

import dataclasses
import re
from typing import List, Mapping, Optional, Sequence

from megatron_vlm.config.run import RunConfig
from megatron_vlm.system.units import count_text

_FIRST_PORT, _PORTS = 10000, 20000  # below 32768, from where Linux gives ports to clients
# Steps that SLURM makes itself (batch, interactive, ...) are numbered from here on.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# After one node's run.py has ended the others get this long: enough to end after the same save, and less
# than a collective waits for a node that is gone.
STEP_WAIT_SECONDS = 120


def with_cluster_defaults(config: RunConfig, environ: Mapping[str, str]) -> RunConfig:
    """Fill in node count, rank, master address, port, job id and log name: SLURM's where a flag says none.

    Inside a job of several nodes this process is expected to be started by srun once per node, as the
    command of :func:`step_command` does.

    Raises:
        ValueError: several nodes, and no way to know which one this is.
    """
    launch = config.launch
    in_step = _in_step(environ)
    # A shell of salloc has the variables of its job, and so has a job that was submitted from there: a
    # step's own come first.
    job_id = launch.slurm_job_id or environ.get("SLURM_JOB_ID")
    node, rank, master_addr, port = launch.node, launch.rank, launch.master_addr, launch.master_port
    step_nodes = _number(environ, "SLURM_STEP_NUM_NODES") if in_step else 0
    # The shell of srun --pty is one task, however many there are.
    tasks = 0 if "SLURM_PTY_PORT" in environ else _number(environ, "SLURM_STEP_NUM_TASKS")
    if tasks > step_nodes > 0 and (node is None or node == step_nodes > 1):
        raise ValueError(
            "srun starts run.py several times on a node; it starts the processes of a node itself: "
            "use srun --ntasks-per-node 1"
        )
    if step_nodes > 1 and node in (None, step_nodes):
        node = step_nodes
        rank = _number(environ, "SLURM_NODEID") if rank is None else rank
        if master_addr is None:
            host = first_host(environ["SLURM_STEP_NODELIST"])
            master_addr = with_suffix(host, launch.master_suffix or "")
        if port is None:
            port = job_port(_number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID"))
    node = node or 1
    if node > 1 and rank is None:
        raise ValueError(f"--node {node} needs --rank: the number of this node, 0 to {node - 1}")
    if node > 1 and master_addr is None:
        raise ValueError(f"--node {node} needs --master-addr: the host name or IP of node 0")
    rank = rank or 0
    if rank >= node:
        raise ValueError(f"--rank {rank} is not one of --node {node}; use 0 to {node - 1}")
    launch = dataclasses.replace(
        launch,
        node=node,
        rank=rank,
        master_addr=master_addr,
        master_port=port,
        slurm_job_id=job_id,
        slurm_output_name=launch.slurm_output_name or output_name(environ),
    )
    return dataclasses.replace(config, launch=launch)


def nodes_to_start_on(config: RunConfig, environ: Mapping[str, str]) -> int:
    """Return the number of nodes of the job on which srun has yet to start run.py; 0 where this process is
    all it takes.

    That is in the shell of salloc, which may run on the login node, and in a batch script of one's own. It
    is 0 outside a job, in a step of srun, on the node of a job that is to use this one alone, and where
    ``--rank`` says that somebody starts the others.

    Raises:
        ValueError: ``--node`` does not fit the job.
    """
    nodes = _number(environ, "SLURM_JOB_NUM_NODES")
    if not nodes or _in_step(environ) or config.launch.rank is not None:
        return 0
    wanted = config.launch.node or nodes
    if wanted > nodes:
        raise ValueError(
            f"--node {wanted}: this SLURM job has {count_text(nodes, 'node')}; use --node {nodes} or fewer"
        )
    # slurmd sets it: where it is not, this is no node of the job.
    return 0 if wanted == 1 and "SLURMD_NODENAME" in environ else wanted


def step_command(nodes: int, environ: Mapping[str, str], run: Sequence[str]) -> List[str]:
    """Return the srun that starts ``run`` once on each of ``nodes`` nodes of this job."""
    command = ["srun", "--nodes", str(nodes), "--ntasks", str(nodes), "--ntasks-per-node", "1"]
    cores = cpus_per_node(environ)
    if cores:
        # srun does not take --cpus-per-task from the job, and would bind a task to one core.
        command += ["--cpus-per-task", str(cores)]
    return [*command, *step_options(), *run]


def step_options() -> List[str]:
    """Return options that end a step when one of its nodes ends, whatever the site's default."""
    # Not --kill-on-bad-exit: it would kill a node that is about to end with 75, too, one moment later.
    return ["--kill-on-bad-exit=0", f"--wait={STEP_WAIT_SECONDS}"]


def starts_again(environ: Mapping[str, str]) -> bool:
    """Return whether SLURM has started this job before: it was requeued, or a node of it failed."""
    return _number(environ, "SLURM_RESTART_COUNT") > 0


def cpus_per_node(environ: Mapping[str, str]) -> Optional[int]:
    """Return the number of cores that the one task of a node may have: the job's for all tasks on the
    smallest node."""
    if _number(environ, "SLURM_CPUS_PER_TASK"):
        tasks = _smallest(environ.get("SLURM_TASKS_PER_NODE", "")) or 1
        return _number(environ, "SLURM_CPUS_PER_TASK") * tasks
    return _smallest(environ.get("SLURM_JOB_CPUS_PER_NODE", ""))


def _smallest(counts: str) -> Optional[int]:
    """Return the smallest number of a list as SLURM writes it: ``72(x2),36`` -> 36."""
    found = re.findall(r"(?:^|,)(\d+)", counts)
    return min(map(int, found)) if found else None


def output_name(environ: Mapping[str, str]) -> Optional[str]:
    """Return the stem of this job's log files: ``slurm-<job>``, or ``slurm-<job>_<index>`` in an array."""
    if "SLURM_ARRAY_TASK_ID" in environ and "SLURM_ARRAY_JOB_ID" in environ:
        return f"slurm-{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return f"slurm-{environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in environ else None


def job_port(job: int, step: int) -> int:
    """Return a port that every node of a step finds by itself, and that two jobs on a node hardly share."""
    return _FIRST_PORT + (job + 101 * step) % _PORTS


def first_host(node_list: str) -> str:
    """Return the first host of a SLURM node list: ``rack[1-2]node[03-04,7],login`` -> ``rack1node03``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group(0)) if first else node_list


def with_suffix(host: str, suffix: str) -> str:
    """Return a host with a suffix: ``node01.site.org`` with ``i`` -> ``node01i.site.org``."""
    name, dot, domain = host.partition(".")
    return f"{name}{suffix}{dot}{domain}"


def _in_step(environ: Mapping[str, str]) -> bool:
    return "SLURM_STEP_NODELIST" in environ and _number(environ, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdigit() else 0
