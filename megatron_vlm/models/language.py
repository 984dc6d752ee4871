"""Llama, Mistral, Mixtral, Qwen2 and Qwen3 language models on megatron-core's GPTModel."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.architecture.language import LanguageConfig, RopeScaling
from megatron_vlm.architecture.lora import LoRAConfig
from megatron_vlm.architecture.model import padded_vocab_size
from megatron_vlm.models.cache import KeyValueCache
from megatron_vlm.models.lora import LANGUAGE_PROJECTIONS, add_adapters
from megatron_vlm.models.loss import LossParts, linear_cross_entropy
from megatron_vlm.models.specs import block_spec
from megatron_vlm.parallel import Layout


class LanguageModel(GPTModel):
    """A decoder-only model whose padded vocabulary takes no part in the loss.

    Tensor parallelism pads the vocabulary to equal parts. Columns beyond the real vocabulary are kept
    out of the softmax, so that loss and gradients equal transformers' at every size.
    """

    def __init__(
        self,
        language: LanguageConfig,
        config: TransformerConfig,
        layout: Layout,
        impl: str,
        vocab_divisible_by: int = 128,
        lora: LoRAConfig | None = None,
        chunk: int = 0,
    ) -> None:
        spec = block_spec(
            impl,
            get_num_layers_to_build(config, chunk),
            language.attention_output_bias,
            language.qk_norm,
            experts=language.num_experts is not None,
        )
        if lora is not None:
            add_adapters(spec.layer_specs, LANGUAGE_PROJECTIONS, lora.language_targets, lora)
        super().__init__(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size(language.vocab_size, layout.tp, vocab_divisible_by),
            max_sequence_length=language.max_position_embeddings,
            pre_process=layout.is_first_stage and chunk == 0,
            post_process=layout.is_last_stage and chunk == layout.vpp - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=language.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=language.rope_theta,
            # Image features are placed among the embeddings first; the model scatters the result.
            scatter_embedding_sequence_parallel=False,
            vp_stage=chunk,
        )
        if language.rope_scaling is not None:
            # megatron-core's own argument knows one of the four numbers.
            rope = self.rotary_pos_emb
            rope.inv_freq = scaled_frequencies(rope.inv_freq, language.rope_scaling)
        self.real_vocab_size = language.vocab_size
        self.tp_group = layout.tp_group

    def forward(
        self, *args: Any, trained: Tensor | None = None, loss_parts: LossParts | None = None, **kwargs: Any
    ) -> Tensor:
        """Run as GPTModel does; arguments that it doesn't have are for :meth:`_postprocess`."""
        self._trained, self._loss_parts = trained, loss_parts
        output: Tensor = super().forward(*args, **kwargs)
        return output

    def _postprocess(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Return the summed loss of the trained tokens where there are labels, else what GPTModel returns.

        With labels (``[b, s]``) the trained positions have to be known, and logits are made for these
        only, some at a time.
        """
        labels = arguments.get("labels")
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, **arguments)
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())  # the module isn't called, and its weight may still be being gathered
        assert self._trained is not None
        tied = self.share_embeddings_and_output_weights
        return linear_cross_entropy(
            hidden_states,
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            labels,
            self._trained,
            vocab_size=self.real_vocab_size,
            group=self.tp_group,
            sequence_parallel=self.config.sequence_parallel,
            parts=self._loss_parts,
        )

    def next_token_logits(self, embeddings: Tensor | None, cache: KeyValueCache) -> Tensor:
        """Run one pass of this stage's layers while generating.

        Args:
            embeddings: ``[s, b, hidden]`` on the first stage; the others take the input tensor that was set.
            cache: what the earlier passes have kept.

        Returns:
            On the last stage the logits of each sequence's next token, ``[b, vocabulary]`` in float32,
            padding of the vocabulary left out; on the others the hidden states ``[s, b, hidden]``.
        """
        rotary = self.rotary_pos_emb(cache.capacity)[cache.positions]  # [s or b, 1, 1, head_dim]
        if not cache.first_pass:
            rotary = rotary.transpose(0, 1)
        for layer in self.decoder.layers:
            layer.self_attention.core_attention.cache = cache
        try:
            hidden = self.decoder(hidden_states=embeddings, attention_mask=None, rotary_pos_emb=rotary)
        finally:
            for layer in self.decoder.layers:
                layer.self_attention.core_attention.cache = None
        if not self.post_process:
            return hidden
        last = hidden[cache.last, cache.rows].unsqueeze(0)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        logits, _ = self.output_layer(last, weight=weight, runtime_gather_output=True)
        return logits[0, :, : self.real_vocab_size].float()


def scaled_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Return rotary frequencies as :class:`RopeScaling` says.

    Args:
        frequencies: unscaled, in radians per token, ``[head_dim / 2]``.

    Source: transformers ``_compute_linear_scaling_rope_parameters``, ``_compute_llama3_parameters``.
    """
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    length = scaling.original_max_position_embeddings
    assert low is not None and high is not None and length is not None
    wavelengths = 2 * math.pi / frequencies
    kept = ((length / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
