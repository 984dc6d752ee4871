"""A connector that is described and nothing more is counted as torch counts it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm.architecture.layers import COLUMN, ROW, Layer, Linear
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.parameters import stage_parameters
from megatron_vlm.architecture.parts import CONNECTORS, ENCODERS
from megatron_vlm.architecture.train_modules import PROJECTOR
from megatron_vlm.plan.flops import Work, training_flops
from tests.tiny import tiny_config

NARROW = 4


def bottleneck_layers(model: ModelConfig) -> Iterator[Layer]:
    yield Linear("encoder.down", model.projector.input_size, NARROW, COLUMN, bias=True)
    yield Linear("encoder.up", NARROW, model.language.hidden_size, ROW, bias=True)


def test_kinds_are_listed_from_their_folders() -> None:
    assert set(ENCODERS) == {"clip", "siglip"}
    assert set(CONNECTORS) == {"linear", "mlp2x_gelu"}


def test_a_made_up_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONNECTORS, "bottleneck", SimpleNamespace(connector_layers=bottleneck_layers))
    model = ModelConfig.from_hf(tiny_config().to_dict())
    model = replace(model, projector=replace(model.projector, kind="bottleneck"))
    inputs, hidden = model.projector.input_size, model.language.hidden_size
    theirs = torch.nn.Sequential(
        torch.nn.Linear(inputs, NARROW), torch.nn.GELU(), torch.nn.Linear(NARROW, hidden)
    )

    sizes = [p.numel() for p in theirs.parameters()]
    for tp in (1, 2):
        (stage,) = stage_parameters(model, tp, [model.language.num_layers])
        down, down_bias, up, up_bias = (p.size for p in stage if p.name.startswith(PROJECTOR))
        assert [down * tp, down_bias * tp, up * tp, up_bias] == sizes

    with FlopCounterMode(display=False) as counter:
        theirs(torch.randn(3 * model.tile_tokens, inputs)).sum().backward()
    flops = training_flops(model, Work(0, 0, 0, 3), lambda name: name.startswith(PROJECTOR))
    assert flops.projector == counter.get_total_flops() > 0
