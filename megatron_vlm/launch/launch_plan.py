"""From a run config and a machine to the command of this node."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Protocol, Sequence, Tuple

from megatron_vlm.artifacts.checkpoint import checkpoint_layers
from megatron_vlm.artifacts.mixture import data_folders, is_mixture
from megatron_vlm.config.run import DETERMINISTIC_ENVIRONMENT, RunConfig
from megatron_vlm.config.sections import ParallelSection
from megatron_vlm.config.sections.launch import LaunchSection
from megatron_vlm.config.sections.slurm import SlurmSection
from megatron_vlm.launch import container, machine
from megatron_vlm.launch.slurm import starts_again, with_cluster_defaults
from megatron_vlm.system.units import count_text

NODE_0 = "NODE0"  # stands in a plan for a machine that is not known yet
DEFAULT_PORT = 9902
_MOST_COMMANDS = 8  # with a line each
# Beginnings of the variables that the container command reads itself, such as APPTAINER_CACHEDIR.
_OF_CONTAINERS = ("APPTAINER", "SINGULARITY")


class Placed(Protocol):
    """A config that says how ranks are started and how they cut the model."""

    @property
    def launch(self) -> LaunchSection: ...

    @property
    def parallel(self) -> ParallelSection: ...


@dataclass(frozen=True)
class Ranks:
    """The ranks of this node."""

    device: str  # "cuda" or "cpu"
    processes: int  # on this node, one per GPU
    command: List[str]  # environment and torchrun
    notes: List[str]  # decisions that a user should see
    gpu_ids: List[str]  # none on the CPU
    port_claim: Optional[machine.PortClaim]  # holds the port until torchrun listens on it


@dataclass(frozen=True)
class LaunchPlan:
    """The command that a node runs, and its environment."""

    config: RunConfig  # with node, rank, master address and job id filled in
    device: str  # "cuda" or "cpu"
    processes: int  # on this node, one per GPU
    world_size: int
    command: List[str]  # complete: environment, container and torchrun included
    notes: List[str]  # decisions that a user should see
    gpu_ids: List[str]  # on this node; none on the CPU
    port_claim: Optional[machine.PortClaim]  # holds the port until torchrun listens on it


def make_plans(
    config: RunConfig, environ: Mapping[str, str], problems: List[str], doubts: List[str]
) -> List[LaunchPlan]:
    """Make plans as :func:`make_plan`: for this node, or where several are only planned and none is named,
    for each.

    Of many nodes node 0's plan stands for all.

    Args:
        problems: takes what this machine lacks.
        doubts: takes it where several nodes are only planned: this machine may be none of them.
    """
    launch = config.launch
    nodes = launch.node or 1
    if not launch.only_looks or nodes == 1 or launch.rank is not None or "SLURM_STEP_NODELIST" in environ:
        return [make_plan(config, environ, problems)]
    address = launch.master_addr or NODE_0

    def on_node(rank: int) -> RunConfig:
        return dataclasses.replace(config, launch=dataclasses.replace(launch, rank=rank, master_addr=address))

    first = make_plan(on_node(0), environ, doubts)
    if launch.master_addr is None:
        first.notes.append(
            f"{NODE_0} in the commands stands for the host name of node 0; --master-addr says it"
        )
    if nodes > _MOST_COMMANDS:
        first.notes.append(
            f"the command is node 0's; nodes 1 to {nodes - 1} have their number in place of the 0 of "
            "--node-rank"
        )
        return [first]
    # One machine is asked, and the others are taken to be like it.
    like_first = {**environ, "CUDA_VISIBLE_DEVICES": ",".join(first.gpu_ids)}
    return [first, *(make_plan(on_node(rank), like_first, []) for rank in range(1, nodes))]


def make_plan(
    config: RunConfig, environ: Mapping[str, str], problems: Optional[List[str]] = None
) -> LaunchPlan:
    """Decide device, number of processes, port and environment, and build the command.

    Args:
        problems: takes what this machine lacks and the plan can be made without: a free port, an
            interface, a container command. None: that is an error too.

    Raises:
        ValueError: this machine does not have what the flags ask for.
    """
    config = with_cluster_defaults(config, environ)
    again = config.checkpoint.restart and starts_again(environ)
    if again:
        config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, restart=False))
    launch = config.launch
    on_gpus = DETERMINISTIC_ENVIRONMENT if config.training.deterministic else {}
    ranks = plan_ranks(config, "megatron_vlm.training", _training_flags(config), environ, on_gpus, problems)
    if ranks.device == "cpu" and config.parallel.device != "cpu" and config.fp8 is not None:
        raise ValueError("--fp8 needs GPUs, and this machine has none; use --bf16")
    if again:
        ranks.notes.append("SLURM has started this job before: the run goes on, without --restart")
    command = ranks.command
    if launch.sif_path:
        runtime = _runtime(launch.container_command, problems)
        command = _in_container(config, command, environ, ranks.device, runtime)
    world_size = ranks.processes * (launch.node or 1)
    return LaunchPlan(
        config,
        ranks.device,
        ranks.processes,
        world_size,
        command,
        ranks.notes,
        ranks.gpu_ids,
        ranks.port_claim,
    )


def plan_job(config: RunConfig, environ: Mapping[str, str]) -> LaunchPlan:
    """Plan what the nodes of a job will run, as far as the flags say it.

    Its command is not that of the ranks: each node makes its own. It is empty, or the container with all
    that this machine can bind.

    Raises:
        ValueError: the flags leave open how many processes a node has.
    """
    device = config.parallel.device or ("cpu" if config.parallel.backend == "gloo" else "cuda")
    nodes = config.launch.node or 1
    if device == "cuda" and config.launch.gpus == -1:
        raise ValueError("--submit needs --gpus: how many GPUs of each node (--device cpu for a job without)")
    processes = config.launch.gpus if device == "cuda" else _cpu_processes(config, nodes)
    config = dataclasses.replace(config, launch=dataclasses.replace(config.launch, node=nodes))
    gpu_ids = [str(number) for number in range(processes)] if device == "cuda" else []
    command: List[str] = []
    if config.launch.sif_path:
        # A site's binds may lie on the nodes alone.
        here = tuple(bind for bind in config.launch.bind if not container.missing_sources(bind))
        bound = dataclasses.replace(config, launch=dataclasses.replace(config.launch, bind=here))
        command = _in_container(bound, ["true"], environ, device, container.RUNTIMES[0])
    return LaunchPlan(config, device, processes, processes * nodes, command, [], gpu_ids, None)


def _in_container(
    config: RunConfig, command: List[str], environ: Mapping[str, str], device: str, runtime: str
) -> List[str]:
    """Return ``command`` inside the image, with all that the run reads and writes bound."""
    launch, variables = config.launch, named_variables(config.launch.environment)
    command = container.container_command(
        command,
        str(launch.sif_path),
        binds=launch.bind,
        inputs=_inputs(config),
        paths=[
            *filter(None, [config.checkpoint.save_dir]),
            *container.cache_folders({**environ, **variables}),
        ],
        gpu=device == "cuda",
        runtime=runtime,
    )
    own = {name: value for name, value in variables.items() if name.startswith(_OF_CONTAINERS)}
    return container.with_environment(own, command)


def plan_ranks(
    config: Placed,
    module: str,
    flags: Sequence[str],
    environ: Mapping[str, str],
    on_gpus: Optional[Mapping[str, str]] = None,
    problems: Optional[List[str]] = None,
) -> Ranks:
    """Decide device, number of processes, port and environment of ``python -m module <flags>``.

    Args:
        on_gpus: further variables, set where the ranks run on GPUs.
        problems: see :func:`make_plan`.

    Raises:
        ValueError: this machine does not have what the flags ask for.
    """
    launch = config.launch
    notes: List[str] = []
    device, gpu_ids = _choose_device(config, environ, problems)
    nodes, rank = launch.node or 1, launch.rank or 0
    if device == "cpu" and config.parallel.transformer_impl == "transformer_engine":
        raise ValueError("--transformer-impl transformer_engine needs GPUs; use local, or leave it out")
    processes = len(gpu_ids) if device == "cuda" else _cpu_processes(config, nodes)
    claim, port = _choose_port(config, notes, problems)
    address = launch.master_addr or "127.0.0.1"

    python = container.PYTHON if launch.sif_path else sys.executable
    torchrun = [python, "-m", "megatron_vlm.launch.torchrun"]
    torchrun += ["--nnodes", str(nodes), "--node-rank", str(rank), "--nproc-per-node", str(processes)]
    torchrun += ["--master-addr", address, "--master-port", str(port)]
    # The "--" keeps torchrun from taking the flags after it, --node for one, for its own.
    command = [*torchrun, "-m", "--", module, *flags]
    variables = _environment(config, environ, device, gpu_ids, processes)
    variables.update(_network(config, environ, problems))
    variables.update(named_variables(launch.environment))
    if device == "cuda":
        variables.update(on_gpus or {})
    command = container.with_environment(variables, command)
    return Ranks(device, processes, command, notes, gpu_ids, claim)


def _tell(problem: str, problems: Optional[List[str]]) -> None:
    """Tell a problem that a plan can be made without: an error where nobody collects problems."""
    if problems is None:
        raise ValueError(problem)
    problems.append(problem)


def _choose_device(
    config: Placed, environ: Mapping[str, str], problems: Optional[List[str]]
) -> Tuple[str, List[str]]:
    """Return the device, and the ids of the GPUs to use."""
    launch, wanted = config.launch, config.parallel.device
    visible = [] if wanted == "cpu" else machine.visible_gpus(environ)
    # The machine that is asked for a plan need not be the one that runs it.
    planned = list(launch.gpu_ids) or [str(number) for number in range(launch.gpus)]
    for_another = launch.only_looks and (wanted == "cuda" or launch.gpu_memory is not None)
    if for_another and not visible and wanted != "cpu":
        visible = planned
    if not visible:
        if launch.gpu_ids and wanted != "cpu":
            raise ValueError("--gpu-ids: this machine has no GPU; leave it out to run on the CPU")
        if wanted == "cuda":
            raise ValueError("--device cuda: this machine has no GPU; use --device cpu")
        if config.parallel.backend == "nccl":
            raise ValueError("--backend nccl needs GPUs and this machine has none; use --backend gloo")
        return "cpu", []
    if config.parallel.backend == "gloo":
        raise ValueError("--backend gloo runs on CPUs only; add --device cpu or use --backend nccl")
    unknown = [gpu for gpu in launch.gpu_ids if gpu not in visible]
    if unknown:
        raise ValueError(f"--gpu-ids {','.join(unknown)}: not among the visible GPUs {','.join(visible)}")
    gpu_ids = list(launch.gpu_ids) or visible
    if launch.gpus > len(gpu_ids):
        _tell(
            f"--gpus {launch.gpus}: this machine has {count_text(len(gpu_ids), 'visible GPU')}; "
            f"use --gpus {len(gpu_ids)}, or --device cpu",
            problems if launch.only_looks else None,
        )
        return "cuda", planned
    return "cuda", gpu_ids if launch.gpus == -1 else gpu_ids[: launch.gpus]


def _cpu_processes(config: Placed, nodes: int) -> int:
    if config.launch.gpus != -1:
        return config.launch.gpus
    model_parallel = config.parallel.tp * config.parallel.pp
    if model_parallel % nodes:
        raise ValueError(
            f"--tp {config.parallel.tp} x --pp {config.parallel.pp} processes cannot be shared evenly by "
            f"--node {nodes}; say with --gpus how many to start on each node"
        )
    return model_parallel // nodes


def _choose_port(
    config: Placed, notes: List[str], problems: Optional[List[str]]
) -> Tuple[Optional[machine.PortClaim], int]:
    launch = config.launch
    wanted, flag = (
        launch.rdzv_port or launch.master_port or DEFAULT_PORT,
        "--rdzv-port" if launch.rdzv_port else "--master-port",
    )
    if launch.rank:
        return None, wanted  # only node 0 listens
    try:
        claim = machine.claim_port(wanted, search=launch.node == 1 and not launch.rdzv_port, flag=flag)
    except ValueError as error:
        _tell(str(error), problems)
        return None, wanted
    if claim.port != wanted:
        notes.append(f"port {wanted} is busy, using {claim.port}")
    return claim, claim.port


def _environment(
    config: Placed, environ: Mapping[str, str], device: str, gpu_ids: List[str], processes: int
) -> Dict[str, str]:
    variables = {"PYTHONPATH": container.python_path(environ), "PYTHONUNBUFFERED": "1"}
    if device == "cuda":
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpu_ids)
        threads = 1  # the cores belong to the data loader workers
        if config.parallel.tp > 1 or config.parallel.sequence_parallel:
            # Kernels start in the order they are launched, so that communication overlaps with GEMMs.
            variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    else:
        if config.parallel.device == "cpu":
            variables["CUDA_VISIBLE_DEVICES"] = ""
        threads = max(1, machine.usable_cores() // processes)
    variables["OMP_NUM_THREADS"] = environ.get("OMP_NUM_THREADS", str(threads))
    return variables


def named_variables(environment: Sequence[str]) -> Dict[str, str]:
    """Return ``--environment`` as a dictionary."""
    return {name: value for name, _, value in (entry.partition("=") for entry in environment)}


def _network(config: Placed, environ: Mapping[str, str], problems: Optional[List[str]]) -> Dict[str, str]:
    """Return the variables of gloo's and NCCL's interface; what the user has exported stays."""
    wanted, names = config.launch.interface, machine.network_interfaces()
    if wanted is not None:
        unknown = [name for name in wanted.split(",") if name not in names]
        if unknown:
            _tell(f"--interface {unknown[0]}: not on this machine; there are {', '.join(names)}", problems)
        return {"GLOO_SOCKET_IFNAME": wanted, "NCCL_SOCKET_IFNAME": wanted}
    if config.launch.node == 1:
        # Otherwise gloo looks up this machine's host name, which need not resolve.
        chosen = {"GLOO_SOCKET_IFNAME": "lo"} if "lo" in names else {}
    else:
        name = machine.fastest_interface(names)
        chosen = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name} if name else {}
    return {key: environ.get(key, name) for key, name in chosen.items()}


def _training_flags(config: RunConfig) -> List[str]:
    # The ranks are started already, and inside the container. They save their flags with the run, for
    # --config to take: a place among other nodes, another job's id or its log would be wrong there.
    given = config.launch
    nodes = given.node if given.num_workers is not None else None  # which together say --data-workers
    launch = LaunchSection(gpus=len(given.gpu_ids) or given.gpus, num_workers=given.num_workers, node=nodes)
    return dataclasses.replace(config, launch=launch, slurm=SlurmSection()).to_flags()


def _inputs(config: RunConfig) -> List[str]:
    """Return the paths that the run reads, a run folder to go on in among them: that may hold links, or be
    one."""
    where = config.checkpoint
    paths = [
        config.data.data_path,
        *_datasets(config),
        config.model.megatron_load_dir,
        config.model.tokenizer_load_dir,
        config.model.base,
        config.lora.lora_load_dir,
        where.run_dir if where.save_dir and where.name else None,
        *_bases(config),
    ]
    return [path for path in paths if path]


def _datasets(config: RunConfig) -> List[str]:
    """Return the folders of a mixture."""
    path = config.data.data_path or ""
    try:
        return data_folders(path) if is_mixture(path) else []
    except ValueError:
        return []  # the preflight tells what is wrong


def _bases(config: RunConfig) -> List[str]:
    """Return the checkpoints that one of trained weights only lies over, wherever they are."""
    sources = [config.model.megatron_load_dir or ""]
    if config.checkpoint.save_dir and config.checkpoint.name:
        sources.append(config.checkpoint.run_dir)
    found: List[str] = []
    for source in filter(os.path.isdir, sources):
        try:
            found += map(str, checkpoint_layers(source, config.model.base)[:-1])
        except ValueError:
            pass  # the preflight tells what is missing, and the run may not have saved yet
    return found


def _runtime(wanted: Optional[str], problems: Optional[List[str]]) -> str:
    try:
        return container.find_runtime(wanted)
    except ValueError as error:
        _tell(str(error), problems)
        return wanted or container.RUNTIMES[0]
