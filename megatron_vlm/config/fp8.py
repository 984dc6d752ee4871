"""FP8: what the flags ask for, the sizes that its matrix products take, and the rules that follow.

Sources: megatron-core 0.16.1 ``fp8_utils.py`` and ``transformer_block.py``, Transformer Engine 2.11
``quantization.py`` and ``utils.assert_dim_for_fp8_exec``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Iterator, List, Optional, Tuple

from megatron_vlm.config.flags import flag, flag_name
from megatron_vlm.config.headings import FP8
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.config.train_modules import LANGUAGE

if TYPE_CHECKING:
    from megatron_vlm.config.run import RunConfig

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
# The linears that compute in FP8, in each layer of the language model.
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
_WITH_PARAM_GATHER = ("tensorwise", "blockwise")


@dataclass(frozen=True)
class Fp8Config:
    """How matrix products in FP8 are done.

    Attributes:
        recipe: how values are scaled into FP8's range; of :data:`RECIPES`.
        param_gather: weights are FP8 in memory too, and are gathered so by the distributed optimizer.
        bf16_at_start: layers of the language model, from its first on, that stay bfloat16.
        bf16_at_end: likewise to its last.
    """

    recipe: str = "tensorwise"
    param_gather: bool = False
    bf16_at_start: int = 0
    bf16_at_end: int = 0

    @property
    def format(self) -> str:
        """megatron-core's name of the format, Transformer Engine's default for the recipe. ``hybrid``
        is e4m3 forward and e5m2, which has the wider range, for gradients; where 32 or 128 values share a
        scale, e4m3 is wide enough for both."""
        return "hybrid" if self.recipe in ("tensorwise", "delayed") else "e4m3"

    @property
    def alignment(self) -> int:
        """Both sides of each matrix on a rank are a multiple of this. Source: megatron-core
        ``get_fp8_align_size``."""
        return 32 if self.recipe == "mxfp8" else 16

    @property
    def projector(self) -> bool:
        """Whether the projector computes in FP8 too. Delayed scaling exchanges the largest values over the
        data parallel ranks whenever FP8 was used, and a rank without images runs no projector."""
        return self.recipe != "delayed"

    def weights(self, num_layers: int) -> List[str]:
        """Names of the language model's weights that are multiplied by in FP8, as checkpoints have them."""
        layers = range(self.bf16_at_start, num_layers - self.bf16_at_end)
        return [
            f"{LANGUAGE}decoder.layers.{number}.{linear}.weight" for number in layers for linear in LINEARS
        ]

    def sequence_multiple(self, rows: int, tp: int, sequence_parallel: bool) -> int:
        """What sequences are padded to a multiple of, so that a rank's tokens, sequence x batch, are aligned.

        Args:
            rows: batch size, in sequences.
        """
        alignment = self.alignment
        if sequence_parallel and self.recipe == "blockwise":
            alignment = 128  # what is gathered has whole blocks. Source: Float8BlockQuantizer.is_quantizable
        return (tp if sequence_parallel else 1) * (alignment // gcd(alignment, rows))

    def sizes(self, model: ModelConfig, tp: int, sequence_parallel: bool) -> Iterator[Tuple[str, int, int]]:
        """The features of each matrix on a rank: what they are, how many, and what divides them."""
        language, projector, step = model.language, model.projector, self.alignment
        heads, groups = language.num_attention_heads, language.num_key_value_heads
        whole = 128 if sequence_parallel and self.recipe == "blockwise" else step
        yield "the language model's hidden size is", language.hidden_size, whole
        yield "its queries, keys and values are", (heads + 2 * groups) * language.head_dim // tp, step
        yield "its attention's output is", heads * language.head_dim // tp, step
        yield "its MLP is", language.ffn_hidden_size // tp, step
        if self.projector and projector.kind != "linear":
            yield "the projector's input is", projector.input_size, step
            yield "its MLP is", language.hidden_size // tp, step


@dataclass(frozen=True)
class Fp8Section:
    """How ``--fp8`` is done."""

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
        """What is done where FP8 is on."""
        ends = self.first_last_layers_bf16
        start, end = self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16
        return Fp8Config(
            recipe=self.fp8_recipe or RECIPES[0],
            param_gather=self.fp8_param_gather,
            bf16_at_start=(1 if start is None else start) if ends else 0,
            bf16_at_end=(1 if end is None else end) if ends else 0,
        )


def check_flags(config: RunConfig) -> None:
    """The rules between FP8 and the other flags.

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
    """The rules between FP8 and the model.

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
    """Why a GPU has no such products, and what would work; None if it has.

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
