"""Attention through the cache equals attention over each whole sequence alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.models.attention import ScaledDotProductAttention
from megatron_vlm.models.cache import KeyValueCache

HEADS, GROUPS, SIZE = 6, 2, 8


def test_sequences_of_different_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    # What memory holds before it is written must not matter.
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape: x.new_full(shape, math.nan))
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, num_query_groups=GROUPS
    )
    attention = ScaledDotProductAttention(config, 1, AttnMaskType.causal, "self").eval()
    lengths, new = [5, 2, 9], 4
    whole = [
        tuple(torch.randn(length + new, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS))
        for length in lengths
    ]
    cache = KeyValueCache(torch.tensor(lengths), max(lengths), max(lengths) + new)
    attention.cache = cache

    prompts = [torch.zeros(max(lengths), 3, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    for row, length in enumerate(lengths):
        for batch, sequence in zip(prompts, whole[row], strict=True):
            batch[:length, row] = sequence[:length]
    found = [
        [output[:length, row]] for output in [attention(*prompts, None)] for row, length in enumerate(lengths)
    ]
    for step in range(new):
        cache.next_pass()
        assert cache.positions.tolist() == [length + step for length in lengths]
        tokens = [
            torch.stack([whole[row][part][length + step] for row, length in enumerate(lengths)]).unsqueeze(0)
            for part in range(3)
        ]
        output = attention(*tokens, None)
        for row in range(3):
            found[row].append(output[:, row])

    for row in range(3):
        query, key, value = (x.transpose(0, 1) for x in whole[row])  # [heads, s, d]
        expected = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(HEADS // GROUPS, 0),
            value.repeat_interleave(HEADS // GROUPS, 0),
            is_causal=True,
        )
        torch.testing.assert_close(torch.cat(found[row]), expected.transpose(0, 1).flatten(1))
