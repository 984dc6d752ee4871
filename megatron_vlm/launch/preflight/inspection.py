"""The findings of the checks of a run."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional, Sequence

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import HF_FOLDER
from megatron_vlm.config.run import RunConfig
from megatron_vlm.launch.launch_plan import LaunchPlan
from megatron_vlm.launch.report import Facts
from megatron_vlm.plan.memory import StageMemory
from megatron_vlm.plan.packing_estimate import PackingEstimate, estimate_run

_WIDTH = 100  # of the list of checks that found nothing


@dataclass
class Inspection:
    """The findings of the checks of one run.

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
        train_samples: of one pass over the training data.
        mixture: a line for each of its datasets.
        memory: estimate for each pipeline rank.
        gpu_memory: of one GPU, in GiB.
        disk: one line: checkpoints to come, and the room for them.
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
    mixture: List[str] = field(default_factory=list)
    memory: Sequence[StageMemory] = ()
    gpu_memory: Optional[float] = None
    disk: str = ""

    @property
    def config(self) -> RunConfig:
        """The run that is looked at."""
        return self.plan.config

    @property
    def problems(self) -> List[str]:
        """The problems that keep the run from starting."""
        return [*self.contradictions, *self.errors]

    @property
    def facts(self) -> Facts:
        """The facts that the first screen shows."""
        if self.layers:
            folder = self.layers[-1]
            start = f"goes on from {folder.name}" if self.resumes else f"from the weights of {folder}"
        elif self.config.model.init:
            start = "from random weights (--init)"
        else:
            start = f"from {self.config.model.megatron_load_dir}"
        return Facts(
            start,
            self.model,
            self.train_samples,
            self._packing,
            self.mixture,
            tuple(self.memory),
            self.gpu_memory,
            self.disk,
        )

    @property
    def _packing(self) -> Optional[PackingEstimate]:
        """Return how many samples share a sequence, as each loader worker packs them."""
        if not self.config.data.packing or self.contradictions or self.train_samples is None:
            return None
        return estimate_run(self.config, self.plan.world_size, self.train_samples)

    @property
    def hf_folders(self) -> List[str]:
        """The folders in which tokenizer and image processor are looked for, in this order."""
        own = [str(self.layers[-1] / HF_FOLDER)] if self.layers else []
        folders = [folder for folder in (self.config.model.tokenizer_load_dir, *own) if folder]
        return [folder for folder in folders if os.path.isdir(folder)]

    def say(self) -> List[str]:
        """Say all of it, a line each, and which checks found nothing."""
        return [
            *(f"error: {problem}" for problem in self.problems),
            *(f"warning: {warning}" for warning in self.warnings),
            *textwrap.wrap(f"ok: {', '.join(self.passed)}", _WIDTH, subsequent_indent="    "),
        ]
