"""The count against torch's own, operation by operation, of transformers' LLaVA."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm.architecture.lora import LANGUAGE_TARGETS, VISION_TARGETS, LoRAConfig
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.plan.flops import _PEAK_TFLOPS, Flops, Work, causal_pairs, peak_tflops, training_flops
from tests.models.test_parity import make_batch
from tests.tiny import FAMILIES, build, tiny_config, transformers_inputs

PARTS = {
    "vision_model.": "model.vision_tower.",
    "vision_projection.": ("model.multi_modal_projector.", "model.image_newline"),
    "language_model.": ("model.language_model.", "lm_head."),
}
# What is trained, in this project's names and in transformers'.
TRAINED = {
    "nothing": ((), ()),
    "projector": (("vision_projection.",), PARTS["vision_projection."]),
    "projector and language": (
        ("vision_projection.", "language_model."),
        (*PARTS["vision_projection."], *PARTS["language_model."]),
    ),
    "language": (("language_model.",), PARTS["language_model."]),
    "tower": (("vision_model.",), (PARTS["vision_model."],)),
    "all": (("",), ("",)),
    "last language block and output layer": (
        ("language_model.decoder.layers.3.", "language_model.output_layer."),
        ("model.language_model.layers.3.", "lm_head."),
    ),
    "norms of the second language block": (
        (
            "language_model.decoder.layers.1.mlp.linear_fc1.layer_norm",
            "language_model.decoder.layers.1.pre_mlp_layernorm.",  # before experts
            "language_model.decoder.layers.1.self_attention.linear_qkv.layer_norm",
        ),
        (
            "model.language_model.layers.1.input_layernorm",
            "model.language_model.layers.1.post_attention_layernorm",
        ),
    ),
}
TEXT = 12


def counted(
    family: str, trained: tuple[str, ...], lora: peft.LoraConfig | None = None
) -> tuple[ModelConfig, Work, int]:
    """Operations that torch counts in transformers' forward and backward pass."""
    config = tiny_config(**FAMILIES[family])
    config.vision_config.vision_use_head = False  # of SigLIP's pooled output, which LLaVA doesn't read
    net = build(config)
    if FAMILIES[family].get("projector") == "linear":
        net.model.multi_modal_projector.linear_2 = torch.nn.Identity()  # transformers multiplies by it
    net.set_attn_implementation("eager")  # flash and its like count work that they do twice
    net.set_experts_implementation("eager")  # the others' products aren't counted
    for name, parameter in net.named_parameters():
        parameter.requires_grad = name.startswith(trained)
    if lora is not None:
        peft.inject_adapter_in_model(lora, net)  # freezes all but its own
        for name, parameter in net.named_parameters():
            parameter.requires_grad |= name.startswith(trained)
    model = ModelConfig.from_hf(config.to_dict())
    tower = net.model.vision_tower
    for block in tower.encoder.layers[model.num_vision_layers_run :]:
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states  # transformers runs them

    # Two images in a row of one sample, to see that sequences are counted and not images.
    batch = make_batch(model, 1, [2, 2, 0], TEXT + 2 * model.tile_tokens)
    ids = batch["input_ids"]
    with FlopCounterMode(display=False) as counter:
        output = net(**transformers_inputs(batch), labels=ids)
        if trained or lora is not None:
            output.loss.backward()
    work = Work(ids.numel(), ids.numel(), len(ids) * ids.shape[1] ** 2, len(batch["pixel_values"]))
    return model, work, counter.get_total_flops()


def formula(model: ModelConfig, work: Work, trained: tuple[str, ...]) -> Flops:
    return training_flops(model, work, lambda name: name.startswith(trained))


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_torchs_count(family: str, trained: str) -> None:
    """Exactly: both count matrix products, and transformers' eager attention computes all s x s pairs."""
    ours, theirs = TRAINED[trained]
    model, work, expected = counted(family, theirs)
    flops = formula(model, work, ours)
    assert flops.total == expected


@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [
        ("clip-llama", "vision_model.ln_pre.", "model.vision_tower.pre_layrnorm"),
        ("clip-llama", "vision_model.class_token", "model.vision_tower.embeddings.class_embedding"),
        ("next-clip-llama", "vision_projection.image_newline", "model.image_newline"),
    ],
)
def test_gradients_reach_what_has_no_product(family: str, ours: str, theirs: str) -> None:
    model, work, expected = counted(family, (theirs,))
    assert formula(model, work, (ours,)).total == expected


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize(
    "targets",
    [("q_proj", "v_proj"), LANGUAGE_TARGETS, ("o_proj", "vision.fc1"), (*LANGUAGE_TARGETS, *VISION_TARGETS)],
)
def test_lora_equals_torchs_count(targets: tuple[str, ...], projector: bool) -> None:
    """Of PEFT's adapters, on grouped queries; with the projector trained beside them, and without."""
    names = [f"language_model.*{name}" for name in targets if not name.startswith("vision.")]
    names += [f"vision_tower.*{name[7:]}" for name in targets if name.startswith("vision.")]
    lora = peft.LoraConfig(r=3, target_modules=f".*({'|'.join(names)})")
    model, work, expected = counted("clip-llama", TRAINED["projector"][1] if projector else (), lora)
    model = dataclasses.replace(model, lora=LoRAConfig(rank=3, alpha=6, dropout=0.0, targets=targets))

    def trains(name: str) -> bool:
        return ".adapters." in name or (projector and name.startswith("vision_projection."))

    if targets == ("q_proj", "v_proj") and not projector:
        # Nothing before the first block's keys is trained, so torch spares their gradient, one product of
        # one block. The count doesn't look into attention: it has all of its gradients or none.
        query = model.language.num_attention_heads * model.language.head_dim
        expected += 2 * work.attention_pairs * query
    assert training_flops(model, work, trains).total == expected


def test_each_part_alone() -> None:
    """What a part costs is what is saved when there is none of it."""
    model = ModelConfig.from_hf(tiny_config().to_dict())
    everything = Work(tokens=90, trained_tokens=40, attention_pairs=causal_pairs([30, 60]), tiles=2)
    no_images = Work(tokens=90, trained_tokens=40, attention_pairs=causal_pairs([30, 60]), tiles=0)
    with_images, text = formula(model, everything, ("",)), formula(model, no_images, ("",))
    assert with_images.language == text.total == text.without_vision > 0
    assert with_images.total == with_images.vision + with_images.projector + with_images.language
    assert text.vision == text.projector == 0 < with_images.vision


def test_causal_pairs() -> None:
    for length in (1, 2, 7):
        mask = torch.ones(length, length).tril()
        assert causal_pairs([length, length]) == 2 * mask.sum()


def test_a_7b_model() -> None:
    """LLaVA-1.5-7B, all trained, is close to 6 operations for each parameter and token."""
    text = {"model_type": "llama", "vocab_size": 32064}
    model = ModelConfig.from_hf({"model_type": "llava", "text_config": text, "image_token_index": 32000})
    flops = training_flops(model, Work(2048, 2048, causal_pairs([2048]), 0), lambda name: True)
    products = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32064 * 4096
    attention = 32 * 3 * 2 * 4096 * 2048 * 2049  # Q K^T and P V, each 2 x h x s (s + 1) / 2, three times
    assert flops.total == 6 * products * 2048 + attention


def test_mixtral_8x7b() -> None:
    """Operations of two experts of the eight, and of the router."""
    text = {"model_type": "mixtral"}
    model = ModelConfig.from_hf({"model_type": "llava", "text_config": text, "image_token_index": 7})
    flops = training_flops(model, Work(2048, 2048, causal_pairs([2048]), 0), lambda name: True)
    of_layer = 2 * 4096**2 + 2 * 4096 * 1024 + 8 * 4096 + 2 * 3 * 4096 * 14336
    attention = 32 * 3 * 2 * 4096 * 2048 * 2049
    assert flops.total == 6 * (32 * of_layer + 32000 * 4096) * 2048 + attention


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA RTX A1000", None),
        ("Tesla T4", None),
    ],
)
def test_peak(device: str, peak: float | None) -> None:
    assert peak_tflops(device) == peak


def test_peak_of_fp8() -> None:
    """Where there is any, FP8 multiplies twice as fast; the datasheets round each."""
    for name, bf16, fp8 in _PEAK_TFLOPS:
        assert fp8 is None or fp8 == pytest.approx(2 * bf16, rel=0.013), name
    assert peak_tflops("NVIDIA H100 80GB HBM3", fp8=True) == 1979
    assert peak_tflops("NVIDIA A100-SXM4-80GB", fp8=True) is None
