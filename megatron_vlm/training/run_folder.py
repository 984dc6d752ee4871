"""The folder of a run: who may write into it, and where a start of the run begins."""

from __future__ import annotations

import errno
import fcntl
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from megatron_vlm.config.checkpoint import (
    BEST,
    CHECKPOINTS,
    RUN_CONFIG,
    latest_resumable,
    list_checkpoints,
    read_manifest,
    resolve_checkpoint,
)
from megatron_vlm.config.flags import flag_name, negative_flag_name
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.hf.convert import import_hf
from megatron_vlm.observe.metrics import LOGS
from megatron_vlm.observe.sinks import TENSORBOARD, WANDB
from megatron_vlm.training.checkpoint import load_data_state

CONFIG = "config.json"
INIT = "init"  # root of the checkpoint that --init makes
_OF_A_RUN = (CHECKPOINTS, BEST, INIT, *LOGS, CONFIG, TENSORBOARD, WANDB)
_LOCK = ".lock"
_LOCK_SECONDS = 60.0  # the ranks of a killed run end within a few seconds
# What sets which samples a global batch holds. (The loader itself knows of changed data.)
_DATA_ORDER = ("seed", "micro_batch_size", "global_batch_size", "shuffle_buffer_size")
_TRAINED_PARTS = ("stage", "train_modules", "freeze_lm", "train_vision")


@dataclass(frozen=True)
class Start:
    """Where a start of the run begins.

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


def lock(run: Path) -> IO[str]:
    """Make the folder and keep every other run out of it until this process ends.

    Raises:
        ValueError: another process holds it, for a minute at least.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / _LOCK, "w")
    deadline = time.monotonic() + _LOCK_SECONDS
    told = False
    while True:
        try:
            # Not flock: that one is held by whatever this process forks, too.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return file  # a file system without locks
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{run}: another process is training here; stop it, or give another --name"
                ) from None
            if not told:
                print(f"{run}: another process is training here; waiting for it to end", flush=True)
                told = True
            time.sleep(0.2)


def choose_start(config: RunConfig, run: Path) -> Start:
    """Resume if the run can be resumed, else begin at ``--megatron-load-dir``.

    Raises:
        ValueError: the run has only checkpoints without optimizer state, or what is to be loaded is
            missing or of another model.
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
    if config.model.init:
        return _random_start(config, run)
    if config.model.megatron_load_dir is None:
        raise ValueError("--megatron-load-dir: give the checkpoint to start from")
    source = resolve_checkpoint(config.model.megatron_load_dir)
    if not config.checkpoint.load_optim:
        return Start(source, False, f"starting {run} from the weights of {source}")
    if not read_manifest(source)["has_optimizer"]:
        raise ValueError(f"--load-optim: {source} has no optimizer state; leave the flag out")
    dataset = PreparedDataset.open(str(config.data.data_path), "train")
    same_data = all(
        worker["identity"]["data"] == dataset.fingerprint for worker in load_data_state(source).values()
    )
    taken = "its optimizer state and position" if same_data else "its optimizer state, on other data"
    return Start(source, True, f"starting {run} from {source}, with {taken}", with_position=same_data)


def check_same_run(config: RunConfig, start: Start) -> str:
    """Compare the flags with those that the checkpoint was saved with, where the run goes on from it.

    Args:
        config: resolved.

    Returns:
        What else changed, as a line for the log; empty if nothing did.

    Raises:
        ValueError: other parts would be trained, or other samples drawn.
    """
    saved = RunConfig.load(str(start.checkpoint / RUN_CONFIG))
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
    for name in _DATA_ORDER:
        if name in changed:
            old, new = changed[name]
            raise ValueError(
                f"{_show(name, new)} would change the order of the data within the run; go on with "
                f"{_show(name, old)}, with which {start.checkpoint} was trained, or {instead}"
            )
    if not changed:
        return ""
    return "changed since the checkpoint: " + ", ".join(
        f"{flag_name(name)} {old} -> {new}" for name, (old, new) in changed.items()
    )


def _training_flags(config: RunConfig) -> dict[str, Any]:
    """The flags that have a say in the weights that come out, but for the layout."""
    values: dict[str, Any] = {}
    for section in (config.data, config.training, config.optimizer, config.model, config.lora):
        values.update(asdict(section))
    del values["megatron_load_dir"], values["base"]  # where things lie
    values["stage"] = values["stage"] or 2  # a run without a stage trains what stage 2 does
    return values


def _show(name: str, value: object) -> str:
    """``--seed 7``, ``--freeze-lm``, ``--no-freeze-lm`` or ``no --train-modules``."""
    if isinstance(value, bool):
        return flag_name(name) if value else negative_flag_name(name)
    return f"no {flag_name(name)}" if value is None else f"{flag_name(name)} {value}"


def _random_start(config: RunConfig, run: Path) -> Start:
    """Make ``<run>/init`` from ``--tokenizer-load-dir``'s config, anew even if an earlier start left one."""
    folder, seed = str(config.model.tokenizer_load_dir), config.training.seed
    print(f"making random weights for the model of {folder} (--init, seed {seed})", flush=True)
    source = import_hf(
        folder, run / INIT, config.parallel.tp, config.parallel.pp, force=True, random_seed=seed
    )
    return Start(source, False, f"starting {run} from random weights")


def with_adapters(model: ModelConfig, config: RunConfig, start: Start) -> ModelConfig:
    """The model that is trained: that of the checkpoint, with the adapters that the flags ask for.

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


def check_same_model(config: RunConfig, start: Start, model: ModelConfig) -> None:
    """Check that everything the flags name is of the checkpoint's model.

    Raises:
        ValueError: the message names the first difference.
    """
    others: dict[str, ModelConfig] = {}
    load_dir, tokenizer_dir = config.model.megatron_load_dir, config.model.tokenizer_load_dir
    if load_dir is not None and (not start.resumes or Path(load_dir).is_dir()):
        others[f"--megatron-load-dir {load_dir}"] = ModelConfig.from_dict(read_manifest(load_dir)["model"])
    if tokenizer_dir is not None and _is_llava(Path(tokenizer_dir)):
        others[f"--tokenizer-load-dir {tokenizer_dir}"] = ModelConfig.from_hf_dir(tokenizer_dir)
    for flag, other in others.items():
        difference = _first_difference(model.to_dict(), other.to_dict())
        if difference:
            raise ValueError(f"{flag} is of another model than {start.checkpoint}: {difference}")


def _is_llava(folder: Path) -> bool:
    """A tokenizer may also come from a folder of its own, or from the text model's."""
    try:
        return json.loads((folder / "config.json").read_text())["model_type"] == "llava"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_restart(config: RunConfig, run: Path) -> None:
    """Check that a run can start over, before anything of it is moved.

    Raises:
        ValueError: there is nothing to start from, or it lies in the folder that is moved aside.
    """
    if config.model.init:
        return
    source = resolve_checkpoint(str(config.model.megatron_load_dir))
    if run.resolve() in source.resolve().parents:
        raise ValueError(
            f"--restart moves {run} aside, and {source} with it; give another --name to go on from there"
        )


def move_aside(run: Path) -> None:
    """Keep what an earlier run left, out of the way of a new one: ``<run>/earlier/<number>/``."""
    old = [run / name for name in _OF_A_RUN if (run / name).exists()]
    if not old:
        return
    numbers = [int(folder.name) for folder in run.glob("earlier/*") if folder.name.isdigit()]
    target = run / "earlier" / str(max(numbers, default=0) + 1)
    target.mkdir(parents=True)
    for path in old:
        path.rename(target / path.name)


def _first_difference(left: dict, right: dict, prefix: str = "") -> str | None:
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
