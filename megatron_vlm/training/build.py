"""The parts of a run before its first iteration: resolved config, data, model, optimizer and hooks."""

from __future__ import annotations

import torch

from megatron_vlm import parallel
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import note_user, read_model
from megatron_vlm.artifacts.image_rule import LOADED
from megatron_vlm.artifacts.mixture import trained_sources
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.loading.loader import TrainLoader, build_train_loader
from megatron_vlm.data.preview.text import describe
from megatron_vlm.data.processing import Processing, build_processing
from megatron_vlm.models.lora_weights import start_adapters
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.scaling import load_scaling_state
from megatron_vlm.models.vlm import VisionLanguageModel, build_model
from megatron_vlm.models.weights import check_unchanged, load_weights
from megatron_vlm.observe.sinks import Sinks
from megatron_vlm.parallel import Layout
from megatron_vlm.parallel.optimizer import Optimizer, wrap_model
from megatron_vlm.plan.pipeline import describe_stages, layers_per_stage
from megatron_vlm.plan.start import Start, check_same_model, check_same_run, with_adapters
from megatron_vlm.training import checkpoint
from megatron_vlm.training.batch import BatchReader
from megatron_vlm.training.checkpoint import RunState
from megatron_vlm.training.context import Parts, RunContext
from megatron_vlm.training.ends import describe_ends
from megatron_vlm.training.evaluate import Evaluator, without_evaluations
from megatron_vlm.training.freezing import Regime, set_trainable, table
from megatron_vlm.training.hooks import Hook
from megatron_vlm.training.hooks.debugging import Debugger
from megatron_vlm.training.hooks.evaluation import Evaluation
from megatron_vlm.training.hooks.gradient_check import GradientCheck, LastVerdict
from megatron_vlm.training.hooks.guards import LossGuard, Watchdog
from megatron_vlm.training.hooks.log import Log
from megatron_vlm.training.hooks.saving import Saving
from megatron_vlm.training.resolve import resolve
from megatron_vlm.training.schedule import Schedule
from megatron_vlm.training.signals import StopRequest
from megatron_vlm.training.sources import SourceTotals
from megatron_vlm.training.step import prepare_for_schedules


def make_hooks(run: RunContext, parts: Parts) -> list[Hook]:
    """Return the hooks of a run; at each moment of an iteration they are called in this order."""
    check = GradientCheck(parts.regime, run.layout, run.state, run.say)
    saving = Saving(run, parts) if run.config.checkpoint.save else None
    hooks: list[Hook | None] = [
        check,
        LossGuard(
            run.config.logging, run.layout, run.state, run.sinks, lambda: parts.find_not_finite(run.layout)
        ),
        Log(run, parts),
        Debugger(parts.regime, parts.optimizer, parts.processing, run.state, run.say)
        if run.config.training.debug
        else None,
        Evaluation(run, parts, parts.evaluator, saving) if parts.evaluator is not None else None,
        LastVerdict(check, run),
        saving,
    ]
    return [hook for hook in hooks if hook is not None]


def begin(
    config: RunConfig, layout: Layout, start: Start, sinks: Sinks, watchdog: Watchdog, stop: StopRequest
) -> RunContext:
    """Find out what is to be run and how far it is; a collective call that loads neither data nor model.

    Raises:
        ValueError: flags, checkpoint and data don't fit each other.
    """
    model = read_model(start.checkpoint)
    check_same_model(config, start, model)
    model = with_adapters(model, config, start)
    config = resolve(config, start, model, layout.world_size)
    state, changes = _first_state(config, start)
    if config.training.eval_interval is None:
        state.evaluation_due = False
    run = RunContext(config, layout, start, model, state, sinks, watchdog, stop)
    if changes:
        run.say(changes)
    return run


def build(run: RunContext) -> Parts:
    """Build what the iterations of a run work with; a collective call.

    Raises:
        ValueError: flags, checkpoint, data and tokenizer don't fit each other.
    """
    config, layout, start = run.config, run.layout, run.start
    check_unchanged(start.checkpoint, config.model.base, not start.with_state, run.say, start.resumes)
    run.watchdog.beat()
    parallel.on_first_rank(lambda: _open_sinks(run))
    schedule, schedules = build_schedules(config)
    processing = build_processing(config, run.model, str(run.hf_source))
    loader = _build_loader(run, processing)
    names = parallel.on_first_rank(lambda: trained_sources(str(config.data.data_path)))
    sources = SourceTotals(names, layout) if names else None
    evaluator = _build_evaluator(run, processing)
    reader = BatchReader(
        loader,
        layout,
        run.model,
        processing,
        num_microbatches=config.num_microbatches(layout.world_size),
        dtype=weights_dtype(config),
        sequence_multiple=config.sequence_multiple,
        totals=sources,
    )
    chunks = _build_chunks(run)
    regime = set_trainable(chunks, config.trained, layout)
    load_weights(start.checkpoint, chunks, config.model.base)
    base = _find_base(run, regime)
    adapter, seed = config.lora.lora_load_dir, config.training.seed
    start_adapters(start.checkpoint, chunks, seed, adapter, config.model.base, run.say)
    models = wrap_model(
        chunks,
        config.parallel.dist_optim,
        config.parallel.overlap_grad_reduce and layout.dp > 1,
        config.parallel.overlap_param_gather and layout.dp > 1,
        config.low_precision.fp8_param_gather,
    )
    prepare_for_schedules(models)
    optimizer = Optimizer(
        models,
        weight_decay=config.optimizer.weight_decay,
        beta1=config.optimizer.adam_beta1,
        beta2=config.optimizer.adam_beta2,
        eps=config.optimizer.adam_eps,
        clip_grad=config.optimizer.clip_grad,
        entries=len(regime.entries),
    )
    if start.with_state:
        checkpoint.load_optimizer(start.checkpoint, chunks, optimizer, run.state)
        if not load_scaling_state(start.checkpoint, chunks):
            run.say("FP8: the checkpoint has no scales of this recipe; they begin anew")
    run.say(table(regime, [one.lr for one in schedules], config.optimizer.weight_decay))
    if start.with_position:
        checkpoint.load_rng(start.checkpoint, layout)
    run.watchdog.beat()
    return Parts(
        processing=processing,
        loader=loader,
        reader=reader,
        sources=sources,
        evaluator=evaluator,
        chunks=chunks,
        models=models,
        optimizer=optimizer,
        regime=regime,
        base=base,
        schedule=schedule,
        schedules=schedules,
    )


def weights_dtype(config: RunConfig) -> torch.dtype:
    """Return the type of the weights, of a config whose precision is known."""
    return torch.bfloat16 if config.training.precision == "bf16" else torch.float32


def model_options(config: RunConfig, model: ModelConfig) -> ModelOptions:
    """Return how a run's flags want its model built."""
    return ModelOptions(
        dtype=weights_dtype(config),
        sequence_parallel=config.parallel.sequence_parallel,
        deterministic=config.training.deterministic,
        impl=config.parallel.transformer_impl,
        vocab_divisible_by=config.model.make_vocab_size_divisible_by,
        layers_per_stage=layers_per_stage(config, model),
        recompute=config.parallel.recompute,
        recompute_num_layers=config.parallel.recompute_num_layers,
        fp8=config.fp8,
    )


def build_schedules(config: RunConfig) -> tuple[Schedule, list[Schedule]]:
    """Return the run's learning rate schedule, and that of each entry of ``--train-modules``."""
    schedule = Schedule(
        lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        warmup_iters=config.warmup_iterations,
        decay_iters=config.decay_iterations,
        style=config.optimizer.lr_decay_style,
    )
    rates = [entry.lr for entry in config.trained]
    return schedule, [schedule if lr is None else schedule.scaled_to(lr) for lr in rates]


def _first_state(config: RunConfig, start: Start) -> tuple[RunState, str]:
    """Return how far the run is at its start, and what else its flags say than they did before."""
    if not start.with_state:
        return RunState(), ""
    saved = checkpoint.load_run_state(start.checkpoint)
    if not start.with_position:
        return RunState(optimizer_steps=saved.optimizer_steps), ""
    changes = check_same_run(config, start)
    return saved if start.resumes else without_evaluations(saved), changes


def _open_sinks(run: RunContext) -> None:
    """Open the sinks, before anything large is loaded: a missing login should be told at once."""
    config = {**run.config.to_dict(), "architecture": run.model.to_dict()}
    name = str(run.config.checkpoint.name)
    run.sinks.open(run.folder, run.config.logging, name, config, run.state.iteration)


def _build_loader(run: RunContext, processing: Processing) -> TrainLoader | None:
    """Build the loader of the training data where this rank loads any, at the run's place in the data."""
    config, layout, start = run.config, run.layout, run.start
    path = str(config.data.data_path)
    run.say(parallel.on_first_rank(lambda: describe_ends(path, processing, run.hf_source)))
    if processing.images.rule != LOADED:
        began = ", as in the checkpoint's run" if start.with_position else ""
        run.say(f"image files are read with {processing.images.rule}{began}")
    if not layout.loads_data:
        return None
    loader = build_train_loader(config, processing, layout.dp_rank, layout.dp)
    if start.with_position:
        loader.load_state_dict(checkpoint.load_data_state(start.checkpoint))
    first = loader.peek()  # on every rank that loads: it forks the workers
    run.say(f"first sample: {describe(first, processing.tokenizer, processing.image_token_id)}")
    return loader


def _build_evaluator(run: RunContext, processing: Processing) -> Evaluator | None:
    config = run.config
    if config.training.eval_interval is None:
        return None
    evaluator = Evaluator(
        config,
        run.layout,
        run.model,
        processing,
        weights_dtype(config),
        config.sequence_multiple,
        before=run.state.held_out,
    )
    run.state.held_out = evaluator.identity
    return evaluator


def _build_chunks(run: RunContext) -> list[VisionLanguageModel]:
    """Build this rank's chunks of the model; their weights are not loaded yet."""
    if run.layout.pp > 1:
        layers = layers_per_stage(run.config, run.model)
        run.say("\n".join(describe_stages(layers, run.layout.pp)))
    return build_model(run.model, run.layout, model_options(run.config, run.model))


def _find_base(run: RunContext, regime: Regime) -> dict[str, str] | None:
    """Return the checkpoint that this run's checkpoints lie over; None if they hold all weights."""
    if not run.config.checkpoint.save_trained_only or len(regime.trained) == len(regime.shapes):
        return None

    def find() -> dict[str, str]:
        base = checkpoint.find_base(run.start.checkpoint, regime.trained, run.config.model.base)
        note_user(base["path"], run.folder)
        return base

    return parallel.on_first_rank(find)
