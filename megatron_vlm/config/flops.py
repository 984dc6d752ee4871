"""Floating-point operations of an iteration, and the peak of the device that does them.

Counted are the matrix products that the model's mathematics needs, a multiplication and an addition as two
operations, as PaLM's model FLOPs utilisation has it (Chowdhery et al., https://arxiv.org/abs/2204.02311, B).
What is computed twice to save memory, padding, and logits of tokens that carry no loss are not counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, Iterator, Optional, Tuple

from megatron_vlm.config.model import ModelConfig

# Dense bfloat16 TFLOP/s with float32 sums, from NVIDIA's datasheets: half of what they print "with sparsity".
# The first entry that stands in the device's name as a word counts.
_PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L4", 121.0),
)

_Product = Tuple[Optional[str], int]  # a weight's name, or None for attention; operations forward


@dataclass(frozen=True)
class Work:
    """What an iteration processes, over all ranks.

    Attributes:
        tokens: positions in the language model, padding left out.
        trained_tokens: of these, the ones that carry loss.
        attention_pairs: pairs of a query and a key that it may see: :func:`causal_pairs`.
        images: through the tower.
    """

    tokens: int
    trained_tokens: int
    attention_pairs: int
    images: int


@dataclass(frozen=True)
class Flops:
    """Operations of forward and backward pass, by part."""

    vision: int
    projector: int
    language: int

    @property
    def without_vision(self) -> int:
        """All but the tower's."""
        return self.projector + self.language

    @property
    def total(self) -> int:
        """All."""
        return self.vision + self.without_vision


def causal_pairs(lengths: Iterable[int]) -> int:
    """Pairs of a query and a key not after it, over sequences of these lengths: ``s (s + 1) / 2`` each."""
    return sum(length * (length + 1) // 2 for length in lengths)


def training_flops(model: ModelConfig, work: Work, trains: Callable[[str], bool]) -> Flops:
    """Operations of one iteration's forward and backward passes.

    A product with a weight costs as much again for the weight's gradient, where the weight is trained,
    and as much again for the gradient of its input, where anything before it is trained. Attention has
    two products forward, and for each of them two backward.

    Args:
        trains: whether a parameter is trained, by the name that checkpoints have for it.
    """
    counts: Dict[str, int] = {}
    gradient_flows = False  # something so far is trained, so that gradients are asked for from here
    for part, products in (
        ("vision", _vision(model, work)),
        ("projector", _projector(model, work)),
        ("language", _language(model, work)),
    ):
        total = 0
        for weight, forward in products:
            total += forward
            if weight is None:
                total += 2 * forward * gradient_flows
            else:
                trained = trains(weight)
                total += forward * (gradient_flows + trained)
                gradient_flows = gradient_flows or trained
        counts[part] = total
    return Flops(**counts)


def peak_tflops(device_name: str) -> Optional[float]:
    """Dense bfloat16 peak of a GPU.

    Args:
        device_name: as ``torch.cuda.get_device_name()`` has it.

    Returns:
        TFLOP/s; None for a device that isn't in the table, or for a part of one.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for name, peak in _PEAK_TFLOPS:
        if re.search(rf"\b{name}\b", device_name):
            return peak
    return None


def _vision(model: ModelConfig, work: Work) -> Iterator[_Product]:
    vision, images = model.vision, work.images
    positions = images * vision.sequence_length
    pixels = vision.num_channels * vision.patch_size**2
    yield "vision_model.conv1.weight", 2 * images * vision.num_patches * pixels * vision.hidden_size
    yield "vision_model.position_embeddings.weight", 0
    for number in range(model.num_vision_layers_run):
        yield from _layer(
            f"vision_model.decoder.layers.{number}",
            tokens=positions,
            pairs=positions * vision.sequence_length,
            hidden=vision.hidden_size,
            query=vision.hidden_size,
            key=vision.hidden_size,
            ffn_in=vision.ffn_hidden_size,
            ffn_out=vision.ffn_hidden_size,
        )


def _projector(model: ModelConfig, work: Work) -> Iterator[_Product]:
    features = work.images * model.image_tokens
    projector, hidden = model.projector, model.language.hidden_size
    prefix = "vision_projection.encoder"
    if projector.kind == "linear":
        yield f"{prefix}.weight", 2 * features * projector.input_size * hidden
    else:
        yield f"{prefix}.linear_fc1.weight", 2 * features * projector.input_size * hidden
        yield f"{prefix}.linear_fc2.weight", 2 * features * hidden * hidden


def _language(model: ModelConfig, work: Work) -> Iterator[_Product]:
    language = model.language
    embedding = "language_model.embedding.word_embeddings.weight"
    yield embedding, 0
    for number in range(language.num_layers):
        yield from _layer(
            f"language_model.decoder.layers.{number}",
            tokens=work.tokens,
            pairs=work.attention_pairs,
            hidden=language.hidden_size,
            query=language.num_attention_heads * language.head_dim,
            key=language.num_key_value_heads * language.head_dim,
            ffn_in=2 * language.ffn_hidden_size,  # gate and up
            ffn_out=language.ffn_hidden_size,
        )
    output = embedding if language.tie_word_embeddings else "language_model.output_layer.weight"
    yield output, 2 * work.trained_tokens * language.hidden_size * language.vocab_size


def _layer(
    prefix: str, tokens: int, pairs: int, hidden: int, query: int, key: int, ffn_in: int, ffn_out: int
) -> Iterator[_Product]:
    """One block. Norms have no products, but gradients have to reach those that are trained."""
    yield f"{prefix}.self_attention.linear_qkv.layer_norm_weight", 0
    yield f"{prefix}.self_attention.linear_qkv.weight", 2 * tokens * hidden * (query + 2 * key)
    yield None, 4 * pairs * query  # queries with keys, then weights with values
    yield f"{prefix}.self_attention.linear_proj.weight", 2 * tokens * query * hidden
    yield f"{prefix}.mlp.linear_fc1.layer_norm_weight", 0
    yield f"{prefix}.mlp.linear_fc1.weight", 2 * tokens * hidden * ffn_in
    yield f"{prefix}.mlp.linear_fc2.weight", 2 * tokens * ffn_out * hidden
