"""The layers of each part of a model, as the kinds of its encoder and connector describe them."""

from __future__ import annotations

from typing import Iterator

from megatron_vlm.architecture.connectors import CONNECTORS
from megatron_vlm.architecture.encoders import ENCODERS
from megatron_vlm.architecture.layers import Layer, norm, vector
from megatron_vlm.architecture.model import ModelConfig


def encoder_embedding(model: ModelConfig) -> Iterator[Layer]:
    """Yield the layers that turn an encoder's input into its first block's."""
    yield from ENCODERS[model.vision.family].embedding_layers(model.vision)


def encoder_block(model: ModelConfig) -> Iterator[Layer]:
    """Yield the layers of one of the encoder's blocks, which are all alike."""
    yield from ENCODERS[model.vision.family].block_layers(model.vision, model.lora)


def connector(model: ModelConfig) -> Iterator[Layer]:
    """Yield the layers that make the encoder's features the language model's."""
    yield from CONNECTORS[model.projector.kind].connector_layers(model.projector, model.language.hidden_size)


def projector_layers(model: ModelConfig) -> Iterator[Layer]:
    """Yield the connector's layers, the norm before them, and the vector that ends rows of cut images."""
    projector = model.projector
    if projector.norm_epsilon is not None:
        yield norm("norm.", projector.input_size, bias=True)
    yield from connector(model)
    if model.anyres is not None:
        yield vector("image_newline", model.language.hidden_size)
