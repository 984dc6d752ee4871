"""The layout of ranks: process groups for tensor, pipeline and data parallelism.

The only reader of megatron-core's ``parallel_state``; the rest of the project asks a :class:`Layout`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_vlm.parallel import cpu
from megatron_vlm.system.units import count_text

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """The place of this rank among all ranks.

    Ranks are numbered as megatron-core does by default: tensor parallel ranks are neighbours, then
    data parallel ones, then pipeline stages.
    """

    device: torch.device
    rank: int
    world_size: int
    tp: int
    pp: int
    vpp: int  # model chunks on each pipeline rank; above 1 stages are interleaved
    dp: int
    cp: int  # context parallel size; 1: nothing cuts sequences
    ep: int  # expert parallel size; 1: each tensor parallel group holds all experts
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup  # all ranks that hold one copy of the model
    model_src: int  # the global rank of model_group that loads data for the others

    @property
    def is_first_stage(self) -> bool:
        """Return whether this rank holds the tower, the projector and the embedding, in its first model
        chunk."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Return whether this rank computes the loss, in its last model chunk."""
        return self.pp_rank == self.pp - 1

    @property
    def loads_data(self) -> bool:
        """Return whether this rank reads batches and hands them to the others of its model copy."""
        return self.rank == self.model_src

    def __str__(self) -> str:
        ranks = count_text(self.world_size, "rank")
        stages = f"PP {self.pp}" + (f" (VPP {self.vpp})" if self.vpp > 1 else "")
        return f"{ranks} on {self.device.type}: TP {self.tp} x {stages} x DP {self.dp}"


def choose_device(device: str | None = None, backend: str | None = None) -> tuple[str, str]:
    """Return the device and the communication backend of this machine; flags override what is found.

    Args:
        device: "cuda", "cpu", or None for what is there.
        backend: "nccl", "gloo", or None for the one that fits the device.

    Raises:
        ValueError: the two don't fit the machine or each other.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")
    if backend is None:
        backend = "nccl" if device == "cuda" else "gloo"
    if backend == "nccl" and device == "cpu":
        raise ValueError("--backend nccl needs GPUs and this run is on the CPU; use --backend gloo")
    if backend == "gloo" and device == "cuda":
        raise ValueError("--backend gloo runs on CPUs only; add --device cpu or use --backend nccl")
    return device, backend


def initialize(
    tp: int = 1,
    pp: int = 1,
    seed: int = 1234,
    device: str | None = None,
    backend: str | None = None,
    timeout_minutes: float = 10.0,
    vpp: int = 1,
) -> Layout:
    """Join the process group and cut the ranks into groups.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them; without
    them the process is a world of one. A process group that exists already is reused.

    Args:
        tp: tensor parallel size.
        pp: pipeline parallel size.
        seed: seeds the generators, differently for each pipeline stage, as Megatron-LM does.
        timeout_minutes: after this long without an answer a collective is an error.
        vpp: model chunks on each pipeline rank.

    Raises:
        ValueError: ``tp * pp`` does not divide the number of ranks, or the device isn't there.
    """
    device, backend = choose_device(device, backend)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    else:
        cpu.install()
    if not dist.is_initialized():
        started_alone = "RANK" not in os.environ
        dist.init_process_group(
            backend,
            rank=0 if started_alone else -1,  # -1: as the environment says
            world_size=1 if started_alone else -1,
            store=dist.HashStore() if started_alone else None,
            timeout=datetime.timedelta(minutes=timeout_minutes),
            # No device_id, as in Megatron-LM: with it torch makes every group's communicator at once, some
            # twenty a rank, and what interleaved stages exchange with their two neighbours takes turns.
        )
    world_size = dist.get_world_size()
    if world_size % (tp * pp):
        raise ValueError(f"--tp {tp} x --pp {pp} does not divide {world_size} ranks")

    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with cpu.one_group_per_set_of_ranks() if backend == "gloo" else contextlib.nullcontext():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            # A second set of groups, for gathering optimizer state; the way it is saved here needs none.
            create_gloo_process_groups=False,
            distributed_timeout_minutes=max(1, round(timeout_minutes)),
        )
    layout = Layout(
        device=torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu"),
        rank=dist.get_rank(),
        world_size=world_size,
        tp=tp,
        pp=pp,
        vpp=vpp,
        dp=world_size // (tp * pp),
        cp=mpu.get_context_parallel_world_size(),
        ep=mpu.get_expert_model_parallel_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
        tp_group=mpu.get_tensor_model_parallel_group(),
        pp_group=mpu.get_pipeline_model_parallel_group(),
        dp_group=mpu.get_data_parallel_group(),
        model_group=mpu.get_model_parallel_group(),
        model_src=mpu.get_model_parallel_src_rank(),
    )
    stage_seed = seed + 100 * layout.pp_rank
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)
    return layout


def finalize() -> None:
    """Leave the process group. A process that exits without it can abort in a gloo thread."""
    if dist.is_initialized():
        from megatron.core import parallel_state as mpu

        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def first_to_arrive(name: str) -> bool:
    """Return whether no other rank has called this with the same name; not a collective call."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    store = dist.distributed_c10d._get_default_store()
    return store.add(f"megatron_vlm/{name}", 1) == 1


def has_arrived(name: str) -> bool:
    """Return whether any rank has called :func:`first_to_arrive` with a name; not a collective call."""
    if not dist.is_initialized():
        return False
    return bool(dist.distributed_c10d._get_default_store().check([f"megatron_vlm/{name}"]))


def first_told(own: str | None) -> str | None:
    """Return the message of the first rank that has one, the same on every rank; a collective call."""
    world = dist.get_world_size()
    teller = torch.tensor([world if own is None else dist.get_rank()], device=torch.cuda.current_device())
    dist.all_reduce(teller, dist.ReduceOp.MIN)
    if int(teller) == world:
        return None
    told = [own]
    dist.broadcast_object_list(told, int(teller))
    return told[0]


def on_first_rank(function: Callable[[], T]) -> T:
    """Call a function on rank 0 and give its result, or its ``ValueError`` or ``OSError``, to every rank."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer = [function(), None]
        except ValueError as error:  # of a plain type, which every rank can unpickle
            answer = [None, ValueError(str(error))]
        except OSError as error:
            answer = [None, OSError(error.errno, error.strerror or str(error), error.filename)]
    dist.broadcast_object_list(answer)
    result, failure = answer
    if failure is not None:
        raise failure
    return result
