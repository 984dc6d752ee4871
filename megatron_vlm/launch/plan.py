"""From a run config and a machine to the command of this node."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Protocol, Sequence, Tuple

from megatron_vlm.config.checkpoint import checkpoint_layers
from megatron_vlm.config.launching import LaunchSection
from megatron_vlm.config.run import DETERMINISTIC_ENVIRONMENT, RunConfig
from megatron_vlm.config.sections import ParallelSection
from megatron_vlm.launch import container, machine
from megatron_vlm.launch.slurm import with_cluster_defaults


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
    port_claim: Optional[machine.PortClaim]  # holds the port until torchrun listens on it


@dataclass(frozen=True)
class LaunchPlan:
    """What this node runs."""

    config: RunConfig  # with node, rank, master address and job id filled in
    device: str  # "cuda" or "cpu"
    processes: int  # on this node, one per GPU
    world_size: int
    command: List[str]  # complete: environment, container and torchrun included
    notes: List[str]  # decisions that a user should see
    port_claim: Optional[machine.PortClaim]  # holds the port until torchrun listens on it


def make_plan(config: RunConfig, environ: Mapping[str, str]) -> LaunchPlan:
    """Decide device, number of processes, port and environment, and build the command.

    Raises:
        ValueError: this machine does not have what the flags ask for.
    """
    config = with_cluster_defaults(config, environ)
    launch = config.launch
    on_gpus = DETERMINISTIC_ENVIRONMENT if config.training.deterministic else {}
    ranks = plan_ranks(config, "megatron_vlm.training", _training_flags(config), environ, on_gpus)
    command = ranks.command
    if launch.sif_path:
        command = container.container_command(
            command,
            launch.sif_path,
            binds=launch.bind,
            paths=_paths(config),
            gpu=ranks.device == "cuda",
            runtime=_runtime(launch.dry_run),
        )
    world_size = ranks.processes * (launch.node or 1)
    return LaunchPlan(
        config, ranks.device, ranks.processes, world_size, command, ranks.notes, ranks.port_claim
    )


def plan_ranks(
    config: Placed,
    module: str,
    flags: Sequence[str],
    environ: Mapping[str, str],
    on_gpus: Optional[Mapping[str, str]] = None,
) -> Ranks:
    """Decide device, number of processes, port and environment of ``python -m module <flags>``.

    Args:
        on_gpus: further variables, set where the ranks run on GPUs.

    Raises:
        ValueError: this machine does not have what the flags ask for.
    """
    launch = config.launch
    notes: List[str] = []
    device, gpu_ids = _choose_device(config, environ)
    nodes, rank = launch.node or 1, launch.rank or 0
    if device == "cpu" and config.parallel.transformer_impl == "transformer_engine":
        raise ValueError("--transformer-impl transformer_engine needs GPUs; use local, or leave it out")
    processes = len(gpu_ids) if device == "cuda" else _cpu_processes(config, nodes)
    claim, port = _choose_port(config, notes)
    address = launch.master_addr or "127.0.0.1"

    python = container.PYTHON if launch.sif_path else sys.executable
    torchrun = [python, "-m", "megatron_vlm.launch.torchrun"]
    torchrun += ["--nnodes", str(nodes), "--node-rank", str(rank), "--nproc-per-node", str(processes)]
    torchrun += ["--master-addr", address, "--master-port", str(port)]
    # The "--" keeps torchrun from taking the flags after it, --node for one, for its own.
    command = [*torchrun, "-m", "--", module, *flags]
    variables = _environment(config, environ, device, gpu_ids, processes)
    if device == "cuda":
        variables.update(on_gpus or {})
    command = container.with_environment(variables, command)
    return Ranks(device, processes, command, notes, claim)


def _choose_device(config: Placed, environ: Mapping[str, str]) -> Tuple[str, List[str]]:
    """The device, and the ids of the GPUs to use."""
    launch, wanted = config.launch, config.parallel.device
    visible = [] if wanted == "cpu" else machine.visible_gpus(environ)
    if wanted == "cuda" and not visible and launch.dry_run and launch.gpus > 0:
        # The machine that prints the command need not be the one that runs it.
        visible = [str(i) for i in range(launch.gpus)]
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
        raise ValueError(
            f"--gpus {launch.gpus}: this machine has {len(gpu_ids)} visible GPU(s); "
            f"use --gpus {len(gpu_ids)}, or --device cpu"
        )
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


def _choose_port(config: Placed, notes: List[str]) -> Tuple[Optional[machine.PortClaim], int]:
    launch = config.launch
    if launch.rank:
        return None, launch.rdzv_port or launch.master_port  # only node 0 listens
    if launch.rdzv_port:
        claim = machine.claim_port(launch.rdzv_port, search=False, flag="--rdzv-port")
    else:
        claim = machine.claim_port(launch.master_port, search=launch.node == 1, flag="--master-port")
        if claim.port != launch.master_port:
            notes.append(f"port {launch.master_port} is busy, using {claim.port}")
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
    variables.update(_network(config, environ))
    return variables


def _network(config: Placed, environ: Mapping[str, str]) -> Dict[str, str]:
    """Interface of gloo and NCCL; what the user has exported stays."""
    wanted, names = config.launch.interface, machine.network_interfaces()
    if wanted is not None:
        unknown = [name for name in wanted.split(",") if name not in names]
        if unknown and not config.launch.dry_run:
            raise ValueError(f"--interface {unknown[0]}: not on this machine; there are {', '.join(names)}")
        return {"GLOO_SOCKET_IFNAME": wanted, "NCCL_SOCKET_IFNAME": wanted}
    if config.launch.node == 1:
        # Otherwise gloo looks up this machine's host name, which need not resolve.
        chosen = {"GLOO_SOCKET_IFNAME": "lo"} if "lo" in names else {}
    else:
        name = machine.fastest_interface(names)
        chosen = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name} if name else {}
    return {key: environ.get(key, name) for key, name in chosen.items()}


def _training_flags(config: RunConfig) -> List[str]:
    # The ranks are started already, and inside the container.
    launch = dataclasses.replace(config.launch, dry_run=False, sif_path=None, bind=())
    return dataclasses.replace(config, launch=launch).to_flags()


def _paths(config: RunConfig) -> List[str]:
    paths = [
        config.checkpoint.save_dir,
        config.data.data_path,
        config.model.megatron_load_dir,
        config.model.tokenizer_load_dir,
        config.model.base,
        *_bases(config),
    ]
    return [os.path.abspath(path) for path in paths if path]


def _bases(config: RunConfig) -> List[str]:
    """What a checkpoint of trained weights only lies over, wherever that is."""
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


def _runtime(dry_run: bool) -> str:
    try:
        return container.find_runtime()
    except ValueError:
        if not dry_run:
            raise
        return container.RUNTIMES[0]
