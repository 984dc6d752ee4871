"""A kind of media that no model has: rows of five numbers, from a JSON file through one linear layer.

Only what a new kind has to describe stands here; nothing of the library knows of it. Nothing here imports
transformers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor, nn

from megatron_vlm import parallel
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import HF_FOLDER, read_manifest
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.media.base import ItemSize, MediaReader, ReaderSettings
from megatron_vlm.data.media.kinds import KINDS, Kind
from megatron_vlm.data.media.readers import READERS
from megatron_vlm.data.templates import SampleError
from megatron_vlm.models.modalities.base import FeatureOrder, Modality
from megatron_vlm.models.modalities.table import MODALITIES
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.transformer_configs import TransformerConfigs
from megatron_vlm.models.vlm import build_model
from megatron_vlm.models.weights import load_sharded, named_parameters, sharded_weights
from megatron_vlm.training.checkpoint import RunState, save_checkpoint
from tests.workers import train

VECTOR = Kind("vector", field="vectors", marker="<numbers>")
TOKEN = "<vector>"
TOKEN_ID = 421  # in the tokenizer of the tests
WIDTH = 5


@dataclass(frozen=True)
class VectorReader(MediaReader):
    """The reader of ``[[...], ...]``, a token for each row; an item's size is its number of rows."""

    kind = VECTOR

    token_id: int
    token: str = TOKEN

    @classmethod
    def load(cls, settings: ReaderSettings) -> VectorReader:
        token_id = settings.tokenizer.convert_tokens_to_ids(TOKEN)
        assert token_id == TOKEN_ID, token_id
        return cls(token_id)

    def open(self, files: Sequence[bytes | Path]) -> list[Any]:
        try:
            return [json.loads(file if isinstance(file, bytes) else file.read_bytes()) for file in files]
        except ValueError as error:
            raise SampleError(f"its vector can't be read ({error})", kind="corrupt") from None

    def sizes(self, opened: Sequence[Any]) -> list[ItemSize]:
        return [(len(item),) for item in opened]

    def count_tokens(self, size: ItemSize) -> int:
        return size[0]

    def decode(self, opened: Sequence[Any]) -> dict[str, Tensor]:
        return {"values": torch.tensor([row for item in opened for row in item], dtype=torch.float64)}

    def finish(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"values": tensors["values"].to(dtype)}


@dataclass(frozen=True)
class Vectors(Modality):
    """The identity as encoder, and a linear connector that is cut by tensor parallelism."""

    kind = VECTOR.name
    modules = ("vector_projection",)

    hidden_size: int
    token_id: int = TOKEN_ID

    @classmethod
    def of(cls, model: ModelConfig) -> Vectors:
        return cls(model.language.hidden_size)

    def build(self, configs: TransformerConfigs, impl: str) -> dict[str, nn.Module]:
        config = configs.projector
        connector = ColumnParallelLinear(
            WIDTH, self.hidden_size, config=config, init_method=config.init_method, gather_output=True
        )
        return {"vector_projection": connector}

    def order(self, sizes: Tensor) -> FeatureOrder:
        return FeatureOrder(int(sizes.sum()))

    def encode(self, modules: nn.Module, inputs: Mapping[str, Tensor], index: Any) -> Tensor:
        features, _ = modules.get_submodule("vector_projection")(inputs["values"])
        return features

    def blank(self, like: Tensor) -> dict[str, Tensor]:
        return {"values": like.new_zeros(1, WIDTH)}


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Within, models and datasets have vectors beside images."""
    with (
        mock.patch.dict(KINDS, vector=VECTOR),
        mock.patch.dict(READERS, vector=VectorReader),
        mock.patch.dict(MODALITIES, vector=Vectors),
    ):
        yield


def begin(argv: list[str], folder: Path) -> None:
    """Write a checkpoint of a model that takes vectors, from one that doesn't; of one rank."""
    with registered():
        config = RunConfig.from_flags(argv)
        layout = parallel.initialize()
        release = Path(str(config.model.megatron_load_dir)) / "release"
        model = ModelConfig.from_dict(read_manifest(release)["model"])
        chunks = build_model(model, layout, ModelOptions())
        entries = sharded_weights(chunks)
        known = {name: entry for name, entry in entries.items() if "vector_projection" not in name}
        assert len(known) == len(entries) - 2
        loaded = load_sharded(release, {"model": known})["model"]
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in named_parameters(chunks):
                drawn = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(loaded.get(name, drawn))
        save_checkpoint(folder, chunks, None, layout, RunState(), config, release / HF_FOLDER, None)


def train_with_vectors(argv: list[str]) -> None:
    """Train a model that takes vectors."""
    with registered():
        train(argv)
