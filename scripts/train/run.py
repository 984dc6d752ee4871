"""Start a training run: checks the flags, then runs torchrun, inside the container if one is given.

    python scripts/train/run.py -g 2 --tp 2 --name demo --save-dir runs --megatron-load-dir checkpoint \\
        --data-path dataset --stage 2 --train-iters 100

Needs only the standard library of Python 3.9 or newer. ``--dry-run`` prints the command and touches no file.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from typing import List

# ruff: noqa: E402 - the imports below need the second of these lines.
sys.dont_write_bytecode = True  # a dry run touches no file, not even a __pycache__
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_vlm.config.pipeline import describe_stages
from megatron_vlm.config.run import RunConfig
from megatron_vlm.launch import preflight, process
from megatron_vlm.launch.plan import LaunchPlan, make_plan


def main(argv: List[str]) -> int:
    """Start the run that ``argv`` describes; returns the exit code, 2 for a user error."""
    try:
        config = RunConfig.from_flags(argv, prog="run.py")
        plan = make_plan(config, os.environ)
        check(plan)
        for note in plan.notes:
            print(f"note: {note}", file=sys.stderr)
        print(shlex.join(plan.command), flush=True)
        if config.launch.dry_run:
            return 0
        return process.run(plan.command, new_log(plan.config))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check(plan: LaunchPlan) -> None:
    """Check flags, files and model, in that order; a dry run only warns about files."""
    plan.config.validate(plan.world_size)
    try:
        preflight.check_paths(plan.config)
        model = preflight.read_model(plan.config)
    except ValueError as error:
        if not plan.config.launch.dry_run:
            raise
        print(f"warning: {error}", file=sys.stderr)
        return
    plan.config.validate(plan.world_size, model)
    if model is not None and plan.config.parallel.pp > 1 and plan.config.launch.dry_run:
        for line in describe_stages(plan.config.layers_per_stage(model), plan.config.parallel.pp):
            print(f"note: {line}", file=sys.stderr)
    if not plan.config.launch.dry_run:
        preflight.check_interpreter(plan.config.launch.sif_path, plan.config.parallel.transformer_impl)


def new_log(config: RunConfig) -> str:
    """Path of this start's log file; makes its folder."""
    launch = config.launch
    stem = launch.slurm_output_name
    if stem is None:
        start = f"slurm-{launch.slurm_job_id}" if launch.slurm_job_id else time.strftime("%Y%m%d-%H%M%S")
        stem = f"{start}-node{launch.rank or 0}"
    folder = os.path.join(config.checkpoint.run_dir, "logs")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--save-dir: cannot make {folder}: {error.strerror}") from None
    return os.path.join(folder, f"{stem}.log")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
