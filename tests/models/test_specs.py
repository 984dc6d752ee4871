"""Layer specs: the same places are filled with and without Transformer Engine."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp

from megatron_vlm.models import specs
from megatron_vlm.models.experts import MixtureOfExperts
from megatron_vlm.models.specs import (
    choose_transformer_impl,
    layer_spec,
    standalone_norm,
)


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_queries_and_keys_are_normalised_where_the_model_says_so(impl: str, qk_norm: bool) -> None:
    attention = layer_spec(impl, causal=True, output_bias=False, qk_norm=qk_norm).submodules.self_attention
    expected = standalone_norm(impl) if qk_norm else IdentityOp
    assert attention.submodules.q_layernorm is attention.submodules.k_layernorm is expected


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_experts_stand_where_the_mlp_would(impl: str) -> None:
    layer = layer_spec(impl, causal=True, output_bias=False, experts=True).submodules
    assert layer.mlp is MixtureOfExperts and layer.pre_mlp_layernorm is standalone_norm(impl)
    assert "pre_mlp_layernorm." not in layer.sharded_state_dict_keys_map


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_a_tower_has_no_mask(impl: str) -> None:
    """Upstream's local spec has a causal one there, and its other spec none."""
    masks = {
        causal: layer_spec(impl, causal=causal, output_bias=True).submodules.self_attention.params
        for causal in (True, False)
    }
    assert masks[False]["attn_mask_type"] is AttnMaskType.no_mask
    assert masks[True]["attn_mask_type"] is AttnMaskType.causal


def test_transformer_engine_is_refused_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[str] = []
    monkeypatch.setattr(specs.importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert choose_transformer_impl("cuda") == choose_transformer_impl("cpu") == "local"
    with pytest.raises(ValueError, match="Transformer Engine is not installed here; use local"):
        choose_transformer_impl("cuda", "transformer_engine")
    installed.append("transformer_engine")
    assert choose_transformer_impl("cuda") == "transformer_engine"
    assert choose_transformer_impl("cuda", "local") == choose_transformer_impl("cpu") == "local"
    assert choose_transformer_impl("cuda", dtype=torch.float32) == "local"
    assert choose_transformer_impl("cuda", "transformer_engine", torch.float32) == "transformer_engine"
    with pytest.raises(ValueError, match="Transformer Engine needs GPUs; use local"):
        choose_transformer_impl("cpu", "transformer_engine")
