"""The sections of a run config: every flag, and the rules inside each section."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import List, Optional, Tuple

from megatron_vlm.architecture.train_modules import TrainEntry, parse_train_modules, preset
from megatron_vlm.config.checks import nearest_multiples, needs, not_negative, positive
from megatron_vlm.config.flags import REQUIRED, flag, flag_name
from megatron_vlm.config.headings import (
    DEBUG,
    DISTRIBUTED,
    FP8,
    LOGGING,
    OPTIMIZER,
    OTHER,
    PARALLEL,
    SAVE_LOAD,
    TOKENIZER,
    TRAINING,
)


@dataclass(frozen=True)
class ModelSection:
    """Which model is trained, and which parts of it."""

    freeze_lm: bool = flag(
        TRAINING,
        REQUIRED,
        "train without changing the language model",
        shown_default="on in --stage 1, else off",
    )
    train_vision: bool = flag(TRAINING, False, "train the vision tower too; it is frozen otherwise")
    train_modules: Optional[str] = flag(
        TRAINING,
        None,
        "what is trained, each part at its own peak learning rate: "
        "'projector:1e-3|language:2e-5|vision.last_block:2e-6'; a part without one has --lr",
        shown_default="as --stage, --freeze-lm and --train-vision say",
    )
    megatron_load_dir: Optional[str] = flag(
        SAVE_LOAD, None, "checkpoint to start from: its folder, the root above it, or a run folder"
    )
    base: Optional[str] = flag(
        SAVE_LOAD,
        None,
        "the checkpoint with all weights, for one saved with --save-trained-only",
        shown_default="where it was then",
    )
    tokenizer_load_dir: Optional[str] = flag(
        SAVE_LOAD,
        None,
        "Hugging Face folder with tokenizer and image processor",
        shown_default="the one that the checkpoint carries",
    )
    init: bool = flag(
        SAVE_LOAD,
        False,
        "start from random weights, made by --seed for the config.json in --tokenizer-load-dir",
    )
    image_token_id: Optional[int] = flag(
        TOKENIZER, None, "id of the image token", shown_default="from the tokenizer and the model"
    )
    pad_token_id: Optional[int] = flag(
        TOKENIZER, None, "id of the padding token", shown_default="from the tokenizer"
    )
    no_add_class_token: Optional[bool] = flag(
        OTHER,
        None,
        "the tower has no class token (SigLIP); --add-class-token: it has one (CLIP); only checked here",
        shown_default="from the model",
    )
    make_vocab_size_divisible_by: int = flag(
        PARALLEL, 128, "the vocabulary is padded to a multiple of this times --tp"
    )

    def __post_init__(self) -> None:
        positive(self, "make_vocab_size_divisible_by")
        not_negative(self, "image_token_id", "pad_token_id")
        _ = self.trained

    @property
    def trained(self) -> Tuple[TrainEntry, ...]:
        """The parts that are trained; what none of them names is frozen."""
        if self.train_modules is None:
            return preset(self.freeze_lm, self.train_vision)
        return parse_train_modules(self.train_modules)


@dataclass(frozen=True)
class ParallelSection:
    """How the model is cut, what runs it, and what it keeps in memory."""

    tp: int = flag(PARALLEL, 1, "tensor-parallel size: each layer is cut into this many parts")
    pp: int = flag(PARALLEL, 1, "pipeline-parallel size: the layers are dealt to this many stages")
    vpp: int = flag(
        PARALLEL,
        1,
        "interleaved pipeline stages: model chunks on each pipeline rank (virtual-pipeline size); needs "
        "--pp > 1, and micro batches per data-parallel rank in multiples of --pp",
    )
    decoder_first_pipeline_num_layers: Optional[int] = flag(
        PARALLEL, None, "language-model layers of the first pipeline rank", shown_default="balanced by FLOPs"
    )
    decoder_last_pipeline_num_layers: Optional[int] = flag(
        PARALLEL, None, "language-model layers of the last pipeline rank", shown_default="balanced by FLOPs"
    )
    sequence_parallel: bool = flag(PARALLEL, False, "cut activations along the sequence too; needs --tp > 1")
    dist_optim: bool = flag(PARALLEL, False, "shard the optimizer state over data-parallel ranks")
    overlap_grad_reduce: bool = flag(
        PARALLEL, True, "reduce gradients over data-parallel ranks while the backward pass runs"
    )
    overlap_param_gather: bool = flag(
        PARALLEL,
        False,
        "gather the weights that --dist-optim has updated while the next forward pass runs",
    )
    tp_comm_overlap: bool = flag(
        PARALLEL,
        False,
        "overlap tensor-parallel communication with matrix products",
        not_yet="Transformer Engine needs one sequence length for it, and batches here vary; leave it out",
    )
    recompute: str = flag(
        TRAINING,
        "none",
        "activations that the backward pass computes again instead of keeping them: selective those of "
        "the MLPs, full all but each layer's input",
        choices=("none", "selective", "full"),
    )
    recompute_num_layers: Optional[int] = flag(
        TRAINING,
        None,
        "with --recompute full: layers of each pipeline stage that are computed again",
        shown_default="all",
    )
    backend: Optional[str] = flag(
        DISTRIBUTED,
        None,
        "communication backend; mpi is refused, since torch's packages are built without it",
        choices=("nccl", "gloo", "mpi"),
        shown_default="nccl on GPUs, gloo on CPUs",
    )
    transformer_impl: Optional[str] = flag(
        OTHER,
        None,
        "layers of megatron-core and torch, or of Transformer Engine",
        choices=("local", "transformer_engine"),
        shown_default="transformer_engine in bfloat16 where it is installed and there are GPUs, else local",
    )
    device: Optional[str] = flag(
        DISTRIBUTED,
        None,
        "what runs the model",
        choices=("cuda", "cpu"),
        shown_default="cuda where there is a GPU, else cpu",
    )
    distributed_timeout_minutes: int = flag(
        DISTRIBUTED,
        10,
        "stop when ranks have waited this long for each other; 5 more than --watchdog-minutes at least",
    )

    def __post_init__(self) -> None:
        positive(self, "tp", "pp", "vpp", "recompute_num_layers", "distributed_timeout_minutes")
        positive(self, "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
        ends = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
        for name, unset in (("vpp", 1), (ends[0], None), (ends[1], None)):
            if self.pp == 1 and getattr(self, name) != unset:
                raise ValueError(f"{flag_name(name)} needs --pp 2 or more; raise --pp or leave it out")
        if self.recompute_num_layers is not None and self.recompute != "full":
            raise ValueError("--recompute-num-layers needs --recompute full; add it or leave this out")
        if self.overlap_param_gather and not (self.dist_optim and self.overlap_grad_reduce):
            missing = "needs --dist-optim" if not self.dist_optim else "contradicts --no-overlap-grad-reduce"
            raise ValueError(f"--overlap-param-gather {missing}; change that or leave it out")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("--sequence-parallel needs --tp 2 or more; raise --tp or leave it out")
        if self.backend == "mpi":
            raise ValueError(
                "--backend mpi is not supported (torch's packages are built without it); "
                "use nccl on GPUs or gloo on CPUs"
            )
        if self.backend == "nccl" and self.device == "cpu":
            raise ValueError("--backend nccl does not run with --device cpu; use --backend gloo")
        if self.transformer_impl == "transformer_engine" and self.device == "cpu":
            raise ValueError("--transformer-impl transformer_engine needs GPUs, not --device cpu; use local")
        if self.backend == "gloo" and self.device == "cuda":
            raise ValueError("--backend gloo does not run with --device cuda; use --backend nccl")


@dataclass(frozen=True)
class TrainingSection:
    """How long, in which batches and in which precision."""

    micro_batch_size: int = flag(
        PARALLEL,
        REQUIRED,
        "samples in one forward pass of a model copy",
        shown_default="16 in --stage 1, else 1",
    )
    global_batch_size: int = flag(
        PARALLEL,
        REQUIRED,
        "samples per iteration, over all ranks",
        shown_default="256 in --stage 1, else 128",
    )
    stage: Optional[int] = flag(
        TRAINING,
        None,
        "1 aligns the projector with everything else frozen, 2 trains the language model with it; "
        "sets the batch sizes, --lr and what is trained",
        choices=(1, 2),
    )
    train_iters: Optional[int] = flag(
        TRAINING, None, "iterations to train", shown_default="one pass over the training split"
    )
    train_samples: Optional[int] = flag(
        TRAINING, None, "samples to train on, in place of --train-iters; rounded down to whole iterations"
    )
    epochs: Optional[float] = flag(
        TRAINING,
        None,
        "passes over the training split, in place of --train-iters, such as 3 or 0.5; rounded down to whole "
        "iterations",
    )
    seed: int = flag(TRAINING, 1234, "seed of weights, dropout and data order")
    precision: Optional[str] = flag(
        TRAINING,
        None,
        "compute in bfloat16 with float32 master weights, or in float32",
        choices=("bf16", "fp32"),
        switches=True,
        shown_default="bf16 where the weights are stored so, else fp32",
    )
    skip_train_iteration_range: Tuple[str, ...] = flag(
        SAVE_LOAD,
        (),
        "iterations to leave out, first and last: 100-110 300-400; their batches are read and not trained on",
    )
    eval_interval: Optional[int] = flag(
        TRAINING,
        None,
        "iterations between evaluations on the dataset's val split; there is one more at the end",
        shown_default="no evaluation",
    )
    eval_iters: int = flag(
        TRAINING, 0, "global batches of val samples in an evaluation, the first ones; 0 is all of them"
    )
    early_stopping_patience: Optional[int] = flag(
        TRAINING,
        None,
        "stop after this many evaluations in a row without an improvement",
        shown_default="never",
    )
    early_stopping_min_delta: float = flag(
        TRAINING, 0.0, "how far below the last improvement's loss is an improvement"
    )
    fp8: bool = flag(
        FP8,
        False,
        "compute the language model's and the projector's matrix products in FP8, all else in bfloat16; "
        "needs Transformer Engine, and GPUs of compute capability 8.9 or more",
    )
    deterministic: bool = flag(
        DEBUG,
        False,
        "use only operations that give the same bits every time, at the cost of speed",
    )
    debug: bool = flag(
        DEBUG,
        False,
        "show each iteration's first sample, shapes and gradient norms, and where a NaN arises",
    )

    def __post_init__(self) -> None:
        positive(self, "micro_batch_size", "global_batch_size", "train_iters", "train_samples", "epochs")
        positive(self, "eval_interval", "early_stopping_patience")
        not_negative(self, "seed", "eval_iters", "early_stopping_min_delta")
        if self.seed >= 1 << 31:
            raise ValueError(f"--seed {self.seed}: must be below {1 << 31}")
        needs(self, "eval_iters", "eval_interval")
        needs(self, "early_stopping_patience", "eval_interval")
        needs(self, "early_stopping_min_delta", "early_stopping_patience")
        _ = self.skipped_ranges
        lengths = [
            name for name in ("train_iters", "train_samples", "epochs") if getattr(self, name) is not None
        ]
        if len(lengths) > 1:
            first, second = map(flag_name, lengths[:2])
            raise ValueError(f"{first} and {second} both say how long to train; give one")
        if self.global_batch_size % self.micro_batch_size:
            micro, batch = self.micro_batch_size, self.global_batch_size
            raise ValueError(
                f"--micro-batch-size {micro} does not divide --global-batch-size {batch}; "
                f"{nearest_multiples('--global-batch-size', batch, micro)}"
            )
        if self.train_samples is not None and self.train_samples < self.global_batch_size:
            raise ValueError(
                f"--train-samples {self.train_samples} is less than one iteration of "
                f"--global-batch-size {self.global_batch_size}; raise the former or lower the latter"
            )

    @property
    def iterations(self) -> Optional[int]:
        """Iterations of the whole run; None where that depends on the number of samples."""
        if self.train_samples is not None:
            return self.train_samples // self.global_batch_size
        return self.train_iters

    @property
    def skipped_ranges(self) -> Tuple[Tuple[int, int], ...]:
        """First and last iteration of each range to leave out; in order, disjoint."""
        merged: List[Tuple[int, int]] = []
        for first, last in sorted(map(_iteration_range, self.skip_train_iteration_range)):
            if merged and first <= merged[-1][1] + 1:
                first, last = merged[-1][0], max(last, merged.pop()[1])
            merged.append((first, last))
        return tuple(merged)

    def skips(self, iteration: int) -> bool:
        """Whether the flags leave this iteration out (1 is the first)."""
        return any(first <= iteration <= last for first, last in self.skipped_ranges)


@dataclass(frozen=True)
class OptimizerSection:
    """AdamW and the learning-rate schedule."""

    lr: float = flag(
        OPTIMIZER,
        REQUIRED,
        "peak learning rate",
        shown_default="1e-3 in --stage 1, 2e-4 with --lora-rank, else 2e-5",
    )
    min_lr: float = flag(
        OPTIMIZER, REQUIRED, "learning rate at the end of the decay", shown_default="1e-8, or --lr if smaller"
    )
    lr_warmup_fraction: Optional[float] = flag(
        OPTIMIZER,
        REQUIRED,
        "part of the decay's iterations in which the learning rate rises",
        shown_default="0.03, unless --lr-warmup-iters is given",
    )
    lr_warmup_iters: Optional[int] = flag(
        OPTIMIZER, None, "iterations in which the learning rate rises, in place of --lr-warmup-fraction"
    )
    lr_decay_style: str = flag(
        OPTIMIZER,
        "cosine",
        "shape of the decay",
        choices=("constant", "linear", "cosine"),
    )
    lr_decay_iters: Optional[int] = flag(
        OPTIMIZER, None, "iterations until --min-lr is reached", shown_default="all"
    )
    weight_decay: float = flag(OPTIMIZER, 0.1, "AdamW's weight decay; none on biases and norms")
    adam_beta1: float = flag(OPTIMIZER, 0.9, "decay of the mean of the gradients")
    adam_beta2: float = flag(OPTIMIZER, 0.999, "decay of the mean of their squares")
    adam_eps: float = flag(OPTIMIZER, 1e-8, "added to the denominator of AdamW")
    clip_grad: float = flag(OPTIMIZER, 1.0, "largest global gradient norm; 0 does not clip")

    def __post_init__(self) -> None:
        positive(self, "lr_decay_iters", "adam_eps")
        not_negative(self, "lr", "min_lr", "lr_warmup_iters", "weight_decay", "clip_grad")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least 0 and below 1")
        if self.min_lr > self.lr:
            raise ValueError(f"--min-lr {self.min_lr} is above --lr {self.lr}; lower --min-lr or raise --lr")
        if self.lr_warmup_fraction is not None:
            if self.lr_warmup_iters is not None:
                raise ValueError("--lr-warmup-iters and --lr-warmup-fraction both set the warmup; give one")
            if not 0.0 <= self.lr_warmup_fraction < 1.0:
                raise ValueError(
                    f"--lr-warmup-fraction {self.lr_warmup_fraction}: must be at least 0 and below 1"
                )


@dataclass(frozen=True)
class CheckpointSection:
    """Where the run lives, and what it saves."""

    save_dir: Optional[str] = flag(SAVE_LOAD, None, "folder of all runs; this one lives in <save-dir>/<name>")
    name: Optional[str] = flag(LOGGING, None, "name of the run and of its folder")
    save: bool = flag(LOGGING, True, "save checkpoints; with --no-save only metrics and logs are written")
    save_optim: bool = flag(SAVE_LOAD, False, "save optimizer and data position too: needed to resume")
    save_trained_only: bool = flag(
        SAVE_LOAD, False, "leave frozen weights out of checkpoints; they are those that the run started from"
    )
    load_optim: bool = flag(
        SAVE_LOAD, False, "take the optimizer state from --megatron-load-dir too, when a run starts there"
    )
    save_interval: int = flag(SAVE_LOAD, 2000, "iterations between checkpoints; the last one is always saved")
    keep_checkpoints: Optional[int] = flag(
        SAVE_LOAD,
        None,
        "delete all but this many of the newest checkpoints after each save; the best one is kept besides",
        shown_default="all are kept",
    )
    restart: bool = flag(SAVE_LOAD, False, "start over in a run folder that holds an earlier run")

    def __post_init__(self) -> None:
        positive(self, "save_interval", "keep_checkpoints")
        if self.keep_checkpoints is not None and not self.save:
            raise ValueError("--keep-checkpoints has nothing to keep with --no-save; drop one of them")
        for name in ("save_optim", "save_trained_only"):
            if getattr(self, name) and not self.save:
                raise ValueError(f"{flag_name(name)} saves nothing with --no-save; drop one of them")
        if self.name is not None and (
            self.name in (".", "..") or not re.fullmatch(r"[^/\0\r\n]+", self.name)
        ):
            raise ValueError(f"--name {self.name!r} cannot name a folder; use letters, digits, '-' and '_'")

    @property
    def run_dir(self) -> str:
        """The run folder, ``<save-dir>/<name>``."""
        if not self.save_dir or not self.name:
            raise ValueError("--save-dir and --name are both needed: the run lives in <save-dir>/<name>")
        return os.path.join(self.save_dir, self.name)


@dataclass(frozen=True)
class LoggingSection:
    """Where numbers go, and what watches over them; ``metrics.jsonl`` in the run folder is always written."""

    log_interval: int = flag(LOGGING, 1, "iterations between two lines of the log")
    peak_tflops: Optional[float] = flag(
        LOGGING,
        None,
        "what one device could do in TFLOP/s, for the model FLOPs utilisation (MFU)",
        shown_default="bfloat16's, or FP8's with --fp8, by the GPU's name; no MFU on CPUs",
    )
    alert_spike: bool = flag(
        LOGGING, False, "tell when the loss jumps: a line of the log, and a message by Weights & Biases"
    )
    spike_threshold: float = flag(
        LOGGING, 2.0, "a loss jumps when it is this many times the median of the last 100"
    )
    nan_policy: str = flag(
        TRAINING,
        "stop",
        "what happens when a loss or gradient is not finite: the run stops before the weights change, or "
        "this one update is left out, 10 times in a row at most",
        choices=("stop", "skip"),
    )
    watchdog_minutes: float = flag(
        DISTRIBUTED,
        20.0,
        "end the run when no iteration has ended for so long, and write each rank's stacks to "
        "<run>/logs/stacks; 0 does not",
    )
    tensorboard: bool = flag(LOGGING, False, "log to TensorBoard: event files in <run>/tensorboard")
    wandb: bool = flag(LOGGING, False, "log to Weights & Biases")
    wandb_mode: Optional[str] = flag(
        LOGGING,
        None,
        "send to its server, or write files to <run>/wandb that `wandb sync` uploads later",
        choices=("online", "offline"),
        shown_default="WANDB_MODE, else online",
    )
    wandb_project: Optional[str] = flag(
        LOGGING, None, "its project", shown_default="WANDB_PROJECT, else megatron-vlm"
    )
    wandb_entity: Optional[str] = flag(
        LOGGING, None, "its team or user", shown_default="WANDB_ENTITY, else the one logged in"
    )
    wandb_name: Optional[str] = flag(LOGGING, None, "name of the run there", shown_default="--name")

    def __post_init__(self) -> None:
        positive(self, "log_interval", "peak_tflops")
        not_negative(self, "watchdog_minutes")
        if self.spike_threshold <= 1:
            raise ValueError(f"--spike-threshold {self.spike_threshold:g}: must be above 1")
        if self.spike_threshold != type(self).spike_threshold and not self.alert_spike:
            raise ValueError("--spike-threshold does nothing without --alert-spike; give both or neither")
        for name in ("wandb_mode", "wandb_project", "wandb_entity", "wandb_name"):
            if getattr(self, name) is not None and not self.wandb:
                raise ValueError(
                    f"{flag_name(name)} does nothing without --wandb; add it, or leave the flag out"
                )


def _iteration_range(text: str) -> Tuple[int, int]:
    match = re.fullmatch(r"(\d+)-(\d+)", text, re.ASCII)
    first, last = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"--skip-train-iteration-range {text}: not a range of iterations; write the first, from 1 on, "
            "and the last, such as 100-110"
        )
    return first, last
