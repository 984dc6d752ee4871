"""Kinds of encoders and connectors are listed from their folders, and what config.json says is checked."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vlm.architecture.connectors import CONNECTORS
from megatron_vlm.architecture.encoders import ENCODERS
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.projector import usual_activation
from megatron_vlm.hf.tables.model import TABLES
from megatron_vlm.models.connectors import BUILD_CONNECTOR
from megatron_vlm.models.encoders import BUILD_ENCODER
from tests.tiny import tiny_config


def test_kinds_are_listed_from_their_folders() -> None:
    assert set(ENCODERS) == {"clip", "siglip"} == set(BUILD_ENCODER)
    assert set(CONNECTORS) == {"identity", "linear", "mlpNx_gelu"} == set(BUILD_CONNECTOR)
    assert set(TABLES) == {*ENCODERS, *CONNECTORS}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mm_projector_type": "resampler"}, "'resampler'; supported: identity, linear, mlpNx_gelu"),
        ({"mm_projector_type": "mlpNx_gelu"}, "'mlpNx_gelu'; supported: identity, linear, mlpNx_gelu"),
        ({"mm_projector_type": "mlp0x_gelu"}, "'mlp0x_gelu' has 0 linear layers; supported: 1 to 16"),
        ({"mm_projector_type": "mlp99x_gelu"}, "has 99 linear layers; supported: 1 to 16"),
        ({"mm_projector_type": "mlp1x_gelu"}, "needs projector_hidden_act 'linear', not 'gelu'"),
        ({"mm_projector_type": "linear"}, "needs projector_hidden_act 'linear', not 'gelu'"),
        ({"mm_projector_type": "identity"}, "needs 48 features, the language model's hidden_size, not 32"),
    ],
)
def test_projectors_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**tiny_config().to_dict(), **values})


def test_usual_activations() -> None:
    kinds = ["mlp2x_gelu", "mlp3x_gelu", "mlp1x_gelu", "linear", "identity"]
    assert [usual_activation(kind) for kind in kinds] == ["gelu", "gelu", "linear", "linear", "linear"]
