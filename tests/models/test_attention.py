"""Core attention equals megatron-core's own, which keeps the scores in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import get_default_causal_mask

from megatron_vlm import parallel
from megatron_vlm.models.attention import ScaledDotProductAttention
from tests.distributed import Pool


def both(groups: int, mask_type: AttnMaskType) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Output and gradients of both implementations."""
    parallel.initialize()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=6,
        num_query_groups=groups,
        kv_channels=8,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
    )
    torch.manual_seed(1)
    inputs = [torch.randn(11, 3, heads, 8) for heads in (6, groups, groups)]
    probe = torch.randn(11, 3, 48)
    mask = get_default_causal_mask(11) if mask_type == AttnMaskType.causal else None
    results = []
    for implementation in (ScaledDotProductAttention, DotProductAttention):
        module = implementation(config, 1, mask_type, "self")
        own = [x.clone().requires_grad_() for x in inputs]
        wanted = mask if implementation is DotProductAttention else None
        output = module(*own, wanted)
        (output * probe).sum().backward()
        results.append((output.detach(), [x.grad for x in own]))
    return results


@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_equals_megatron_core(pool: Pool, groups: int, mask_type: AttnMaskType) -> None:
    ((ours, our_grads), (theirs, their_grads)) = pool.run(1, both, groups, mask_type)[0]
    # fp32 sums of 11 products in another order: a few times 6e-8.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))


def refusals() -> list[str]:
    parallel.initialize()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    messages = []
    x: Any = torch.zeros(2, 1, 2, 4)
    attention = ScaledDotProductAttention(config, 1, AttnMaskType.causal, "self")
    for call in (
        lambda: ScaledDotProductAttention(config, 1, AttnMaskType.padding, "self"),
        lambda: attention(x, x, x, torch.ones(1, dtype=torch.bool)),
        lambda: attention(x, x, x, None, packed_seq_params=object()),
    ):
        try:
            call()
            messages.append("none")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_it_cannot_do_is_refused(pool: Pool) -> None:
    mask, explicit, packed = pool.run(1, refusals)[0]
    assert "supported: causal, no_mask" in mask
    assert "no explicit mask" in explicit and "packed" in packed
