"""A mixture of experts beside transformers' Mixtral."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from megatron_vlm import parallel
from megatron_vlm.models.experts import MixtureOfExperts
from tests.distributed import Pool


def routed(tokens: torch.Tensor, weight: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    """Weights and choice of each token's experts, ``[tokens, experts]``; transformers' logits, weights and
    choice on the same device: of equal logits another one may take another."""
    device = parallel.initialize().device
    config = TransformerConfig(
        num_layers=1,
        hidden_size=tokens.shape[1],
        num_attention_heads=1,
        num_moe_experts=len(weight),
        moe_router_topk=top_k,
        moe_ffn_hidden_size=4,
        moe_router_load_balancing_type="none",
        add_bias_linear=False,
        params_dtype=weight.dtype,
    )
    router = MixtureOfExperts(config).router
    sizes = dict(hidden_size=tokens.shape[1], num_local_experts=len(weight), num_experts_per_tok=top_k)
    theirs = MixtralTopKRouter(MixtralConfig(**sizes))
    theirs.weight.data = weight.to(device)
    with torch.no_grad():
        router.weight.copy_(weight)
        return *router(tokens.unsqueeze(1).to(device)), *theirs(tokens.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [2, 3])
def test_each_token_has_transformers_experts(pool: Pool, dtype: torch.dtype, top_k: int) -> None:
    """Chosen by logits of the weights' precision, which in bfloat16 are often equal; weighted in float32."""
    torch.manual_seed(0)
    tokens, weight = torch.randn(2000, 24).to(dtype), torch.randn(6, 24).to(dtype)
    ((weights, chosen, logits, values, indices),) = pool.run(1, routed, tokens, weight, top_k)
    assert (dtype == torch.bfloat16) == bool((logits.sort().values.diff() == 0).any())
    assert torch.equal(chosen, torch.zeros(2000, 6, dtype=torch.bool).scatter(1, indices, True))
    expected = torch.zeros(2000, 6).scatter(1, indices, values)
    assert weights.dtype == expected.dtype == torch.float32
    # A softmax over some is one over all, made to add up to 1 again: two roundings more.
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)
