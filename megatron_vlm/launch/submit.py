"""A run as a SLURM job: the batch script, and handing it to sbatch."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import List, Mapping, Optional, Sequence

from megatron_vlm.config.run import RunConfig
from megatron_vlm.config.sections.slurm import GPUS, SlurmSection
from megatron_vlm.launch.container import CHECKOUT
from megatron_vlm.launch.launch_plan import LaunchPlan
from megatron_vlm.launch.progress import job_state
from megatron_vlm.launch.slurm import step_options
from megatron_vlm.launch.status import read_status
from megatron_vlm.system.exit_codes import CONTINUE

FOLDER = "slurm"  # in the run folder: batch scripts, and what their jobs print
_RUN, _STATUS = (os.path.join(str(CHECKOUT), "scripts", "train", name) for name in ("run.py", "status.py"))
# Variables of sbatch that are not SBATCH_<NAME OF THE OPTION>; they win over lines of the script.
_VARIABLES = {"time": "SBATCH_TIMELIMIT", "array": "SBATCH_ARRAY_INX", "requeue": "SBATCH_NO_REQUEUE"}


@dataclass(frozen=True)
class Job:
    """A batch script and what becomes of it."""

    script: str  # its text
    path: str  # where it will be
    command: List[str]  # environment and sbatch, without --dependency
    log: str  # pattern of the job's output, as sbatch reads it; %j is its id
    jobs: int  # how many, one after the other
    notes: List[str]


def make_job(plan: LaunchPlan, environ: Mapping[str, str]) -> Job:
    """Return the job that runs ``plan`` on ``plan.config.launch.node`` nodes.

    Args:
        plan: of a job, see :func:`launch_plan.plan_job`.
        environ: where sbatch will be called.

    Raises:
        ValueError: flags that do not fit a job, or names that SLURM cannot take.
    """
    config = plan.config
    _check(config)
    folder = os.path.join(os.path.abspath(config.checkpoint.run_dir), FOLDER)
    stem = _free_stem(folder, time.strftime("%Y%m%d-%H%M%S"))
    log = os.path.join(_no_pattern(folder), "%A_%a.log" if config.slurm.array else "%j.log")
    options = _options(plan, log)
    # An array's or a chain's own flags come after these and win.
    script = "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            "",
            *_body(plan, os.path.join(folder, f"{stem}.ended")),
        ]
    )
    command = ["sbatch", "--parsable", os.path.join(folder, f"{stem}.sh")]
    set_here = [option[2:].split("=")[0] for option in options]
    overriding = [name for name in map(_variable, set_here) if name in environ]
    if overriding:
        command = ["env", *(word for name in overriding for word in ("-u", name)), *command]
    return Job(
        script, os.path.join(folder, f"{stem}.sh"), command, log, config.slurm.chain or 1, _notes(config)
    )


def check_queue(config: RunConfig) -> None:
    """Check that no job waits or trains for this run: two would train in one folder.

    Raises:
        ValueError: one does, and the flags don't say to wait for it.
    """
    if config.slurm.array is not None or config.slurm.dependency is not None:
        return
    run_dir = config.checkpoint.run_dir
    noted = read_status(run_dir) or {}
    for job in filter(None, [noted.get("job_id"), *(noted.get("more_jobs") or [])]):
        state = (job_state(str(job)) or "").split(" ")[0]
        if state in ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED"):
            raise ValueError(
                f"{run_dir}: job {job} of this run is {state.lower()}; end it with scancel, give another "
                f"--name, or --dependency afterany:{job} to go on after it"
            )


def hand_in(job: Job) -> List[str]:
    """Write the script and hand it to sbatch, once for each job of a chain.

    Returns:
        The ids of the jobs.

    Raises:
        ValueError: sbatch refuses it, or the script cannot be written. Nothing is left behind.
    """
    folder = os.path.dirname(job.path)
    made = _make(folder)
    ids: List[str] = []
    try:
        with open(job.path, "x", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            file.write(job.script)
        for number in range(1, job.jobs + 1):
            ids.append(_sbatch(job.command, number, ids[-1] if ids else None))
    except (OSError, ValueError, KeyboardInterrupt) as error:
        for job_id in ids:
            subprocess.run(["scancel", job_id], check=False)
        if not isinstance(error, FileExistsError):
            _remove(job.path, made)
        if isinstance(error, OSError):
            raise ValueError(f"{job.path}: {error.strerror}") from None
        raise
    return ids


def what_now(job: Job, ids: Sequence[str], run_dir: str) -> str:
    """Say how to follow and to end what was submitted."""
    log = job.log.replace("%%", "%").replace("%A", ids[0]).replace("%j", ids[0])
    then = f", then {', '.join(ids[1:])}" if len(ids) > 1 else ""
    return "\n".join(
        [
            f"job {ids[0]} is in the queue{then}",
            f"  its output  tail -F {shlex.quote(log)}",
            f"  how it is   {shlex.join([sys.executable, _STATUS, run_dir])}",
            f"  save, end   scancel --signal=USR1 {ids[0]}",
            f"  cancel      {shlex.join(['scancel', *ids])}",
        ]
    )


def _free_stem(folder: str, stem: str) -> str:
    """Return ``stem``, or with a number where a script was written in the same second."""
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next(name for name in names if not os.path.exists(os.path.join(folder, f"{name}.sh")))


def _check(config: RunConfig) -> None:
    launch, slurm = config.launch, config.slurm
    for name in ("rank", "master_addr", "slurm_job_id"):
        if getattr(launch, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is SLURM's to say in a job; leave it out with --submit")
    if launch.gpu_ids:
        raise ValueError("--gpu-ids: SLURM picks the GPUs of a job; say how many with --gpus")
    goes_on = slurm.chain or slurm.requeues(config.checkpoint.save_optim)
    if goes_on and not config.checkpoint.save_optim:
        flag = "--chain" if slurm.chain else "--max-requeues"
        raise ValueError(f"{flag} needs --save-optim: without it there is nothing to go on from")
    if re.search(r"[\\\r\n]", os.path.abspath(config.checkpoint.run_dir) + os.getcwd()):
        raise ValueError(
            f"{os.path.abspath(config.checkpoint.run_dir)!r}: SLURM cannot write a log into a folder with a "
            "backslash or a line break in its name; use another --save-dir or --name"
        )


def _notes(config: RunConfig) -> List[str]:
    if config.checkpoint.save_optim:
        return []
    return ["without --save-optim the job cannot go on after its time limit or a failed node"]


def _options(plan: LaunchPlan, log: str) -> List[str]:
    """Return the options behind ``#SBATCH``, in the order in which one reads them."""
    config, slurm = plan.config, plan.config.slurm
    options = [_option("job-name", slurm.job_name or str(config.checkpoint.name))]
    for name in ("account", "partition", "qos", "time", "constraint", "exclude", "array", "dependency"):
        value = getattr(slurm, name)
        if value is not None:
            options.append(_option(name, value))
    options += [_option("nodes", str(config.launch.node)), _option("ntasks-per-node", "1")]
    if plan.device == "cuda" and slurm.gpu_request:
        options.append(slurm.gpu_request.replace(GPUS, str(plan.processes)))
    if slurm.cpus_per_gpu:
        options.append(_option("cpus-per-task", str(slurm.cpus_per_gpu * plan.processes)))
    for name in ("mail_user", "mail_type"):
        if getattr(slurm, name) is not None:
            options.append(_option(name.replace("_", "-"), getattr(slurm, name)))
    options.append(_option("signal", f"USR1@{slurm.signal_seconds}"))
    options.append("--requeue" if config.checkpoint.save_optim else "--no-requeue")
    options += [_option("open-mode", "append"), _option("chdir", os.getcwd()), _option("output", log)]
    return options + [line if line.startswith("-") else f"--{line}" for line in slurm.sbatch]


def _body(plan: LaunchPlan, ended: str) -> List[str]:
    config, slurm = plan.config, plan.config.slurm
    lines = [
        "# Written by run.py --submit; sbatch with this file submits it again.",
        "# shellcheck disable=SC1003,SC1010,SC2016,SC2191 # \\ and $ are meant so; 'do', '=' are values",
        f"# It ends as run.py does: 0 done, {CONTINUE} saved early and to be continued, 2 a wrong flag.",
        "",
    ]
    if slurm.setup:
        lines += [*slurm.setup, ""]
    if slurm.chain:
        lines += [
            f"# One of {slurm.chain} jobs; each starts when the one before has ended, however that was.",
            f"ended={shlex.quote(ended)}",
            'if [ "${1:-1}" -eq 1 ]; then',
            '  rm -f "$ended"',
            'elif [ -e "$ended" ]; then',
            '  echo "the run has ended before: $(cat "$ended")"',
            "  exit 0",
            "fi",
            "",
        ]
    lines += [
        "unset MEGATRON_VLM_SITE  # what that file says is in the flags below",
        "# srun does not take this from the job, and would bind each task to one core.",
        'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"',
        "# One task on each node: run.py starts the processes of its node itself. When it has ended on one,",
        "# the others get some time to end after the same save, whatever this site's defaults are.",
        f"step=(srun --ntasks-per-node=1 {shlex.join(step_options())})",
        "run=(",
        *_grouped([sys.executable, _RUN, *_flags(plan)]),
        ")",
    ]
    if slurm.chain and config.checkpoint.restart:
        lines += [
            "# Only the first job starts the run over.",
            '[ "${1:-1}" -eq 1 ] || run+=(--no-restart)',
        ]
    if slurm.array:
        seed = config.training.seed
        lines += [
            "# Each task of the array is a run of its own.",
            f'run+=(--name={shlex.quote(str(config.checkpoint.name))}-"$SLURM_ARRAY_TASK_ID")',
            f'run+=(--seed="$(({seed} + SLURM_ARRAY_TASK_ID))")',
        ]
    lines += [
        "",
        "# --signal above has no B:, so that SLURM itself sends USR1 to the step on every node. With B: only",
        "# this shell would get it, and saving the run would take one more hop. TERM, sent by scancel and at",
        "# the time limit, goes to the step too. This shell only has to live until srun has ended.",
        "trap : USR1 TERM",
        "code=0",
    ]
    requeues = slurm.requeues(config.checkpoint.save_optim)
    if requeues:
        lines += [
            "# TERM says that the whole job is over: were it requeued then, it could not be cancelled.",
            "cancelled=",
            "trap 'cancelled=1' TERM",
        ]
    lines += ['"${step[@]}" "${run[@]}" || code=$?']
    if slurm.chain:
        lines += [
            f'[ "$code" -eq {CONTINUE} ] || echo "job $SLURM_JOB_ID, exit code $code" >"$ended"',
        ]
    if requeues:
        lines += [
            "restarts=${SLURM_RESTART_COUNT:-0}",
            f'if [ "$code" -eq {CONTINUE} ]; then',
            '  if [ -n "$cancelled" ]; then',
            '    echo "saved; not requeued, since the job was cancelled or is over its time limit"',
            f'  elif [ "$restarts" -ge {requeues} ]; then',
            f'    echo "saved; not requeued, since it was {requeues} times (--max-requeues)"',
            '  elif scontrol requeue "$SLURM_JOB_ID"; then',
            f'    echo "saved; requeued, $((restarts + 1)) of at most {requeues} times"',
            "  else",
            '    echo "saved; SLURM does not requeue it: submit it again to go on"',
            "  fi",
            "fi",
        ]
    return [*lines, 'exit "$code"', ""]


def _flags(plan: LaunchPlan) -> List[str]:
    """Return the run's flags as they are now: later changes of a --config or site file do not reach the
    job."""
    launch = dataclasses.replace(plan.config.launch, dry_run=False)
    # A node without its GPUs is then an error, not a slow run.
    parallel = dataclasses.replace(plan.config.parallel, device=plan.device)
    return dataclasses.replace(plan.config, launch=launch, parallel=parallel, slurm=SlurmSection()).to_flags()


def _grouped(words: Sequence[str]) -> List[str]:
    """Return one line for each flag with its values."""
    lines: List[List[str]] = []
    for word in words:
        if word.startswith("-") or not lines or len(lines) < 2:
            lines.append([])
        lines[-1].append(word)
    return [f"  {shlex.join(line)}" for line in lines]


def _option(name: str, value: str) -> str:
    """Return ``--name=value`` as sbatch reads it from a script.

    Its quotes are not the shell's: inside "..." it takes a backslash off every character behind one.
    """
    if re.fullmatch(r"[\w./:=,@+%-]+", value):
        return f"--{name}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'--{name}="{escaped}"'


def _variable(option: str) -> str:
    return _VARIABLES.get(option, "SBATCH_" + option.upper().replace("-", "_"))


def _no_pattern(path: str) -> str:
    """Return a path in which sbatch replaces nothing."""
    return path.replace("%", "%%")


def _sbatch(command: Sequence[str], number: int, previous: Optional[str]) -> str:
    """Submit one job; returns its id."""
    *call, script = command
    if previous is not None:
        call.append(f"--dependency=afterany:{previous}")
    call += [script] if number == 1 else [script, str(number)]
    if shutil.which("sbatch") is None:
        raise ValueError("--submit needs sbatch on PATH: use a login node of a SLURM cluster, or --dry-run")
    result = subprocess.run(call, capture_output=True, check=False)
    said = os.fsdecode(result.stderr)
    job_id = os.fsdecode(result.stdout).strip().split(";")[0]
    if result.returncode or not job_id:
        lines = [re.sub(r"^sbatch: (error: |fatal: )?", "", line) for line in said.splitlines() if line]
        raise ValueError(f"sbatch: {'; '.join(lines) or f'exit code {result.returncode}'}")
    sys.stderr.write(said)  # a site's remarks
    return job_id


def _make(folder: str) -> List[str]:
    """Make a folder; returns those that were not there, innermost first."""
    missing: List[str] = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    try:
        for path in reversed(missing):
            os.mkdir(path)
    except OSError as error:
        raise ValueError(f"--save-dir: cannot make {path}: {error.strerror}") from None
    return missing


def _remove(script: str, folders: Sequence[str]) -> None:
    try:
        os.remove(script)
        for folder in folders:
            os.rmdir(folder)
    except OSError:
        pass  # another start of the same run has put something there
