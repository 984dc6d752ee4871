"""Floating-point operations of an iteration, and the peak of the device that does them.

Counted are the matrix products that the model's mathematics needs, a multiplication and an addition as two
operations, as PaLM's model FLOPs utilisation has it (Chowdhery et al., https://arxiv.org/abs/2204.02311, B).
What is computed twice to save memory, padding, and logits of tokens that carry no loss are not counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Optional, Sequence, Tuple

from megatron_vlm.architecture.decoder import decoder_layers
from megatron_vlm.architecture.layers import Amount, Layer, Product, Step, named
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.parameters import EMBEDDING, OUTPUT_LAYER
from megatron_vlm.architecture.parts import encoder_block, encoder_embedding, projector_layers
from megatron_vlm.architecture.train_modules import LANGUAGE, PROJECTOR, VISION

# Dense TFLOP/s in bfloat16 and in FP8 with float32 sums, from NVIDIA's datasheets: half of what they print
# "with sparsity". The first entry that stands in the device's name as a word counts.
_PEAK_TFLOPS = (
    ("GB200", 2500.0, 5000.0),
    ("B200", 2250.0, 4500.0),
    ("GH200", 989.0, 1979.0),
    ("H200 NVL", 835.0, 1671.0),
    ("H200", 989.0, 1979.0),
    ("H100 PCIe", 756.0, 1513.0),
    ("H100 NVL", 835.0, 1671.0),
    ("H100", 989.0, 1979.0),
    ("H800", 989.0, 1979.0),
    ("H20", 148.0, 296.0),
    ("A100", 312.0, None),
    ("A800", 312.0, None),
    ("A40", 149.7, None),
    ("A30", 165.0, None),
    ("A10", 125.0, None),
    ("L40S", 362.0, 733.0),
    ("L4", 121.0, 242.0),
)


@dataclass(frozen=True)
class Work:
    """The work of an iteration: what is processed, over all ranks.

    Attributes:
        tokens: positions in the language model, padding left out.
        trained_tokens: of these, the ones that carry loss.
        attention_pairs: pairs of a query and a key that it may see: :func:`causal_pairs`.
        tiles: of images, through the tower; an image is one, where it isn't cut.
    """

    tokens: int
    trained_tokens: int
    attention_pairs: int
    tiles: int


@dataclass(frozen=True)
class Flops:
    """Operations of forward and backward pass, by part."""

    vision: int
    projector: int
    language: int

    @property
    def without_vision(self) -> int:
        """The operations of all parts but the tower."""
        return self.projector + self.language

    @property
    def total(self) -> int:
        """The operations of all parts."""
        return self.vision + self.without_vision


def causal_pairs(lengths: Iterable[int]) -> int:
    """Return the number of pairs of a query and a key not after it, over sequences of these lengths: ``s
    (s + 1) / 2`` each."""
    return sum(length * (length + 1) // 2 for length in lengths)


def training_flops(model: ModelConfig, work: Work, trains: Callable[[str], bool]) -> Flops:
    """Return the operations of one iteration's forward and backward passes.

    A product with a weight costs as much again for the weight's gradient, where the weight is trained,
    and as much again for the gradient of its input, where anything before it is trained. Attention has
    two products forward, and for each of them two backward.

    Args:
        trains: whether a parameter is trained, by the name that checkpoints have for it.
    """
    counts = {"vision": 0, "projector": 0, "language": 0}
    gradient_flows = False  # something so far is trained, so that gradients are asked for from here
    for part, step in _steps(model, work):
        ways = [_operations(products, trains, gradient_flows) for products in step]
        counts[part] += sum(operations for operations, _ in ways)
        gradient_flows = any(flows for _, flows in ways)
    return Flops(**counts)


def _operations(
    products: Sequence[Product], trains: Callable[[str], bool], gradient_flows: bool
) -> Tuple[int, bool]:
    """Return the operations of products in a row, and whether their result needs a gradient if their input
    does."""
    total = 0
    for weight, forward in products:
        if weight is None:
            total += forward + 2 * forward * gradient_flows
        else:
            trained = trains(weight)
            total += forward * (1 + gradient_flows + trained)
            gradient_flows = gradient_flows or trained
    return total, gradient_flows


def peak_tflops(device_name: str, fp8: bool = False) -> Optional[float]:
    """Return the dense peak of a GPU.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` has it.
        fp8: in FP8 instead of bfloat16.

    Returns:
        TFLOP/s; None for a device that isn't in the table, or for a part of one, or that has no FP8.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for name, bf16, in_fp8 in _PEAK_TFLOPS:
        if re.search(rf"\b{name}\b", device_name):
            return in_fp8 if fp8 else bf16
    return None


def _steps(model: ModelConfig, work: Work) -> Iterator[Tuple[str, Step]]:
    """Yield the products of the whole model with the part that they belong to, in the order of its pass."""
    language, vision = model.language, model.vision
    positions = work.tiles * vision.sequence_length
    tower = Amount(positions, positions * vision.sequence_length)
    yield from _part("vision", VISION, encoder_embedding(model), tower)
    for number in range(model.num_vision_layers_run):
        yield from _part("vision", f"{VISION}decoder.layers.{number}.", encoder_block(model), tower)
    features = Amount(work.tiles * model.tile_tokens)
    yield from _part("projector", PROJECTOR, projector_layers(model), features)
    yield "language", [[(EMBEDDING, 0)]]
    text = Amount(work.tokens, work.attention_pairs)
    for number in range(language.num_layers):
        yield from _part(
            "language",
            f"{LANGUAGE}decoder.layers.{number}.",
            decoder_layers(model.language, model.lora),
            text,
        )
    output = EMBEDDING if language.tie_word_embeddings else OUTPUT_LAYER
    yield "language", [[(output, 2 * work.trained_tokens * language.hidden_size * language.vocab_size)]]


def _part(part: str, prefix: str, layers: Iterable[Layer], amount: Amount) -> Iterator[Tuple[str, Step]]:
    for layer in layers:
        yield part, named(prefix, layer.step(amount))
