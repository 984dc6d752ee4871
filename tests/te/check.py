"""Transformer Engine's own Python under this project's layer specs, on a CPU, against transformers and PEFT.

    python -m tests.te.check

Loss, logits and gradients of tiny models, whole and packed sequences, with and without recomputation; a run
with adapters; and what delayed scaling remembers, given back. :mod:`tests.te.stub` stands in for the engine's
C++ library, so kernels, FP8's arithmetic and flash attention aren't in it. Needs the engine's Python on
PYTHONPATH.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.te import stub

RELEASE = stub.install()  # before anything imports megatron-core

from megatron_vlm import parallel  # noqa: E402
from megatron_vlm.models import scaling, vlm  # noqa: E402
from megatron_vlm.parallel import sharded_files  # noqa: E402
from tests.models import test_lora, test_packing, test_parity  # noqa: E402
from tests.te.ranks import in_fp8, number  # noqa: E402
from tests.workers import Layout, logits_and_gradients, train_adapters  # noqa: E402


def main() -> None:
    """Check everything, and say what."""
    folder = Path(tempfile.mkdtemp())
    for family in ("siglip-llama-biases", "clip-qwen3-tied", "clip-mixtral"):
        reference = test_parity.Reference(family, folder / family)
        for recompute in ("none", "full", "selective"):
            _check(reference, Layout(recompute=recompute))
        print(f"{family}: equals transformers", flush=True)
    packed = test_parity.Reference("clip-llama", folder / "packed", test_packing.make_packed_batch)
    _check(packed, Layout())
    print("clip-llama, packed: equals transformers", flush=True)
    _with_engine(_check_scaling, packed.checkpoint, folder / "scaling")
    print("delayed scaling: goes on from what was saved", flush=True)

    for case in test_lora.CASES:
        adapters = test_lora.Reference(case, folder / case)
        losses = _with_engine(
            train_adapters,
            str(adapters.checkpoint),
            str(adapters.adapter),
            adapters.lora,
            adapters.batches,
            Layout(),
            test_lora.ITERATIONS,
            (test_lora.LR, test_lora.WEIGHT_DECAY, test_lora.CLIP),
        )
        assert all(abs(a - b) <= 1e-5 * b for a, b in zip(losses, adapters.losses, strict=True))
        print(f"LoRA, {case}: trains as PEFT", flush=True)


def _check_scaling(checkpoint: str, folder: Path) -> None:
    """The engine goes on with the scales and the history that it is given."""
    from megatron.core.fp8_utils import get_fp8_context

    layout = parallel.initialize()

    def linears(chunks: Any) -> Iterator[tuple[str, str, Any, torch.Tensor]]:
        with get_fp8_context(chunks[0].config):  # as the first layer of an iteration
            for base, linear in scaling._linears(chunks):
                linear.init_fp8_metadata()
                for name, tensor in scaling._kept(linear).items():
                    yield base, name, linear, tensor

    before = in_fp8(checkpoint, layout, history=4)
    count = 0
    for base, name, _, tensor in linears(before):
        tensor.copy_(number(base, name, tensor.shape))
        count += 1
    assert count
    folder.mkdir()
    sharded_files.save({"scaling": scaling.scaling_state(before, layout)}, str(folder))

    after = in_fp8(checkpoint, layout, history=4)
    assert scaling.load_scaling_state(folder, after)
    for base, name, linear, tensor in linears(after):
        assert torch.equal(tensor, number(base, name, tensor.shape))
        count -= 1
        if name == "scale_fwd":  # what casts a product's input, weight and output
            assert torch.equal(torch.stack([q.scale for q in linear.quantizers["scaling_fwd"]]), tensor)
    assert count == 0


def _check(reference: test_parity.Reference, sizes: Layout) -> None:
    answer = _with_engine(logits_and_gradients, reference.checkpoint, reference.batch, sizes)
    assert abs(answer[0] - reference.loss) <= 1e-6 * reference.loss
    test_parity.check_logits(reference, [answer], sizes)
    test_parity.check_gradients(reference, [answer])


def _with_engine(function: Callable[..., Any], *args: Any) -> Any:
    with mock.patch.object(vlm, "choose_transformer_impl", lambda *_: "transformer_engine"):
        try:
            return function(*args)
        finally:
            parallel.finalize()


if __name__ == "__main__":
    print(f"Transformer Engine {RELEASE}, torch {torch.__version__}")
    main()
