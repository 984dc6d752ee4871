"""What each training stage trains."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel import Layout

_PARTS = {
    "vision tower": "vision_model.",
    "projector": "vision_projection.",
    "language model": "language_model.",
}


def set_trainable(chunks: Iterable[VisionLanguageModel], train_language: bool, train_vision: bool) -> None:
    """Freeze what isn't trained. The projector and adapters always are.

    LLaVA's stage 1 trains the projector alone, stage 2 the language model too; the tower is frozen in
    both (Liu et al., https://arxiv.org/abs/2304.08485).
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".lora_" in name:
                continue
            if name.startswith("language_model."):
                parameter.requires_grad = train_language
            elif name.startswith("vision_model."):
                parameter.requires_grad = train_vision


def describe_trainable(chunks: Iterable[VisionLanguageModel], layout: Layout) -> str:
    """``vision tower 0 of 120,000, projector ...``: parameters of the whole model; a collective call."""
    counts = torch.zeros(len(_PARTS), 2, dtype=torch.int64, device=layout.device)
    for name, parameter in (entry for chunk in chunks for entry in chunk.named_parameters()):
        whole_copy_elsewhere = getattr(parameter, "shared", False)  # tied embedding on the last stage
        sharded = getattr(parameter, "tensor_model_parallel", False)
        if whole_copy_elsewhere or not (sharded or layout.tp_rank == 0):
            continue
        row = next(i for i, prefix in enumerate(_PARTS.values()) if name.startswith(prefix))
        counts[row, 0] += parameter.numel() if parameter.requires_grad else 0
        counts[row, 1] += parameter.numel()
    dist.all_reduce(counts, group=layout.model_group)
    return ", ".join(
        f"{part} {trained:,} of {total:,}"
        for part, (trained, total) in zip(_PARTS, counts.tolist(), strict=True)
    )
