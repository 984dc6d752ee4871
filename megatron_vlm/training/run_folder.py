"""The folder of a run: who may write into it, and where a start of the run begins."""

from __future__ import annotations

import time
from pathlib import Path
from typing import IO

from megatron_vlm.artifacts.checkpoint import BEST, CHECKPOINTS, read_manifest, resolve_checkpoint
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.mixture import Mixture
from megatron_vlm.hf.convert import import_hf
from megatron_vlm.observe.metrics import LOGS
from megatron_vlm.observe.sinks import TENSORBOARD, WANDB
from megatron_vlm.plan.start import LOCK, LOCK_SECONDS, Start, own_checkpoint
from megatron_vlm.system.locks import take_lock
from megatron_vlm.training.checkpoint import load_data_state

CONFIG = "config.json"
INIT = "init"  # root of the checkpoint that --init makes
_OF_A_RUN = (CHECKPOINTS, BEST, INIT, *LOGS, CONFIG, TENSORBOARD, WANDB)


def lock(run: Path) -> IO[str]:
    """Make the folder and keep every other run out of it until this process ends.

    Raises:
        ValueError: another process holds it, for a minute at least.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / LOCK, "w")
    deadline = time.monotonic() + LOCK_SECONDS
    told = False
    while True:
        if take_lock(file):
            return file
        if time.monotonic() > deadline:
            raise ValueError(f"{run}: another process is training here; stop it, or give another --name")
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
    own = own_checkpoint(run)
    if own is not None:
        return own
    if config.model.init:
        return _random_start(config, run)
    if config.model.megatron_load_dir is None:
        raise ValueError("--megatron-load-dir: give the checkpoint to start from")
    source = resolve_checkpoint(config.model.megatron_load_dir, "--megatron-load-dir")
    if not config.checkpoint.load_optim:
        return Start(source, False, f"starting {run} from the weights of {source}")
    if not read_manifest(source)["has_optimizer"]:
        raise ValueError(f"--load-optim: {source} has no optimizer state; leave the flag out")
    data = Mixture.open(str(config.data.data_path), "train")
    same_data = all(
        identity["data"] == data.fingerprint and identity.get("mixture", {}) == data.description
        for identity in (worker["identity"] for worker in load_data_state(source).values())
    )
    taken = "its optimizer state and position" if same_data else "its optimizer state, on other data"
    return Start(source, True, f"starting {run} from {source}, with {taken}", with_position=same_data)


def _random_start(config: RunConfig, run: Path) -> Start:
    """Make ``<run>/init`` from ``--tokenizer-load-dir``'s config, anew even if an earlier start left one."""
    folder, seed = str(config.model.tokenizer_load_dir), config.training.seed
    print(f"making random weights for the model of {folder} (--init, seed {seed})", flush=True)
    source = import_hf(
        folder, run / INIT, config.parallel.tp, config.parallel.pp, force=True, random_seed=seed
    )
    return Start(source, False, f"starting {run} from random weights")


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
