"""The options that a model is built with, whatever model it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_vlm.architecture.fp8 import Fp8Config


@dataclass(frozen=True)
class ModelOptions:
    """The precision, the kernels and the cut that a model is built with; its architecture is another matter.

    Attributes:
        dtype: of the parameters: ``torch.float32`` or ``torch.bfloat16``.
        sequence_parallel: shard the language model's activations between its tensor parallel parts.
        deterministic: ask the kernels for reproducible sums.
        impl: layer spec, ``"local"`` or ``"transformer_engine"``; None for what is there.
        vocab_divisible_by: each tensor parallel rank's rows of the vocabulary are padded to a multiple of it.
        layers_per_stage: as dealt by :func:`megatron_vlm.plan.pipeline.deal_layers`; None for an even deal.
        recompute: which activations the backward pass computes again: "none", "selective" or "full".
        recompute_num_layers: with "full", the layers of each stage, and of the tower; None for all.
        fp8: of the language model and the projector; the tower's tokens are seldom aligned, and its work is
            little. None: no FP8.
    """

    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    deterministic: bool = False
    impl: str | None = None
    vocab_divisible_by: int = 128
    layers_per_stage: Sequence[int] | None = None
    recompute: str = "none"
    recompute_num_layers: int | None = None
    fp8: Fp8Config | None = None
