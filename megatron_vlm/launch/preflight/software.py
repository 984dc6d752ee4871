"""Checks of what the ranks run in: interpreter, Transformer Engine, container image and the paths in it."""

from __future__ import annotations

import os
import sys
from typing import Optional

from megatron_vlm.artifacts.checkpoint import HF_FOLDER
from megatron_vlm.artifacts.dataset import shard_counts
from megatron_vlm.artifacts.mixture import data_folders, is_mixture
from megatron_vlm.launch import machine
from megatron_vlm.launch.container import check_image
from megatron_vlm.launch.launch_plan import named_variables
from megatron_vlm.launch.preflight import storage
from megatron_vlm.launch.preflight.inspection import Inspection
from megatron_vlm.system.transformer_engine import check_kernel_switches, engine_problem


def interpreter(found: Inspection) -> None:
    try:
        config = found.config
        check_interpreter(config.launch.sif_path, config.parallel.transformer_impl, config.training.fp8)
        _check_engine(found)
        environment = named_variables(config.launch.environment)
        # A job begins with what it exports.
        check_kernel_switches({**({} if config.slurm.submit else os.environ), **environment})
    except ValueError as error:
        if not (found.config.slurm.submit and found.config.slurm.setup):
            raise
        found.warnings.append(f"{error}, or let --setup bring it")


def _check_engine(found: Inspection) -> None:
    config = found.config
    if found.plan.device != "cuda" or config.launch.sif_path or config.parallel.transformer_impl == "local":
        return
    problem = engine_problem()
    if problem is not None:
        raise ValueError(f"{problem}; install such a one, or use --transformer-impl local")


def check_interpreter(
    sif_path: Optional[str] = None, transformer_impl: Optional[str] = None, fp8: bool = False
) -> None:
    """Check that this Python, which the ranks will run under, has what they need.

    Inside a container it isn't asked.

    Raises:
        ValueError: it has not.
    """
    if sif_path is None and not machine.installed("torch"):
        raise ValueError(
            f"{sys.executable} has no torch; run `make setup` and `source .venv/bin/activate`, "
            "or give --sif-path"
        )
    if sif_path is not None or machine.installed("transformer_engine"):
        return
    if fp8:
        raise ValueError(f"--fp8: {sys.executable} has no Transformer Engine; use --bf16, or give --sif-path")
    if transformer_impl == "transformer_engine":
        raise ValueError(
            f"--transformer-impl transformer_engine: {sys.executable} does not have it; "
            "use local, or give --sif-path"
        )


def image(found: Inspection) -> None:
    if found.config.launch.sif_path is not None:
        check_image(found.config.launch.sif_path)
        found.errors += storage.image_problems(found.config.launch.sif_path)


def container_paths(found: Inspection) -> None:
    """Check that links in the folders that flags name lead to places that the container has."""
    config = found.config
    if config.launch.sif_path is None:
        return
    folders = {"--megatron-load-dir": [str(layer) for layer in found.layers]}
    folders["--megatron-load-dir"] += [str(layer / HF_FOLDER) for layer in found.layers]
    folders["--tokenizer-load-dir"] = list(filter(None, [config.model.tokenizer_load_dir]))
    data = config.data.data_path
    folders["--data-path"] = [data] if data is not None and is_mixture(data) else []
    for folder in data_folders(data) if data is not None else ():
        if os.path.isfile(os.path.join(folder, ".nv-meta", ".info.json")):
            inner = {".", ".nv-meta", *(os.path.dirname(name) or "." for name in shard_counts(folder))}
            folders["--data-path"] += [os.path.normpath(os.path.join(folder, name)) for name in sorted(inner)]
    for flag, paths in folders.items():
        links = [link for path in paths for link in storage.links_in(path)]
        lost = storage.unseen([*paths, *links], found.plan.command, os.path.expanduser("~"))
        if lost:
            path, target = lost[0]
            more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            folder = target if os.path.isdir(target) else os.path.dirname(target)
            found.errors.append(
                f"{flag}: {path}{more} leads to {target}, which is not in the container; add --bind {folder}"
            )
