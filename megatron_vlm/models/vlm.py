"""The vision-language model: tower, projector and language model as one pipeline stage sees them."""

from __future__ import annotations

import os

from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.models.cache import KeyValueCache
from megatron_vlm.models.language import LanguageModel
from megatron_vlm.models.loss import LossParts
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.projector import Projector
from megatron_vlm.models.recompute import ask_for_gradient, let_mlps_be_recomputed
from megatron_vlm.models.specs import choose_transformer_impl
from megatron_vlm.models.tiles import FeatureIndex
from megatron_vlm.models.transformer_configs import TransformerConfigs, transformer_configs
from megatron_vlm.models.vision import VisionTower
from megatron_vlm.parallel import Layout
from megatron_vlm.parallel.fused import accumulate_weight_gradients
from megatron_vlm.system.transformer_engine import check_kernel_switches


class VisionLanguageModel(MegatronModule):
    """A LLaVA model, or the part of it that one pipeline stage holds: a model chunk.

    The first stage holds tower, projector and token embedding; every stage its share of the language
    model's layers; the last one the output layer and the loss. Equals transformers'
    ``LlavaForConditionalGeneration``; parts are named as in Megatron-LM's ``LLaVAModel``.
    """

    def __init__(
        self,
        model: ModelConfig,
        configs: TransformerConfigs,
        layout: Layout,
        impl: str,
        vocab_divisible_by: int = 128,
        chunk: int = 0,
    ) -> None:
        """
        Args:
            chunk: number of this stage among those of this pipeline rank.
        """
        super().__init__(config=configs.language)
        self.model_type = ModelType.encoder_or_decoder  # megatron-core's schedules ask for it
        self.vp_stage = chunk
        self.pre_process = layout.is_first_stage and chunk == 0
        self.post_process = layout.is_last_stage and chunk == layout.vpp - 1
        self.share_embeddings_and_output_weights = model.language.tie_word_embeddings
        self.model_config = model
        if self.pre_process:
            self.vision_model = VisionTower(model, configs.vision, impl)
            self.vision_projection = Projector(model, configs.projector, impl)
        self.language_model = LanguageModel(
            model.language, configs.language, layout, impl, vocab_divisible_by, model.lora, chunk
        )
        if configs.language.recompute_granularity == "selective":
            let_mlps_be_recomputed(self)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_positions: Tensor | None = None,
        labels: Tensor | None = None,
        trained: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        feature_index: FeatureIndex | None = None,
        loss_parts: LossParts | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            input_ids: ``[b, s]``; every image holds ``ModelConfig.count_tokens`` placeholders.
            pixel_values: ``[tiles, channels, height, width]``, normalised, in the order of their
                placeholders. Read on the first stage only.
            image_positions: ``[2, features]``: batch and sequence index of each feature's placeholder, as
                :func:`find_image_positions` makes them.
            labels: ``[b, s]``, the token to be predicted at each position.
            trained: where there are labels, the positions that are trained, as
                :func:`~megatron_vlm.models.loss.find_trained` makes them.
            packed_seq_params: on every stage, where ``b`` is 1 and ``s`` holds several samples: where
                they begin, as :func:`~megatron_vlm.models.packing.boundaries` makes it.
            feature_index: of :func:`index_features`, where images are cut into tiles.
            loss_parts: on the last stage, takes the losses of a mixture's datasets.

        Returns:
            On the last stage the summed loss of the trained tokens, a scalar in float32, or without
            labels this tensor parallel rank's logits ``[b, s, padded vocabulary / tp]``; on the others
            the hidden states ``[s, b, hidden]`` (``s / tp`` with sequence parallelism).
        """
        embeddings = None
        if self.pre_process:
            embeddings = self.embed(input_ids, pixel_values, image_positions, feature_index)
            embeddings = ask_for_gradient(embeddings, self.language_model)
        return self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=embeddings,
            labels=labels,
            trained=trained,
            packed_seq_params=packed_seq_params,
            loss_parts=loss_parts,
        )

    def next_token_logits(
        self,
        input_ids: Tensor,
        cache: KeyValueCache,
        pixel_values: Tensor | None = None,
        image_positions: Tensor | None = None,
        feature_index: FeatureIndex | None = None,
    ) -> Tensor:
        """Run this stage while generating: the prompts in the first pass, one token of each after that.

        Args:
            input_ids: ``[b, s]``, prompts padded on the right, or ``[b, 1]``.
            cache: of the batch; the caller tells it when the next pass begins.
            pixel_values, image_positions, feature_index: as for :meth:`forward`, in the first pass.

        Returns:
            On the last stage the logits of each sequence's next token, ``[b, vocabulary]`` in float32;
            on the others the hidden states ``[s, b, hidden]``.
        """
        embeddings = None
        if self.pre_process:
            embeddings = self.embed(input_ids, pixel_values, image_positions, feature_index)
        return self.language_model.next_token_logits(embeddings, cache)

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_positions: Tensor | None,
        feature_index: FeatureIndex | None = None,
    ) -> Tensor:
        """Token embeddings with image features at the placeholders, ``[s, b, hidden]``."""
        embeddings = self.language_model.embedding(input_ids=input_ids, position_ids=None)
        if pixel_values is not None and pixel_values.shape[0] > 0:
            assert image_positions is not None
            features = self.vision_projection(self.vision_model(pixel_values), feature_index)
            batch_index, sequence_index = image_positions
            embeddings = embeddings.index_put((sequence_index, batch_index), features.to(embeddings.dtype))
        elif any(
            p.requires_grad for m in (self.vision_model, self.vision_projection) for p in m.parameters()
        ):
            # Without images this rank would skip the gradients that the others reduce, and with
            # nothing else to train its output would have no gradient at all to receive.
            vision = self.model_config.vision
            blank = embeddings.new_zeros(1, vision.num_channels, vision.image_size, vision.image_size)
            unused = self.vision_projection(self.vision_model(blank)).sum()
            if self.model_config.anyres is not None:
                unused = unused + self.vision_projection.image_newline.sum()
            embeddings = embeddings + 0.0 * unused
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
        return embeddings

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the hidden states that the previous stage sent (called by the schedules)."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The weight that first and last stage share when embeddings are tied."""
        return self.language_model.shared_embedding_or_output_weight()


def find_image_positions(
    input_ids: Tensor, num_images: int, model: ModelConfig, index: FeatureIndex | None = None
) -> Tensor:
    """Where the features of a batch's images go.

    Args:
        input_ids: ``[b, s]``, best on the CPU: the result's size depends on the data.
        num_images: images of the batch.
        index: of :func:`index_features`, where images are cut into tiles.

    Returns:
        int64 ``[2, features]``: batch and sequence indices of their placeholders: row by row, or in the order
        of ``index``.

    Raises:
        ValueError: placeholders and image features differ in number.
    """
    positions = (input_ids == model.image_token_id).nonzero().t().contiguous()
    expected = num_images * model.tile_tokens if index is None else len(index.places)
    if positions.shape[1] != expected:
        each = "with" if index is not None else f"x {model.tile_tokens} features ="
        raise ValueError(
            f"{positions.shape[1]} image tokens in the text but {num_images} images {each} {expected}; the "
            f"tokenizer and the model must agree on the image token ({model.image_token_id}) and on its "
            "count per image"
        )
    return positions if index is None else positions[:, index.places]


def build_model(
    model: ModelConfig, layout: Layout, options: ModelOptions = ModelOptions()
) -> list[VisionLanguageModel]:
    """Return this rank's chunks of the model, on the layout's device, with weights not yet set.

    One chunk, unless pipeline stages are interleaved.

    Raises:
        ValueError: the layer spec is not to be had here, or FP8 is wanted and it is not Transformer Engine's.
    """
    check_kernel_switches(os.environ)
    wanted = options.impl or ("transformer_engine" if options.fp8 is not None else None)
    impl = choose_transformer_impl(layout.device.type, wanted, options.dtype)
    configs = transformer_configs(model, layout, options, fused_rope=impl == "transformer_engine")
    chunks = [
        VisionLanguageModel(model, configs, layout, impl, options.vocab_divisible_by, chunk).to(layout.device)
        for chunk in range(layout.vpp)
    ]
    if impl == "transformer_engine":
        for chunk in chunks:
            accumulate_weight_gradients(chunk)
    return chunks
