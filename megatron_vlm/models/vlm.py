"""The vision-language model: tower, projector and language model as one pipeline stage sees them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.models.cache import KeyValueCache
from megatron_vlm.models.language import LanguageModel
from megatron_vlm.models.loss import LossParts
from megatron_vlm.models.modalities.base import Modality, Placed
from megatron_vlm.models.modalities.table import modalities_of
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.recompute import ask_for_gradient, let_mlps_be_recomputed
from megatron_vlm.models.specs import choose_transformer_impl
from megatron_vlm.models.transformer_configs import TransformerConfigs, transformer_configs
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
        self.modalities = modalities_of(model)
        for modality in self.modalities.values() if self.pre_process else ():
            for name, module in modality.build(configs, impl).items():
                self.add_module(name, module)
        self.language_model = LanguageModel(
            model.language, configs.language, layout, impl, vocab_divisible_by, model.lora, chunk
        )
        if configs.language.recompute_granularity == "selective":
            let_mlps_be_recomputed(self)

    def forward(
        self,
        input_ids: Tensor,
        media: Mapping[str, Placed] | None = None,
        labels: Tensor | None = None,
        trained: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        loss_parts: LossParts | None = None,
        position_ids: Tensor | None = None,
        taps: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Run the forward pass of this pipeline stage.

        Args:
            input_ids: ``[b, s]``; every item of the media holds as many placeholders as it has features.
            media: by kind, on the first stage; as
                :func:`~megatron_vlm.models.modalities.table.place_media` places them.
            labels: ``[b, s]``, the token to be predicted at each position.
            trained: where there are labels, the positions that are trained, as
                :func:`~megatron_vlm.models.loss.find_trained` makes them.
            packed_seq_params: on every stage, where ``b`` is 1 and ``s`` holds several samples: where
                they begin, as :func:`~megatron_vlm.models.packing.boundaries` makes it.
            loss_parts: on the last stage, takes the losses of a mixture's datasets.
            position_ids: ``[b, s]`` or ``[3, b, s]``; None: a token's position is its index in its sample,
                which is all that rotary embeddings of today's models know.
            taps: what the language model's layers take beside the hidden states; None for nothing.

        Returns:
            On the last stage the summed loss of the trained tokens, a scalar in float32, or without
            labels this tensor parallel rank's logits ``[b, s, padded vocabulary / tp]``; on the others
            the hidden states ``[s, b, hidden]`` (``s / tp`` with sequence parallelism).

        Raises:
            ValueError: there are ``position_ids`` that the language model would not read.
        """
        if position_ids is not None:  # megatron-core would leave them unread
            raise ValueError("the language model's positions are indices; it takes no position_ids")
        embeddings = None
        if self.pre_process:
            embeddings = self.embed(input_ids, media or {})
            embeddings = ask_for_gradient(embeddings, self.language_model)
        return self.language_model(
            input_ids=None,
            position_ids=position_ids,
            attention_mask=None,
            decoder_input=embeddings,
            labels=labels,
            trained=trained,
            packed_seq_params=packed_seq_params,
            extra_block_kwargs=taps,
            loss_parts=loss_parts,
        )

    def next_token_logits(
        self, input_ids: Tensor, cache: KeyValueCache, media: Mapping[str, Placed] | None = None
    ) -> Tensor:
        """Run this stage while generating: the prompts in the first pass, one token of each after that.

        Args:
            input_ids: ``[b, s]``, prompts padded on the right, or ``[b, 1]``.
            cache: of the batch; the caller tells it when the next pass begins.
            media: as for :meth:`forward`, in the first pass.

        Returns:
            On the last stage the logits of each sequence's next token, ``[b, vocabulary]`` in float32;
            on the others the hidden states ``[s, b, hidden]``.
        """
        embeddings = None
        if self.pre_process:
            embeddings = self.embed(input_ids, media or {})
        return self.language_model.next_token_logits(embeddings, cache)

    def embed(self, input_ids: Tensor, media: Mapping[str, Placed]) -> Tensor:
        """Return token embeddings with the media's features at their placeholders, ``[s, b, hidden]``."""
        embeddings = self.language_model.embedding(input_ids=input_ids, position_ids=None)
        for kind, modality in self.modalities.items():
            if kind in media:
                own = media[kind]
                features = modality.encode(self, own.inputs, own.index)
                batch_index, sequence_index = own.positions
                embeddings = embeddings.index_put(
                    (sequence_index, batch_index), features.to(embeddings.dtype)
                )
            elif self._trains(modality):
                # Without such media this rank would skip the gradients that the others reduce, and with
                # nothing else to train its output would have no gradient at all to receive.
                embeddings = embeddings + 0.0 * modality.unused(self, embeddings)
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
        return embeddings

    def _trains(self, modality: Modality) -> bool:
        return any(p.requires_grad for name in modality.modules for p in getattr(self, name).parameters())

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the hidden states that the previous stage sent (called by the schedules)."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return the weight that first and last stage share when embeddings are tied."""
        return self.language_model.shared_embedding_or_output_weight()


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
