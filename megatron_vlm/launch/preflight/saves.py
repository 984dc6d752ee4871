"""Checks of what a run writes: the folder, and room for its checkpoints."""

from __future__ import annotations

import os

from megatron_vlm.artifacts.checkpoint import CHECKPOINTS, read_manifest
from megatron_vlm.launch.preflight import storage
from megatron_vlm.launch.preflight.inspection import Inspection
from megatron_vlm.system.units import count_text, size_text


def save_folder(found: Inspection) -> None:
    where = found.config.checkpoint
    if not where.save_dir or not where.name:
        return  # a rule of the flags
    for path in (where.run_dir, *(os.path.join(where.run_dir, name) for name in (CHECKPOINTS, "logs"))):
        folder = storage.nearest_folder(path)
        if not os.path.isdir(folder):
            raise ValueError(f"--save-dir {where.save_dir}: {folder} is a file; give a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(
                f"--save-dir {where.save_dir}: {folder} can't be written to; give a folder of your own"
            )


def disk(found: Inspection) -> None:
    """Check that there is room for the checkpoints to come, as far as the file system tells: it doesn't
    tell of quotas."""
    config, model, where = found.config, found.model, found.config.checkpoint
    if model is None or found.contradictions or not where.save_dir or not where.save:
        return
    iterations = config.iterations_over(found.train_samples)
    done = int(read_manifest(found.layers[-1])["iteration"]) if found.resumes else 0
    saves = storage.number_of_saves(iterations, where.save_interval, done)
    size = storage.checkpoint_bytes(config, model, where.save_optim)
    free = storage.free_bytes(where.save_dir)
    if free is None or not saves:
        return
    # A new one is whole before an old one is deleted.
    at_once = saves if where.keep_checkpoints is None else min(saves, where.keep_checkpoints + 1)
    best = storage.checkpoint_bytes(config, model, False) if config.training.eval_interval else 0
    total = at_once * size + best
    what = (
        f"{count_text(at_once, 'checkpoint')} of {size_text(size)}"
        if at_once > 1
        else f"a checkpoint of {size_text(size)}"
    )
    what += f" and a best one of {size_text(best)}" if best else ""
    found.disk = f"{what}, {size_text(total)} in all; {size_text(free)} free in {where.save_dir}"
    if size > free:
        smaller = storage.checkpoint_bytes(config, model, False)
        instead = f", or leave --save-optim out ({size_text(smaller)} each)" if smaller <= free else ""
        raise ValueError(
            f"--save-dir {where.save_dir}: a checkpoint takes {size_text(size)}, and {size_text(free)} are "
            f"free there; make room or give another folder{instead}"
        )
    if total > free:
        fits = (free - best) // size - 1
        keep = f"--keep-checkpoints {fits} fits" if fits > 0 else "a larger --save-interval makes fewer"
        found.warnings.append(
            f"--save-dir {where.save_dir}: {what} take {size_text(total)}, and {size_text(free)} are free "
            f"there; {keep}"
        )
