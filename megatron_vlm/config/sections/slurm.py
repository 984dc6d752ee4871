"""The section of a run config that says what ``--submit`` asks of SLURM; the training itself reads nothing
here."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Optional, Tuple

from megatron_vlm.config.checks import not_negative, positive
from megatron_vlm.config.flags import flag, flag_name
from megatron_vlm.config.headings import SLURM

REQUEUES = 10  # of a job that can go on, unless --max-requeues says otherwise
GPUS = "{gpus}"  # stands for their number in --gpu-request
# Options of sbatch that --sbatch may not give: a job would not be what its run was told it is.
_LONG = ("account", "partition", "qos", "time", "constraint", "exclude", "array", "dependency", "job-name")
_SHORT = dict(zip("ApqtCxadJ", _LONG))
_HAVE_FLAGS = {
    **{name: flag_name(name) for name in (*_LONG, "mail-user", "mail-type")},
    **{letter: flag_name(name) for letter, name in _SHORT.items()},
    **{"signal": "--signal-seconds", "nodes": "--node", "N": "--node"},
    **dict.fromkeys(("ntasks", "n", "ntasks-per-node"), "--node and --gpus"),
}


@dataclass(frozen=True)
class SlurmSection:
    """The job that ``--submit`` makes. Names are sbatch's own where it has one."""

    submit: bool = flag(SLURM, False, "write a batch script to <run>/slurm and hand it to sbatch")
    account: Optional[str] = flag(SLURM, None, "account that pays for the job", site=True)
    partition: Optional[str] = flag(SLURM, None, "partition of the nodes", site=True)
    qos: Optional[str] = flag(SLURM, None, "quality of service", site=True)
    time: Optional[str] = flag(
        SLURM, None, "time limit, such as 30 (minutes), 4:00:00 or 1-12:00:00", site=True
    )
    constraint: Optional[str] = flag(SLURM, None, "features that the nodes must have", site=True)
    exclude: Optional[str] = flag(SLURM, None, "nodes to leave out, such as node[03,07-09]", site=True)
    mail_user: Optional[str] = flag(SLURM, None, "whom SLURM sends mail", site=True)
    mail_type: Optional[str] = flag(SLURM, None, "about what, such as END,FAIL", site=True)
    array: Optional[str] = flag(
        SLURM,
        None,
        "several runs, such as 0-3: run <index> is <name>-<index> and has --seed + <index>",
    )
    dependency: Optional[str] = flag(SLURM, None, "jobs to wait for, such as afterok:1234")
    job_name: Optional[str] = flag(SLURM, None, "name of the job", shown_default="--name")
    gpu_request: str = flag(
        SLURM,
        "--gres=gpu:{gpus}",
        "how this site's sbatch is asked for a node's GPUs; empty where nodes are given whole",
        site=True,
    )
    cpus_per_gpu: Optional[int] = flag(
        SLURM, None, "CPU cores for each GPU", shown_default="what SLURM gives", site=True
    )
    setup: Tuple[str, ...] = flag(
        SLURM,
        (),
        "lines of the batch script before the run starts, such as 'module load apptainer'; as they are",
        site=True,
        verbatim=True,
    )
    sbatch: Tuple[str, ...] = flag(
        SLURM, (), "further #SBATCH options, such as mem=0 exclusive", site=True, verbatim=True
    )
    signal_seconds: int = flag(
        SLURM, 300, "save and end this long before the time limit; SLURM may be 60 s early", site=True
    )
    max_requeues: Optional[int] = flag(
        SLURM,
        None,
        "how often a job that has saved and ended before its time limit goes back into the queue",
        shown_default=f"{REQUEUES} with --save-optim and no --chain, else 0",
        site=True,
    )
    chain: Optional[int] = flag(
        SLURM,
        None,
        "submit this many jobs, each waiting for the one before and going on where it ended",
        shown_default="one job",
    )

    def __post_init__(self) -> None:
        positive(self, "cpus_per_gpu", "chain")
        not_negative(self, "max_requeues")
        if not 1 <= self.signal_seconds <= 65535:
            raise ValueError(f"--signal-seconds {self.signal_seconds}: must be between 1 and 65535")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and not value and field.name != "gpu_request":
                raise ValueError(f"{flag_name(field.name)} is empty; give a value or leave it out")
            lines = (value,) if isinstance(value, str) else value if field.name == "sbatch" else ()
            for line in lines:
                if re.search(r"[\r\n\0]", line):
                    raise ValueError(
                        f"{flag_name(field.name)} {line!r}: a line of #SBATCH cannot hold a line break"
                    )
        if self.gpu_request and (GPUS not in self.gpu_request or not self.gpu_request.startswith("--")):
            raise ValueError(
                f"--gpu-request {self.gpu_request!r}: an option of sbatch with {GPUS} for their number, "
                "such as --gres=gpu:{gpus} or --gpus-per-node={gpus}"
            )
        limit = None if self.time is None else time_limit(self.time)
        if limit is not None and limit <= self.signal_seconds:
            raise ValueError(
                f"--time {self.time} leaves nothing before --signal-seconds {self.signal_seconds}, when it "
                "saves and ends; use more time, or fewer seconds"
            )
        for option in self.sbatch:
            name = re.split(r"[=\s]", option.lstrip("-"), maxsplit=1)[0]
            if name in _HAVE_FLAGS:
                raise ValueError(f"--sbatch {option}: use run.py's {_HAVE_FLAGS[name]} for it")
        if self.array is not None and self.chain is not None:
            raise ValueError("--array and --chain do not go together; --max-requeues lets each run go on")

    def requeues(self, resumable: bool) -> int:
        """Return the number of times that the job goes back into the queue by itself."""
        if self.max_requeues is not None:
            return self.max_requeues
        return REQUEUES if resumable and self.chain is None else 0


def time_limit(text: str) -> Optional[int]:
    """Return the seconds of a time limit as sbatch takes it: ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M``,
    ``D-H:M:S``.

    None for no limit: ``0``, ``-1``, ``UNLIMITED``, ``INFINITE``.

    Raises:
        ValueError: ``text`` is none of these.
    """
    if text.upper() in ("-1", "UNLIMITED", "INFINITE"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if match is None:
        raise ValueError(f"--time {text}: write minutes, such as 30, or 4:00:00, or 1-12:00:00 for days")
    days, *parts = match.groups()
    first, second, third = (int(part) if part else 0 for part in parts)
    if days is not None or parts[2] is not None:
        return int(days or 0) * 86400 + first * 3600 + second * 60 + third
    return first * 60 + second or None
