"""Images in a model: through the vision tower and the projector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.models.connectors.tiles import index_features
from megatron_vlm.models.encoders import BUILD_ENCODER
from megatron_vlm.models.modalities.base import FeatureOrder, Modality
from megatron_vlm.models.projector import Projector
from megatron_vlm.models.transformer_configs import TransformerConfigs


@dataclass(frozen=True)
class Images(Modality):
    """Images, each of one tile or cut into several; ``pixel_values`` ``[tiles, c, h, w]`` are normalised."""

    kind = IMAGE.name
    modules = ("vision_model", "vision_projection")

    model: ModelConfig

    @classmethod
    def of(cls, model: ModelConfig) -> Images:
        """Return the images of any model: all have a tower."""
        return cls(model)

    @property
    def token_id(self) -> int:  # type: ignore[override]
        """The image token."""
        return self.model.image_token_id

    def build(self, configs: TransformerConfigs, impl: str) -> dict[str, nn.Module]:
        """Return tower and projector."""
        tower = BUILD_ENCODER[self.model.vision.family](self.model, configs.vision, impl)
        return dict(zip(self.modules, (tower, Projector(self.model, configs.projector, impl)), strict=True))

    def order(self, sizes: Tensor) -> FeatureOrder:
        """Return the tiles' features one after the other, or as :func:`index_features` if images are cut."""
        index = index_features(sizes, self.model)
        if index is None:
            tokens = self.model.tile_tokens
            return FeatureOrder(len(sizes) * tokens, made_of=f"x {tokens} features =")
        return FeatureOrder(len(index.places), index, index.places)

    def encode(self, modules: nn.Module, inputs: Mapping[str, Tensor], index: Any) -> Tensor:
        """Return the projected features of all images."""
        tower, projector = (modules.get_submodule(name) for name in self.modules)
        features: Tensor = projector(tower(inputs["pixel_values"]), index)
        return features

    def blank(self, like: Tensor) -> dict[str, Tensor]:
        """Return one tile of zeros."""
        vision = self.model.vision
        shape = (1, vision.num_channels, vision.image_size, vision.image_size)
        return {"pixel_values": like.new_zeros(shape)}

    def unused(self, modules: nn.Module, like: Tensor) -> Tensor:
        """Return the sum of a blank tile's features, and of the newline where images are cut."""
        unused = super().unused(modules, like)
        if self.model.anyres is not None:
            unused = unused + modules.get_parameter("vision_projection.image_newline").sum()
        return unused
