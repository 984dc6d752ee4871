"""The section of a run config that says how ``--fp8`` is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from megatron_vlm.architecture.fp8 import RECIPES, Fp8Config
from megatron_vlm.config.flags import flag, flag_name
from megatron_vlm.config.headings import FP8

_WITH_PARAM_GATHER = ("tensorwise", "blockwise")


@dataclass(frozen=True)
class Fp8Section:
    """The flags that say how ``--fp8`` is done."""

    fp8_recipe: Optional[str] = flag(
        FP8,
        None,
        "how values are scaled: tensorwise by the tensor's largest value, delayed by that of earlier "
        "iterations, blockwise by that of 128 values (compute capability 9.0, CUDA 12.9), mxfp8 of 32 (10.0)",
        choices=RECIPES,
        shown_default="tensorwise",
    )
    fp8_param_gather: bool = flag(
        FP8,
        False,
        "keep these weights in FP8, and gather them so; needs --dist-optim and a trained language model",
    )
    first_last_layers_bf16: bool = flag(
        FP8, False, "leave the first and last layers of the language model in bfloat16; not with delayed"
    )
    num_layers_at_start_in_bf16: Optional[int] = flag(
        FP8, None, "with --first-last-layers-bf16: how many first layers", shown_default="1"
    )
    num_layers_at_end_in_bf16: Optional[int] = flag(
        FP8, None, "with --first-last-layers-bf16: how many last layers", shown_default="1"
    )

    def __post_init__(self) -> None:
        counts = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        for name in counts:
            value = getattr(self, name)
            if value is not None and not self.first_last_layers_bf16:
                raise ValueError(f"{flag_name(name)} does nothing without --first-last-layers-bf16")
            if value is not None and value < 0:
                raise ValueError(f"{flag_name(name)} {value}: must be 0 or more")
        if all(getattr(self, name) == 0 for name in counts):
            raise ValueError("--first-last-layers-bf16 with no layer at either end; leave it out")
        if self.first_last_layers_bf16 and self.fp8_recipe == "delayed":
            # One FP8 region for all layers: its scales are exchanged where it ends.
            raise ValueError(
                "--first-last-layers-bf16 does not run with --fp8-recipe delayed; use tensorwise, or drop it"
            )
        if self.fp8_param_gather and self.config.recipe not in _WITH_PARAM_GATHER:
            raise ValueError(
                f"--fp8-param-gather does not run with --fp8-recipe {self.fp8_recipe}; "
                f"use {' or '.join(_WITH_PARAM_GATHER)}, or drop it"
            )

    @property
    def config(self) -> Fp8Config:
        """The way matrix products are done where FP8 is on."""
        ends = self.first_last_layers_bf16
        start, end = self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16
        return Fp8Config(
            recipe=self.fp8_recipe or RECIPES[0],
            param_gather=self.fp8_param_gather,
            bf16_at_start=(1 if start is None else start) if ends else 0,
            bf16_at_end=(1 if end is None else end) if ends else 0,
        )
