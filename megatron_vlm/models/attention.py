"""Attention and norm modules for layer specs that don't need Transformer Engine."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlm.models.cache import KeyValueCache
from megatron_vlm.parallel.fused import norms


class ScaledDotProductAttention(MegatronModule):
    """Core attention through ``torch.nn.functional.scaled_dot_product_attention``.

    Stands where megatron-core's ``DotProductAttention`` would: same arguments, same result, but no
    ``[b, heads, s, s]`` scores in memory. The mask is what ``attn_mask_type`` says, ``causal`` or
    ``no_mask``. Batches are padded on the right, so that a causal mask keeps padding away from
    every real token and no padding mask is needed. Of packed samples each is attended to on its own, so
    that no score between two of them is ever computed. While a model generates, its language model's
    layers share a ``cache``.

    Raises:
        ValueError: a mask type other than these two, or an explicit mask or bias.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
            raise ValueError(f"attention mask {attn_mask_type}; supported: causal, no_mask")
        assert config.kv_channels is not None
        self.layer_number = layer_number
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.cache: KeyValueCache | None = None
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Compute attention.

        Args:
            query: ``[s, b, heads / tp, head_dim]``; ``[t, heads / tp, head_dim]`` of packed samples.
            key, value: ``[s, b, key-value heads / tp, head_dim]``; packed as ``query``.
            packed_seq_params: where the samples begin, see :func:`~megatron_vlm.models.packing.boundaries`.

        Returns:
            ``[s, b, heads / tp * head_dim]``; ``[t, heads / tp * head_dim]`` of packed samples.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("this attention takes no explicit mask or bias")
        if packed_seq_params is not None:
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            # [t, n, d] -> [1, n, s, d] of each sample
            samples = (x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (query, key, value))
            contexts = [self._attend(*one) for one in zip(*samples, strict=True)]
            return torch.cat(contexts, dim=2).squeeze(0).transpose(0, 1).flatten(1)
        # [s, b, n, d] -> [b, n, s, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.cache is not None:
            key, value = self.cache.append(self.layer_number, key, value)
            if not self.cache.first_pass:
                context = self._attend_to_cache(query, key, value, self.cache.visible)
                return context.permute(2, 0, 1, 3).flatten(2)
        # [b, n, s, d] -> [s, b, n * d]
        return self._attend(query, key, value).permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            # Not enable_gqa: torch's CPU kernel for it is the one that keeps the scores in memory.
            key = key.repeat_interleave(groups, dim=1)
            value = value.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.is_causal,
            scale=self.softmax_scale,
        )

    def _attend_to_cache(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        """Attend with one query per sequence and head.

        Those that share a key-value head stand in the sequence dimension, so that the cache isn't
        copied for each.
        """
        b, heads, _, d = query.shape
        query = query.reshape(b, key.shape[1], heads // key.shape[1], d)
        context = F.scaled_dot_product_attention(query, key, value, visible, scale=self.softmax_scale)
        return context.reshape(b, heads, 1, d)


class SelfAttentionWithOutputBias(SelfAttention):
    """Self-attention whose output projection has a bias or none by a setting of its own.

    megatron-core has one switch for the biases of ``linear_proj`` and of the MLP; Llama has two
    (``attention_bias``, ``mlp_bias``).
    """

    def __init__(self, config: TransformerConfig, *args: Any, output_bias: bool, **kwargs: Any) -> None:
        # A shallow copy: dataclasses.replace would run the config's checks and defaults again.
        attention_config = object.__new__(type(config))
        attention_config.__dict__.update(config.__dict__)
        attention_config.add_bias_linear = output_bias
        super().__init__(attention_config, *args, **kwargs)


class TorchNorm:
    """LayerNorm or RMSNorm, as ``config.normalization`` says: torch's, or apex's fused one where it runs.

    Unlike megatron-core's ``WrappedTorchNorm`` it works with sequence parallelism: its parameters are
    marked, so that ``finalize_model_grads`` sums their gradients over the tensor parallel ranks.
    A class, because megatron-core's ``build_module`` takes a function for something built already.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        """Build the norm.

        Args:
            hidden_size: size of the last dimension, over which it normalises.
        """
        device = torch.device(torch.cuda.current_device())  # the CPU backend answers with the CPU
        norm = norms(device.type)[config.normalization](hidden_size, eps=eps)
        norm.to(device=device, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
