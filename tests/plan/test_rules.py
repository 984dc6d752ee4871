"""Rules between the sections of a run config, and between it and the model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.plan.pipeline import layers_per_stage
from megatron_vlm.plan.rules import broken_rules, validate
from tests.config.test_run_config import BASE


def error_of(argv: list[str], world_size: int, model: ModelConfig | None = None) -> str:
    with pytest.raises(ValueError) as error:
        validate(RunConfig.from_flags(argv), world_size, model)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_missing_is_named() -> None:
    for name in ("--name", "--save-dir", "--data-path", "--megatron-load-dir"):
        at = BASE.index(name)
        assert name in error_of(BASE[:at] + BASE[at + 2 :], 1)


def test_gpus_are_not_picked_for_the_cpu() -> None:
    assert "--gpu-ids picks GPUs" in error_of([*BASE, "--gpu-ids", "0", "--device", "cpu"], 1)


def test_names_that_are_not_utf8() -> None:
    """As the command line has them: os.fsdecode() of their bytes."""
    assert "--save-dir 'r\\udcff': is not UTF-8" in error_of([*BASE, "--save-dir", "r\udcff"], 1)


def test_layout_and_batch_rules() -> None:
    assert "use 4 or 8 ranks" in error_of([*BASE, "--tp", "2", "--pp", "2"], 6)
    assert "use 2 ranks" in error_of([*BASE, "--tp", "2"], 1)
    message = error_of([*BASE, "--micro-batch-size", "4", "--global-batch-size", "12"], 2)
    assert "--global-batch-size 12" in message and "8 or 16" in message and "--micro-batch-size 3" in message
    config = RunConfig.from_flags(
        [*BASE, "--tp", "2", "--micro-batch-size", "4", "--global-batch-size", "32"]
    )
    validate(config, 8)
    assert (config.dp(8), config.num_microbatches(8)) == (4, 2)
    assert "leaves none" in error_of([*BASE, "--lr-warmup-iters", "10"], 1)
    skipped = [*BASE, "--skip-train-iteration-range"]
    assert "leaves out all 10 iterations" in error_of([*skipped, "6-12", "1-5"], 1)
    validate(RunConfig.from_flags([*skipped, "1-9"]), 1)


def test_interleaved_stages_need_groups_of_micro_batches() -> None:
    argv = [*BASE, "--pp", "4", "--vpp", "2", "--micro-batch-size", "2"]
    message = error_of([*argv, "--global-batch-size", "24"], 8)
    assert "micro batches in multiples of --pp 4" in message and "has 6" in message
    assert message.endswith("use --global-batch-size 16 or 32")
    validate(RunConfig.from_flags([*argv, "--global-batch-size", "32"]), 8)


def test_adapters_have_to_be_there_to_be_trained() -> None:
    assert "add --lora-rank" in error_of([*BASE, "--train-modules", "lora|projector"], 1)


def test_adapters_are_not_gathered_in_the_background() -> None:
    flags = ["--lora-rank", "4", "--dist-optim", "--overlap-param-gather"]
    assert "--overlap-param-gather does not run with LoRA" in error_of([*BASE, *flags], 1)


def test_the_length_defaults_to_one_epoch() -> None:
    at = BASE.index("--train-iters")
    config = RunConfig.from_flags([*BASE[:at], *BASE[at + 2 :], "--global-batch-size", "128"])
    validate(config, 1)
    assert config.with_length(1300).train_iterations == 10
    with pytest.raises(ValueError, match="--train-samples 100 is less than one iteration"):
        config.with_length(100)
    assert RunConfig.from_flags(BASE).with_length(1300).train_iterations == 10


@pytest.mark.parametrize(
    ("epochs", "samples", "expected"),
    [
        ("1", 1300, 1300),
        ("3", 1300, 3900),
        ("0.5", 1300, 650),
        ("0.29", 100, 29),
        ("1.1", 30, 33),
        ("2", 7, 14),
    ],
)
def test_epochs_are_passes_over_the_samples(epochs: str, samples: int, expected: int) -> None:
    """To the sample, also where the product of floats would be a little less."""
    flags = ["--epochs", epochs, "--global-batch-size", "4"]
    config = RunConfig.from_flags([*BASE[:-2], *flags])
    validate(config, 1)
    assert config.iterations_over(None) is None and config.iterations_over(samples) == expected // 4
    told = config.with_length(samples)
    assert (told.training.train_samples, told.training.epochs) == (expected, None)
    assert told.train_iterations == told.decay_iterations == expected // 4
    # What a run has saved is taken again, and another number of epochs in its place.
    assert RunConfig.from_flags(told.to_flags()) == told


def test_epochs_that_are_less_than_an_iteration() -> None:
    config = RunConfig.from_flags([*BASE[:-2], "--epochs", "0.1"])
    with pytest.raises(
        ValueError, match=r"^--epochs 0.1 of 1000 samples is less than one iteration of --glob"
    ):
        config.with_length(1000)


def test_epochs_take_the_place_of_a_files_length(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for other in ("train-iters", "train-samples"):
        path.write_text(json.dumps({other: 1000}))
        config = RunConfig.from_flags(["--config", str(path), "--epochs", "2"])
        assert (config.training.epochs, config.training.iterations) == (2, None)
        path.write_text(json.dumps({"epochs": 2}))
        config = RunConfig.from_flags(["--config", str(path), f"--{other}", "1000"])
        assert config.training.epochs is None


def test_default_loader_workers_do_not_depend_on_dp_where_that_is_possible() -> None:
    def workers(microbatches: int, world_size: int) -> int:
        argv = ["--global-batch-size", str(microbatches), "--micro-batch-size", "1"]
        return RunConfig.from_flags(argv).data_workers(world_size)

    assert [workers(128, dp) for dp in (1, 2, 4)] == [4, 4, 4]
    assert [workers(12, dp) for dp in (1, 2, 4)] == [4, 4, 4]
    assert [workers(6, dp) for dp in (1, 2, 3, 6)] == [6, 6, 6, 6]
    assert [workers(2, dp) for dp in (1, 2)] == [2, 2]
    assert workers(1, 1) == 1
    assert workers(64, 8) == 8  # more ranks than four: as many as there are ranks


def test_loader_workers_that_do_not_fit() -> None:
    batch = [*BASE, "--global-batch-size", "12", "--micro-batch-size", "1"]
    assert "use --data-workers 2, 4, 6 or 12" in error_of([*batch, "--data-workers", "3"], 2)
    assert "use --data-workers 2, 4, 6 or 12" in error_of([*batch, "--data-workers", "8"], 2)
    assert "leave one of them out" in error_of([*batch, "--data-workers", "4", "--num-workers", "2"], 2)
    two_nodes = [*batch, "--num-workers", "2", "--node", "2"]
    assert RunConfig.from_flags(two_nodes).data_workers(2) == 4
    assert RunConfig.from_flags([*two_nodes, "--data-workers", "4"]).data_workers(2) == 4
    assert "--num-workers 5 x 1 node = 5" in error_of([*batch, "--num-workers", "5"], 1)


def test_rules_that_need_the_model() -> None:
    model = ModelConfig.from_hf(
        {
            "model_type": "llava",
            "vision_config": {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
            "text_config": {
                "model_type": "llama",
                "vocab_size": 100,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_attention_heads": 8,
                "num_hidden_layers": 4,
            },
            "image_token_index": 99,
        }
    )
    assert "--tp 3 does not divide" in error_of([*BASE, "--tp", "3", "--global-batch-size", "3"], 3, model)
    assert "--pp 5: the language model has only 4" in error_of([*BASE, "--pp", "5"], 5, model)
    assert "--pp 2 x --vpp 3 makes 6" in error_of([*BASE, "--pp", "2", "--vpp", "3"], 2, model)
    first = ["--pp", "2", "--decoder-first-pipeline-num-layers", "4"]
    assert "leave 0 of the 4 layers" in error_of([*BASE, *first], 2, model)
    trained = RunConfig.from_flags([*BASE, "--pp", "2", "--train-vision"])
    assert layers_per_stage(trained, model) == (1, 3)  # the tower is far larger than this language model
    assert "16 tokens" in error_of([*BASE, "--seq-length", "16"], 1, model)
    assert "clip tower has a class token" in error_of([*BASE, "--no-add-class-token"], 1, model)
    tower = dataclasses.replace(model.vision, family="siglip")
    siglip = dataclasses.replace(model, vision=tower, feature_strategy="full")
    assert "siglip tower has no class token" in error_of([*BASE, "--add-class-token"], 1, siglip)
    for flag, fitting in (("--add-class-token", model), ("--no-add-class-token", siglip)):
        config = RunConfig.from_flags([*BASE, flag])
        validate(config, 1, fitting)
        assert RunConfig.from_dict(config.to_dict()) == RunConfig.from_flags(config.to_flags()) == config
    assert "vocabulary of 100" in error_of([*BASE, "--image-token-id", "100"], 1, model)
    validate(RunConfig.from_flags([*BASE, "--tp", "4", "--pp", "2", "--seq-length", "17"]), 8, model)


INIT = ["--name", "a", "--save-dir", "b", "--data-path", "c", "--init"]


def test_packing_needs_to_know_how_long() -> None:
    """For a pass over the samples it would have to pack them first."""
    flags = ["--packing", "--data-path", "d", "--megatron-load-dir", "e", "--save-dir", "s", "--name", "n"]
    for config in (
        RunConfig.from_flags([*flags, "--train-samples", "1000"]),
        RunConfig.from_flags(flags).with_length(1000),
        RunConfig.from_flags([*flags, "--epochs", "2"]),
        RunConfig.from_flags([*flags, "--epochs", "2"]).with_length(1000),
    ):
        with pytest.raises(ValueError, match="--packing needs --train-iters"):
            validate(config, 1)
    validate(RunConfig.from_flags([*flags, "--train-iters", "5"]), 1)


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--init needs --tokenizer-load-dir"),
        (["--tokenizer-load-dir", "d", "--megatron-load-dir", "e"], "both say which weights to start from"),
        (["--tokenizer-load-dir", "d", "--load-optim"], "--load-optim has nothing to load with --init"),
    ],
)
def test_init_needs_a_config_and_nothing_else(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(RunConfig.from_flags([*INIT, *flags]), 1)
    validate(RunConfig.from_flags([*INIT, "--tokenizer-load-dir", "d"]), 1)


def test_all_broken_rules_are_told_and_validate_raises_the_first() -> None:
    config = RunConfig.from_flags(
        ["--train-iters", "5", "--lr-warmup-iters", "9", "--global-batch-size", "3"]
    )
    problems = broken_rules(config, world_size=2)
    words = ["--data-path", "--megatron-load-dir", "--save-dir", "the warmup of 9", "--global-batch-size 3"]
    assert len(problems) == len(words)  # the batch is met by two rules and told once
    assert all(word in problem for word, problem in zip(words, problems, strict=True))
    with pytest.raises(ValueError) as error:
        validate(config, world_size=2)
    assert str(error.value) == problems[0]


def test_a_projector_of_adapters_is_not_left_out_of_checkpoints() -> None:
    argv = [*BASE, "--lora-rank", "4", "--lora-load-dir", "adapter", "--save-trained-only"]
    validate(RunConfig.from_flags(argv), 1)
    assert "loses the projector of --lora-load-dir" in error_of([*argv, "--train-modules", "lora"], 1)
