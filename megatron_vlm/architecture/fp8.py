"""Matrix products in FP8: the way they are done, and the sizes that they take.

Sources: megatron-core 0.16.1 ``fp8_utils.py`` and ``transformer_block.py``, Transformer Engine 2.11
``quantization.py`` and ``utils.assert_dim_for_fp8_exec``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Iterator, List, Tuple

from megatron_vlm.architecture.connectors import CONNECTORS
from megatron_vlm.architecture.layers import ROW, Linear
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.parts import connector
from megatron_vlm.architecture.train_modules import LANGUAGE

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
# The linears that compute in FP8, in each layer of the language model.
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True)
class Fp8Config:
    """The way in which matrix products in FP8 are done.

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
        """The number that both sides of each matrix on a rank are a multiple of.

        Source: megatron-core ``get_fp8_align_size``.
        """
        return 32 if self.recipe == "mxfp8" else 16

    @property
    def projector(self) -> bool:
        """Return whether the projector computes in FP8 too.

        Delayed scaling exchanges the largest values over the data parallel ranks whenever FP8 was
        used, and a rank without images runs no projector.
        """
        return self.recipe != "delayed"

    def weights(self, num_layers: int) -> List[str]:
        """Return the names of the language model's weights that are multiplied by in FP8, as checkpoints
        have them."""
        layers = range(self.bf16_at_start, num_layers - self.bf16_at_end)
        return [
            f"{LANGUAGE}decoder.layers.{number}.{linear}.weight" for number in layers for linear in LINEARS
        ]

    def sequence_multiple(self, rows: int, tp: int, sequence_parallel: bool) -> int:
        """Return the number that sequences are padded to a multiple of, so that a rank's tokens, sequence x
        batch, are aligned.

        Args:
            rows: batch size, in sequences.
        """
        alignment = self.alignment
        if sequence_parallel and self.recipe == "blockwise":
            alignment = 128  # what is gathered has whole blocks. Source: Float8BlockQuantizer.is_quantizable
        return (tp if sequence_parallel else 1) * (alignment // gcd(alignment, rows))

    def sizes(self, model: ModelConfig, tp: int, sequence_parallel: bool) -> Iterator[Tuple[str, int, int]]:
        """Yield the features of each matrix on a rank: what they are, how many, and what divides them."""
        language, step = model.language, self.alignment
        heads, groups = language.num_attention_heads, language.num_key_value_heads
        whole = 128 if sequence_parallel and self.recipe == "blockwise" else step
        yield "the language model's hidden size is", language.hidden_size, whole
        yield "its queries, keys and values are", (heads + 2 * groups) * language.head_dim // tp, step
        yield "its attention's output is", heads * language.head_dim // tp, step
        yield "its MLP is", language.ffn_hidden_size // tp, step
        if self.projector and CONNECTORS[model.projector.kind].in_fp8(model.projector.kind):
            what = "the projector's input is"
            for linear in connector(model):
                if isinstance(linear, Linear):
                    yield what, linear.inputs // (tp if linear.cut == ROW else 1), step
                    what = "its MLP is"
