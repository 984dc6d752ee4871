"""Checks of the data that a run reads."""

from __future__ import annotations

from megatron_vlm.artifacts.mixture import MixtureConfig, check_shares, is_mixture, one_pass, worker_shares
from megatron_vlm.launch.preflight.dataset_files import (
    dataset_problems,
    held_out_problems,
    image_problems,
    index_doubts,
    length_problems,
)
from megatron_vlm.launch.preflight.inspection import Inspection


def dataset(found: Inspection) -> None:
    path = found.config.data.data_path
    if path is None:
        return  # a rule of the flags
    problems = list(dataset_problems(path))
    found.errors += problems
    if problems:
        return
    found.train_samples = one_pass(path)
    if is_mixture(path):
        found.mixture = MixtureConfig.load(path).lines()
    batch, iterations = (
        found.config.training.global_batch_size,
        found.config.iterations_over(found.train_samples),
    )
    if found.train_samples is not None and iterations == 0 and found.config.training.epochs is None:
        found.errors.append(
            f"--data-path {path}: its train split of {found.train_samples} samples is less than one "
            f"iteration of --global-batch-size {batch}; lower that, or give --train-iters"
        )
    found.errors += image_problems(path, found.config.trained)
    found.warnings += index_doubts(path)
    if found.config.training.eval_interval is not None:
        found.errors += held_out_problems(path)
    if found.train_samples is not None and found.config.training.epochs is not None:
        found.config.with_length(found.train_samples)


def loader_workers(found: Inspection) -> None:
    """Check the loader workers, after the flags, which say how many there are."""
    path = found.config.data.data_path
    if path is not None and found.train_samples is not None and not found.contradictions:
        workers = found.config.data_workers(found.plan.world_size)
        check_shares(worker_shares(path), "train", workers)


def lengths(found: Inspection) -> None:
    """Check samples' lengths, after the model, which says how many tokens an image has."""
    path, data = found.config.data.data_path, found.config.data
    if path is None or found.train_samples is None or found.model is None:
        return
    least, folder = found.model.min_image_tokens, found.config.model.tokenizer_load_dir
    errors, doubts = length_problems(path, data, least, folder)
    found.errors += errors
    found.warnings += doubts
