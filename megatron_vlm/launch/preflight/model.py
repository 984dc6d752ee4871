"""Checks of the model that a run reads: the checkpoint, or its own to go on from, tokenizer and image
processor."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Callable, List

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import (
    DATA_STATE,
    RUN_CONFIG,
    RUN_STATE,
    checkpoint_layers,
    read_manifest,
    read_model,
)
from megatron_vlm.launch.preflight import model_files, storage
from megatron_vlm.launch.preflight.inspection import Inspection
from megatron_vlm.plan.data_order import (
    check_held_out,
    check_same_data,
    data_identity,
    held_out_identity,
)
from megatron_vlm.plan.rules import broken_rules
from megatron_vlm.plan.start import (
    Start,
    check_restart,
    check_same_model,
    check_same_precision,
    check_same_run,
    own_checkpoint,
    saved_config,
    with_adapters,
)


def checkpoint(found: Inspection) -> None:
    config, folder = found.config, found.config.model.tokenizer_load_dir
    if folder is not None and not os.path.isdir(folder):
        found.errors.append(
            f"--tokenizer-load-dir {folder}: no such folder; give a Hugging Face model folder"
        )
    where = config.checkpoint
    begun = where.save_dir and where.name and not where.restart
    start = own_checkpoint(Path(where.run_dir)) if begun else None
    if start is not None or not config.model.init:
        source = start.checkpoint if start is not None else config.model.megatron_load_dir
        if source is None:
            return  # a rule of the flags
        found.layers = checkpoint_layers(
            source, config.model.base, "--megatron-load-dir" if start is None else ""
        )
        found.resumes = start is not None
        manifest = read_manifest(found.layers[-1])
        model = read_model(found.layers[-1])
        found.model = dataclasses.replace(model, lora=config.lora.adapters)
        for layer in found.layers:
            found.errors += storage.shard_problems(layer)
        if where.load_optim and start is None and not manifest["has_optimizer"]:
            found.errors.append(f"--load-optim: {source} has no optimizer state; leave the flag out")
        _fits_start(found, start or Start(found.layers[-1], where.load_optim, ""), model)
    elif folder is not None and os.path.isdir(folder):
        model = ModelConfig.from_hf_dir(folder, "--tokenizer-load-dir")
        found.model = dataclasses.replace(model, lora=config.lora.adapters)


def _fits_start(found: Inspection, start: Start, model: ModelConfig) -> None:
    """Check the rules that training checks before it loads anything large."""
    rules: List[Callable[[], object]] = [
        lambda: check_same_model(found.config, start, model),
        lambda: with_adapters(model, found.config, start),
    ]
    if start.resumes:
        rules.append(lambda: check_same_run(found.config, start))
        rules.append(lambda: _same_data(found, start))
        rules.append(lambda: _same_held_out(found, start))
    elif start.with_state and (start.checkpoint / RUN_CONFIG).is_file():
        rules.append(
            lambda: check_same_precision(found.config, saved_config(start.checkpoint), start.checkpoint)
        )
    if found.config.checkpoint.restart:
        rules.append(lambda: check_restart(found.config, Path(found.config.checkpoint.run_dir)))
    for rule in rules:
        try:
            rule()
        except ValueError as error:
            found.errors.append(str(error))


def _same_data(found: Inspection, start: Start) -> None:
    """Check the data loader's rules, where the run goes on in the middle of its data."""
    config = found.config
    try:
        with open(start.checkpoint / DATA_STATE, encoding="utf-8") as file:
            saved = next(iter(json.load(file).values()))["identity"]
        workers = config.data.data_workers or (config.launch.num_workers or 0) * (config.launch.node or 1)
        workers = workers or int(saved["data_workers"])
        whole = isinstance(saved.get("mixture", {}), dict)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, StopIteration):
        return  # an older run's, or damaged: the ranks say which
    if whole and config.data.data_path is not None:
        check_same_data(saved, data_identity(config, workers))


def _same_held_out(found: Inspection, start: Start) -> None:
    """Check that evaluations are on the samples that the run's state has kept."""
    config = found.config
    if config.training.eval_interval is None or config.data.data_path is None:
        return
    try:
        with open(start.checkpoint / RUN_STATE, encoding="utf-8") as file:
            before = json.load(file)["held_out"]
        whole = isinstance(before["mixture"], dict) and isinstance(before["data"], str)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return  # it had none, or an older run's, or damaged: the ranks say which
    now = held_out_identity(config.data.data_path)
    if whole and now is not None:
        check_held_out(before, now)


def flags(found: Inspection) -> None:
    found.contradictions += broken_rules(found.config, found.plan.world_size, found.model)


def tokenizer(found: Inspection) -> None:
    if found.model is not None and found.hf_folders:
        found.errors += model_files.tokenizer_problems(found.hf_folders[0], found.model, found.config)
        found.errors += model_files.end_token_problems(
            found.hf_folders[-1]
        )  # the checkpoint's, if it is there
    elif found.model is not None and found.config.model.tokenizer_load_dir is None:
        found.errors.append("no tokenizer: give --tokenizer-load-dir, the Hugging Face folder of the model")


def image_processor(found: Inspection) -> None:
    if found.model is not None and found.hf_folders:
        found.errors += model_files.image_problems(found.hf_folders, found.model)
        found.errors += model_files.uncut_problems(found.model, found.config)


def image_tokens(found: Inspection) -> None:
    if found.model is not None:
        found.warnings += model_files.image_warnings(found.hf_folders, found.model)
        found.warnings += model_files.sequence_warnings(found.model, found.config.data.seq_length)
