"""Layers dealt to pipeline stages: no other deal has a faster slowest stage."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.plan.flops import Work, causal_pairs, training_flops
from megatron_vlm.plan.pipeline import StageCosts, deal_layers, describe_stages, stage_costs
from tests.tiny import tiny_config


def slowest(counts: tuple[int, ...], costs: StageCosts) -> int:
    times = [count * costs.layer for count in counts]
    times[0] += costs.first
    times[-1] += costs.last
    return max(times)


def test_no_deal_is_better() -> None:
    """Against every deal there is."""
    generator = random.Random(0)
    for _ in range(60):
        layers, pp, vpp = generator.choice([(7, 2, 1), (8, 4, 1), (9, 2, 2), (6, 3, 2), (5, 5, 1)])
        costs = StageCosts(generator.randint(1, 9), generator.randint(0, 40), generator.randint(0, 40))
        counts = deal_layers(layers, costs, pp, vpp)
        assert sum(counts) == layers and len(counts) == pp * vpp and min(counts) >= 1
        every = (d for d in itertools.product(range(1, layers + 1), repeat=pp * vpp) if sum(d) == layers)
        assert slowest(counts, costs) == min(slowest(deal, costs) for deal in every)


def test_flags_set_the_ends_and_the_rest_is_balanced() -> None:
    even = StageCosts(layer=1)
    assert deal_layers(32, even, 4) == (8, 8, 8, 8)
    assert deal_layers(10, even, 4) == (2, 2, 3, 3)
    assert deal_layers(10, even, 4, first=1) == (1, 3, 3, 3)
    assert deal_layers(10, even, 4, first=1, last=1) == (1, 4, 4, 1)
    assert deal_layers(10, even, 2, first=3, last=7) == (3, 7)
    assert deal_layers(12, even, 2, vpp=2, first=4) == (2, 4, 2, 4)
    for layers, pp, vpp, first, last, message in [
        (4, 5, 1, None, None, "--pp 5 x --vpp 1 makes 5 stages of 4 layers; use 4 or fewer"),
        (4, 2, 3, None, None, "--pp 2 x --vpp 3 makes 6 stages"),
        (8, 2, 2, 3, None, "--decoder-first-pipeline-num-layers 3 is no multiple of the 2 model chunks"),
        (8, 2, 1, 8, None, "leave 0 of the 8 layers for the other 1 stages"),
        (8, 2, 1, 3, 4, "leave 1 of the 8 layers for the other 0 stages"),
        (8, 4, 1, 4, 3, "leave 1 of the 8 layers for the other 2 stages"),
    ]:
        with pytest.raises(ValueError, match=message):
            deal_layers(layers, even, pp, vpp, first, last)


def test_costs_are_those_of_the_whole_model() -> None:
    """Which :mod:`tests.plan.test_flops` holds against torch's count."""
    model, length = ModelConfig.from_hf(tiny_config().to_dict()), 60
    work = Work(length, length - model.image_tokens, causal_pairs([length]), tiles=1)
    for frozen in (("vision_model.",), ("vision_model.", "language_model."), ("none",)):
        costs = stage_costs(model, length, lambda name, frozen=frozen: not name.startswith(frozen))
        whole = training_flops(model, work, lambda name, frozen=frozen: not name.startswith(frozen))
        assert costs.first == whole.vision + whole.projector
        assert costs.layer * model.language.num_layers + costs.last == whole.language
        passes = 2 if "language_model." in frozen else 3
        output = 2 * work.trained_tokens * model.language.hidden_size * model.language.vocab_size
        assert costs.last == passes * output


def test_description() -> None:
    assert describe_stages((2, 1, 3, 4), 2) == [
        "pipeline stage 0: vision tower, projector, embedding, layers 0-1 | layers 3-5",
        "pipeline stage 1: layer 2 | layers 6-9, output layer",
    ]
