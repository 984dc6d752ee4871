"""The section of a run config that says how processes are started; the training itself does not read it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional, Tuple

from megatron_vlm.config.checks import not_negative, positive
from megatron_vlm.config.flags import flag, flag_name
from megatron_vlm.config.headings import DISTRIBUTED, GPU, OTHER, SAVE_LOAD, SLURM

RANK0_LOG = "MEGATRON_VLM_RANK0_LOG"  # environment variable: where rank 0 keeps a copy of what it prints


@dataclass(frozen=True)
class LaunchSection:
    """The flags that say how the processes are started; the training itself reads nothing here."""

    gpus: int = flag(
        GPU,
        -1,
        "GPUs to use on each node; -1 is all of them. Without GPUs: processes, -1 being tp x pp in all",
        short="-g",
        site=True,
    )
    gpu_ids: Tuple[str, ...] = flag(GPU, (), "which GPUs, e.g. 0,2", shown_default="the first ones")
    gpu_memory: Optional[float] = flag(
        GPU,
        None,
        "memory of a GPU in GiB, for the estimate; where this machine has none, --dry-run and "
        "--preflight-only plan for --gpus such GPUs on each node",
        shown_default="what nvidia-smi says",
    )
    sif_path: Optional[str] = flag(
        SAVE_LOAD, None, "run inside this Apptainer (Singularity) image", site=True
    )
    bind: Tuple[str, ...] = flag(
        SAVE_LOAD, (), "further paths to bind into the container, each source[:target[:ro]]", site=True
    )
    container_command: Optional[str] = flag(
        SAVE_LOAD,
        None,
        "command or path that starts the container",
        shown_default="apptainer, else singularity",
        site=True,
    )
    environment: Tuple[str, ...] = flag(
        OTHER,
        (),
        "variables for the container command and the ranks, each NAME=value",
        site=True,
        verbatim=True,
    )
    num_workers: Optional[int] = flag(
        DISTRIBUTED, None, "data loader workers per node: --data-workers divided by --node"
    )
    node: Optional[int] = flag(DISTRIBUTED, None, "number of nodes", shown_default="SLURM's, else 1")
    rank: Optional[int] = flag(
        DISTRIBUTED, None, "number of this node, from 0", short="-r", shown_default="SLURM's, else 0"
    )
    master_addr: Optional[str] = flag(
        DISTRIBUTED, None, "host name or IP of node 0", short="-m", shown_default="SLURM's first node"
    )
    master_suffix: Optional[str] = flag(
        DISTRIBUTED,
        None,
        "added to the host name of SLURM's first node, where that is how the fast network knows it",
        site=True,
    )
    master_port: Optional[int] = flag(
        DISTRIBUTED,
        None,
        "port on node 0; if busy, one node alone looks in 9800-9999",
        short="-p",
        shown_default="9902; on several nodes of a SLURM job one made of its id",
    )
    interface: Optional[str] = flag(
        DISTRIBUTED,
        None,
        "network interface such as eth0 or ib0",
        shown_default="with several nodes the first of ib*, hsn*, en*, eth*",
        site=True,
    )
    rdzv_port: Optional[int] = flag(
        DISTRIBUTED, None, "port for torchrun's rendezvous, in place of --master-port and never changed"
    )
    slurm_job_id: Optional[str] = flag(SLURM, None, "job of this run", shown_default="SLURM_JOB_ID")
    slurm_output_name: Optional[str] = flag(
        SLURM,
        None,
        "stem of this start's log files, <run>/logs/<stem>-node<N>.log",
        shown_default="job id or time",
    )
    dry_run: bool = flag(OTHER, False, "print what would be run, and do nothing")
    preflight_only: bool = flag(
        OTHER, False, "run all checks, print what is wrong and what would work, and do nothing"
    )

    def __post_init__(self) -> None:
        positive(self, "node", "num_workers", "gpu_memory")
        if self.bind and self.sif_path is None:
            raise ValueError("--bind does nothing without --sif-path; give both or neither")
        for entry in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", entry, re.DOTALL):
                raise ValueError(f"--environment {entry!r}: write NAME=value")
        not_negative(self, "rank")
        if self.gpus < 1 and self.gpus != -1:
            raise ValueError(f"--gpus {self.gpus}: must be 1 or more, or -1 for all")
        if len(set(self.gpu_ids)) != len(self.gpu_ids):
            raise ValueError(f"--gpu-ids {','.join(self.gpu_ids)} names a GPU twice")
        if self.gpu_ids and self.gpus not in (-1, len(self.gpu_ids)):
            raise ValueError(
                f"--gpu-ids names {len(self.gpu_ids)} GPUs but --gpus is {self.gpus}; "
                f"use --gpus {len(self.gpu_ids)} or leave it out"
            )
        for name in ("master_port", "rdzv_port"):
            port = getattr(self, name)
            if port is not None and not 1 <= port <= 65535:
                raise ValueError(f"{flag_name(name)} {port}: must be between 1 and 65535")
        if self.master_suffix is not None and not re.fullmatch(r"[A-Za-z0-9.-]+", self.master_suffix):
            raise ValueError(f"--master-suffix {self.master_suffix!r}: letters, digits, '-' and '.' only")
        if self.slurm_output_name is not None and "/" in self.slurm_output_name:
            raise ValueError(f"--slurm-output-name {self.slurm_output_name!r}: a file name, without folders")

    @property
    def only_looks(self) -> bool:
        """Nothing is started: the plan may be one for another machine."""
        return self.dry_run or self.preflight_only
