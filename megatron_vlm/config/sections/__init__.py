"""The sections of a run config, a file each: their flags, and the rules inside each section."""

from __future__ import annotations

from typing import Dict

from megatron_vlm.config.sections.checkpoint import CheckpointSection
from megatron_vlm.config.sections.data import DataSection
from megatron_vlm.config.sections.launch import LaunchSection
from megatron_vlm.config.sections.logging import LoggingSection
from megatron_vlm.config.sections.lora import LoraSection
from megatron_vlm.config.sections.low_precision import Fp8Section
from megatron_vlm.config.sections.model import ModelSection
from megatron_vlm.config.sections.optimizer import OptimizerSection
from megatron_vlm.config.sections.parallel import ParallelSection
from megatron_vlm.config.sections.slurm import SlurmSection
from megatron_vlm.config.sections.training import TrainingSection

# In the order of a saved config.json.
SECTIONS: Dict[str, type] = {
    "model": ModelSection,
    "parallel": ParallelSection,
    "data": DataSection,
    "training": TrainingSection,
    "low_precision": Fp8Section,
    "lora": LoraSection,
    "optimizer": OptimizerSection,
    "checkpoint": CheckpointSection,
    "logging": LoggingSection,
    "launch": LaunchSection,
    "slurm": SlurmSection,
}

__all__ = [
    "SECTIONS",
    "CheckpointSection",
    "DataSection",
    "Fp8Section",
    "LaunchSection",
    "LoggingSection",
    "LoraSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "SlurmSection",
    "TrainingSection",
]
