"""Every parameter of a model by its name in checkpoints, and how large each rank's part of it is.

Read off the description of each part, without torch, so that the launcher can count what a run holds before
any rank starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Iterator, List, Sequence

from megatron_vlm.architecture.decoder import decoder_layers
from megatron_vlm.architecture.layers import Layer, weights_of
from megatron_vlm.architecture.model import ModelConfig, padded_vocab_size
from megatron_vlm.architecture.parts import encoder_block, encoder_embedding, projector_layers
from megatron_vlm.architecture.train_modules import LANGUAGE, PROJECTOR, VISION

EMBEDDING = f"{LANGUAGE}embedding.word_embeddings.weight"
OUTPUT_LAYER = f"{LANGUAGE}output_layer.weight"
PROJECTOR_NORM = f"{PROJECTOR}norm.weight"


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
    """Return the parameters of each pipeline stage, on one tensor parallel rank.

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
    stages[0] = [
        *_vision(model, tp),
        *_parameters(projector_layers(model), PROJECTOR, tp),
        Parameter(EMBEDDING, table),
        *stages[0],
    ]
    stages[-1].append(Parameter(f"{LANGUAGE}decoder.final_layernorm.weight", model.language.hidden_size))
    if not model.language.tie_word_embeddings:
        stages[-1].append(Parameter(OUTPUT_LAYER, table))
    elif len(stages) > 1:
        stages[-1].append(Parameter(EMBEDDING, table))
    return stages


def _vision(model: ModelConfig, tp: int) -> Iterator[Parameter]:
    yield from _parameters(encoder_embedding(model), VISION, tp)
    for number in range(model.num_vision_layers_run):
        yield from _parameters(encoder_block(model), f"{VISION}decoder.layers.{number}.", tp)


def _language_layers(model: ModelConfig, tp: int, numbers: Sequence[int]) -> Iterator[Parameter]:
    for number in numbers:
        yield from _parameters(
            decoder_layers(model.language, model.lora), f"{LANGUAGE}decoder.layers.{number}.", tp
        )


def _parameters(layers: Iterable[Layer], prefix: str, tp: int) -> Iterator[Parameter]:
    for weight in weights_of(layers, prefix):
        yield Parameter(weight.name, weight.size(tp))
