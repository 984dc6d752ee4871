"""Names and sizes of parameters against those of the models that are built."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vlm import parallel
from megatron_vlm.config.lora import LANGUAGE_TARGETS, VISION_TARGETS, LoRAConfig
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.config.parameters import stage_parameters
from megatron_vlm.models.vlm import build_model
from megatron_vlm.models.weights import named_parameters, saved_name, sharded_weights
from tests.distributed import Pool
from tests.tiny import FAMILIES, tiny_config
from tests.workers import Layout

Sizes = dict[str, int]


def built(model: ModelConfig, sizes: Layout, layers: list[int]) -> tuple[int, list[Sizes]]:
    """This rank's pipeline stage and, for each of its chunks, elements by name in checkpoints."""
    layout = parallel.initialize(sizes.tp, sizes.pp, vpp=sizes.vpp)
    chunks = build_model(model, layout, layers_per_stage=layers)
    weights = sharded_weights(chunks)
    found: list[Sizes] = [{} for _ in chunks]
    for name, parameter in named_parameters(chunks):
        found[int(name.partition(".")[0])][saved_name(weights[name])] = parameter.numel()
    return layout.pp_rank, found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_adapters", [False, True], ids=["", "lora"])
def test_they_are_those_of_the_model(pool: Pool, family: str, with_adapters: bool) -> None:
    model = ModelConfig.from_hf(tiny_config(**FAMILIES[family]).to_dict())
    if with_adapters:
        language = LANGUAGE_TARGETS if model.language.num_experts is None else LANGUAGE_TARGETS[:4]
        lora = LoRAConfig(rank=4, alpha=8, dropout=0.0, targets=(*language, *VISION_TARGETS))
        model = replace(model, lora=lora)
    for sizes, layers in ((Layout(), [4]), (Layout(tp=2, pp=2), [1, 3]), (Layout(pp=2, vpp=2), [1, 1, 1, 1])):
        expected = [
            {parameter.name: parameter.size for parameter in stage}
            for stage in stage_parameters(model, sizes.tp, layers)
        ]
        for rank, chunks in pool.run(sizes.world, built, model, sizes, layers):
            assert chunks == expected[rank :: sizes.pp]
