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
from megatron_vlm.models.packing import boundaries
from tests.distributed import ROUNDING, Pool


def both(groups: int, mask_type: AttnMaskType) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Output and gradients of both implementations."""
    device = parallel.initialize().device
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
    inputs = [torch.randn(11, 3, heads, 8).to(device) for heads in (6, groups, groups)]
    probe = torch.randn(11, 3, 48).to(device)
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
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * ROUNDING)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * ROUNDING * float(b.abs().max()))


def packed_and_apart(mask_type: AttnMaskType) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Output and gradients of samples in a row, and of megatron-core's attention to one after the other."""
    device = parallel.initialize().device
    config = TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=8,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
    )
    torch.manual_seed(1)
    lengths = [4, 1, 6]
    inputs = [torch.randn(11, heads, 8).to(device) for heads in (6, 2, 2)]
    probe = torch.randn(11, 48).to(device)
    own = [x.clone().requires_grad_() for x in inputs]
    params = boundaries(lengths, 11, device)
    ours = ScaledDotProductAttention(config, 1, mask_type, "self")(*own, None, packed_seq_params=params)
    theirs_in = [x.clone().requires_grad_() for x in inputs]
    module = DotProductAttention(config, 1, mask_type, "self")
    parts = []
    for sample in zip(*(x.unsqueeze(1).split(lengths) for x in theirs_in), strict=True):
        causal = mask_type == AttnMaskType.causal
        parts.append(module(*sample, get_default_causal_mask(len(sample[0])) if causal else None))
    theirs = torch.cat(parts).squeeze(1)
    results = []
    for output, given in ((ours, own), (theirs, theirs_in)):
        (output * probe).sum().backward()
        results.append((output.detach(), [x.grad for x in given]))
    return results


@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_packed_samples_do_not_see_each_other(pool: Pool, mask_type: AttnMaskType) -> None:
    ((ours, our_grads), (theirs, their_grads)) = pool.run(1, packed_and_apart, mask_type)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * ROUNDING)  # as above
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * ROUNDING * float(b.abs().max()))


def refusals() -> list[str]:
    parallel.initialize()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    messages = []
    x: Any = torch.zeros(2, 1, 2, 4)
    attention = ScaledDotProductAttention(config, 1, AttnMaskType.causal, "self")
    for call in (
        lambda: ScaledDotProductAttention(config, 1, AttnMaskType.padding, "self"),
        lambda: attention(x, x, x, torch.ones(1, dtype=torch.bool)),
    ):
        try:
            call()
            messages.append("none")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_it_cannot_do_is_refused(pool: Pool) -> None:
    mask, explicit = pool.run(1, refusals)[0]
    assert "supported: causal, no_mask" in mask
    assert "no explicit mask" in explicit
