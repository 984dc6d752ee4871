"""What can be found wrong with a run before torch is loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from typing import Optional

from megatron_vlm.config.checkpoint import CHECKPOINTS, checkpoint_layers, latest_resumable, read_manifest
from megatron_vlm.config.dataset import prepare_command
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.launch.container import check_image


def check_interpreter(sif_path: Optional[str] = None, transformer_impl: Optional[str] = None) -> None:
    """Check that this Python, which the ranks will run under, has what they need.

    Inside a container it isn't asked.

    Raises:
        ValueError: it has not.
    """
    if sif_path is None and not _installed("torch"):
        raise ValueError(
            f"{sys.executable} has no torch; run `make setup` and `source .venv/bin/activate`, "
            "or give --sif-path"
        )
    wants_engine = transformer_impl == "transformer_engine"
    if wants_engine and sif_path is None and not _installed("transformer_engine"):
        raise ValueError(
            f"--transformer-impl transformer_engine: {sys.executable} does not have it; "
            "use local, or give --sif-path"
        )


def check_paths(config: RunConfig) -> None:
    """Check that what the run reads is there and of the right kind.

    Raises:
        ValueError: one line that names the path and says what to do.
    """
    if config.launch.sif_path is not None:
        check_image(config.launch.sif_path)
    if config.data.data_path is not None:
        check_dataset(config.data.data_path)
        if config.training.eval_interval is not None:
            check_held_out(config.data.data_path)
    folder = config.model.tokenizer_load_dir
    if folder is not None and not os.path.isdir(folder):
        raise ValueError(f"--tokenizer-load-dir {folder}: no such folder; give a Hugging Face model folder")


def read_model(config: RunConfig) -> Optional[ModelConfig]:
    """The architecture of the checkpoint that training starts from or goes on from, or of the one it makes.

    Raises:
        ValueError: the checkpoint is not there or not readable.
    """
    own, where = None, config.checkpoint
    if where.save_dir and where.name and not where.restart:
        own = latest_resumable(os.path.join(where.run_dir, CHECKPOINTS))
    if own is None and config.model.init:
        return ModelConfig.from_hf_dir(str(config.model.tokenizer_load_dir))
    source = own or config.model.megatron_load_dir
    if source is None:
        return None
    checkpoint_layers(source, config.model.base)
    return ModelConfig.from_dict(read_manifest(source)["model"])


def check_dataset(path: str) -> None:
    """Check that ``path`` is a prepared energon dataset with samples.

    Raises:
        ValueError: it is missing, empty or not prepared.
    """
    if not os.path.isdir(path):
        raise ValueError(f"--data-path {path}: no such folder; give one on which `energon prepare` was run")
    info_path = os.path.join(path, ".nv-meta", ".info.json")
    if not os.path.isfile(info_path):
        if not _has_shards(path):
            raise ValueError(
                f"--data-path {path}: empty, it holds no .tar shards; write them, then run energon prepare"
            )
        raise ValueError(f"--data-path {path}: not prepared; run: {prepare_command(path)}")
    try:
        with open(info_path, encoding="utf-8") as file:
            shard_counts = json.load(file)["shard_counts"]
        samples = sum(shard_counts.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{info_path}: damaged; run again: {prepare_command(path)}") from None
    if not samples:
        raise ValueError(f"--data-path {path}: its shards hold no samples")
    missing = [name for name in shard_counts if not os.path.isfile(os.path.join(path, name))]
    if missing:
        raise ValueError(
            f"--data-path {path}: shard {missing[0]} is gone since it was prepared; "
            f"bring it back, or run: {prepare_command(path)}"
        )


def check_held_out(path: str) -> None:
    """Check that a prepared dataset has samples for evaluations, as far as its split tells without YAML.

    Raises:
        ValueError: its ``val`` split is empty, or there is none.
    """
    try:
        with open(os.path.join(path, ".nv-meta", "split.yaml"), encoding="utf-8") as file:
            split = file.read()
    except OSError:
        return  # a JSON file, or none: told when training opens the data
    parts = re.findall(r"^\s+val:(.*)$", split, re.MULTILINE)
    if not parts or parts[0].replace(" ", "") == "[]":
        raise ValueError(
            f"--eval-interval needs held-out samples, and the val split of --data-path {path} is empty; "
            f"leave it out, or write more shards and prepare again: {prepare_command(path)}"
        )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _has_shards(path: str) -> bool:
    return any(name.endswith(".tar") for _, _, names in os.walk(path) for name in names)
