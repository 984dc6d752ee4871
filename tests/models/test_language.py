"""Rotary frequencies equal transformers', bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.models.language import scaled_frequencies
from megatron_vlm.models.vlm import VisionLanguageModel
from tests.tiny import LLAMA3_ROPE

LLAMA31 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
SCALINGS = {
    "llama-3.1": LLAMA31,
    "llama-3.2": dict(LLAMA31, factor=32.0),
    "odd": dict(LLAMA31, factor=3.3, low_freq_factor=1.7, high_freq_factor=2.9),
    "tiny": LLAMA3_ROPE,
    "linear": dict(rope_type="linear", factor=2.5),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("head_dim, theta", [(128, 500000.0), (64, 500000.0), (12, 5000.0)])
def test_frequencies(scaling: dict[str, Any], head_dim: int, theta: float) -> None:
    text = transformers.LlamaConfig(head_dim=head_dim, rope_theta=theta, rope_scaling=dict(scaling))
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](text)
    assert factor == 1.0
    model = ModelConfig.from_hf(
        {"model_type": "llava", "text_config": text.to_dict(), "image_token_index": 7}
    )
    assert model.language.rope_scaling is not None
    unscaled = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    found = scaled_frequencies(unscaled, model.language.rope_scaling)
    assert torch.equal(found, expected)
    assert not torch.equal(found, unscaled)


def test_positions_that_would_not_be_read_are_refused() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="it takes no position_ids"):
        VisionLanguageModel.forward(None, ids, position_ids=ids)  # type: ignore[arg-type]
