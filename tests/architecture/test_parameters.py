"""Names and sizes of parameters against those of the models that are built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from megatron_vlm import parallel
from megatron_vlm.architecture.lora import LANGUAGE_TARGETS, VISION_TARGETS, LoRAConfig
from megatron_vlm.architecture.model import ModelConfig, padded_vocab_size
from megatron_vlm.architecture.parameters import stage_parameters
from megatron_vlm.architecture.train_modules import LANGUAGE
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.vlm import build_model
from megatron_vlm.models.weights import named_parameters, saved_name, sharded_weights
from tests.distributed import Pool
from tests.tiny import FAMILIES, tiny_config
from tests.workers import Layout

Sizes = dict[str, int]


def built(model: ModelConfig, sizes: Layout, layers: list[int]) -> tuple[int, list[Sizes]]:
    """This rank's pipeline stage and, for each of its chunks, elements by name in checkpoints."""
    layout = parallel.initialize(sizes.tp, sizes.pp, vpp=sizes.vpp)
    chunks = build_model(model, layout, ModelOptions(layers_per_stage=layers))
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


def test_mixtral_8x7b() -> None:
    """All experts are stored: 46.7 billion parameters, on one rank and on eight together."""
    with torch.device("meta"):
        theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig()).num_parameters()
    text = {"model_type": "mixtral"}
    model = ModelConfig.from_hf({"model_type": "llava", "text_config": text, "image_token_index": 7})
    for tp in (1, 8):
        (stage,) = stage_parameters(model, tp, [32])
        own = [p for p in stage if p.name.startswith(LANGUAGE)]
        whole = sum(p.size for p in own if "norm" in p.name or "router" in p.name)
        padding = padded_vocab_size(32000, tp) - 32000
        sizes = tp * sum(p.size for p in own) - (tp - 1) * whole - 2 * padding * 4096
        assert sizes == theirs == 46_702_792_704
