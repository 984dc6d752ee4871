"""Samples that share a row give the logits and gradients that transformers gives each on its own."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.models.packing import boundaries
from tests.distributed import Pool
from tests.models.test_parity import Reference, check, make_batch
from tests.workers import Layout

LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2),
    Layout(pp=4),
    Layout(tp=2, pp=2, sequence_parallel=True),
    Layout(tp=2, pp=2, vpp=2, sequence_parallel=True),
    Layout(tp=2, sequence_parallel=True, recompute="full"),
    Layout(pp=2, recompute="selective"),
]


def make_packed_batch(model: ModelConfig) -> list[dict[str, torch.Tensor]]:
    """Rows of one to five samples: with images, without, of one token, and of an odd sum of lengths."""
    rows = [
        [(1, 40), (0, 9), (2, 70), (0, 1), (1, 33)],
        [(0, 17), (0, 30)],
        [(1, 61)],
        [(0, 5), (1, 29), (1, 90)],
    ]
    batch = []
    for number, row in enumerate(rows):
        samples = [make_batch(model, 10 * number + i, [n], length) for i, (n, length) in enumerate(row)]
        packed = {
            name: torch.cat([sample[name] for sample in samples], dim=int(name in ("input_ids", "labels")))
            for name in samples[0]
        }
        packed["lengths"] = torch.tensor([sample["input_ids"].shape[1] for sample in samples])
        batch.append({**packed, "samples": samples})
    return batch


@pytest.fixture(scope="module", params=["clip-llama", "clip-qwen3-tied"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(request.param, tmp_path_factory.mktemp(request.param), make_packed_batch)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_equals_transformers_on_each_sample(reference: Reference, pool: Pool, sizes: Layout) -> None:
    check(reference, pool, sizes)


@pytest.mark.parametrize("sizes", [Layout(tp=2, sequence_parallel=True), Layout(pp=2)], ids=str)
@pytest.mark.parametrize("reference", ["next-clip-llama", "onevision-siglip-qwen2"], indirect=True)
def test_images_in_tiles_too(reference: Reference, pool: Pool, sizes: Layout) -> None:
    check(reference, pool, sizes)


def test_every_position_belongs_to_a_sample() -> None:
    found = boundaries([3, 5], 8, torch.device("cpu"))
    assert found.cu_seqlens_q.tolist() == found.cu_seqlens_kv.tolist() == [0, 3, 8]
    assert found.cu_seqlens_q.dtype == torch.int32 and found.qkv_format == "thd"
    padded = boundaries([3, 5], 20, torch.device("cpu"))
    assert padded.cu_seqlens_q.tolist() == [0, 3, 8, 20]
    assert (padded.max_seqlen_q, padded.max_seqlen_kv) == (12, 12)
