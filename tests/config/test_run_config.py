"""The run config: one table of flags, read from a command line or from JSON."""

from __future__ import annotations

import dataclasses
import json
import re
import typing

import pytest

from megatron_vlm.config.flags import REQUIRED, flag_name
from megatron_vlm.config.run import RunConfig
from megatron_vlm.config.sections import SECTIONS
from megatron_vlm.plan.rules import validate

# What every run has to say; the rest has defaults.
BASE = ["--name", "run", "--save-dir", "runs", "--data-path", "data", "--megatron-load-dir", "ckpt"]
BASE += ["--train-iters", "10"]

# Flags in the README of the system that this one takes the place of.
ORIGINAL_FLAGS = """
-g --gpus --gpu-ids --save --name --wandb --log-interval --megatron-load-dir --tokenizer-load-dir --save-dir
--sif-path --save-optim --load-optim --init --save-interval --skip-train-iteration-range --tp --pp
--micro-batch-size --global-batch-size --num-workers --node -r --rank -m --master-addr -p --master-port
--backend --interface --rdzv-port --dist-optim --image-token-id --pad-token-id --freeze-lm --stage --lang
--slurm-job-id --slurm-output-name --fp8 --no-add-class-token --debug --deterministic
"""
MEGATRON_FLAGS = """
--train-iters --train-samples --lr --min-lr --lr-decay-style --lr-decay-iters --lr-warmup-iters
--lr-warmup-fraction --weight-decay --adam-beta1 --adam-beta2 --adam-eps --clip-grad --seed --seq-length
--bf16 --fp32 --sequence-parallel --make-vocab-size-divisible-by --decoder-first-pipeline-num-layers
--decoder-last-pipeline-num-layers --recompute-num-layers --overlap-grad-reduce --overlap-param-gather
--tp-comm-overlap --distributed-timeout-minutes --fp8-recipe --fp8-param-gather --first-last-layers-bf16
--num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16
"""


def all_fields() -> list[tuple[str, dataclasses.Field, object]]:
    found = []
    for section, cls in SECTIONS.items():
        types = typing.get_type_hints(cls)
        found += [(section, field, types[field.name]) for field in dataclasses.fields(cls)]
    return found


FIELDS = all_fields()
FIELD_NAMES = [field.name for _, field, _ in FIELDS]
AVAILABLE = [entry for entry in FIELDS if not entry[1].metadata["not_yet"]]
# What a field's rule asks for beside it.
COMPANIONS = {
    "sequence_parallel": ["--tp", "2"],
    "vpp": ["--pp", "2"],
    "decoder_first_pipeline_num_layers": ["--pp", "2"],
    "decoder_last_pipeline_num_layers": ["--pp", "2"],
    "overlap_param_gather": ["--dist-optim"],
    "recompute_num_layers": ["--recompute", "full"],
    "gpu_ids": ["--gpus", "2"],
    "lr_warmup_iters": ["--lr-warmup-iters", "3"],
    "lora_rank": ["--freeze-lm"],
    **{
        name: ["--lora-rank", "4"]
        for name in ("lora_alpha", "lora_dropout", "lora_targets", "use_rslora", "lora_load_dir")
    },
    "eval_iters": ["--eval-interval", "5"],
    "early_stopping_patience": ["--eval-interval", "5"],
    "early_stopping_min_delta": ["--eval-interval", "5", "--early-stopping-patience", "2"],
    "spike_threshold": ["--alert-spike"],
    "fp8": ["--bf16"],
    "num_layers_at_start_in_bf16": ["--first-last-layers-bf16"],
    "num_layers_at_end_in_bf16": ["--first-last-layers-bf16"],
    "bind": ["--sif-path", "image.sif"],
    **{key: ["--wandb"] for key in ("wandb_mode", "wandb_project", "wandb_entity", "wandb_name")},
}


def other_value(section: str, field: dataclasses.Field, kind: object) -> object:
    """A legal value that is not the default, to see that it survives."""
    special = {"tp": 2, "seq_length": 77, "lr_warmup_fraction": 0.25, "max_corrupt_rate": 0.5, "min_lr": 1e-9}
    special |= {"adam_beta1": 0.5, "adam_beta2": 0.25, "global_batch_size": 96, "micro_batch_size": 4}
    special |= {"lora_targets": ("q_proj", "vision.fc1"), "spike_threshold": 3.0}
    special |= {"train_samples": 1000, "backend": "gloo", "bind": ("/a:/b:ro", "/c"), "gpus": 3}
    special |= {"name": "-odd 'name' $HOME\t\"x\"", "lr": 0.1 + 0.2, "gpu_ids": ("0", "2"), "stage": 2}
    special |= {"train_modules": "projector:1e-3|language", "skip_train_iteration_range": ("3-4", "1-2")}
    special |= {"setup": ("module load a,b", "-x\n"), "sbatch": ("--mem=0", "comment='a, b'")}
    special |= {"environment": ("A=b,c", "B=", "C=$x\n=y"), "master_suffix": "-i"}
    special |= {"gpu_request": "--gpus-per-node=h100:{gpus}", "time": "4:00:00"}
    if field.name in special:
        return special[field.name]
    choices = field.metadata["choices"]
    if choices:
        return next(choice for choice in choices if choice != field.default)
    if kind is bool:
        return field.default is not True
    scalar = next((a for a in typing.get_args(kind) if a is not type(None)), kind)
    return {bool: True, int: 7, float: 0.125, str: "a b"}[scalar]


def test_all_flags_of_the_readme_exist(capsys) -> None:
    with pytest.raises(SystemExit):
        RunConfig.from_flags(["--help"])
    options = set(re.findall(r"(?<!\S)--?[a-z0-9-]+", capsys.readouterr().out))
    assert {
        *ORIGINAL_FLAGS.split(),
        *MEGATRON_FLAGS.split(),
        "--no-save",
        "--config",
        "--dry-run",
    } - options == set()


def test_names_are_unique_and_no_section_is_named_like_a_flag() -> None:
    assert len(set(FIELD_NAMES)) == len(FIELD_NAMES)
    assert not set(FIELD_NAMES) & set(SECTIONS)


@pytest.mark.parametrize(
    ("section", "field", "kind"), AVAILABLE, ids=[field.name for _, field, _ in AVAILABLE]
)
def test_every_field_survives_flags_json_and_dict(section, field, kind, tmp_path) -> None:
    value = other_value(section, field, kind)
    companions = COMPANIONS.get(field.name, [])
    base = [
        arg
        for arg in BASE
        if field.name not in ("train_samples", "epochs") or arg not in ("--train-iters", "10")
    ]
    start = RunConfig.from_flags(base + companions)
    changed = dataclasses.replace(getattr(start, section), **{field.name: value})
    config = dataclasses.replace(start, **{section: changed})
    assert (
        getattr(getattr(config, section), field.name) == value != getattr(getattr(start, section), field.name)
    )

    assert RunConfig.from_flags(config.to_flags()) == config
    assert RunConfig.from_dict(config.to_dict()) == config
    path = str(tmp_path / "config.json")
    config.save(path)
    assert RunConfig.load(path) == config
    assert RunConfig.from_flags(["--config", path]) == config


def test_flags_win_over_the_file(tmp_path) -> None:
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps(
            {"tp": 2, "train-samples": 512, "dist-optim": True, "optimizer": {"lr": 0.5}, "fp32": True}
        )
    )
    config = RunConfig.from_flags(
        ["--config", str(path), "--tp", "4", "--train-iters", "3", "--no-dist-optim"]
    )
    assert config.parallel.tp == 4
    assert (config.training.train_iters, config.training.train_samples) == (3, None)
    assert not config.parallel.dist_optim
    assert config.optimizer.lr == 0.5
    assert config.training.precision == "fp32"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tpp": 2}, ["run.json", "tpp", "did you mean tp?"]),
        ({"optimiser": {"lr": 1}}, ["optimiser", "did you mean optimizer?"]),
        ({"training": {"lr": 1}}, ["training.lr", "belongs to section optimizer"]),
        ({"optimizer": {"learning_rate": 1}}, ["optimizer.learning_rate"]),
        ({"optimizer": {"weight-decy": 1}}, ["did you mean weight_decay?"]),
        ({"tp": "two"}, ["--tp", "two"]),
        ({"tp": 2.5}, ["--tp", "2.5"]),
        ({"tp": True}, ["tp", "True"]),
        ({"tp": [2]}, ["tp", "an integer"]),
        ({"save": "yes"}, ["save", "true or false"]),
        ({"precision": "fp16"}, ["precision", "bf16, fp32"]),
        ({"bind": "/a"}, ["bind", "a list"]),
        ({"environment": ["A=1", None]}, ["environment", "strings or numbers"]),
        ({"optimizer": 3}, ["optimizer is a section"]),
        ({"help": True}, ["help"]),
        ({"config": "other.json"}, ["config"]),
        ({"tp_comm_overlap": True}, ["--tp-comm-overlap is not available yet"]),
        ({"bf16": True, "fp32": True}, ["--fp32: not allowed with argument --bf16"]),
        ([1], ["expected a JSON object"]),
    ],
)
def test_bad_json_is_one_line(values, words, tmp_path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError) as error:
        RunConfig.from_flags(["--config", str(path)])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"--config .*none\.json: No such file"):
        RunConfig.from_flags(["--config", str(tmp_path / "none.json")])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"--config .*bad\.json: not valid JSON"):
        RunConfig.load(str(tmp_path / "bad.json"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tpp", "2"], ["--tpp", "did you mean --tp?"]),
        (["--global-batchsize=3"], ["did you mean --global-batch-size?"]),
        (["oops"], ["unexpected argument 'oops'"]),
        (["--tp", "x"], ["--tp", "x"]),
        (["--tp", "0"], ["--tp 0", "above 0"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", "-1"], ["--lr", "0 or more"]),
        (["--gpus", "0"], ["--gpus 0", "-1 for all"]),
        (["--stage", "3"], ["--stage", "3"]),
        (["--packing", "--group-by-length"], ["--group-by-length", "--packing", "drop one"]),
        (["--packing-buffer-size", "0"], ["--packing-buffer-size 0", "above 0"]),
        (["--stage", "1", "--no-freeze-lm"], ["--no-freeze-lm", "--stage 1"]),
        (["--backend", "mpi"], ["--backend mpi", "nccl", "gloo"]),
        (["--backend", "nccl", "--device", "cpu"], ["--backend nccl", "--device cpu"]),
        (["--backend", "gloo", "--device", "cuda"], ["--backend gloo", "--device cuda"]),
        (["--distributed-timeout-minutes", "0"], ["--distributed-timeout-minutes 0", "above 0"]),
        (["--sequence-parallel"], ["--sequence-parallel", "--tp 2"]),
        (["--vpp", "2"], ["--vpp needs --pp 2"]),
        (["--decoder-last-pipeline-num-layers", "3"], ["--decoder-last-pipeline-num-layers needs --pp 2"]),
        (["--decoder-first-pipeline-num-layers", "0", "--pp", "2"], ["num-layers 0", "above 0"]),
        (["--recompute", "some"], ["--recompute", "'some'", "selective"]),
        (["--recompute-num-layers", "2"], ["--recompute-num-layers needs --recompute full"]),
        (["--overlap-param-gather"], ["--overlap-param-gather needs --dist-optim"]),
        (
            ["--dist-optim", "--no-overlap-grad-reduce", "--overlap-param-gather"],
            ["--overlap-param-gather contradicts --no-overlap-grad-reduce"],
        ),
        (["--tp-comm-overlap"], ["--tp-comm-overlap", "not available yet"]),
        (["--save-optim", "--no-save"], ["--save-optim", "--no-save"]),
        (["--name", "a/b"], ["--name", "a/b"]),
        (["--name", ".."], ["--name"]),
        (["--name", ""], ["--name"]),
        (["--min-lr", "1", "--lr", "0.1"], ["--min-lr 1.0", "--lr 0.1"]),
        (
            ["--lr-warmup-iters", "1", "--lr-warmup-fraction", "0.1"],
            ["--lr-warmup-iters", "--lr-warmup-fraction"],
        ),
        (["--train-iters", "1", "--train-samples", "1000"], ["--train-iters", "--train-samples"]),
        (["--train-iters", "1", "--epochs", "2"], ["--train-iters and --epochs both say how long to train"]),
        (["--train-samples", "999", "--epochs", "2"], ["--train-samples and --epochs both say"]),
        (["--epochs", "0"], ["--epochs 0", "above 0"]),
        (["--epochs", "inf"], ["--epochs", "inf"]),
        (["--train-samples", "100"], ["--train-samples 100", "--global-batch-size 128"]),
        (["--micro-batch-size", "3", "--global-batch-size", "10"], ["--global-batch-size 9 or 12"]),
        (["--gpu-ids", "0,1", "-g", "1"], ["--gpu-ids", "--gpus 2"]),
        (["--gpu-ids", "0,0"], ["--gpu-ids", "twice"]),
        (["--seed", str(1 << 31)], ["--seed 2147483648", "below"]),
        (["--master-port", "70000"], ["--master-port 70000", "65535"]),
        (["--skip-train-iteration-range", "110-100"], ["110-100", "such as 100-110"]),
        (["--skip-train-iteration-range", "1-2", "0-5"], ["0-5", "from 1 on"]),
        (["--skip-train-iteration-range", "100"], ["100", "such as 100-110"]),
        (["--template", "llm_jp", "--lang", "en"], ["--template llm_jp is Japanese", "--lang en"]),
        (["--template", "alpaca"], ["--template", "'alpaca'", "llama_3"]),
        (["--eval-iters", "2"], ["--eval-iters", "--eval-interval"]),
        (["--early-stopping-patience", "2"], ["--early-stopping-patience", "--eval-interval"]),
        (["--eval-interval", "5", "--early-stopping-min-delta", "0.1"], ["--early-stopping-patience"]),
        (["--eval-interval", "0"], ["--eval-interval 0", "above 0"]),
        (["--keep-checkpoints", "0"], ["--keep-checkpoints 0", "above 0"]),
        (["--keep-checkpoints", "2", "--no-save"], ["--keep-checkpoints", "--no-save"]),
    ],
)
def test_bad_flags_are_one_line(argv, words) -> None:
    with pytest.raises(ValueError) as error:
        RunConfig.from_flags(argv)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_skipped_ranges_are_merged() -> None:
    flags = ["--skip-train-iteration-range", "300-400", "100-110", "105-120,121-122", "--train-iters", "10"]
    training = RunConfig.from_flags(RunConfig.from_flags(flags).to_flags()).training
    assert training.skipped_ranges == ((100, 122), (300, 400))
    found = [i for i in range(1, 500) if training.skips(i)]
    assert found == [*range(100, 123), *range(300, 401)]


def test_an_unavailable_switch_may_be_off() -> None:
    assert RunConfig.from_flags(["--no-tp-comm-overlap"]) == RunConfig.from_flags([])


@pytest.mark.parametrize(
    ("argv", "freeze_lm", "micro", "batch", "lr"),
    [
        (["--stage", "1"], True, 16, 256, 1e-3),
        (["--stage", "2"], False, 1, 128, 2e-5),
        ([], False, 1, 128, 2e-5),
        (["--stage", "2", "--freeze-lm", "--lr", "0.5"], True, 1, 128, 0.5),
    ],
)
def test_the_stage_chooses_the_recipe(argv, freeze_lm, micro, batch, lr) -> None:
    config = RunConfig.from_flags(argv)
    assert config.model.freeze_lm is freeze_lm
    assert (config.training.micro_batch_size, config.training.global_batch_size) == (micro, batch)
    assert (config.optimizer.lr, config.optimizer.min_lr) == (lr, 1e-8)
    assert (config.optimizer.lr_decay_style, config.optimizer.weight_decay) == ("cosine", 0.1)
    assert (config.optimizer.clip_grad, config.training.precision) == (1.0, None)


def test_a_learning_rate_of_zero_needs_no_other_flag() -> None:
    config = RunConfig.from_flags([*BASE, "--lr", "0"])
    assert config.optimizer.min_lr == 0.0
    validate(config, 1)


def test_schedule_lengths() -> None:
    config = RunConfig.from_flags(["--train-samples", "2600", "--global-batch-size", "25"])
    assert (config.train_iterations, config.decay_iterations, config.warmup_iterations) == (104, 104, 3)
    config = RunConfig.from_flags(["--train-iters", "50", "--lr-warmup-iters", "5", "--lr-decay-iters", "40"])
    assert (config.train_iterations, config.decay_iterations, config.warmup_iterations) == (50, 40, 5)


def test_to_flags_leaves_fixed_defaults_out_and_names_the_recipe() -> None:
    flags = RunConfig.from_flags([*BASE, "--stage", "1", "--save", "--tp", "1"]).to_flags()
    assert "--save" not in flags and "--tp" not in flags
    assert flags[flags.index("--lr") + 1] == "0.001"


def test_help_is_grouped_and_shows_defaults(capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        RunConfig.from_flags(["--help"], prog="run.py")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    headings = [
        "GPU-related",
        "Logging",
        "Save/Load",
        "Model parallel",
        "Distributed settings",
        "Tokenizer-related",
    ]
    positions = [
        text.index(f"\n{heading}") for heading in [*headings, "Training settings", "SLURM", "Other", "Debug"]
    ]
    assert positions == sorted(positions)
    assert "(default: 2000)" in text and "1e-3 in --stage 1" in text
    for _, field, _ in FIELDS:
        if not field.metadata["switches"]:
            assert flag_name(field.name) in text
        assert field.default is not REQUIRED or field.metadata["shown_default"], field.name


def test_another_stage_than_the_files_brings_its_own_recipe(tmp_path) -> None:
    file = str(tmp_path / "config.json")
    RunConfig.from_flags(["--stage", "1", "--seq-length", "512"]).save(file)
    recipe = lambda config: (  # noqa: E731
        config.model.freeze_lm,
        config.optimizer.lr,
        config.training.micro_batch_size,
        config.training.global_batch_size,
    )
    second = RunConfig.from_flags(["--config", file, "--stage", "2"])
    assert recipe(second) == recipe(RunConfig.from_flags(["--stage", "2"])) != recipe(RunConfig.load(file))
    assert second.data.seq_length == 512
    assert recipe(RunConfig.from_flags(["--config", file, "--stage", "1"])) == recipe(RunConfig.load(file))
    # What the file's author chose stays, and so does what stands on the command line.
    RunConfig.from_flags(["--stage", "1", "--lr", "5e-4"]).save(file)
    chosen = RunConfig.from_flags(["--config", file, "--stage", "2", "--micro-batch-size", "16"])
    assert recipe(chosen) == (False, 5e-4, 16, 128)
    RunConfig.from_flags(["--stage", "2"]).save(file)
    adapted = RunConfig.from_flags(["--config", file, "--lora-rank", "8"])
    assert recipe(adapted)[:2] == (True, 2e-4)
