"""The section of a run config that says what is saved, where, and what is taken up again."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Optional

from megatron_vlm.config.checks import positive
from megatron_vlm.config.flags import flag, flag_name
from megatron_vlm.config.headings import (
    LOGGING,
    SAVE_LOAD,
)


@dataclass(frozen=True)
class CheckpointSection:
    """The flags that say where the run lives, and what it saves."""

    save_dir: Optional[str] = flag(SAVE_LOAD, None, "folder of all runs; this one lives in <save-dir>/<name>")
    name: Optional[str] = flag(LOGGING, None, "name of the run and of its folder")
    save: bool = flag(LOGGING, True, "save checkpoints; with --no-save only metrics and logs are written")
    save_optim: bool = flag(SAVE_LOAD, False, "save optimizer and data position too: needed to resume")
    save_trained_only: bool = flag(
        SAVE_LOAD, False, "leave frozen weights out of checkpoints; they are those that the run started from"
    )
    load_optim: bool = flag(
        SAVE_LOAD, False, "take the optimizer state from --megatron-load-dir too, when a run starts there"
    )
    save_interval: int = flag(SAVE_LOAD, 2000, "iterations between checkpoints; the last one is always saved")
    keep_checkpoints: Optional[int] = flag(
        SAVE_LOAD,
        None,
        "delete all but this many of the newest checkpoints after each save; the best one is kept besides",
        shown_default="all are kept",
    )
    restart: bool = flag(SAVE_LOAD, False, "start over in a run folder that holds an earlier run")

    def __post_init__(self) -> None:
        positive(self, "save_interval", "keep_checkpoints")
        if self.keep_checkpoints is not None and not self.save:
            raise ValueError("--keep-checkpoints has nothing to keep with --no-save; drop one of them")
        for name in ("save_optim", "save_trained_only"):
            if getattr(self, name) and not self.save:
                raise ValueError(f"{flag_name(name)} saves nothing with --no-save; drop one of them")
        if self.name is not None and (
            self.name in (".", "..") or not re.fullmatch(r"[^/\0\r\n]+", self.name)
        ):
            raise ValueError(f"--name {self.name!r} cannot name a folder; use letters, digits, '-' and '_'")

    @property
    def run_dir(self) -> str:
        """The run folder, ``<save-dir>/<name>``."""
        if not self.save_dir or not self.name:
            raise ValueError("--save-dir and --name are both needed: the run lives in <save-dir>/<name>")
        return os.path.join(self.save_dir, self.name)
