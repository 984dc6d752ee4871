"""Layouts, process groups, and the CPU backend."""

from megatron_vlm.parallel.layout import Layout, choose_device, finalize, initialize, reset

__all__ = ["Layout", "choose_device", "finalize", "initialize", "reset"]
