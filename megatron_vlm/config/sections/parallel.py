"""The section of a run config that says how the model is cut, what runs it, and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from megatron_vlm.config.checks import positive
from megatron_vlm.config.flags import flag, flag_name
from megatron_vlm.config.headings import (
    DISTRIBUTED,
    OTHER,
    PARALLEL,
    TRAINING,
)


@dataclass(frozen=True)
class ParallelSection:
    """The flags that say how the model is cut, what runs it, and what it keeps in memory."""

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
