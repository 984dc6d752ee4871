"""Llama and Qwen2 language models on megatron-core's GPTModel."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.config.model import LanguageConfig, padded_vocab_size
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
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(
                impl, get_num_layers_to_build(config), language.attention_output_bias
            ),
            vocab_size=padded_vocab_size(language.vocab_size, layout.tp, vocab_divisible_by),
            max_sequence_length=language.max_position_embeddings,
            pre_process=layout.is_first_stage,
            post_process=layout.is_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=language.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=language.rope_theta,
            # Image features are placed among the embeddings first; the model scatters the result.
            scatter_embedding_sequence_parallel=False,
        )
        self.real_vocab_size = language.vocab_size
        part = self.vocab_size // layout.tp
        self.real_columns = min(part, max(0, language.vocab_size - part * layout.tp_rank))

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy over the real vocabulary.

        Args:
            labels: ``[b, s]``, each within the vocabulary.
            logits: this rank's part, ``[s, b, padded vocabulary / tp]``.

        Returns:
            ``[b, s]`` in float32.
        """
        if self.real_columns < logits.shape[-1]:
            columns = torch.arange(logits.shape[-1], device=logits.device)
            logits = logits.masked_fill(columns >= self.real_columns, float("-inf"))
        loss = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels.t().contiguous())
        return loss.t().contiguous()
