"""Layer specs: the same places are filled with and without Transformer Engine."""

from __future__ import annotations

import pytest
from megatron.core.transformer.identity_op import IdentityOp

from megatron_vlm.models.specs import layer_spec, standalone_norm


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_queries_and_keys_are_normalised_where_the_model_says_so(impl: str, qk_norm: bool) -> None:
    attention = layer_spec(impl, causal=True, output_bias=False, qk_norm=qk_norm).submodules.self_attention
    expected = standalone_norm(impl) if qk_norm else IdentityOp
    assert attention.submodules.q_layernorm is attention.submodules.k_layernorm is expected
