"""Transformer Engine's layer specs, on a make-believe engine: they equal transformers, and a checkpoint of
one spec is that of the other."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_vlm.hf.formats.native import NativeReader
from megatron_vlm.hf.verify import verify
from tests.distributed import Pool
from tests.models.test_packing import make_packed_batch
from tests.models.test_parity import Reference, check_gradients, check_logits
from tests.te.ranks import load_scaled, save_again, scale_and_save, with_engine
from tests.workers import Layout, logits_and_gradients

SEQUENCE_PARALLEL = Layout(tp=2, sequence_parallel=True)


def check(reference: Reference, pool: Pool, sizes: Layout) -> None:
    arguments = (reference.checkpoint, reference.batch, sizes)
    answers = pool.run(sizes.world, with_engine, logits_and_gradients, *arguments)
    for loss, _, _ in answers:
        assert loss == pytest.approx(reference.loss, rel=1e-6)
    check_logits(reference, answers, sizes)
    check_gradients(reference, answers)


@pytest.fixture(scope="module", params=["siglip-llama-biases", "clip-qwen3-tied", "clip-mixtral"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("sizes", [Layout(), SEQUENCE_PARALLEL, Layout(pp=2, recompute="selective")], ids=str)
def test_equals_transformers(reference: Reference, pool: Pool, sizes: Layout) -> None:
    check(reference, pool, sizes)


def test_packed_samples_equal_transformers(pool: Pool, tmp_path: Path) -> None:
    """Attention and rotary positions by the samples' beginnings, in the format ``thd``."""
    check(Reference("clip-llama", tmp_path, make_packed_batch), pool, SEQUENCE_PARALLEL)


def test_checkpoints_of_both_specs_are_the_same(pool: Pool, reference: Reference, tmp_path: Path) -> None:
    first, second = str(tmp_path / "engine"), str(tmp_path / "local")
    pool.run(2, with_engine, save_again, reference.checkpoint, first, 2)
    pool.run(1, save_again, first, second, 1)
    pool.run(1, with_engine, save_again, second, str(tmp_path / "again"), 1)
    expected = NativeReader(reference.checkpoint)
    for folder in (first, second, tmp_path / "again"):
        found = NativeReader(folder)
        assert sorted(found.names) == sorted(expected.names)
        for name in expected.names:
            rows = len(expected.read(name))  # padding of the vocabulary may differ
            assert torch.equal(found.read(name)[:rows], expected.read(name)), name


@pytest.mark.parametrize("reference", ["clip-qwen3-tied"], indirect=True)
def test_delayed_scaling_is_saved_and_given_back(pool: Pool, reference: Reference, tmp_path: Path) -> None:
    saved = str(tmp_path / "scaled")
    pool.run(2, with_engine, scale_and_save, reference.checkpoint, saved, 2, 4)
    load = partial(pool.run, 1, with_engine, load_scaled)
    linears = 4 * reference.model.language.num_layers
    assert load(saved, 1, 4, "delayed") == [(True, linears)]
    assert pool.run(2, with_engine, load_scaled, saved, 2, 4, "delayed") == [(True, linears)] * 2
    # Another history, another recipe, and a checkpoint that has none: it begins anew.
    assert load(saved, 1, 16, "delayed") == [(False, 0)]
    assert load(saved, 1, 4, "tensorwise") == [(True, 0)]
    assert load(reference.checkpoint, 1, 4, "delayed") == [(False, 0)]
    # A local model and the converters don't mind.
    pool.run(1, save_again, saved, str(tmp_path / "local"), 1)
    assert verify(saved, reference.checkpoint)
