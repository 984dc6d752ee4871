"""Transformer Engine's layers beside megatron-core's own: logits and every gradient of one checkpoint.

The model is computed three times: with its own layers in float32, with them in BF16, and with Transformer
Engine's in BF16. Without a GPU the last is left out, and the tolerance is tried on the first two.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.gpu.speed import READER, TINY
from benchmarks.ours import microbatch
from benchmarks.workload import Workload, make_batches, save_model
from megatron_vlm import parallel
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.train_modules import parse_train_modules
from megatron_vlm.artifacts.checkpoint import read_manifest
from megatron_vlm.data.batch import Microbatch
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.vlm import VisionLanguageModel, build_model
from megatron_vlm.models.weights import (
    load_sharded,
    load_weights,
    named_parameters,
    saved_name,
    sharded_weights,
)
from megatron_vlm.parallel import sharded_files
from megatron_vlm.parallel.optimizer import wrap_model
from megatron_vlm.training.batch import BatchReader, GlobalBatch
from megatron_vlm.training.freezing import set_trainable
from megatron_vlm.training.step import compute_gradients, prepare_for_schedules

WORKLOAD = Workload(
    vocab_size=2048,
    hidden_size=1024,
    ffn_hidden_size=2816,
    num_heads=16,
    num_key_value_heads=4,
    vision_hidden_size=512,
    vision_ffn_hidden_size=2048,
    vision_layers=5,
    vision_heads=8,
    image_size=112,
    patch_size=14,
    sequence=256,
    answer=128,
    micro_batch=2,
    global_batch=4,
)
# BF16 has 8 bits, so that rounding to the nearest errs by up to 2^-9, and by 2^-9 / sqrt(3) on average. A
# layer rounds some 12 times on the way of a value: two norms, queries, rotation, attention, its output, the
# sum, two products of the MLP, its activation, its output, the sum. Errors of both sides add up as random
# ones do, by the root of their number. Twice that is allowed: a layer may enlarge what came before it.
ROUNDINGS = 12
EPSILON = 2.0**-9 / math.sqrt(3)


def tolerances(layers: int) -> dict[str, float]:
    """Return how far apart two ways to compute the same in BF16 may be, relative to the norm.

    Args:
        layers: that a value goes through, one after the other. A gradient goes through them once forward
            and once back, where each product has two factors with errors.
    """
    return {
        "logits": 2 * EPSILON * math.sqrt(2 * ROUNDINGS * layers),
        "gradients": 2 * EPSILON * math.sqrt(2 * 3 * ROUNDINGS * layers),
    }


def microbatches(workload: Workload, image_token_id: int) -> list[Microbatch]:
    """Return the rows of their own, and a row that several samples share."""
    made = make_batches(replace(workload, warmup=0, iterations=1), image_token_id, all_trained=False)
    first, second = (microbatch(batch) for batch in made[:2])
    lengths = second.lengths.clone()
    packed = replace(
        second,
        input_ids=second.input_ids.view(1, -1),
        labels=second.labels.view(1, -1),
        lengths=lengths,
        packed=True,
    )
    return [first, packed]


def loaded(
    checkpoint: Path, layout: parallel.Layout, impl: str, dtype: torch.dtype
) -> list[VisionLanguageModel]:
    """Return the model of a checkpoint, all of it trained."""
    model = ModelConfig.from_dict(read_manifest(checkpoint)["model"])
    chunks = build_model(model, layout, ModelOptions(dtype, impl=impl))
    set_trainable(chunks, parse_train_modules("all"), layout)
    load_weights(checkpoint, chunks)
    return chunks


def compute(
    checkpoint: Path, workload: Workload, layout: parallel.Layout, impl: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Logits of each microbatch and gradients by their names in checkpoints, in float32 on the CPU."""
    chunks = loaded(checkpoint, layout, impl, dtype)
    model = chunks[0].model_config
    models = wrap_model(chunks, distributed_optimizer=False, overlap_grad_reduce=False)
    prepare_for_schedules(models)
    given = microbatches(workload, model.image_token_id)
    processing: Any = SimpleNamespace(readers={IMAGE.name: READER}, pad_token_id=0)
    # One global batch each: rows of their own and packed ones are not of one shape.
    found: dict[str, Tensor] = {}
    for number, one in enumerate(given):
        batch = BatchReader(iter([one]), layout, model, processing, 1, dtype).next()
        for wrapped in models:
            wrapped.zero_grad_buffer()
        compute_gradients(models, batch, layout)
        found |= {f"{number} gradient {name}": g for name, g in _gradients(chunks).items()}
        found[f"{number} logits"] = _logits(chunks[0], batch)
    return found


def _gradients(chunks: list[VisionLanguageModel]) -> dict[str, Tensor]:
    entries = sharded_weights(chunks)
    return {
        saved_name(entries[name]): parameter.main_grad.detach().float().cpu()  # type: ignore[attr-defined]
        for name, parameter in named_parameters(chunks)
    }


@torch.no_grad()
def _logits(chunk: VisionLanguageModel, batch: GlobalBatch) -> Tensor:
    (one,) = batch.microbatches
    logits = chunk(one.input_ids, one.media, packed_seq_params=one.packed_seq_params)
    return logits.float().cpu()


def round_trip(checkpoint: Path, folder: Path, layout: parallel.Layout, impl: str) -> bool:
    """Return whether a checkpoint of one kind of layers loads into megatron-core's own, to the bit."""
    folder.mkdir()
    sharded_files.save(
        {"model": sharded_weights(loaded(checkpoint, layout, impl, torch.bfloat16))}, str(folder)
    )
    expected = loaded(checkpoint, layout, "local", torch.bfloat16)
    blank = build_model(expected[0].model_config, layout, ModelOptions(torch.bfloat16, impl="local"))
    found = load_sharded(folder, {"model": sharded_weights(blank)})["model"]
    return all(
        torch.equal(found[name].to(parameter.device), parameter)
        for name, parameter in named_parameters(expected)
    )


def compare(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest relative difference of logits, and of gradients beside the larger of their norm and
    a hundredth of all gradients': some are zero in exact arithmetic.

    Raises:
        ValueError: the two have other gradients.
    """
    if a.keys() != b.keys():
        raise ValueError(f"only one of the two has {sorted(a.keys() ^ b.keys())[:4]}")
    worst = {"logits": 0.0, "gradients": 0.0}
    for number in ("0", "1"):
        gradients = {name for name in a if name.startswith(f"{number} gradient")}
        whole = math.sqrt(sum(float(b[name].norm()) ** 2 for name in gradients))
        for name in (*gradients, f"{number} logits"):
            least = 1e-2 * whole if name in gradients else 0.0
            apart = float((a[name] - b[name]).norm()) / max(float(b[name].norm()), least)
            kind = "gradients" if name in gradients else "logits"
            worst[kind] = max(worst[kind], apart if math.isfinite(apart) else math.inf)
    return worst


def measure(layout: parallel.Layout, workload: Workload, folder: Path) -> Iterator[dict[str, Any]]:
    """Differences of each pair, the tolerance, and whether Transformer Engine's layers keep it."""
    save_model(workload, folder)
    checkpoint = folder / "megatron" / "release"
    exact = compute(checkpoint, workload, layout, "local", torch.float32)
    local = compute(checkpoint, workload, layout, "local", torch.bfloat16)
    allowed = tolerances(workload.num_layers + workload.vision_layers - 1 + 1)  # the projector is one
    judged, apart, impl = "local in BF16 beside float32", compare(local, exact), "local"
    yield {"tolerance": allowed, judged: apart}
    if layout.device.type == "cuda":
        engine = compute(checkpoint, workload, layout, "transformer_engine", torch.bfloat16)
        yield {"Transformer Engine beside float32": compare(engine, exact)}
        judged, impl = "Transformer Engine beside local, both BF16", "transformer_engine"
        apart = compare(engine, local)
    yield {judged: apart, "judged": judged, "within": all(apart[kind] <= allowed[kind] for kind in allowed)}
    yield {"saved with": impl, "loads with local": round_trip(checkpoint, folder / "saved", layout, impl)}


def main(argv: list[str]) -> None:
    args = gpu.parser(__doc__.splitlines()[0]).parse_args(argv)
    layout = parallel.initialize(device="cpu" if args.tiny else "cuda")
    # Else the float32 side would multiply in TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        gpu.collect(measure(layout, TINY if args.tiny else WORKLOAD, Path(folder)), args.result)
    parallel.finalize()


if __name__ == "__main__":
    main(sys.argv[1:])
