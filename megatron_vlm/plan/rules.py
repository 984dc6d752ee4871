"""Rules between the sections of a run config, and between it and the model; each raises a ``ValueError``."""

from __future__ import annotations

import dataclasses
from typing import Callable, Dict, List, Optional

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.mixture import one_pass
from megatron_vlm.config.checks import nearest_multiples
from megatron_vlm.config.flags import flag_name
from megatron_vlm.config.run import RunConfig
from megatron_vlm.plan import fp8_rules
from megatron_vlm.plan.packing_estimate import estimate_run
from megatron_vlm.plan.pipeline import layers_per_stage


def validate(config: RunConfig, world_size: int, model: Optional[ModelConfig] = None) -> None:
    """Check the rules between a config's sections.

    Args:
        world_size: number of ranks.
        model: the architecture, where it is known; with it the flags are checked against it.

    Raises:
        ValueError: one line that names the flags that disagree and what would work.
    """
    for problem in broken_rules(config, world_size, model):
        raise ValueError(problem)


def broken_rules(config: RunConfig, world_size: int, model: Optional[ModelConfig] = None) -> List[str]:
    """Return a line for each rule that is broken, as :func:`validate`: it raises the first."""
    rules: List[Callable[[], object]] = [
        lambda: _text(config),
        lambda: _data(config),
        lambda: _packing(config, world_size),
        lambda: _weights(config),
        lambda: config.checkpoint.run_dir,
        lambda: _schedule(config),
        lambda: _devices(config),
        lambda: _adapters(config),
        lambda: fp8_rules.check_flags(config),
    ]
    if model is not None:
        known = model  # for mypy: a lambda forgets what was narrowed
        rules += [
            lambda: known.check_layout(config.parallel.tp, config.parallel.pp),
            lambda: [entry.patterns(known) for entry in config.trained],
            lambda: _sequence(config, known),
            lambda: _no_adapters_on_experts(config, known),
            lambda: layers_per_stage(config, known),
            lambda: _class_token(config, known),
            lambda: _token_ids(config, known),
            lambda: fp8_rules.check_model(config, known),
        ]
    rules += [
        lambda: _interleaving(config, world_size),
        lambda: _overlap(config, model),
        lambda: config.data_workers(world_size),
    ]
    found: Dict[str, None] = {}  # in order; two rules may meet the same problem
    for rule in rules:
        try:
            rule()
        except ValueError as error:
            found[str(error)] = None
    return list(found)


def _text(config: RunConfig) -> None:
    """Check that texts are UTF-8; a rank could not print other bytes, nor save them with the run."""
    for section in dataclasses.asdict(config).values():
        for name, value in section.items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                    raise ValueError(f"{flag_name(name)} {text!r}: is not UTF-8; give another name")


def _data(config: RunConfig) -> None:
    if config.data.data_path is None:
        raise ValueError("--data-path is missing: a folder on which `energon prepare` was run")


def _packing(config: RunConfig, world_size: int) -> None:
    if config.data.packing and config.training.train_iters is None:
        given = "" if config.training.epochs is None else " in place of --epochs"
        raise ValueError(
            f"--packing needs --train-iters{given}: how many sequences the samples make is only known once "
            f"they are packed; {_packed_length(config, world_size)}"
        )


def _packed_length(config: RunConfig, world_size: int) -> str:
    """Return the ``--train-iters`` of the passes that the flags ask for, as far as that can be told."""
    try:
        samples = one_pass(str(config.data.data_path))
        packed = estimate_run(config, world_size, samples) if samples else None
    except (ValueError, OSError):  # another rule says so
        samples = packed = None
    if samples is None or packed is None:
        return "a pass over them takes about samples x mean length / --seq-length / --global-batch-size"
    epochs, batch = config.training.epochs or 1, config.training.global_batch_size
    passes = "one pass takes" if epochs == 1 else f"{epochs:g} passes take"
    iterations = packed.iterations(samples * epochs, batch)
    return f"by the lengths that prepare.py counted, {passes} about --train-iters {iterations}"


def _weights(config: RunConfig) -> None:
    if config.model.init:
        if config.model.megatron_load_dir is not None:
            raise ValueError("--init and --megatron-load-dir both say which weights to start from; give one")
        if config.model.tokenizer_load_dir is None:
            raise ValueError("--init needs --tokenizer-load-dir: the Hugging Face folder of the model")
        if config.checkpoint.load_optim:
            raise ValueError("--load-optim has nothing to load with --init; drop one of them")
    elif config.model.megatron_load_dir is None:
        raise ValueError(
            "--megatron-load-dir is missing; make one with scripts/convert/convert_hf_to_megatron.py"
        )


def _schedule(config: RunConfig) -> None:
    iterations, ranges = config.training.iterations, config.training.skipped_ranges
    length_is_known = iterations is not None or config.optimizer.lr_decay_iters is not None
    if length_is_known and config.warmup_iterations >= config.decay_iterations:
        raise ValueError(
            f"the warmup of {config.warmup_iterations} iterations leaves none of {config.decay_iterations} "
            f"for the decay; use --lr-warmup-iters {config.decay_iterations - 1} or less, or train longer"
        )
    if iterations is not None and ranges and ranges[0][0] == 1 and ranges[0][1] >= iterations:
        raise ValueError(
            f"--skip-train-iteration-range leaves out all {iterations} iterations; name fewer, or train "
            "longer"
        )


def _devices(config: RunConfig) -> None:
    if config.launch.gpu_ids and config.parallel.device == "cpu":
        raise ValueError("--gpu-ids picks GPUs, and --device cpu uses none; drop one of them")


def _adapters(config: RunConfig) -> None:
    if config.lora.adapters is None and any(entry.name == "lora" for entry in config.trained):
        raise ValueError("--train-modules lora: there are no adapters; add --lora-rank, such as 16")
    projector = any(entry.may_train("projector") for entry in config.trained)
    if config.checkpoint.save_trained_only and config.lora.lora_load_dir is not None and not projector:
        raise ValueError(
            "--save-trained-only loses the projector of --lora-load-dir; train it, or leave one out"
        )


def _no_adapters_on_experts(config: RunConfig, model: ModelConfig) -> None:
    lora = config.lora.adapters
    if model.language.num_experts is None or lora is None:
        return
    wrong = [name for name in lora.targets if name in ("gate_proj", "up_proj", "down_proj")]
    if wrong:
        rest = " ".join(name for name in lora.targets if name not in wrong)
        raise ValueError(
            f"--lora-targets {' '.join(wrong)}: the experts of this model can't have adapters; "
            f"use --lora-targets {rest or 'q_proj k_proj v_proj o_proj'}"
        )


def _sequence(config: RunConfig, model: ModelConfig) -> None:
    if config.data.seq_length <= model.min_image_tokens:
        at_least = "" if model.anyres is None else "at least "
        raise ValueError(
            f"--seq-length {config.data.seq_length} has no room for text: an image takes {at_least}"
            f"{model.min_image_tokens} tokens; use more"
        )
    window = model.language.sliding_window
    if window is not None and config.data.seq_length > window:
        raise ValueError(
            f"--seq-length {config.data.seq_length} is longer than the language model's sliding window of "
            f"{window} tokens, and here attention is over the whole sequence; "
            f"use --seq-length {window} or less"
        )


def _class_token(config: RunConfig, model: ModelConfig) -> None:
    without = config.model.no_add_class_token
    if without is not None and without == bool(model.vision.prefix_tokens):
        flag, has = ("--no-add-class-token", "a") if without else ("--add-class-token", "no")
        tower = f"the {model.vision.family} tower has {has} class token"
        raise ValueError(f"{flag}: {tower}; leave the flag out")


def _token_ids(config: RunConfig, model: ModelConfig) -> None:
    for name in ("image_token_id", "pad_token_id"):
        token = getattr(config.model, name)
        if token is not None and token >= model.language.vocab_size:
            raise ValueError(
                f"--{name.replace('_', '-')} {token} is outside the vocabulary of "
                f"{model.language.vocab_size}; leave the flag out to take the tokenizer's"
            )
    token = config.model.image_token_id
    if token not in (None, model.image_token_id):
        raise ValueError(
            f"--image-token-id {token}: the model was built with {model.image_token_id}; leave the flag out"
        )


def _interleaving(config: RunConfig, world_size: int) -> None:
    """Check the micro batches of interleaved stages, which take them in groups, one for each pipeline
    rank."""
    pp, vpp, microbatches = config.parallel.pp, config.parallel.vpp, config.num_microbatches(world_size)
    if vpp > 1 and microbatches % pp:
        batch = config.training.global_batch_size
        step = config.training.micro_batch_size * config.dp(world_size) * pp
        raise ValueError(
            f"--vpp {vpp} needs micro batches in multiples of --pp {pp}, and each data-parallel rank has "
            f"{microbatches}; {nearest_multiples('--global-batch-size', batch, step)}"
        )


def _overlap(config: RunConfig, model: Optional[ModelConfig]) -> None:
    if config.parallel.overlap_param_gather and (config.lora.adapters or (model and model.lora)):
        # They aren't called as modules, which is what waits for weights; and they are small.
        raise ValueError("--overlap-param-gather does not run with LoRA's adapters; leave it out")
