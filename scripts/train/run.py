"""Start a training run: checks the flags, then runs torchrun, inside the container if one is given.

    python scripts/train/run.py -g 2 --tp 2 --name demo --save-dir runs --megatron-load-dir checkpoint \\
        --data-path dataset --stage 2 --train-iters 100

Needs only the standard library of Python 3.9 or newer. ``--dry-run`` prints the plan on stderr, each node's
command on stdout, and touches no file.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import os
import re
import shlex
import signal
import sys
import time
from typing import List

# ruff: noqa: E402 - the imports below need the second of these lines.
sys.dont_write_bytecode = True  # a dry run touches no file, not even a __pycache__
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_vlm.config.run import RunConfig
from megatron_vlm.config.sections.launch import RANK0_LOG
from megatron_vlm.launch import container, preflight, process, progress, report, slurm, status
from megatron_vlm.launch.launch_plan import LaunchPlan, make_plans, plan_job
from megatron_vlm.system.exit_codes import DONE, STOP_SIGNALS

SITE = "MEGATRON_VLM_SITE"  # a site file, where --site names none


def main(argv: List[str]) -> int:
    """Start the run that ``argv`` describes; returns the exit code, 2 for a user error."""
    try:
        config = RunConfig.from_flags(argv, prog="run.py", site=os.environ.get(SITE))
        config.check_typed(argv)
        nodes = 0 if config.slurm.submit else slurm.nodes_to_start_on(config, os.environ)
        if nodes:
            return start_step(nodes, config, argv)
        problems: List[str] = []
        doubts: List[str] = []
        if config.slurm.submit:
            plans = [plan_job(config, os.environ)]
        else:
            plans = make_plans(config, os.environ, problems, doubts)
        found = preflight.inspect(plans[0], problems, doubts)
        if config.launch.preflight_only:
            print("\n".join(found.say()))
            return 2 if found.problems else 0
        if not show(plans[0], found):
            return 2
        if config.slurm.submit:
            return submit_job(plans[0], argv)
        for plan in plans:
            print(shlex.join(plan.command), flush=True)
        if config.launch.dry_run:
            return 0
        return start(plans[0])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a working directory that is gone, a disk that is full
        print(f"error: {error.filename or 'working directory or output'}: {error.strerror}", file=sys.stderr)
        return 2
    except RecursionError:
        print("error: a JSON file is nested too deeply to be one of a run", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the ranks have not begun, or have ended
        print("ended by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT


def show(plan: LaunchPlan, found: preflight.Inspection) -> bool:
    """Print what is wrong, and the plan; returns whether the run can be started."""
    dry_run = found.config.launch.dry_run
    fatal = found.contradictions if dry_run else found.problems
    for problem in fatal:
        print(f"error: {problem}", file=sys.stderr)
    for warning in [*(found.errors if dry_run else ()), *found.warnings]:
        print(f"warning: {warning}", file=sys.stderr)
    if fatal:
        return False
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    launch = plan.config.launch
    if not (launch.rank and launch.slurm_job_id):  # of a job, node 0 says it for all
        print(report.screen(plan, found.facts), file=sys.stderr)
    return True


def start(plan: LaunchPlan) -> int:
    """Run this node's ranks; returns the exit code."""
    launch, run_dir, log = plan.config.launch, plan.config.checkpoint.run_dir, new_log(plan.config)
    if not launch.rank:
        status.wait_until_free(run_dir)
        os.environ[RANK0_LOG] = re.sub("node0.log$", "rank0.log", log)
        status.note_running(run_dir, plan.command, launch.slurm_job_id, log)
    if launch.sif_path:
        os.environ.update(container.forwarded({**os.environ, process.STDIN_IS_LAUNCHER: "1"}))
    begun = time.monotonic()
    ended = process.run(plan.command, log, held=STOP_SIGNALS)
    if not launch.rank:
        status.note_ended(run_dir, ended.code, ended.message)
        if ended.code == DONE:
            close(plan.config, log, time.monotonic() - begun)
    return ended.code


def close(config: RunConfig, log: str, seconds: float) -> None:
    """Say what a run that is done leaves, on the screen and in its log."""
    try:
        text = progress.closing(config.checkpoint.run_dir, sys.argv[0], config.launch.sif_path)
        text += f"\ntime     {datetime.timedelta(seconds=round(seconds))} for this start; log {log}"
        print(text, flush=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    except (ValueError, OSError) as error:  # the run itself is done
        print(f"warning: {error}", file=sys.stderr)


def start_step(nodes: int, config: RunConfig, argv: List[str]) -> int:
    """Let srun start this script on every node of the allocation, in this process's place."""
    if config.launch.dry_run and config.launch.gpus != -1:  # all GPUs: only the nodes know how many
        launch = dataclasses.replace(config.launch, node=nodes)
        plan = plan_job(dataclasses.replace(config, launch=launch), os.environ)
        if not show(plan, preflight.inspect(plan)):
            return 2
    run = [
        sys.executable,
        os.path.abspath(__file__),
        *(arg for arg in argv if arg.replace("_", "-") != "--dry-run"),
    ]
    command = slurm.step_command(nodes, os.environ, run)
    print(shlex.join(command), flush=True)
    if config.launch.dry_run:
        return 0
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise ValueError(f"{command[0]}: {error.strerror}; --node 1 is this machine alone") from None


def submit_job(plan: LaunchPlan, argv: List[str]) -> int:
    """Hand the run to sbatch, or show what would be handed to it."""
    from megatron_vlm.launch import submit  # no other start needs it

    job = submit.make_job(plan, os.environ)
    submit.check_queue(plan.config)
    for note in job.notes:
        print(f"note: {note}", file=sys.stderr)
    if plan.config.launch.dry_run:
        print(job.script)
        print(shlex.join(job.command))
        return 0
    print(shlex.join(job.command), flush=True)
    ids = submit.hand_in(job)
    run_dir = plan.config.checkpoint.run_dir
    if plan.config.slurm.array is None:
        status.note_queued(run_dir, ids[0], [sys.executable, os.path.abspath(__file__), *argv], ids[1:])
    print(submit.what_now(job, ids, run_dir))
    return 0


def new_log(config: RunConfig) -> str:
    """Path of this start's log file; makes its folder."""
    launch = config.launch
    stem = launch.slurm_output_name or time.strftime("%Y%m%d-%H%M%S")
    folder = os.path.join(config.checkpoint.run_dir, "logs")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--save-dir: cannot make {folder}: {error.strerror}") from None
    return os.path.join(folder, f"{stem}-node{launch.rank or 0}.log")


if __name__ == "__main__":
    process.end_on_request()
    for stream in (sys.stdout, sys.stderr):
        # What is printed has the bytes of what was typed, whatever the locale.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=sys.getfilesystemencoding(), errors="surrogateescape")
    sys.exit(main(sys.argv[1:]))
