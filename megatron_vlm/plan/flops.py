"""Floating-point operations of an iteration, and the peak of the device that does them.

Counted are the matrix products that the model's mathematics needs, a multiplication and an addition as two
operations, as PaLM's model FLOPs utilisation has it (Chowdhery et al., https://arxiv.org/abs/2204.02311, B).
What is computed twice to save memory, padding, and logits of tokens that carry no loss are not counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, Iterator, Optional, Sequence, Tuple

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.parameters import ROUTER, expert_weight

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

_Product = Tuple[Optional[str], int]  # a weight's name, or None for attention; operations forward
# Products one after the other, and beside each other on one input, as a linear and its LoRA adapters.
_Step = Sequence[Sequence[_Product]]


@dataclass(frozen=True)
class Work:
    """What an iteration processes, over all ranks.

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
    counts = {"vision": 0, "projector": 0, "language": 0}
    gradient_flows = False  # something so far is trained, so that gradients are asked for from here
    for part, step in _steps(model, work):
        ways = [_operations(products, trains, gradient_flows) for products in step]
        counts[part] += sum(operations for operations, _ in ways)
        gradient_flows = any(flows for _, flows in ways)
    return Flops(**counts)


def _operations(
    products: Sequence[_Product], trains: Callable[[str], bool], gradient_flows: bool
) -> Tuple[int, bool]:
    """Operations of products in a row, and whether their result needs a gradient if their input does."""
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
    """Dense peak of a GPU.

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


def _steps(model: ModelConfig, work: Work) -> Iterator[Tuple[str, _Step]]:
    for part, steps in (("vision", _vision), ("projector", _projector), ("language", _language)):
        for step in steps(model, work):
            yield part, step


def _vision(model: ModelConfig, work: Work) -> Iterator[_Step]:
    vision, tiles = model.vision, work.tiles
    positions, hidden = tiles * vision.sequence_length, vision.hidden_size
    pixels = vision.num_channels * vision.patch_size**2
    yield [[("vision_model.conv1.weight", 2 * tiles * vision.num_patches * pixels * hidden)]]
    yield [[("vision_model.position_embeddings.weight", 0)]]
    for number in range(model.num_vision_layers_run):
        yield from _layer(
            f"vision_model.decoder.layers.{number}",
            tokens=positions,
            pairs=positions * vision.sequence_length,
            qkv={"q_proj": (hidden, hidden), "k_proj": (hidden, hidden), "v_proj": (hidden, hidden)},
            proj={"out_proj": (hidden, hidden)},
            fc1={"fc1": (hidden, vision.ffn_hidden_size)},
            fc2={"fc2": (vision.ffn_hidden_size, hidden)},
            rank=model.lora.rank if model.lora else 0,
            adapted=model.lora.vision_targets if model.lora else (),
        )


def _projector(model: ModelConfig, work: Work) -> Iterator[_Step]:
    features = work.tiles * model.tile_tokens
    projector, hidden = model.projector, model.language.hidden_size
    prefix = "vision_projection.encoder"
    if projector.norm_epsilon is not None:
        yield [[("vision_projection.norm.weight", 0)]]
    if projector.kind == "linear":
        yield [[(f"{prefix}.weight", 2 * features * projector.input_size * hidden)]]
    else:
        yield [[(f"{prefix}.linear_fc1.weight", 2 * features * projector.input_size * hidden)]]
        yield [[(f"{prefix}.linear_fc2.weight", 2 * features * hidden * hidden)]]


def _language(model: ModelConfig, work: Work) -> Iterator[_Step]:
    language = model.language
    hidden, ffn = language.hidden_size, language.ffn_hidden_size
    query = language.num_attention_heads * language.head_dim
    key = language.num_key_value_heads * language.head_dim
    embedding = "language_model.embedding.word_embeddings.weight"
    yield [[(embedding, 0)]]
    for number in range(language.num_layers):
        yield from _layer(
            f"language_model.decoder.layers.{number}",
            tokens=work.tokens,
            pairs=work.attention_pairs,
            qkv={"q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key)},
            proj={"o_proj": (query, hidden)},
            fc1={"gate_proj": (hidden, ffn), "up_proj": (hidden, ffn)},
            fc2={"down_proj": (ffn, hidden)},
            rank=model.lora.rank if model.lora else 0,
            adapted=model.lora.language_targets if model.lora else (),
            experts=language.num_experts,
            experts_per_token=language.experts_per_token,
        )
    output = embedding if language.tie_word_embeddings else "language_model.output_layer.weight"
    yield [[(output, 2 * work.trained_tokens * hidden * language.vocab_size)]]


_Projections = Dict[str, Tuple[int, int]]  # Hugging Face's name: input and output features


def _layer(
    prefix: str,
    tokens: int,
    pairs: int,
    qkv: _Projections,
    proj: _Projections,
    fc1: _Projections,
    fc2: _Projections,
    rank: int,
    adapted: Sequence[str],
    experts: Optional[int] = None,
    experts_per_token: Optional[int] = None,
) -> Iterator[_Step]:
    """One block. Norms have no products, but gradients have to reach those that are trained."""

    def linear(name: str, projections: _Projections) -> _Step:
        whole = sum(2 * tokens * inputs * outputs for inputs, outputs in projections.values())
        adapters = [
            [
                (f"{prefix}.{name}.adapters.{projection}.lora_A.weight", 2 * tokens * inputs * rank),
                (f"{prefix}.{name}.adapters.{projection}.lora_B.weight", 2 * tokens * rank * outputs),
            ]
            for projection, (inputs, outputs) in projections.items()
            if projection in adapted
        ]
        return [[(f"{prefix}.{name}.weight", whole)], *adapters]

    yield [[(f"{prefix}.self_attention.linear_qkv.layer_norm_weight", 0)]]
    yield linear("self_attention.linear_qkv", qkv)
    yield [[(None, 4 * pairs * qkv["q_proj"][1])]]  # queries with keys, then weights with values
    yield linear("self_attention.linear_proj", proj)
    if experts is not None and experts_per_token is not None:
        yield [[(f"{prefix}.pre_mlp_layernorm.weight", 0)]]
        hidden, ffn = fc1["gate_proj"]
        router = [(f"{prefix}.{ROUTER}", 2 * tokens * hidden * experts)]
        yield [router, *_experts(prefix, experts, tokens * experts_per_token, hidden, ffn)]
        return
    yield [[(f"{prefix}.mlp.linear_fc1.layer_norm_weight", 0)]]
    yield linear("mlp.linear_fc1", fc1)
    yield linear("mlp.linear_fc2", fc2)


def _experts(prefix: str, count: int, tokens: int, hidden: int, ffn: int) -> Iterator[Sequence[_Product]]:
    """All experts, as if each worked on as many tokens: together it makes no difference."""
    for number in range(count):
        share = (tokens + number) // count
        names = (f"{prefix}.{expert_weight(number, linear)}" for linear in ("linear_fc1", "linear_fc2"))
        yield list(zip(names, (4 * share * hidden * ffn, 2 * share * ffn * hidden)))
