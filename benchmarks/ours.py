"""One rank of this trainer, from tensors in memory or from its loaders; started by benchmarks.compare."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.workload import IGNORE, OPTIMIZER, Workload, make_batches, peak_memory
from megatron_vlm import parallel, rank
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.batch import Microbatch
from megatron_vlm.data.media.base import Media
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.data.processing import load_processing
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.vlm import VisionLanguageModel, build_model
from megatron_vlm.models.weights import load_weights
from megatron_vlm.parallel.optimizer import Optimizer, wrap_model
from megatron_vlm.training.batch import BatchReader
from megatron_vlm.training.run import run
from megatron_vlm.training.step import prepare_for_schedules, train_step


def freeze_tower(chunks: list[VisionLanguageModel]) -> None:
    """Freeze the tower: stage 2 trains projector and language model."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad = not name.startswith("vision_model.")


def from_memory(
    workload: Workload, folder: Path, layout: parallel.Layout, all_trained: bool
) -> dict[str, list[float]]:
    """Return the training step on collated batches: hand out, normalise, forward, backward, update."""
    dtype = torch.bfloat16 if layout.device.type == "cuda" else torch.float32
    model = ModelConfig.from_hf_dir(str(folder / "hf"))
    chunks = build_model(model, layout, ModelOptions(dtype))
    freeze_tower(chunks)
    load_weights(folder / "megatron" / "release", chunks)
    models = wrap_model(chunks, distributed_optimizer=False, overlap_grad_reduce=layout.dp > 1)
    prepare_for_schedules(models)
    settings = {name: value for name, value in OPTIMIZER.items() if name != "lr"}
    optimizer = Optimizer(models, **settings)

    batches = make_batches(workload, model.image_token_id, all_trained)[layout.dp_rank :: layout.dp]
    reader = BatchReader(
        (microbatch(batch) for batch in batches) if layout.loads_data else None,
        layout,
        model,
        load_processing(str(folder / "hf"), model, seq_length=workload.sequence),
        num_microbatches=workload.global_batch // workload.micro_batch // layout.dp,
        dtype=dtype,
    )
    losses: list[float] = []
    seconds: list[float] = []
    tokens: list[float] = []
    for _ in range(workload.warmup + workload.iterations):
        start = time.perf_counter()
        batch = reader.next()
        result = train_step(models, optimizer, batch, layout, [OPTIMIZER["lr"]])
        seconds.append(time.perf_counter() - start)
        losses.append(result.loss)
        tokens.append(batch.tokens)
    return {"losses": losses, "seconds": seconds, "tokens": tokens}


def microbatch(batch: dict[str, torch.Tensor]) -> Microbatch:
    """Return a batch of :func:`benchmarks.workload.make_batches` as a microbatch, with labels shifted."""
    labels = torch.full_like(batch["labels"], IGNORE)
    labels[:, :-1] = batch["labels"][:, 1:]
    rows, length = labels.shape
    sizes = torch.zeros(len(batch["pixels"]), 2, dtype=torch.int64)
    media = {IMAGE.name: Media(IMAGE.name, {"pixels": batch["pixels"]}, sizes)}
    return Microbatch(batch["input_ids"], labels, torch.full((rows,), length), [""] * rows, media)


def from_loader(workload: Workload, folder: Path, layout: parallel.Layout) -> dict[str, list[float]]:
    """Return a whole run as the launcher starts it: energon's loaders with one worker per rank."""
    total = workload.warmup + workload.iterations
    sizes = {"micro_batch_size": workload.micro_batch, "global_batch_size": workload.global_batch}
    sizes |= {"seq_length": workload.sequence, "train_iters": total, "tp": layout.tp}
    settings = {name.replace("_", "-"): value for name, value in OPTIMIZER.items()}
    settings = {
        {"beta1": "adam-beta1", "beta2": "adam-beta2", "eps": "adam-eps"}.get(n, n): v
        for n, v in settings.items()
    }
    numbers = {**sizes, **settings, "data-workers": layout.world_size, "lr-warmup-iters": 0}
    argv = [text for name, value in numbers.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    argv += ["--stage", "2", "--lr-decay-style", "constant", "--lang", "en", "--no-save", "--name", "run"]
    argv += ["--megatron-load-dir", str(folder / "megatron"), "--tokenizer-load-dir", str(folder / "hf")]
    argv += ["--data-path", str(folder / "data"), "--save-dir", str(folder / "runs"), "--restart"]
    argv += ["--bf16" if layout.device.type == "cuda" else "--fp32"]
    run(RunConfig.from_flags(argv), layout)
    dist.barrier()  # rank 0 has written its last line
    log = folder / "runs" / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines],
        "seconds": [line["iteration_seconds"] for line in lines],
        "tokens": [line["tokens"] / layout.dp for line in lines],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--workload", type=json.loads, required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--all-trained", action="store_true")
    parser.add_argument("--loader", action="store_true")
    args = parser.parse_args()
    workload = Workload(**args.workload)
    layout = parallel.initialize(tp=args.tp)
    if args.loader:
        result = from_loader(workload, args.folder, layout)
    else:
        result = from_memory(workload, args.folder, layout, args.all_trained)
    # Of ranks with the same data, one counts its tokens.
    counts = result["tokens"] if layout.loads_data else []
    answer = {**result, "tokens": counts, "peak_mib": peak_memory()}
    args.result.with_suffix(f".{layout.rank}.json").write_text(json.dumps(answer))
    parallel.finalize()


if __name__ == "__main__":
    main()
    rank.leave(0)
