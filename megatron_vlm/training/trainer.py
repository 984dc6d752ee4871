"""The training loop, and everything that has to stand before its first iteration."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from megatron_vlm import parallel
from megatron_vlm.artifacts.checkpoint import (
    BEST,
    CHECKPOINTS,
    HF_FOLDER,
    checkpoint_name,
    keep_last,
    latest_resumable,
    note_user,
    read_model,
    write_best,
)
from megatron_vlm.artifacts.image_rule import LOADED
from megatron_vlm.artifacts.mixture import trained_sources
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.loader import TrainLoader, build_train_loader
from megatron_vlm.data.preview.text import describe
from megatron_vlm.data.processing import Processing, build_processing
from megatron_vlm.models.lora_weights import start_adapters
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.scaling import load_scaling_state, unmoved
from megatron_vlm.models.vlm import build_model
from megatron_vlm.models.weights import check_unchanged, load_weights
from megatron_vlm.observe.sinks import Sinks
from megatron_vlm.parallel.optimizer import Optimizer, wrap_model
from megatron_vlm.plan.pipeline import describe_stages, layers_per_stage
from megatron_vlm.plan.start import (
    Start,
    check_same_model,
    check_same_run,
    with_adapters,
)
from megatron_vlm.system.exit_codes import CONTINUE, DONE, STOPPED
from megatron_vlm.training import checkpoint
from megatron_vlm.training.batch import BatchReader, GlobalBatch
from megatron_vlm.training.checkpoint import RunState
from megatron_vlm.training.debugging import Debugger
from megatron_vlm.training.ends import describe_ends
from megatron_vlm.training.evaluate import Evaluator, note_evaluation, stops_early, without_evaluations
from megatron_vlm.training.freezing import set_trainable, table
from megatron_vlm.training.gradient_check import GradientCheck
from megatron_vlm.training.guards import LossGuard, Watchdog
from megatron_vlm.training.meter import Meter
from megatron_vlm.training.resolve import resolve
from megatron_vlm.training.schedule import Schedule
from megatron_vlm.training.signals import StopRequest
from megatron_vlm.training.sources import SourceTotals
from megatron_vlm.training.step import NonFiniteError, StepResult, prepare_for_schedules, train_step


class Trainer:
    """One rank of a training run. Where that is finished already, neither data nor model are loaded.

    Args:
        config: the whole run.
        layout: this rank's place.
        start: where the run begins.
        sinks: opened here, closed by the caller.
        watchdog: hears of all that goes on.
        stop: asks the run to end before its end.

    Raises:
        ValueError: flags, checkpoint, data and tokenizer don't fit each other.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: parallel.Layout,
        start: Start,
        sinks: Sinks,
        watchdog: Watchdog,
        stop: StopRequest,
    ) -> None:
        self.layout = layout
        self.start = start
        self.run = Path(config.checkpoint.run_dir)
        self.hf_source = start.checkpoint / HF_FOLDER
        self.model_config = read_model(start.checkpoint)
        check_same_model(config, start, self.model_config)
        self.model_config = with_adapters(self.model_config, config, start)
        self.config = config = resolve(config, start, self.model_config, layout.world_size)
        self.state = self._first_state(start)
        self.total_iterations = config.train_iterations
        self.schedule = Schedule(
            lr=config.optimizer.lr,
            min_lr=config.optimizer.min_lr,
            warmup_iters=config.warmup_iterations,
            decay_iters=config.decay_iterations,
            style=config.optimizer.lr_decay_style,
        )
        self.sinks = sinks
        self.watchdog = watchdog
        self.stop = stop
        self.guard = LossGuard(config.logging, layout, self.state, sinks, self._find_not_finite)
        self.loader: TrainLoader | None = None
        self.evaluator: Evaluator | None = None
        if config.training.eval_interval is None:
            self.state.evaluation_due = False
        if self.done:
            return
        weights_only = not start.with_state
        check_unchanged(start.checkpoint, config.model.base, weights_only, self.say, start.resumes)
        watchdog.beat()
        parallel.on_first_rank(self._open_sinks)
        rates = [entry.lr for entry in config.trained]
        self.schedules = [self.schedule if lr is None else self.schedule.scaled_to(lr) for lr in rates]
        self._build_data(start)
        self._build_model(start)
        if start.with_position:
            checkpoint.load_rng(start.checkpoint, layout)
        watchdog.beat()
        self.meter = Meter(
            layout,
            self.model_config,
            trains=self.regime.trained.__contains__,
            peak=config.logging.peak_tflops,
            fp8=config.training.fp8,
            state=self.state,
            total_iterations=self.total_iterations,
        )

    def _open_sinks(self) -> None:
        """Before anything large is loaded: a missing login should be told at once."""
        config = {**self.config.to_dict(), "architecture": self.model_config.to_dict()}
        name = str(self.config.checkpoint.name)
        self.sinks.open(self.run, self.config.logging, name, config, self.state.iteration)

    def _first_state(self, start: Start) -> RunState:
        if not start.with_state:
            return RunState()
        saved = checkpoint.load_run_state(start.checkpoint)
        if not start.with_position:
            return RunState(optimizer_steps=saved.optimizer_steps)
        changes = check_same_run(self.config, start)
        if changes:
            self.say(changes)
        return saved if start.resumes else without_evaluations(saved)

    def _build_data(self, start: Start) -> None:
        self.processing = processing = build_processing(self.config, self.model_config, str(self.hf_source))
        path = str(self.config.data.data_path)
        self.say(parallel.on_first_rank(lambda: describe_ends(path, processing, self.hf_source)))
        if processing.images.rule != LOADED:
            began = ", as in the checkpoint's run" if start.with_position else ""
            self.say(f"image files are read with {processing.images.rule}{began}")
        if self.layout.loads_data:
            self.loader = build_train_loader(self.config, processing, self.layout.dp_rank, self.layout.dp)
            if start.with_position:
                self.loader.load_state_dict(checkpoint.load_data_state(start.checkpoint))
            self._show_first_sample(self.loader, processing)
        names = parallel.on_first_rank(lambda: trained_sources(path))
        self.sources = SourceTotals(names, self.layout) if names else None
        multiple = self.config.sequence_multiple
        if self.config.training.eval_interval is not None:
            self.evaluator = Evaluator(
                self.config,
                self.layout,
                self.model_config,
                processing,
                self._dtype,
                multiple,
                before=self.state.held_out,
            )
            self.state.held_out = self.evaluator.identity
        self.reader = BatchReader(
            self.loader,
            self.layout,
            self.model_config,
            processing,
            num_microbatches=self.config.num_microbatches(self.layout.world_size),
            dtype=self._dtype,
            sequence_multiple=multiple,
            totals=self.sources,
        )

    def _build_model(self, start: Start) -> None:
        config, layout = self.config, self.layout
        layers = layers_per_stage(config, self.model_config)
        if layout.pp > 1:
            self.say("\n".join(describe_stages(layers, layout.pp)))
        self.chunks = build_model(
            self.model_config,
            layout,
            ModelOptions(
                dtype=self._dtype,
                sequence_parallel=config.parallel.sequence_parallel,
                deterministic=config.training.deterministic,
                impl=config.parallel.transformer_impl,
                vocab_divisible_by=config.model.make_vocab_size_divisible_by,
                layers_per_stage=layers,
                recompute=config.parallel.recompute,
                recompute_num_layers=config.parallel.recompute_num_layers,
                fp8=config.fp8,
            ),
        )
        self.regime = set_trainable(self.chunks, config.trained, layout)
        load_weights(start.checkpoint, self.chunks, config.model.base)
        self.base = self._find_base(start)
        adapter, seed = config.lora.lora_load_dir, config.training.seed
        start_adapters(start.checkpoint, self.chunks, seed, adapter, config.model.base, self.say)
        self.models = wrap_model(
            self.chunks,
            config.parallel.dist_optim,
            config.parallel.overlap_grad_reduce and layout.dp > 1,
            config.parallel.overlap_param_gather and layout.dp > 1,
            config.low_precision.fp8_param_gather,
        )
        prepare_for_schedules(self.models)
        self.optimizer = Optimizer(
            self.models,
            weight_decay=config.optimizer.weight_decay,
            beta1=config.optimizer.adam_beta1,
            beta2=config.optimizer.adam_beta2,
            eps=config.optimizer.adam_eps,
            clip_grad=config.optimizer.clip_grad,
            entries=len(self.regime.entries),
        )
        if start.with_state:
            checkpoint.load_optimizer(start.checkpoint, self.chunks, self.optimizer, self.state)
            if not load_scaling_state(start.checkpoint, self.chunks):
                self.say("FP8: the checkpoint has no scales of this recipe; they begin anew")
        peaks = [schedule.lr for schedule in self.schedules]
        self.say(table(self.regime, peaks, config.optimizer.weight_decay))
        self.gradient_check = GradientCheck(self.regime, layout, self.state, self.say)
        self.debugger: Debugger | None = None
        if config.training.debug:
            self.debugger = Debugger(self.regime, self.optimizer, self.processing, self.say)

    def _find_base(self, start: Start) -> dict[str, str] | None:
        """What this run's checkpoints lie over; None if they hold all weights."""
        trained, config = self.regime.trained, self.config
        if not config.checkpoint.save_trained_only or len(trained) == len(self.regime.shapes):
            return None

        def find() -> dict[str, str]:
            base = checkpoint.find_base(start.checkpoint, trained, config.model.base)
            note_user(base["path"], self.run)
            return base

        return parallel.on_first_rank(find)

    def train(self) -> int:
        """Run to the last iteration, or until the ranks agree to stop; returns the exit code.

        Raises:
            ValueError: the data can't be read on, or a loss or gradient is not finite.
        """
        self.stop.hold()
        while not self.done and not self.stop.agreed:
            if not self.state.evaluation_due:  # else a signal came between iteration and evaluation
                self._next_iteration()
            if self.evaluator is not None and self.state.evaluation_due and not self.stop.agreed:
                self._evaluate(self.evaluator)
            if self.finished:
                self.gradient_check.judge()
            if self.config.checkpoint.save and (
                self._every(self.config.checkpoint.save_interval) or self.stop.agreed
            ):
                self.save()
                self.stop.agree(self.layout.device)  # a save takes long: a signal in it needs no other
        if not self.done:
            return self._stopped()
        if self.state.iteration < self.total_iterations:
            self.say(self.why_finished())
        return DONE

    def _next_iteration(self) -> None:
        if self.config.training.skips(self.state.iteration + 1):
            self._skip_iteration()
        else:
            self._iterate()
        if self.evaluator is not None:
            self.state.evaluation_due = self._every(self.evaluator.interval)

    def _stopped(self) -> int:
        """Tell how the run can go on; returns the exit code."""
        flags = self.config.checkpoint
        stopped = f"stopped by a signal at iteration {self.state.iteration}/{self.total_iterations}"
        if flags.save_optim:
            self.say(f"{stopped}, which is saved; the same command goes on from there")
            return CONTINUE
        folder = self.run / CHECKPOINTS / checkpoint_name(self.state.iteration)
        self.say(
            f"{stopped}. Without --save-optim the run can't go on; --megatron-load-dir {folder} and another "
            "--name begin a new one from its weights"
            if flags.save
            else f"{stopped}; with --no-save there is nothing to go on from"
        )
        return STOPPED

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.finished and not self.state.evaluation_due

    @property
    def finished(self) -> bool:
        """Whether no iteration is left: by the run's length, or early."""
        patience = self.config.training.early_stopping_patience
        return self.state.iteration >= self.total_iterations or stops_early(self.state, patience)

    def why_finished(self) -> str:
        """One line, for a run that stopped early or had ended before this start of it."""
        done, total, state = self.state.iteration, self.total_iterations, self.state
        resumable = self.config.checkpoint.save_optim
        if done >= total:
            return (
                f"{done} iterations are done and the run has {total}: nothing left to do; give a larger "
                "--train-iters, or --epochs, to go on"
            )
        return (
            f"stopped early at iteration {done}, after {state.evaluations_without_improvement} evaluations "
            f"without an improvement; the lowest validation loss was {state.best_loss:.4f}, at iteration "
            f"{state.best_iteration}"
            + (f" ({self.run / BEST})" if self.config.checkpoint.save else "")
            + (". To go on, give a larger --early-stopping-patience" if resumable else "")
        )

    def _count_iteration(self) -> None:
        self.state.iteration += 1
        self.state.consumed_samples += self.config.training.global_batch_size

    def _iterate(self) -> None:
        """Train on the next global batch."""
        self.meter.start()
        global_batch = self.reader.next()
        self.meter.batch_arrived()
        result = self._step(global_batch)
        if result.updated:
            self.gradient_check.after_step(global_batch, result.trained_tokens)
        self._count_iteration()
        self.state.optimizer_steps += result.updated
        self.guard.watch(result)
        self.watchdog.beat()
        self.meter.stop()
        if self._every(self.config.logging.log_interval):
            self._log(global_batch, result)

    def _skip_iteration(self) -> None:
        """Pass over the next global batch, as if it were done."""
        self.reader.skip()
        self.stop.agree(self.layout.device)
        self._count_iteration()
        self.state.skipped += 1
        self.watchdog.beat()
        self.say(f"iteration {self.state.iteration}/{self.total_iterations} skipped, as the flags say")

    def _evaluate(self, evaluator: Evaluator) -> None:
        """Evaluate, and save the weights if they are the best so far; a collective call.

        If the ranks agree to stop in between, the evaluation stays due.
        """
        if self.state.evaluated_step == self.state.optimizer_steps:
            self.state.evaluation_due = False
            self.say(f"no evaluation at iteration {self.state.iteration}: no update since the last one")
            return
        with unmoved(self.chunks):
            found = evaluator.evaluate(self.models, self.watchdog.beat, self.stop)
        if found is None:
            return
        self.state.evaluation_due = False
        best = note_evaluation(self.state, found.loss, self.config.training.early_stopping_min_delta)
        self.sinks.log(self.state.iteration, found.metrics)
        self.say(f"{found} at iteration {self.state.iteration}" + (", the lowest so far" if best else ""))
        if best and self.config.checkpoint.save:
            self._save(self.run / BEST, with_state=False)
            if self.layout.rank == 0:
                write_best(self.run / BEST, self.state.iteration, found.loss)
                keep_last(self.run / BEST, 1)

    def save(self) -> None:
        """Write a checkpoint; a collective call."""
        root = self.run / CHECKPOINTS
        self._save(root, with_state=self.config.checkpoint.save_optim)
        keep = self.config.checkpoint.keep_checkpoints
        if keep is not None and self.layout.rank == 0:
            keep_last(root, keep, also=[self.start.checkpoint])

    def _save(self, root: Path, with_state: bool) -> None:
        self.optimizer.gather_weights()
        broken = self._find_not_finite()
        if broken is not None:
            raise ValueError(
                f"iteration {self.state.iteration}: {broken} holds NaN or infinite values, and is not saved; "
                f"lower --lr, and {self._where_to_go_on()}"
            )
        folder = checkpoint.save_checkpoint(
            root,
            self.chunks,
            self.optimizer if with_state else None,
            self.layout,
            self.state,
            self.config,
            self.hf_source,
            self.loader.state_dict if self.loader is not None else None,
            self.base,
            self.processing.template,
        )
        self.watchdog.beat()
        self.say(f"saved {folder}" + ("" if with_state else " (weights only)"))

    def _find_not_finite(self) -> str | None:
        return checkpoint.find_not_finite(self.chunks, self.optimizer, self.layout)

    def _where_to_go_on(self) -> str:
        last = latest_resumable(self.run / CHECKPOINTS)
        return "begin again" if last is None else f"the run goes on from {last.name}"

    def close(self) -> None:
        """End the data loaders' workers."""
        if self.loader is not None:
            self.loader.close()
        if self.evaluator is not None:
            self.evaluator.close()

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.training.precision == "bf16" else torch.float32

    def _every(self, interval: int) -> bool:
        return self.state.iteration % interval == 0 or self.finished

    def _step(self, global_batch: GlobalBatch) -> StepResult:
        if self.debugger is not None:
            self.debugger.show_batch(self.state.iteration + 1, global_batch)
        try:
            return train_step(
                self.models,
                self.optimizer,
                global_batch,
                self.layout,
                [schedule.at(self.state.iteration + 1) for schedule in self.schedules],
                self.debugger.show_gradients if self.debugger is not None else None,
                self.stop,
            )
        except NonFiniteError as error:
            return self.guard.not_finite(error, global_batch)

    def _log(self, global_batch: GlobalBatch, result: StepResult) -> None:
        """A collective call."""
        metrics = self.meter.measure(
            global_batch,
            result,
            lr=self.schedule.at(self.state.iteration),
            sequences=self.config.training.global_batch_size,
            seen=self.loader.counts if self.loader is not None else None,
        )
        rates = self._rates_of_parts()
        by_part = {f"lr/{part}": rate for part, rate in rates.items()}
        by_source = self.sources.take() if self.sources is not None else {}
        self.sinks.log(metrics.iteration, {**asdict(metrics), **by_part, **by_source})
        rank = "GPU" if self.layout.device.type == "cuda" else "process"
        self.say(metrics.line(self.total_iterations, rates, rank))

    def _rates_of_parts(self) -> dict[str, float]:
        """Learning rates of the last update, if a part has one of its own."""
        entries = self.regime.entries
        if all(entry.lr is None for entry in entries):
            return {}
        rates = [schedule.at(self.state.iteration) for schedule in self.schedules]
        return {entry.name: rate for entry, rate in zip(entries, rates, strict=True)}

    def _show_first_sample(self, loader: TrainLoader, processing: Processing) -> None:
        first = loader.peek()  # on every rank that loads: it forks the workers
        self.say(f"first sample: {describe(first, processing.tokenizer, processing.image_token_id)}")

    def say(self, message: str) -> None:
        """Print, on rank 0."""
        if self.layout.rank == 0:
            print(message, flush=True)
