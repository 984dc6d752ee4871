"""Vision transformers over patches, as CLIP's and SigLIP's towers are, on megatron-core's parallel layers."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.architecture.layers import weights_of
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.parts import encoder_embedding
from megatron_vlm.models.lora import VISION_PROJECTIONS, add_adapters
from megatron_vlm.models.recompute import ask_for_gradient
from megatron_vlm.models.specs import layer_spec, standalone_norm


class VisionTower(CLIPViTModel):
    """A vision tower, which turns images into patch features.

    Equals ``hidden_states[vision_feature_layer]`` of transformers' ``CLIPVisionModel`` and
    ``SiglipVisionModel``, the class token dropped where the strategy says so. Blocks after the last
    layer that features are taken from aren't built: a checkpoint carries them for export.

    The tower stands whole on the first pipeline stage, cut by tensor parallelism only.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, impl: str, like: str) -> None:
        """Build the tower; its weights are not set.

        Args:
            like: ``clip`` with a norm before the first block, or ``siglip`` without.
        """
        vision = model.vision
        described = {weight.name for weight in weights_of(encoder_embedding(model))}
        spec = layer_spec(impl, causal=False, output_bias=True)
        if model.lora is not None:
            add_adapters([spec], VISION_PROJECTIONS, model.lora.vision_targets, model.lora)
        super().__init__(
            transformer_config=config,
            transformer_layer_spec=spec,
            ln_pre_impl=standalone_norm(impl),
            ln_post_impl=standalone_norm(impl),
            add_class_token=vision.prefix_tokens > 0,
            class_token_len=vision.prefix_tokens,
            patch_dim=vision.patch_size,
            # A last strip that is narrower than a patch is dropped, as the convolution drops it.
            img_h=vision.image_size // vision.patch_size * vision.patch_size,
            img_w=vision.image_size // vision.patch_size * vision.patch_size,
            model_subtype=like,
        )
        # LLaVA takes features before SigLIP's norm, which CLIPViTModel applies.
        self.ln_post = None
        factory = dict(device=self.position_ids.device, dtype=config.params_dtype)
        self.conv1 = torch.nn.Conv2d(
            vision.num_channels,
            vision.hidden_size,
            kernel_size=vision.patch_size,
            stride=vision.patch_size,
            bias="conv1.bias" in described,
            **factory,
        )
        self.position_embeddings.to(**factory)
        if vision.prefix_tokens:
            self.class_token.data = self.class_token.data.to(**factory)
        self.feature_layers = model.feature_layers
        self.drop_first = model.feature_strategy == "default"

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode images.

        Args:
            x: normalised pixels ``[tiles, channels, height, width]``.

        Returns:
            ``[tiles, ModelConfig.tile_tokens, hidden_size * number of feature layers]``.
        """
        x = self.conv1(x).flatten(2).transpose(1, 2)  # [n, c, h, w] -> [n, patches, hidden]
        x = self.add_prefix(x) + self.position_embeddings(self.position_ids)
        if self.ln_pre is not None:
            x = self.ln_pre(x)
        x = x.transpose(0, 1).contiguous()  # [n, positions, hidden] -> [positions, n, hidden]
        x = ask_for_gradient(x, self)
        recomputed = self.config.recompute_num_layers if self.training and x.requires_grad else 0
        states = {0: x}
        for number, layer in enumerate(self.decoder.layers, start=1):
            if number <= (recomputed or 0):
                x, _ = tensor_parallel.checkpoint(layer, False, x)
            else:
                x, _ = layer(hidden_states=x, attention_mask=None)
            if number in self.feature_layers:
                states[number] = x
        features = torch.cat([states[number] for number in self.feature_layers], dim=-1)
        if self.drop_first:
            features = features[1:]
        return features.transpose(0, 1)

    def add_prefix(self, patches: Tensor) -> Tensor:
        """Return patches, ``[n, patches, hidden]``, behind what stands in front of them: the class token."""
        if not self.add_class_token:
            return patches
        return torch.cat([self.class_token.expand(patches.shape[0], -1, -1), patches], dim=1)
