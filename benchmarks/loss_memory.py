"""Peak memory with and without whole logits, of output layer and loss alone and of a whole training step.

Each figure is the peak resident set of a process of its own, interpreter and libraries included. Every
token is trained, so that what is saved comes from the chunks and not from the mask.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from benchmarks.ours import freeze_tower
from benchmarks.workload import OPTIMIZER, Workload, make_batches, peak_memory, save_model
from megatron_vlm import parallel
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.media.base import Media
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.models import language
from megatron_vlm.models.loss import find_trained, linear_cross_entropy
from megatron_vlm.models.modalities.table import modalities_of, place_media
from megatron_vlm.models.vlm import build_model
from megatron_vlm.models.weights import load_weights
from megatron_vlm.parallel.optimizer import Optimizer, wrap_model
from megatron_vlm.training.batch import Batch, GlobalBatch
from megatron_vlm.training.step import prepare_for_schedules, train_step


def whole_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, trained: Tensor, vocab_size: int, **_: Any
) -> Tensor:
    """Compute the loss as megatron-core does: all logits, then its ``vocab_parallel_cross_entropy``."""
    logits = hidden @ weight.t()
    if vocab_size < logits.shape[-1]:
        logits = logits[..., :vocab_size].contiguous()
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels.t().contiguous())
    return losses.flatten()[trained].sum()


def alone(path: str, workload: Workload) -> dict[str, Any]:
    """Forward and backward of output layer and loss in this process; answers as :func:`step`."""
    layout = parallel.initialize()
    generator = torch.Generator().manual_seed(0)
    shape = workload.sequence, workload.micro_batch, workload.hidden_size
    hidden = torch.randn(shape, generator=generator).requires_grad_()
    weight = torch.randn(workload.vocab_size, workload.hidden_size, generator=generator).mul_(0.02)
    weight.requires_grad_()
    labels = torch.randint(workload.vocab_size, (shape[1], shape[0]), generator=generator)
    trained = torch.arange(labels.numel())
    started = time.process_time()
    loss_function = whole_logits if path == "upstream" else linear_cross_entropy
    loss = loss_function(hidden, weight, labels, trained, workload.vocab_size, group=layout.tp_group)
    loss.backward()
    seconds = time.process_time() - started
    parallel.finalize()
    return {"peak_mib": peak_memory(), "losses": [float(loss.detach())], "cpu_seconds": seconds}


def step(path: str, folder: Path, workload: Workload) -> dict[str, Any]:
    """Train for some steps in this process.

    Returns:
        ``peak_mib``, ``losses``, and ``cpu_seconds`` of the steps after the first.
    """
    if path == "upstream":
        replacement: Callable[..., Tensor] = whole_logits
        language.linear_cross_entropy = replacement
    layout = parallel.initialize()
    model = ModelConfig.from_hf_dir(str(folder / "hf"))
    chunks = build_model(model, layout)
    freeze_tower(chunks)
    load_weights(folder / "megatron" / "release", chunks)
    models = wrap_model(chunks, distributed_optimizer=False, overlap_grad_reduce=False)
    prepare_for_schedules(models)
    optimizer = Optimizer(models, **{name: value for name, value in OPTIMIZER.items() if name != "lr"})
    losses, started = [], 0.0
    for number, given in enumerate(make_batches(workload, model.image_token_id, all_trained=True)):
        if number == workload.warmup:
            started = time.process_time()
        ids, labels = given["input_ids"], torch.zeros_like(given["labels"])
        labels[:, :-1] = given["labels"][:, 1:]
        mask = torch.ones_like(labels, dtype=torch.bool)
        mask[:, -1] = False
        sizes = torch.zeros(len(ids), 2, dtype=torch.int64)
        images = Media(IMAGE.name, {"pixel_values": given["pixels"] / 255.0}, sizes)
        media = place_media(ids, {IMAGE.name: images}, modalities_of(model))
        batch = Batch(ids, labels, mask, find_trained(mask), media)
        one = GlobalBatch([batch], workload.sequence)
        losses.append(train_step(models, optimizer, one, layout, [OPTIMIZER["lr"]]).loss)
    seconds = time.process_time() - started
    parallel.finalize()
    return {"peak_mib": peak_memory(), "losses": losses, "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=1, help="steps after the first")
    parser.add_argument("--workload", type=json.loads, default={}, help="sizes that differ, as JSON")
    parser.add_argument("--path", choices=("upstream", "fused"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {"sequence": args.sequence, "micro_batch": args.micro_batch, "global_batch": args.micro_batch}
    workload = Workload(**{**sizes, "iterations": args.iterations, **args.workload})
    if args.path:
        answer = step(args.path, args.folder, workload) if args.folder else alone(args.path, workload)
        print(json.dumps(answer))
        return
    tokens = workload.sequence * workload.micro_batch
    print(f"{tokens} tokens, all trained; hidden {workload.hidden_size}, vocabulary {workload.vocab_size}")
    compare("output layer and loss", workload)
    with tempfile.TemporaryDirectory() as temporary:
        save_model(workload, Path(temporary))
        compare("training step", workload, "--folder", temporary)


def compare(title: str, workload: Workload, *flags: str) -> None:
    """Run both ways and print a line."""
    answers = []
    for path in ("upstream", "fused"):
        command = [sys.executable, "-m", "benchmarks.loss_memory", "--path", path, *flags]
        command += ["--workload", json.dumps(asdict(workload))]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(f"error: {path} ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
        answers.append(json.loads(ended.stdout.splitlines()[-1]))
    old, new = answers
    apart = max(abs(a - b) / a for a, b in zip(old["losses"], new["losses"], strict=True))
    print(
        f"{title}: {old['peak_mib']:.0f} MiB with whole logits, {new['peak_mib']:.0f} MiB in chunks "
        f"({100 * (1 - new['peak_mib'] / old['peak_mib']):.0f} % less); {old['cpu_seconds']:.1f} s and "
        f"{new['cpu_seconds']:.1f} s of processor; losses differ by {apart:.0e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
