"""Let a Megatron checkpoint answer questions about images, at any tensor and pipeline parallel size.

    python scripts/inference/generate.py --megatron-dir runs/demo --image photo.jpg --prompt "What is this?"

The text of a single answer appears as it is made. ``--input questions.jsonl --output answers.jsonl``
answers many. With ``--sif-path`` the script runs itself inside that container image.
"""

from __future__ import annotations

import os
import sys
from typing import List

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from megatron_vlm.artifacts.checkpoint import read_model
from megatron_vlm.config.generation import GenerationConfig
from megatron_vlm.hf import cli
from megatron_vlm.launch import process
from megatron_vlm.launch.container import reenter
from megatron_vlm.launch.launch_plan import plan_ranks
from megatron_vlm.launch.preflight.software import check_interpreter


def main(argv: List[str]) -> int:
    """Generate as ``argv`` says; returns the exit code."""
    config = GenerationConfig.from_flags(argv, prog="generate.py")
    config.check_model(read_model(config.checkpoint))
    cli.tell_of_best(config.checkpoint)
    config.check_files()
    if config.machine.sif_path:
        return reenter([__file__, *argv], config.machine.sif_path, config.machine.bind, config.paths)
    check_interpreter()
    if config.machine.tp * config.machine.pp > 1:
        ranks = plan_ranks(config, "megatron_vlm.inference", argv, os.environ)
        return process.run(ranks.command, os.devnull).code

    from megatron_vlm.inference.__main__ import main as run_rank

    return run_rank(argv)


if __name__ == "__main__":
    sys.exit(cli.run(main))
