"""The kinds of encoders and connectors, each described in a file of its own under that folder."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Dict, Iterator

from megatron_vlm.architecture import connectors, encoders
from megatron_vlm.architecture.layers import Layer, norm, vector
from megatron_vlm.architecture.model import ModelConfig


def _listed(package: ModuleType) -> Dict[str, ModuleType]:
    """Return the modules of a package that describe a kind, by its name: their ``KIND``."""
    names = [found.name for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    modules = [importlib.import_module(name) for name in sorted(names)]
    return {module.KIND: module for module in modules if hasattr(module, "KIND")}


# By VisionConfig.family: embedding_layers(model) and block_layers(model) yield an encoder's layers.
ENCODERS = _listed(encoders)
# By ProjectorConfig.kind: connector_layers(model) yields the layers between encoder and language model.
CONNECTORS = _listed(connectors)


def projector_layers(model: ModelConfig) -> Iterator[Layer]:
    """Yield the connector's layers, the norm before them, and the vector that ends rows of cut images."""
    projector = model.projector
    if projector.norm_epsilon is not None:
        yield norm("norm.", projector.input_size, bias=True)
    yield from CONNECTORS[projector.kind].connector_layers(model)
    if model.anyres is not None:
        yield vector("image_newline", model.language.hidden_size)
