"""What can be found wrong with a run before torch is loaded: every check, every problem.

inspection = inspect(plan)
inspection.contradictions, inspection.errors, inspection.warnings, inspection.passed
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

from megatron_vlm.config.checkpoint import (
    CHECKPOINTS,
    HF_FOLDER,
    checkpoint_layers,
    latest_resumable,
    read_manifest,
)
from megatron_vlm.config.dataset import prepare_command, shard_counts, split_parts, split_samples
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.launch import model_files
from megatron_vlm.launch.container import check_image
from megatron_vlm.launch.plan import LaunchPlan
from megatron_vlm.launch.report import Facts


@dataclass
class Inspection:
    """What a look at a run has found.

    Attributes:
        plan: of this node.
        contradictions: flags that contradict each other or the model: no plan is made from them.
        errors: why it would fail; each says what would work.
        warnings: what it would do and perhaps was not meant to.
        passed: names of the checks that found nothing.
        layers: folders of the checkpoint it starts from, the one with all weights first; empty if there
            is none to be read.
        resumes: the last of them is the run's own.
        model: the architecture, with the adapters that the flags ask for.
        train_samples: of the training split.
    """

    plan: LaunchPlan
    contradictions: List[str] = field(default_factory=list)
    errors: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)
    passed: List[str] = field(default_factory=list)
    layers: List[Path] = field(default_factory=list)
    resumes: bool = False
    model: Optional[ModelConfig] = None
    train_samples: Optional[int] = None

    @property
    def config(self) -> RunConfig:
        """The run that is looked at."""
        return self.plan.config

    @property
    def problems(self) -> List[str]:
        """What keeps the run from starting."""
        return [*self.contradictions, *self.errors]

    @property
    def facts(self) -> Facts:
        """For the first screen."""
        if self.layers:
            folder = self.layers[-1]
            start = f"goes on from {folder.name}" if self.resumes else f"from the weights of {folder}"
        elif self.config.model.init:
            start = "from random weights (--init)"
        else:
            start = f"from {self.config.model.megatron_load_dir}"
        return Facts(start, self.model, self.train_samples)

    @property
    def hf_folders(self) -> List[str]:
        """Where tokenizer and image processor are looked for, in this order."""
        own = [str(self.layers[-1] / HF_FOLDER)] if self.layers else []
        folders = [folder for folder in (self.config.model.tokenizer_load_dir, *own) if folder]
        return [folder for folder in folders if os.path.isdir(folder)]

    def say(self) -> List[str]:
        """All of it, a line each."""
        return [
            *(f"error: {problem}" for problem in self.problems),
            *(f"warning: {warning}" for warning in self.warnings),
            f"ok: {', '.join(self.passed)}",
        ]


def inspect(plan: LaunchPlan, problems: Sequence[str] = ()) -> Inspection:
    """Run all checks.

    Args:
        problems: what was found while the plan was made.
    """
    found = Inspection(plan, errors=list(problems))
    checks: Sequence[Tuple[str, Callable[[Inspection], None]]] = (
        ("interpreter", _interpreter),
        ("image", _image),
        ("dataset", _dataset),
        ("checkpoint", _checkpoint),
        ("flags and layout", _flags),
        ("tokenizer", _tokenizer),
        ("image processor", _image_processor),
        ("image tokens", _image_tokens),
    )
    for name, check in checks:
        before = len(found.problems) + len(found.warnings)
        try:
            check(found)
        except ValueError as error:
            found.errors.append(str(error))
        if len(found.problems) + len(found.warnings) == before:
            found.passed.append(name)
    return found


def _interpreter(found: Inspection) -> None:
    check_interpreter(found.config.launch.sif_path, found.config.parallel.transformer_impl)


def _image(found: Inspection) -> None:
    if found.config.launch.sif_path is not None:
        check_image(found.config.launch.sif_path)


def _dataset(found: Inspection) -> None:
    path = found.config.data.data_path
    if path is None:
        return  # a rule of the flags
    check_dataset(path)
    found.train_samples = split_samples(path)
    if found.train_samples == 0:
        raise ValueError(
            f"--data-path {path}: its train split is empty ({len(shard_counts(path))} shards; energon splits "
            "by whole shards); write more shards, or prepare again: " + prepare_command(path, "1,0,0")
        )
    batch, one_pass = found.config.training.global_batch_size, found.config.training.iterations is None
    if one_pass and found.train_samples is not None and found.train_samples < batch:
        found.errors.append(
            f"--data-path {path}: its train split of {found.train_samples} samples is less than one "
            f"iteration of --global-batch-size {batch}; lower that, or give --train-iters"
        )
    if found.config.training.eval_interval is not None:
        check_held_out(path)


def _checkpoint(found: Inspection) -> None:
    config, folder = found.config, found.config.model.tokenizer_load_dir
    if folder is not None and not os.path.isdir(folder):
        found.errors.append(
            f"--tokenizer-load-dir {folder}: no such folder; give a Hugging Face model folder"
        )
    where = config.checkpoint
    own = None
    if where.save_dir and where.name and not where.restart:
        own = latest_resumable(os.path.join(where.run_dir, CHECKPOINTS))
    if own is not None or not config.model.init:
        source = own or config.model.megatron_load_dir
        if source is None:
            return  # a rule of the flags
        found.layers = checkpoint_layers(source, config.model.base)
        found.resumes = own is not None
        model = ModelConfig.from_dict(read_manifest(found.layers[-1])["model"])
    elif folder is not None and os.path.isdir(folder):
        model = ModelConfig.from_hf_dir(folder)
    else:
        return
    found.model = dataclasses.replace(model, lora=config.lora.adapters or model.lora)


def _flags(found: Inspection) -> None:
    found.contradictions += found.config.problems(found.plan.world_size, found.model)


def _tokenizer(found: Inspection) -> None:
    if found.model is not None and found.hf_folders:
        found.errors += model_files.tokenizer_problems(found.hf_folders[0], found.model, found.config)
    elif found.model is not None and found.config.model.tokenizer_load_dir is None:
        found.errors.append("no tokenizer: give --tokenizer-load-dir, the Hugging Face folder of the model")


def _image_processor(found: Inspection) -> None:
    if found.model is not None and found.hf_folders:
        found.errors += model_files.image_problems(found.hf_folders, found.model)


def _image_tokens(found: Inspection) -> None:
    if found.model is not None:
        found.warnings += model_files.image_warnings(found.hf_folders, found.model)
        found.warnings += model_files.sequence_warnings(found.model, found.config.data.seq_length)


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


def check_dataset(path: str) -> None:
    """Check that ``path`` is a prepared energon dataset with samples.

    Raises:
        ValueError: it is missing, empty or not prepared.
    """
    if not os.path.isdir(path):
        raise ValueError(f"--data-path {path}: no such folder; give one on which `energon prepare` was run")
    if not os.path.isfile(os.path.join(path, ".nv-meta", ".info.json")):
        if not _has_shards(path):
            raise ValueError(
                f"--data-path {path}: empty, it holds no .tar shards; write them, then run energon prepare"
            )
        raise ValueError(f"--data-path {path}: not prepared; run: {prepare_command(path)}")
    counts = shard_counts(path)
    if not sum(counts.values()):
        raise ValueError(f"--data-path {path}: its shards hold no samples")
    missing = [name for name in counts if not os.path.isfile(os.path.join(path, name))]
    if missing:
        raise ValueError(
            f"--data-path {path}: {_and_more('shard', missing)} gone since it was prepared; "
            f"bring it back, or run: {prepare_command(path)}"
        )


def check_held_out(path: str) -> None:
    """Check that a prepared dataset has samples for evaluations, as far as its split tells without YAML.

    Raises:
        ValueError: its ``val`` split is empty, or there is none.
    """
    parts = split_parts(path)
    if parts is not None and not parts.get("val"):
        raise ValueError(
            f"--eval-interval needs held-out samples, and the val split of --data-path {path} is empty; "
            f"leave it out, or write more shards and prepare again: {prepare_command(path)}"
        )


def _and_more(noun: str, names: Sequence[str]) -> str:
    """``shard a is``, or ``shard a and 3 more are``."""
    return f"{noun} {names[0]} is" if len(names) == 1 else f"{noun} {names[0]} and {len(names) - 1} more are"


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _has_shards(path: str) -> bool:
    return any(name.endswith(".tar") for _, _, names in os.walk(path) for name in names)
