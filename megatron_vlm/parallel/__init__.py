"""Layouts, process groups, and the CPU backend."""

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
