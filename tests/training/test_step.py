"""A step waits for the device at its end only, and lengths that are rounded up change nothing."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm import parallel
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.train_modules import parse_train_modules
from megatron_vlm.artifacts.checkpoint import read_manifest
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.batch import Microbatch
from megatron_vlm.data.processing import build_processing
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.vlm import build_model
from megatron_vlm.models.weights import load_weights
from megatron_vlm.parallel.optimizer import Optimizer, wrap_model
from megatron_vlm.training import batch as batch_module
from megatron_vlm.training.batch import BatchReader
from megatron_vlm.training.freezing import set_trainable
from megatron_vlm.training.step import prepare_for_schedules, train_step
from tests.distributed import Pool
from tests.media import image_media
from tests.training.conftest import Trainable

# On a GPU the host has to wait for these: their results, or the results' sizes, depend on the data.
WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "equal",
    "bincount",
    "repeat_interleave",
)


class Waits(TorchDispatchMode):
    """The lines of code that ask for what a GPU has not computed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name.startswith(WAITS) or by_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        """The innermost function of this project or of megatron-core that is running."""
        names = [frame for frame in traceback.extract_stack() if "megatron" in frame.filename]
        self.places.append(f"{names[-1].name}: {what}")


def steps(argv: list[str], microbatches: list[Microbatch], multiple: int) -> tuple[list[float], list[str]]:
    """Losses of two steps, and where the second has waited, reading its batch left out."""
    config = RunConfig.from_flags(argv)
    layout = parallel.initialize()
    checkpoint = Path(str(config.model.megatron_load_dir)) / "release"
    model = ModelConfig.from_dict(read_manifest(checkpoint)["model"])
    chunks = build_model(model, layout, ModelOptions(torch.bfloat16 if "--bf16" in argv else torch.float32))
    set_trainable(chunks, parse_train_modules("all"), layout)
    load_weights(checkpoint, chunks)
    models = wrap_model(chunks, config.parallel.dist_optim, overlap_grad_reduce=False)
    prepare_for_schedules(models)
    optimizer = Optimizer(models, 0.1, 0.9, 0.999, 1e-8, 1.0)
    batch_module.LENGTH_STEP = {"cpu": multiple}
    dtype = torch.bfloat16 if "--bf16" in argv else torch.float32
    reader = BatchReader(
        iter(microbatches), layout, model, build_processing(config, model), len(microbatches) // 2, dtype
    )
    losses = [train_step(models, optimizer, reader.next(), layout, [1e-3]).loss]
    batch = reader.next()
    assert all(one.input_ids.shape[1] % multiple == 0 for one in batch.microbatches)
    original = torch.Tensor.tolist
    with Waits() as waits:
        # Reads memory on the CPU, so that no operation shows.
        torch.Tensor.tolist = lambda self: waits.note("tolist") or original(self)  # type: ignore[method-assign]
        try:
            losses.append(train_step(models, optimizer, batch, layout, [1e-3]).loss)
        finally:
            torch.Tensor.tolist = original  # type: ignore[method-assign]
            batch_module.LENGTH_STEP = {"cpu": 1, "cuda": 64}
    return losses, waits.places


@pytest.fixture
def microbatches(trainables: dict[str, Trainable]) -> list[Microbatch]:
    """With images and without, of several lengths."""
    model = ModelConfig.from_hf_dir(str(trainables["untied"].hf))
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, images in enumerate(([1, 1], [0, 0], [0, 1], [2, 0])):
        ids = torch.randint(3, 190, (2, 71 + number), generator=generator)
        for row, count in enumerate(images):
            ids[row, : count * model.image_tokens] = model.image_token_id
        labels = ids.clone()
        labels[:, :60] = -100
        pixels = torch.randint(0, 256, (sum(images), 3, 20, 20), generator=generator).to(torch.uint8)
        lengths = torch.full((2,), ids.shape[1])
        found.append(Microbatch(ids, labels, lengths, ["a", "b"], image_media(pixels)))
    return found


@pytest.mark.parametrize("flags", [[], ["--bf16"], ["--bf16", "--dist-optim"]], ids=" ".join)
def test_a_step_waits_at_its_end_only(
    pool: Pool,
    trainables: dict[str, Trainable],
    microbatches: list[Microbatch],
    tmp_path: Path,
    flags: list[str],
) -> None:
    """For whether anything was trained, the loss, and the gradients' norm, however many micro batches."""
    argv = trainables["untied"].flags(tmp_path, "run", "--train-iters", "2", *flags)
    ((_, places),) = pool.run(1, steps, argv, microbatches, 1)
    assert places == [
        "finalize_model_grads: _local_scalar_dense",
        "sum_losses: tolist",
        "local_multi_tensor_l2_norm: _local_scalar_dense",  # not with Transformer Engine's or apex's
        "get_grad_norm_fp32: _local_scalar_dense",
    ]


def test_rounded_lengths_change_no_loss(
    pool: Pool, trainables: dict[str, Trainable], microbatches: list[Microbatch], tmp_path: Path
) -> None:
    argv = trainables["untied"].flags(tmp_path, "run", "--train-iters", "2")
    ((expected, _),) = pool.run(1, steps, argv, microbatches, 1)
    ((losses, _),) = pool.run(1, steps, argv, microbatches, 64)
    assert losses == pytest.approx(expected, rel=1e-6)  # fp32 sums in another order
