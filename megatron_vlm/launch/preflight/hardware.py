"""Checks of what the ranks run on: GPUs, memory, cores, nodes."""

from __future__ import annotations

from megatron_vlm.launch import machine
from megatron_vlm.launch.launch_plan import NODE_0
from megatron_vlm.launch.preflight import storage
from megatron_vlm.launch.preflight.inspection import Inspection
from megatron_vlm.plan.fp8_rules import unsupported
from megatron_vlm.plan.memory import GIB, estimate, suggestions
from megatron_vlm.system.units import count_text, size_text


def gpus(found: Inspection) -> None:
    """Check the GPUs; a job, or a plan for another machine, may find others than this machine has."""
    fp8 = found.config.fp8
    capability = machine.compute_capability() if fp8 is not None and found.plan.device == "cuda" else None
    if fp8 is None or capability is None or found.config.slurm.submit:
        return
    cuda = machine.torch_cuda() if found.config.launch.sif_path is None else None
    problem = unsupported(fp8.recipe, capability, cuda)
    if problem is not None:
        (found.warnings if found.config.launch.only_looks else found.errors).append(problem)


def memory(found: Inspection) -> None:
    plan, model, job = found.plan, found.model, found.config.slurm.submit
    if plan.device == "cuda":
        # A job's GPUs are those of its nodes, whatever the machine has that it is submitted from.
        found.gpu_memory = found.config.launch.gpu_memory or (None if job else machine.gpu_memory())
    if model is None or found.contradictions:
        return
    found.memory = estimate(found.config, model, plan.world_size, plan.device)
    if plan.device == "cpu" and not job:
        _main_memory(found)
    elif found.gpu_memory is not None:
        limit = int(found.gpu_memory * GIB)
        largest = max(found.memory, key=lambda stage: stage.with_allowance)
        changes = suggestions(found.config, model, plan.world_size, limit, plan.device)
        if changes:
            found.warnings.append(
                f"a GPU of pipeline stage {largest.rank} is predicted to need "
                f"{largest.with_allowance / GIB:.1f} GiB and has {found.gpu_memory:.1f}; "
                + " or ".join(changes)
            )


def _main_memory(found: Inspection) -> None:
    """Warn where the ranks of node 0, which hold the first stages, take more main memory than there is."""
    size = found.plan.world_size // found.config.parallel.pp
    need = sum(found.memory[rank // size].total for rank in range(found.plan.processes))
    have = machine.main_memory()
    if have is not None and need > have and not found.config.launch.only_looks:
        found.warnings.append(
            f"the {found.plan.processes} processes of this node are predicted to need "
            f"{size_text(need)} of memory, and it has {size_text(have)}; use fewer, or more nodes"
        )


def cores(found: Inspection) -> None:
    """Check the CPU cores; a SLURM job that asks for none has one on many sites."""
    config, processes, cores = found.config, found.plan.processes, machine.usable_cores()
    if found.plan.device == "cpu" or config.launch.only_looks or config.slurm.submit or cores >= processes:
        return
    found.warnings.append(
        f"the {processes} processes of this node have {count_text(cores, 'CPU core')} between them, and "
        "loader workers need some besides; a SLURM job asks for more by --cpus-per-gpu, such as 8"
    )


def nodes(found: Inspection) -> None:
    """Check what several machines have to agree on."""
    launch, parallel, per_node = found.config.launch, found.config.parallel, found.plan.processes
    nodes = launch.node or 1
    if nodes == 1:
        return
    if launch.interface == "lo":
        others = ", ".join(name for name in machine.network_interfaces() if name != "lo")
        found.warnings.append(f"--interface lo reaches this machine only; there are {others}")
    if launch.master_addr in ("localhost", "127.0.0.1", "::1"):
        found.warnings.append(
            f"--master-addr {launch.master_addr} is another machine on every node; give node 0's host name"
        )
    address = launch.master_addr
    if launch.dry_run or address in (None, NODE_0):
        return
    if not machine.knows_host(str(address)):
        told = found.warnings if launch.preflight_only else found.errors  # this may be none of the nodes
        told.append(f"--master-addr {address}: this machine knows no such host; give the name of node 0")
    if per_node % parallel.tp:
        divisors = [n for n in range(1, parallel.tp) if parallel.tp % n == 0 and per_node % n == 0]
        found.warnings.append(
            f"--tp {parallel.tp} with {per_node} ranks on a node: tensor-parallel groups reach over nodes, "
            f"and wait for the network in every layer; use --tp {divisors[-1]} and more --pp"
        )
    where = found.config.checkpoint.save_dir
    kind = storage.local_file_system(where) if where else None
    if kind is not None:
        found.warnings.append(
            f"--save-dir {where} is on this machine's own file system ({kind}), and all {nodes} nodes write "
            "parts of a checkpoint there; give a folder that they share"
        )
