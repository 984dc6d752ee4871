"""Layouts, process groups, optimizer, and the CPU backend.

layout.py         the layout of ranks, and calls between them
optimizer.py      megatron-core's optimizers: built, stepped and saved in one form
adam.py           Adam where no fused one runs; fused.py: which fused kernels are used where
cpu.py            megatron-core on a CPU with gloo
engine.py         the import of Transformer Engine
fp8.py            a check that every rank's GPU can multiply in FP8
deterministic.py  the same bits from every run of the same layout
sharded_files.py  the writer of sharded checkpoints
"""

from megatron_vlm.parallel.cpu import import_megatron_core
from megatron_vlm.parallel.layout import (
    Layout,
    choose_device,
    finalize,
    first_to_arrive,
    first_told,
    has_arrived,
    initialize,
    on_first_rank,
)

__all__ = [
    "Layout",
    "choose_device",
    "finalize",
    "first_to_arrive",
    "first_told",
    "has_arrived",
    "initialize",
    "on_first_rank",
]

# Before any module of this project imports megatron-core by itself: models/ imports this package first.
import_megatron_core()
