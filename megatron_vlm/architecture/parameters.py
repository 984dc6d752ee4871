"""Every parameter of a model by its name in checkpoints, and how large each rank's part of it is.

Known without torch, so that the launcher can count what a run holds before any rank starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, List, Sequence, Tuple

from megatron_vlm.architecture.language import LanguageConfig
from megatron_vlm.architecture.model import ModelConfig, VisionConfig, padded_vocab_size
from megatron_vlm.architecture.train_modules import LANGUAGE, PROJECTOR, VISION

EMBEDDING = f"{LANGUAGE}embedding.word_embeddings.weight"
OUTPUT_LAYER = f"{LANGUAGE}output_layer.weight"
IMAGE_NEWLINE = f"{PROJECTOR}image_newline"
PROJECTOR_NORM = f"{PROJECTOR}norm.weight"
ROUTER = "mlp.router.weight"  # in a layer


def expert_weight(number: int, linear: str) -> str:
    """The name, in a layer, of an expert's weight."""
    return f"mlp.experts.local_experts.{number}.{linear}.weight"


@dataclass(frozen=True)
class Parameter:
    """One rank's part of a parameter.

    Attributes:
        size: elements on a rank.
    """

    name: str
    size: int


def stage_parameters(
    model: ModelConfig, tp: int, layers: Sequence[int], vocab_divisible_by: int = 128
) -> List[List[Parameter]]:
    """The parameters of each pipeline stage, on one tensor parallel rank.

    Tied embeddings stand on the first stage and, where that is another one, on the last stage too.

    Args:
        layers: of the language model on each stage, in the order of the model (see :mod:`.pipeline`).
    """
    rows = padded_vocab_size(model.language.vocab_size, tp, vocab_divisible_by) // tp
    table = rows * model.language.hidden_size
    stages: List[List[Parameter]] = []
    start = 0
    for count in layers:
        numbers = range(start, start + count)
        stages.append([*_language_layers(model, tp, numbers)])
        start += count
    stages[0] = [*_vision(model, tp), *_projector(model, tp), Parameter(EMBEDDING, table), *stages[0]]
    stages[-1].append(Parameter(f"{LANGUAGE}decoder.final_layernorm.weight", model.language.hidden_size))
    if not model.language.tie_word_embeddings:
        stages[-1].append(Parameter(OUTPUT_LAYER, table))
    elif len(stages) > 1:
        stages[-1].append(Parameter(EMBEDDING, table))
    return stages


def _vision(model: ModelConfig, tp: int) -> Iterator[Parameter]:
    vision = model.vision
    hidden = vision.hidden_size
    if vision.has_class_token:
        yield Parameter(f"{VISION}class_token", hidden)
        yield Parameter(f"{VISION}ln_pre.weight", hidden)
        yield Parameter(f"{VISION}ln_pre.bias", hidden)
    else:
        yield Parameter(f"{VISION}conv1.bias", hidden)
    yield Parameter(f"{VISION}conv1.weight", hidden * vision.num_channels * vision.patch_size**2)
    yield Parameter(f"{VISION}position_embeddings.weight", vision.sequence_length * hidden)
    layer = [*_vision_layer(vision, tp)]
    if model.lora is not None:
        for projection in model.lora.vision_targets:
            layer += _adapter(_vision_linear(vision, projection), projection, model.lora.rank, tp)
    for number in range(model.num_vision_layers_run):
        for suffix, size in layer:
            yield Parameter(f"{VISION}decoder.layers.{number}.{suffix}", size)


def _vision_layer(vision: VisionConfig, tp: int) -> Iterator[Tuple[str, int]]:
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    for place in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        yield f"{place}.layer_norm_weight", hidden
        yield f"{place}.layer_norm_bias", hidden
    yield "self_attention.linear_qkv.weight", 3 * hidden * hidden // tp
    yield "self_attention.linear_qkv.bias", 3 * hidden // tp
    yield "self_attention.linear_proj.weight", hidden * hidden // tp
    yield "self_attention.linear_proj.bias", hidden
    yield "mlp.linear_fc1.weight", hidden * ffn // tp
    yield "mlp.linear_fc1.bias", ffn // tp
    yield "mlp.linear_fc2.weight", hidden * ffn // tp
    yield "mlp.linear_fc2.bias", hidden


def _projector(model: ModelConfig, tp: int) -> Iterator[Parameter]:
    projector, hidden = model.projector, model.language.hidden_size
    if model.anyres is not None:
        yield Parameter(IMAGE_NEWLINE, hidden)
    if projector.norm_epsilon is not None:
        yield Parameter(PROJECTOR_NORM, projector.input_size)
        yield Parameter(f"{PROJECTOR}norm.bias", projector.input_size)
    prefix = f"{PROJECTOR}encoder"
    first = prefix if projector.kind == "linear" else f"{prefix}.linear_fc1"
    yield Parameter(f"{first}.weight", projector.input_size * hidden // tp)
    if projector.bias:
        yield Parameter(f"{first}.bias", hidden // tp)
    if projector.kind != "linear":
        yield Parameter(f"{prefix}.linear_fc2.weight", hidden * hidden // tp)
        if projector.bias:
            yield Parameter(f"{prefix}.linear_fc2.bias", hidden)


def _language_layers(model: ModelConfig, tp: int, numbers: Sequence[int]) -> Iterator[Parameter]:
    layer = [*_language_layer(model.language, tp)]
    if model.lora is not None:
        for projection in model.lora.language_targets:
            layer += _adapter(_language_linear(model.language, projection), projection, model.lora.rank, tp)
    for number in numbers:
        for suffix, size in layer:
            yield Parameter(f"{LANGUAGE}decoder.layers.{number}.{suffix}", size)


def _language_layer(language: LanguageConfig, tp: int) -> Iterator[Tuple[str, int]]:
    hidden, ffn = language.hidden_size, language.ffn_hidden_size
    query = language.num_attention_heads * language.head_dim
    fused = query + 2 * language.num_key_value_heads * language.head_dim
    yield "self_attention.linear_qkv.layer_norm_weight", hidden
    yield "self_attention.linear_qkv.weight", hidden * fused // tp
    if language.qkv_bias:
        yield "self_attention.linear_qkv.bias", fused // tp
    if language.qk_norm:
        yield "self_attention.q_layernorm.weight", language.head_dim
        yield "self_attention.k_layernorm.weight", language.head_dim
    yield "self_attention.linear_proj.weight", hidden * query // tp
    if language.attention_output_bias:
        yield "self_attention.linear_proj.bias", hidden
    if language.num_experts is not None:
        yield "pre_mlp_layernorm.weight", hidden
        yield ROUTER, language.num_experts * hidden
        for number in range(language.num_experts):
            yield expert_weight(number, "linear_fc1"), 2 * hidden * ffn // tp
            yield expert_weight(number, "linear_fc2"), hidden * ffn // tp
        return
    yield "mlp.linear_fc1.layer_norm_weight", hidden
    yield "mlp.linear_fc1.weight", 2 * hidden * ffn // tp
    yield "mlp.linear_fc2.weight", hidden * ffn // tp
    if language.mlp_bias:
        yield "mlp.linear_fc1.bias", 2 * ffn // tp
        yield "mlp.linear_fc2.bias", hidden


_Linear = Tuple[str, int, int, bool]  # name; input and output features; cut along its output


def _vision_linear(vision: VisionConfig, projection: str) -> _Linear:
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    if projection == "fc1":
        return "mlp.linear_fc1", hidden, ffn, True
    if projection == "fc2":
        return "mlp.linear_fc2", ffn, hidden, False
    if projection == "out_proj":
        return "self_attention.linear_proj", hidden, hidden, False
    return "self_attention.linear_qkv", hidden, hidden, True


def _language_linear(language: LanguageConfig, projection: str) -> _Linear:
    hidden, ffn = language.hidden_size, language.ffn_hidden_size
    query = language.num_attention_heads * language.head_dim
    if projection in ("gate_proj", "up_proj"):
        return "mlp.linear_fc1", hidden, ffn, True
    if projection == "down_proj":
        return "mlp.linear_fc2", ffn, hidden, False
    if projection == "o_proj":
        return "self_attention.linear_proj", query, hidden, False
    output = query if projection == "q_proj" else language.num_key_value_heads * language.head_dim
    return "self_attention.linear_qkv", hidden, output, True


def _adapter(linear: _Linear, projection: str, rank: int, tp: int) -> Iterator[Tuple[str, int]]:
    """B is cut where the linear's output is, A where its input is; the other is whole on every rank."""
    name, inputs, outputs, by_output = linear
    prefix = f"{name}.adapters.{projection}"
    yield f"{prefix}.lora_A.weight", rank * inputs // (1 if by_output else tp)
    yield f"{prefix}.lora_B.weight", rank * outputs // (tp if by_output else 1)
