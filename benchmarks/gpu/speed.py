"""Training speed of one side at one shape: this trainer in BF16 or FP8, or transformers' model in BF16.

Both sides train projector and language model of the same LLaVA on the same batches: these go to the device in
each step, gradients are accumulated over the micro batches and clipped, and the same AdamW updates float32
weights. A few layers of a model stand for all: they have its full width, and the tower is whole.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.gpu.timing import find_kernels, find_waits, time_steps
from benchmarks.ours import freeze_tower, microbatch
from benchmarks.workload import OPTIMIZER, Workload, llava_config, make_batches, peak_memory
from megatron_vlm import parallel
from megatron_vlm.architecture.fp8 import Fp8Config
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.media.images import normalize
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.specs import choose_transformer_impl
from megatron_vlm.models.vlm import build_model
from megatron_vlm.parallel.fused import adam_source
from megatron_vlm.parallel.optimizer import Optimizer, wrap_model
from megatron_vlm.plan.flops import Flops, Work, causal_pairs, training_flops
from megatron_vlm.training.batch import BatchReader
from megatron_vlm.training.step import prepare_for_schedules, train_step

IMAGE_TOKEN = 499  # make_batches draws text from above
CLIP_L_336 = dict(
    vision_hidden_size=1024,
    vision_ffn_hidden_size=4096,
    vision_layers=24,
    vision_heads=16,
    image_size=336,
    patch_size=14,  # 576 tokens an image
)
SHAPES = {
    # Llama 2 7B, as in LLaVA-1.5: 4 of its 32 layers
    "7B": Workload(
        vocab_size=32064,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_layers=4,
        num_heads=32,
        num_key_value_heads=32,
        sequence=2048,
        answer=1024,
        micro_batch=4,
        global_batch=16,
        warmup=4,
        iterations=10,
        **CLIP_L_336,
    ),
    # TinyLlama 1.1B: 8 of its 22 layers
    "1B": Workload(
        vocab_size=32000,
        hidden_size=2048,
        ffn_hidden_size=5632,
        num_layers=8,
        num_heads=32,
        num_key_value_heads=4,
        sequence=4096,
        answer=2048,
        micro_batch=4,
        global_batch=16,
        warmup=4,
        iterations=10,
        **CLIP_L_336,
    ),
}
TINY = Workload(
    vocab_size=512,
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    vision_hidden_size=32,
    vision_ffn_hidden_size=48,
    vision_layers=2,
    vision_heads=4,
    image_size=32,
    patch_size=8,
    sequence=48,
    answer=16,
    micro_batch=2,
    global_batch=4,
    warmup=1,
    iterations=2,
)
# What the processors of CLIP do, without one.
PIXELS: Any = SimpleNamespace(
    rescale=1 / 255, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)
READER = SimpleNamespace(
    finish=lambda tensors, dtype: {"pixel_values": normalize(tensors["pixels"], PIXELS, dtype)}
)
SIDES = ("bf16", "fp8", "transformers")
Step = Callable[[], float]


def our_step(workload: Workload, layout: parallel.Layout, fp8: bool) -> Step:
    """Return a training step of this project; returns its loss."""
    model = ModelConfig.from_hf(llava_config(workload, IMAGE_TOKEN).to_dict())
    chunks = build_model(model, layout, ModelOptions(torch.bfloat16, fp8=Fp8Config() if fp8 else None))
    freeze_tower(chunks)
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                _start(name, parameter)
    models = wrap_model(chunks, distributed_optimizer=False, overlap_grad_reduce=False)
    prepare_for_schedules(models)
    optimizer = Optimizer(models, **{name: value for name, value in OPTIMIZER.items() if name != "lr"})
    one_global_batch = [microbatch(batch) for batch in _batches(workload)]
    if layout.device.type == "cuda":
        one_global_batch = [batch.pin_memory() for batch in one_global_batch]  # as the loader's are
    reader = BatchReader(
        itertools.cycle(one_global_batch),
        layout,
        model,
        SimpleNamespace(readers={IMAGE.name: READER}, pad_token_id=0),  # type: ignore[arg-type]
        num_microbatches=len(one_global_batch),
        dtype=torch.bfloat16,
    )
    return lambda: train_step(models, optimizer, reader.next(), layout, [OPTIMIZER["lr"]]).loss


def their_step(workload: Workload, device: torch.device) -> Step:
    """Return a training step of transformers' model with float32 weights under BF16 autocast; returns its
    loss.

    Written out, so that nothing but the model, its backward pass and the update is timed: less than what
    transformers' Trainer does.
    """
    import transformers

    config = llava_config(workload, IMAGE_TOKEN)
    with device:
        net = transformers.AutoModelForImageTextToText.from_config(
            config, attn_implementation="sdpa", dtype=torch.float32
        )
    net.train()
    net.model.vision_tower.requires_grad_(False)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    update = _adam(device)(
        trained,
        lr=OPTIMIZER["lr"],
        betas=(OPTIMIZER["beta1"], OPTIMIZER["beta2"]),
        eps=OPTIMIZER["eps"],
        weight_decay=OPTIMIZER["weight_decay"],
    )
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (PIXELS.mean, PIXELS.std))
    batches = _batches(workload)
    for batch in batches:
        batch["pixel_values"] = (batch.pop("pixels") * PIXELS.rescale - mean) / std
        if device.type == "cuda":
            batch.update({name: tensor.pin_memory() for name, tensor in batch.items()})

    def step() -> float:
        total = torch.zeros((), device=device)
        for batch in batches:
            inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with torch.autocast(device.type, torch.bfloat16):
                loss = net(**inputs).loss / len(batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER["clip_grad"])
        update.step()
        update.zero_grad()
        return float(total)

    return step


def _batches(workload: Workload) -> list[dict[str, Tensor]]:
    """Return the microbatches of one global batch, which every step takes again."""
    return make_batches(replace(workload, warmup=0, iterations=1), IMAGE_TOKEN, all_trained=False)


def _start(name: str, parameter: Tensor) -> None:
    """Random weights, as good as any others to be fast with."""
    if parameter.dim() > 1:
        parameter.normal_(0.0, 0.02)
    else:
        parameter.fill_(float("norm" in name and name.endswith("weight")))


def _adam(device: torch.device) -> Any:
    """Return the AdamW that this project's weights are updated by here."""
    source = adam_source(device.type)
    if source == "torch":
        return lambda *args, **options: torch.optim.AdamW(*args, fused=True, **options)
    if source == "apex":
        from apex.optimizers import FusedAdam
    else:
        from transformer_engine.pytorch.optimizers import FusedAdam
    return FusedAdam


def work(workload: Workload) -> tuple[int, Flops]:
    """Return the tokens of a step, and its floating-point operations by part, whoever does them."""
    model = ModelConfig.from_hf(llava_config(workload, IMAGE_TOKEN).to_dict())
    samples = workload.global_batch
    tokens = samples * workload.sequence
    pairs = causal_pairs([workload.sequence] * samples)
    done = Work(tokens, samples * workload.answer, pairs, tiles=samples)
    return tokens, training_flops(model, done, lambda name: not name.startswith("vision_model."))


def measure(workload: Workload, side: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time the steps of a side, and look at one more of them."""
    layout = None
    if side == "transformers":
        step = their_step(workload, device)
    else:
        layout = parallel.initialize(device=device.type)
        step = our_step(workload, layout, fp8=side == "fp8")
    losses = [step() for _ in range(workload.warmup)]
    seconds = time_steps(step, 0, workload.iterations, device)
    tokens, flops = work(workload)
    median = statistics.median(seconds)
    yield {
        "workload": asdict(workload),
        "layers": "transformers, sdpa" if layout is None else choose_transformer_impl(device.type),
        "adam": adam_source(device.type),
        "step_seconds": median,
        "all_seconds": seconds,
        "tokens_per_second": tokens / median,
        "tflops": flops.total / median / 1e12,
        "tflops_without_tower": flops.without_vision / median / 1e12,
        "peak_gib": peak_memory() / 1024,
        "first_losses": losses,
    }
    if device.type == "cuda":
        yield from look_at(step)
    if layout is not None:
        parallel.finalize()


def look_at(step: Step) -> Iterator[dict[str, Any]]:
    """Waits and kernels of a step; where a profiler may not run, why not."""
    for name, find in (("waits", find_waits), ("kernels", find_kernels)):
        try:
            yield {name: find(step)}
        except Exception as error:
            yield {f"no {name}": f"{type(error).__name__}: {error}"}


def main(argv: list[str]) -> None:
    parser = gpu.parser(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--side", choices=SIDES, required=True)
    args = parser.parse_args(argv)
    workload = TINY if args.tiny else SHAPES[args.shape]
    device = torch.device("cpu" if args.tiny else "cuda")
    gpu.collect(measure(workload, args.side, device), args.result)


if __name__ == "__main__":
    main(sys.argv[1:])
