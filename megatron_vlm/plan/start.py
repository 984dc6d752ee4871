"""The beginning of a start of a run: from which checkpoint, and whether flags and files fit that.

No torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Dict, Optional

from megatron_vlm.architecture.families.known import FAMILIES
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import (
    CHECKPOINTS,
    RUN_CONFIG,
    latest_resumable,
    list_checkpoints,
    read_manifest,
    read_model,
    resolve_checkpoint,
)
from megatron_vlm.artifacts.image_rule import FIRST_RULE, LOADED, ImageRule
from megatron_vlm.config.flags import flag_name, negative_flag_name
from megatron_vlm.config.run import RunConfig
from megatron_vlm.system.files import reading

LOCK = ".lock"  # in the run folder; locked by rank 0 as long as it trains there
LOCK_SECONDS = 60.0  # the ranks of a killed run end within a few seconds
# What sets which samples a global batch holds. (The loader itself knows of changed data.)
_DATA_ORDER = (
    *("seed", "micro_batch_size", "global_batch_size", "shuffle_buffer_size"),
    *("packing", "group_by_length"),
)
_TRAINED_PARTS = ("stage", "train_modules", "freeze_lm", "train_vision")


@dataclass(frozen=True)
class Start:
    """The checkpoint at which a start of the run begins.

    Attributes:
        checkpoint: folder to load.
        with_state: take the optimizer from it, not the weights alone.
        with_position: take counters, random numbers and data position too.
        resumes: it is the run's own.
        message: first line of the log.
    """

    checkpoint: Path
    with_state: bool
    message: str
    with_position: bool = False
    resumes: bool = False


def own_checkpoint(run: Path) -> Optional[Start]:
    """Return the checkpoint at which a run goes on; None if it has not begun.

    Raises:
        ValueError: it has only checkpoints without optimizer state.
    """
    root = run / CHECKPOINTS
    resumable = latest_resumable(root)
    if resumable is not None:
        iteration = read_manifest(resumable)["iteration"]
        return Start(
            checkpoint=resumable,
            with_state=True,
            message=f"resuming {run} from {resumable.name}: {iteration} iterations are done",
            with_position=True,
            resumes=True,
        )
    finished = list_checkpoints(root)
    if finished:
        raise ValueError(
            f"{run} has checkpoints but none with optimizer state, so it can't be resumed. Give another "
            f"--name with --megatron-load-dir {finished[-1]} to go on from its weights, or --restart to "
            "start over (the old checkpoints are kept aside); next time, --save-optim makes a run resumable"
        )
    return None


def saved_config(checkpoint: Path) -> RunConfig:
    """Return the config that a run saved with a checkpoint; one from before there were rules for images has
    theirs.

    Raises:
        ValueError: it can't be read.
    """
    file = checkpoint / RUN_CONFIG
    with reading(file, "move the checkpoint's folder away, and the run goes on from the one before it"):
        saved = RunConfig.load(str(file))
    return replace(saved, data=saved.data.with_image_rule(FIRST_RULE))


def first_image_rule(config: RunConfig) -> ImageRule:
    """Return how the run of these flags began to read image files, as its newest checkpoint says; else as a
    new one does."""
    checkpoint = config.checkpoint
    named = checkpoint.save_dir is not None and checkpoint.name is not None
    saved = list_checkpoints(Path(checkpoint.run_dir) / CHECKPOINTS) if named else []
    return saved_config(saved[-1]).data.image_rule() if saved else LOADED


def check_same_run(config: RunConfig, start: Start) -> str:
    """Compare the flags with those that the checkpoint was saved with, where the run goes on from it.

    Args:
        config: resolved.

    Returns:
        What else changed, as a line for the log; empty if nothing did.

    Raises:
        ValueError: other parts would be trained, other samples drawn, or in another precision.
    """
    saved = saved_config(start.checkpoint)
    config = replace(config, data=config.data.with_image_rule(saved.data.image_rule()))
    then, now = _training_flags(saved), _training_flags(config)
    changed = {name: (then[name], now[name]) for name in now if now[name] != then[name]}
    instead = f"start a new run from its weights: another --name, and --megatron-load-dir {start.checkpoint}"
    trained = [[entry.name for entry in flags.trained] for flags in (saved, config)]
    for name in _TRAINED_PARTS if start.resumes and ("stage" in changed or trained[0] != trained[1]) else ():
        if name in changed:
            old, new = changed[name]
            raise ValueError(
                f"{_show(name, new)} trains other parts of the model than {_show(name, old)}, with which "
                f"{start.checkpoint} was trained; go on with that, or {instead}"
            )
    grouped = saved.data.packing or saved.data.group_by_length
    # A turned image may be cut into other tiles, and so be put together with other samples.
    for name in (*_DATA_ORDER, "image_orientation") if grouped else _DATA_ORDER:
        if name in changed:
            old, new = changed[name]
            raise ValueError(
                f"{_show(name, new)} would change the order of the data within the run; go on with "
                f"{_show(name, old)}, with which {start.checkpoint} was trained, or {instead}"
            )
    check_same_precision(config, saved, start.checkpoint)
    if not changed:
        return ""
    return "changed since the checkpoint: " + ", ".join(
        f"{flag_name(name)} {old} -> {new}" for name, (old, new) in changed.items()
    )


def check_same_precision(config: RunConfig, saved: RunConfig, checkpoint: Path) -> None:
    """Check that optimizer state fits what the flags say, as far as these say it.

    Args:
        saved: config that was saved with the checkpoint.

    Raises:
        ValueError: it is of another precision.
    """
    old, new = saved.training.precision, config.training.precision
    if old is not None and new not in (None, old):
        raise ValueError(
            f"{checkpoint}: its optimizer state is of --{old}; go on with that, or start a new run from its "
            "weights"
        )


def _training_flags(config: RunConfig) -> Dict[str, Any]:
    """Return the flags that have a say in the weights that come out, but for the layout."""
    values: Dict[str, Any] = {}
    for section in (config.data, config.training, config.optimizer, config.model, config.lora):
        values.update(asdict(section))
    del values["megatron_load_dir"], values["base"]  # where things lie
    values["stage"] = values["stage"] or 2  # a run without a stage trains what stage 2 does
    return values


def _show(name: str, value: object) -> str:
    """Return a flag as typed: ``--seed 7``, ``--freeze-lm``, ``--no-freeze-lm`` or ``no --train-modules``."""
    if isinstance(value, bool):
        return flag_name(name) if value else negative_flag_name(name)
    return f"no {flag_name(name)}" if value is None else f"{flag_name(name)} {value}"


def check_same_model(config: RunConfig, start: Start, model: ModelConfig) -> None:
    """Check that everything the flags name is of the checkpoint's model.

    Raises:
        ValueError: the message names the first difference.
    """
    others: Dict[str, ModelConfig] = {}
    load_dir, tokenizer_dir = config.model.megatron_load_dir, config.model.tokenizer_load_dir
    if load_dir is not None and (not start.resumes or Path(load_dir).is_dir()):
        others[f"--megatron-load-dir {load_dir}"] = read_model(load_dir)
    if tokenizer_dir is not None and _is_whole_model(Path(tokenizer_dir)):
        others[f"--tokenizer-load-dir {tokenizer_dir}"] = ModelConfig.from_hf_dir(tokenizer_dir)
    for flag, other in others.items():
        difference = _first_difference(model.to_dict(), other.to_dict())
        if difference:
            raise ValueError(f"{flag} is of another model than {start.checkpoint}: {difference}")


def _is_whole_model(folder: Path) -> bool:
    """Return whether a folder is of a whole model; that of a text model or of a bare tokenizer is not."""
    try:
        return json.loads((folder / "config.json").read_text())["model_type"] in FAMILIES
    except (OSError, ValueError, KeyError, TypeError):
        return False


def with_adapters(model: ModelConfig, config: RunConfig, start: Start) -> ModelConfig:
    """Return the model that is trained: that of the checkpoint, with the adapters that the flags ask for.

    Raises:
        ValueError: the checkpoint has adapters, and others or none are asked for.
    """
    found, wanted = model.lora, config.lora.adapters
    if found is not None and (wanted is None or not wanted.fits(found)):
        raise ValueError(
            f"{start.checkpoint} has LoRA adapters; give {found.flags()} to go on training them, or merge "
            "them with scripts/convert/convert_megatron_to_hf.py"
        )
    if found is not None and config.lora.lora_load_dir is not None and not start.with_state:
        raise ValueError(f"--lora-load-dir: {start.checkpoint} has adapters already; leave the flag out")
    return replace(model, lora=wanted)


def check_restart(config: RunConfig, run: Path) -> None:
    """Check that a run can start over, before anything of it is moved.

    Raises:
        ValueError: there is nothing to start from, or it lies in the folder that is moved aside.
    """
    if config.model.init:
        return
    source = resolve_checkpoint(str(config.model.megatron_load_dir), "--megatron-load-dir")
    if run.resolve() in source.resolve().parents:
        raise ValueError(
            f"--restart moves {run} aside, and {source} with it; give another --name to go on from there"
        )


def _first_difference(left: Dict[str, Any], right: Dict[str, Any], prefix: str = "") -> Optional[str]:
    for key, value in left.items():
        if prefix == "" and key in ("dtype", "lora"):  # what a run may add or change
            continue
        other = right.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            inner = _first_difference(value, other, f"{prefix}{key}.")
            if inner:
                return inner
        elif value != other:
            return f"{prefix}{key} is {other!r} there and {value!r} here"
    return None
