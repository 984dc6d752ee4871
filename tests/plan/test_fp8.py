"""FP8: what the flags mean, what they ask of model and machine, and what sequences are padded to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from megatron_vlm.architecture.fp8 import RECIPES, Fp8Config
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.parameters import stage_parameters
from megatron_vlm.config.run import RunConfig
from megatron_vlm.plan.fp8_rules import unsupported
from megatron_vlm.plan.memory import estimate
from megatron_vlm.plan.rules import broken_rules

TEXT = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 100,
}
GPU = ["--device", "cuda", "--fp8"]
GATHER = ["--dist-optim", "--fp8-param-gather"]
LAST2 = ["--first-last-layers-bf16", "--num-layers-at-end-in-bf16", "2"]


def model(**text: Any) -> ModelConfig:
    text = {**TEXT, **text}
    return ModelConfig.from_hf({"model_type": "llava", "text_config": text, "image_token_index": 7})


def problems(*argv: str, **text: Any) -> list[str]:
    """Return what is wrong with FP8, of all that is wrong."""
    config = RunConfig.from_flags([*GPU, *argv])
    told = [p for p in broken_rules(config, 8, model(**text)) if "fp8" in p or "bf16" in p]
    assert not any("\n" in line for line in told)
    return told


def test_fp8_is_tensorwise_and_bfloat16() -> None:
    config = RunConfig.from_flags(["--fp8"])
    assert config.fp8 == Fp8Config("tensorwise", False, 0, 0) and config.training.precision == "bf16"
    assert RunConfig.from_flags([]).fp8 is None and RunConfig.from_flags([]).training.precision is None
    assert RunConfig.from_flags(["--fp8", *LAST2]).fp8 == Fp8Config(bf16_at_start=1, bf16_at_end=2)
    formats = {recipe: Fp8Config(recipe).format for recipe in RECIPES}
    assert formats == {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--first-last-layers-bf16", "--fp8-recipe", "delayed"], "--fp8-recipe delayed; use tensorwise"),
        (["--num-layers-at-start-in-bf16", "2"], "does nothing without --first-last-layers-bf16"),
        (["--first-last-layers-bf16", "--num-layers-at-end-in-bf16", "-1"], "-1: must be 0 or more"),
        ([*LAST2[:-1], "0", "--num-layers-at-start-in-bf16", "0"], "no layer at either end; leave it out"),
        (["--fp8-param-gather", "--fp8-recipe", "delayed"], "delayed; use tensorwise or blockwise"),
        (["--fp8-param-gather", "--fp8-recipe", "mxfp8"], "mxfp8; use tensorwise or blockwise"),
    ],
)
def test_flags_that_contradict_each_other(argv: list[str], words: str) -> None:
    with pytest.raises(ValueError) as error:
        RunConfig.from_flags(["--fp8", *argv])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--device", "cpu"], "--fp8 needs GPUs, and --device cpu has none; use --bf16"),
        (["--device", "cpu", "--backend", "gloo"], "--device cpu has none"),
        (["--fp32"], "--fp32 asks for float32; drop one of them"),
        (["--transformer-impl", "local"], "needs Transformer Engine; leave --transformer-impl local out"),
        (["--fp8-param-gather"], "--fp8-param-gather needs --dist-optim"),
        (["--no-fp8", "--fp8-recipe", "delayed"], "--fp8-recipe does nothing without --fp8"),
        (["--no-fp8", "--first-last-layers-bf16"], "--first-last-layers-bf16 does nothing without --fp8"),
        (["--no-fp8", "--fp8-param-gather"], "--fp8-param-gather does nothing without --fp8"),
        ([*GATHER, "--stage", "1"], "layers.0.self_attention.linear_qkv.weight is frozen"),
        ([*GATHER, "--lora-rank", "8"], "is frozen, and checkpoints would hold it"),
        ([*LAST2, "--pp", "4"], "--num-layers-at-end-in-bf16 2: a pipeline stage has 1 of the 4 layers"),
        ([*LAST2, "--num-layers-at-start-in-bf16", "2"], "leave none of the 4 layers in FP8"),
    ],
)
def test_what_the_launcher_refuses(argv: list[str], words: str) -> None:
    (told,) = problems(*argv)
    assert words in told


@pytest.mark.parametrize(
    ("argv", "text", "words"),
    [
        ([], {"hidden_size": 504, "head_dim": 64}, "language model's hidden size is 504 wide; use --bf16"),
        (["--tp", "4"], {"intermediate_size": 544}, "with --tp 4 its MLP is 136 wide; use --tp 1 or 2"),
        (["--tp", "4"], {"head_dim": 4}, "its attention's output is 8 wide; use --tp 1 or 2, or"),
        (["--tp", "2"], {"head_dim": 9}, "its queries, keys and values are 72 wide; use --bf16"),
        (["--fp8-recipe", "mxfp8"], {"intermediate_size": 1040}, "multiples of 32, and with --tp 1 its MLP"),
    ],
)
def test_features_have_to_be_aligned_on_each_rank(argv: list[str], text: dict[str, Any], words: str) -> None:
    (told,) = problems(*argv, **text)
    assert words in told


def test_blockwise_gathers_whole_blocks() -> None:
    argv = ["--fp8-recipe", "blockwise", "--tp", "2"]
    assert problems(*argv, hidden_size=576, head_dim=64) == []
    (told,) = problems(*argv, "--sequence-parallel", hidden_size=576, head_dim=64)
    assert "multiples of 128, and with --tp 2 the language model's hidden size is 576 wide" in told


def test_experts_are_refused() -> None:
    (told,) = problems(model_type="mixtral", num_local_experts=4)
    assert "the experts of this model" in told and told.endswith("use --bf16")


def test_a_sound_run() -> None:
    assert problems("--tp", "4", "--pp", "2", "--sequence-parallel", *GATHER) == []
    assert problems("--lora-rank", "3", "--fp8-recipe", "delayed") == []  # adapters stay bfloat16


def test_what_stays_bfloat16_may_be_frozen_where_weights_are_fp8() -> None:
    argv = [*GATHER, "--train-modules", "projector|language.layers.3"]
    assert len(problems(*argv)) == 1
    argv += ["--first-last-layers-bf16", "--num-layers-at-start-in-bf16", "3"]
    assert problems(*argv, "--num-layers-at-end-in-bf16", "0") == []


def test_the_linears_are_the_models() -> None:
    """Those named in the rules are all of a layer's that multiply."""
    (stage,) = stage_parameters(model(), 1, [4])
    linears = [p.name for p in stage if ".linear_" in p.name and p.name.endswith(".weight")]
    of_language = [name for name in linears if name.startswith("language_model.decoder.layers.")]
    assert sorted(Fp8Config().weights(4)) == sorted(of_language) and len(of_language) == 16
    last = [name for name in of_language if "layers.3." in name]
    assert sorted(Fp8Config(bf16_at_start=2, bf16_at_end=0).weights(4)[4:]) == sorted(last)


@pytest.mark.parametrize(
    ("recipe", "alignment", "sequence_parallel"),
    [("tensorwise", 16, True), ("tensorwise", 16, False), ("mxfp8", 32, True), ("blockwise", 128, True)],
)
def test_sequences_are_padded_no_further_than_alignment_asks(
    recipe: str, alignment: int, sequence_parallel: bool
) -> None:
    for rows, tp in itertools.product(range(1, 40), (1, 2, 4)):
        parts = tp if sequence_parallel else 1
        lengths = range(parts, parts * alignment + 1, parts)
        smallest = next(length for length in lengths if length // parts * rows % alignment == 0)
        assert Fp8Config(recipe).sequence_multiple(rows, tp, sequence_parallel) == smallest, (rows, tp)


def test_packed_rows_are_one() -> None:
    argv = ["--fp8", "--micro-batch-size", "8", "--tp", "2", "--sequence-parallel"]
    assert RunConfig.from_flags(argv).sequence_multiple == 4
    assert RunConfig.from_flags([*argv, "--packing"]).sequence_multiple == 32
    assert RunConfig.from_flags([*argv, "--no-fp8"]).sequence_multiple == 2
    assert RunConfig.from_flags([]).sequence_multiple == 1


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "words"),
    [
        ("tensorwise", (9, 0), None, None),
        ("delayed", (8, 9), None, None),
        ("tensorwise", (8, 0), None, "8.9 or more, and a GPU here has compute capability 8.0; use --bf16"),
        ("mxfp8", (8, 6), None, "use --bf16"),
        ("mxfp8", (9, 0), None, "mxfp8 needs compute capability 10.0 up to 11.x"),
        ("mxfp8", (10, 0), None, None),
        ("mxfp8", (12, 0), None, "has compute capability 12.0; use tensorwise"),
        ("blockwise", (8, 9), (13, 0), "blockwise needs compute capability 9.0"),
        ("blockwise", (9, 0), (12, 8), "needs CUDA 12.9, and torch here has 12.8; use tensorwise"),
        ("blockwise", (9, 0), (13, 0), None),
        ("blockwise", (9, 0), None, None),
    ],
)
def test_gpus_that_lack_it(
    recipe: str, capability: tuple[int, int], cuda: tuple[int, int] | None, words: str | None
) -> None:
    told = unsupported(recipe, capability, cuda)
    assert told is None if words is None else words in str(told)


def test_memory_of_the_copies() -> None:
    """Two bytes more for each weight of FP8 products; none more where the weights are FP8 themselves."""
    argv = ["--device", "cuda", "--bf16", "--dist-optim", "--tp", "2"]

    def weights(*more: str) -> int:
        (stage,) = estimate(RunConfig.from_flags([*argv, *more]), model(), 2)
        return stage.weights

    of_layer = 512 * (512 + 2 * 256) + 512 * 512 + 3 * 512 * 1024  # queries, keys and values; output; MLP
    assert weights("--fp8") - weights() == 2 * 4 * of_layer // 2
    assert weights("--fp8", "--first-last-layers-bf16") - weights() == 2 * 2 * of_layer // 2
    assert weights("--fp8", "--fp8-param-gather") == weights()
