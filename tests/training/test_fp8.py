"""Batches for FP8: padded tokens change neither loss nor gradient; GPUs without it are told by all ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_vlm import parallel
from megatron_vlm.parallel import fp8
from tests.distributed import Pool
from tests.training.conftest import Trainable
from tests.training.test_layouts import layout_flags
from tests.workers import Layout, plain_and_for_fp8

GPU = "a GPU here has compute capability"
PACKED = ["--packing", "--packing-buffer-size", "20", "--seq-length", "203"]


@pytest.mark.parametrize(
    ("layout", "kind", "flags"),
    [
        (Layout(), "llava_next", ["--seq-length", "191"]),
        (Layout(tp=2), "deep", ["--seq-length", "93", "--micro-batch-size", "1"]),
        (Layout(tp=2, sequence_parallel=True), "deep", PACKED),
        (Layout(pp=2), "deep", PACKED),
        (Layout(dp=2, distributed_optimizer=True), "deep", ["--seq-length", "93"]),
        (Layout(tp=2, pp=2, sequence_parallel=True), "deep", ["--seq-length", "93"]),
        (Layout(pp=2, vpp=2), "deep", ["--seq-length", "93", "--micro-batch-size", "1"]),
    ],
    ids=lambda value: str(value) if isinstance(value, (Layout, str)) else str(len(value)),
)
def test_padding_changes_nothing(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path, layout: Layout, kind: str, flags: list[str]
) -> None:
    """Micro batches with and without images, up to a --seq-length that is not aligned."""
    argv = trainables[kind].flags(tmp_path, "run", *layout_flags(layout), "--stage", "2", "--train-vision")
    argv.remove("--fp32")
    argv += ["--train-iters", "1", "--global-batch-size", "8", "--data-workers", "4", *flags]
    for plain, padded in pool.run(layout.world, plain_and_for_fp8, argv):
        assert padded[0] == pytest.approx(plain[0], rel=1e-6)
        total = torch.stack([gradient.norm() for gradient in plain[1].values()]).norm()
        for name, expected in plain[1].items():
            # fp32 sums in another order; relative to the rank's gradients, of which some are zero in theory.
            allowed = 1e-6 * max(float(expected.norm()), 1e-1 * float(total))
            assert float((padded[1][name] - expected).norm()) <= allowed, name
        assert padded[2] and all(tokens % 16 == 0 for tokens in padded[2])
        assert any(tokens % 16 for tokens in plain[2])


def check(capabilities: list[tuple[int, int]], engine: bool = True, device: str = "cuda") -> str | None:
    """Return what this rank says where the ranks' GPUs are of these compute capabilities."""
    layout = parallel.initialize()
    layout = replace(layout, device=torch.device(device))
    with (
        mock.patch.object(fp8.importlib.util, "find_spec", return_value=object() if engine else None),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: capabilities[layout.rank]),
        mock.patch.object(torch.version, "cuda", "12.8"),
    ):
        try:
            fp8.check_ranks("tensorwise", layout)
        except ValueError as error:
            return str(error)
    return None


def test_all_ranks_end_alike(pool: Pool) -> None:
    """One line, though one GPU alone is too old; none of them is left waiting for it."""
    assert pool.run(2, check, [(9, 0), (9, 0)]) == [None, None]
    first, second = pool.run(2, check, [(9, 0), (8, 0)])
    assert first == second
    assert first == f"--fp8 needs compute capability 8.9 or more, and {GPU} 8.0; use --bf16"
    assert "Transformer Engine, which is not installed here" in pool.run(1, check, [(9, 0)], False)[0]
    with mock.patch.object(fp8, "why_not", return_value="can't be imported"):
        assert fp8._reason("tensorwise", torch.device("cuda")) == (
            "--fp8: Transformer Engine can't be imported; mend that, or use --bf16 --transformer-impl local"
        )
    assert "this run is on the CPU" in pool.run(1, check, [(9, 0)], True, "cpu")[0]
