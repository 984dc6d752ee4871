"""Rules between FP8 and a run's other flags, its model and its GPUs."""

from __future__ import annotations

from typing import List, Optional, Tuple

from megatron_vlm.architecture.fp8 import Fp8Config
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.config.flags import flag_name
from megatron_vlm.config.run import RunConfig


def check_flags(config: RunConfig) -> None:
    """Check the rules between FP8 and the other flags.

    Raises:
        ValueError: one is broken.
    """
    fp8, parallel = config.fp8, config.parallel
    if fp8 is None:
        for name in ("fp8_recipe", "fp8_param_gather", "first_last_layers_bf16"):
            if getattr(config.low_precision, name):
                raise ValueError(f"{flag_name(name)} does nothing without --fp8; give both or neither")
        return
    if config.training.precision == "fp32":
        raise ValueError("--fp8 leaves all else in bfloat16, and --fp32 asks for float32; drop one of them")
    if parallel.device == "cpu" or parallel.backend == "gloo":
        where = "--device cpu" if parallel.device == "cpu" else "--backend gloo"
        raise ValueError(f"--fp8 needs GPUs, and {where} has none; use --bf16")
    if parallel.transformer_impl == "local":
        raise ValueError("--fp8 needs Transformer Engine; leave --transformer-impl local out")
    if fp8.param_gather and not parallel.dist_optim:
        raise ValueError("--fp8-param-gather needs --dist-optim, which keeps the float32 weights; add it")


def check_model(config: RunConfig, model: ModelConfig) -> None:
    """Check the rules between FP8 and the model.

    Raises:
        ValueError: one is broken.
    """
    fp8, parallel = config.fp8, config.parallel
    if fp8 is None:
        return
    if model.language.num_experts is not None:
        raise ValueError(
            "--fp8: the experts of this model, most of its work, have no FP8 products here; use --bf16"
        )
    _check_sizes(fp8, model, parallel.tp, parallel.sequence_parallel)
    _check_layers(fp8, model.language.num_layers, parallel.pp)
    if fp8.param_gather:
        trains = config.trains(model)
        frozen = next((name for name in fp8.weights(model.language.num_layers) if not trains(name)), None)
        if frozen is not None:
            raise ValueError(
                f"--fp8-param-gather: {frozen} is frozen, and checkpoints would hold it rounded to FP8; "
                "drop the flag, or train the whole language model"
            )


def _check_sizes(fp8: Fp8Config, model: ModelConfig, tp: int, sequence_parallel: bool) -> None:
    def broken(tp: int) -> Optional[Tuple[str, int, int]]:
        sizes = fp8.sizes(model, tp, sequence_parallel)
        return next((entry for entry in sizes if entry[1] % entry[2]), None)

    found = broken(tp)
    if found is None:
        return
    what, size, step = found
    works: List[int] = []
    for other in (1, 2, 4, 8, 16):
        try:
            model.check_layout(other, 1)
        except ValueError:
            continue
        if broken(other) is None and (other > 1 or not sequence_parallel):
            works.append(other)
    instead = f"use --tp {' or '.join(map(str, works))}, or --bf16" if works else "use --bf16"
    raise ValueError(f"--fp8 needs multiples of {step}, and with --tp {tp} {what} {size} wide; {instead}")


def _check_layers(fp8: Fp8Config, layers: int, pp: int) -> None:
    most = layers // pp
    for end, count in (("start", fp8.bf16_at_start), ("end", fp8.bf16_at_end)):
        if count > most:  # megatron-core's own limit
            raise ValueError(
                f"--num-layers-at-{end}-in-bf16 {count}: a pipeline stage has {most} of the {layers} layers; "
                f"use {most} or less"
            )
    if fp8.bf16_at_start + fp8.bf16_at_end >= layers:
        raise ValueError(
            f"--num-layers-at-start-in-bf16 {fp8.bf16_at_start} and --num-layers-at-end-in-bf16 "
            f"{fp8.bf16_at_end} leave none of the {layers} layers in FP8; use fewer, or --bf16"
        )


def unsupported(
    recipe: str, capability: Tuple[int, int], cuda: Optional[Tuple[int, int]] = None
) -> Optional[str]:
    """Return why a GPU has no products of a recipe, and what would work; None if it has.

    Args:
        capability: compute capability, such as (9, 0).
        cuda: version of CUDA, where it is known.

    Source: Transformer Engine 2.11 ``check_fp8_support``, ``check_fp8_block_scaling_support`` and
    ``check_mxfp8_support``.
    """
    has = f"a GPU here has compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 9):
        return f"--fp8 needs compute capability 8.9 or more, and {has}; use --bf16"
    if recipe == "mxfp8" and not (10, 0) <= capability < (12, 0):
        return f"--fp8-recipe mxfp8 needs compute capability 10.0 up to 11.x, and {has}; use tensorwise"
    if recipe == "blockwise" and capability < (9, 0):
        return f"--fp8-recipe blockwise needs compute capability 9.0 or more, and {has}; use tensorwise"
    if recipe == "blockwise" and cuda is not None and cuda < (12, 9):
        return (
            f"--fp8-recipe blockwise needs CUDA 12.9, and torch here has {cuda[0]}.{cuda[1]}; use tensorwise"
        )
    return None
