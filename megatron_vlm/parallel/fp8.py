"""A check that the ranks' GPUs can multiply in FP8."""

from __future__ import annotations

import importlib.util

import torch
import torch.distributed as dist

from megatron_vlm.parallel.engine import why_not
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.plan.fp8_rules import unsupported


def check_ranks(recipe: str, layout: Layout) -> None:
    """Check that every rank can compute by a recipe; a collective call, so that all of them end alike.

    Args:
        recipe: of :data:`megatron_vlm.architecture.fp8.RECIPES`.

    Raises:
        ValueError: one can't; on every rank, for the reason of the first that can't.
    """
    reasons: list[str | None] = [None] * layout.world_size
    dist.all_gather_object(reasons, _reason(recipe, layout.device))
    for reason in filter(None, reasons):
        raise ValueError(reason)


def _reason(recipe: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "--fp8 needs GPUs, and this run is on the CPU; use --bf16"
    if why_not() is not None:
        return f"--fp8: Transformer Engine {why_not()}; mend that, or use --bf16 --transformer-impl local"
    if importlib.util.find_spec("transformer_engine") is None:
        return "--fp8 needs Transformer Engine, which is not installed here; use --bf16"
    major, minor = (int(number) for number in str(torch.version.cuda).split(".")[:2])
    return unsupported(recipe, torch.cuda.get_device_capability(device), (major, minor))
