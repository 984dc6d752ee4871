"""Names and shapes of Transformer Engine's own modules, as ``tests/te/keys.json`` records them, against
checkpoints of both formats, the tables of conversion, and the make-believe engine of other tests."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.architecture.model import ModelConfig, padded_vocab_size
from megatron_vlm.hf.formats.classic import (
    BESIDE,
    FILE,
    POST_NORM,
    ClassicLayout,
    ClassicReader,
    ClassicWriter,
)
from megatron_vlm.hf.tables.model import build_table
from megatron_vlm.hf.tables.table import ON_THE_HUB, Row
from tests.distributed import Pool
from tests.te.ranks import keys
from tests.te.record import FAMILIES, NOT_UPSTREAM, model_of

RECORDED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "te/keys.json").read_text())["families"]


def rows_of(model: ModelConfig) -> tuple[Row, ...]:
    return build_table(model, padded_vocab_size(model.language.vocab_size, 2, 8), ON_THE_HUB).rows


def recorded(family: str, kind: str, tp: int) -> dict[str, list[int]]:
    return {name: shapes[tp - 1] for name, shapes in RECORDED[family][kind]["tensors"].items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_specs_have_the_names_of_the_engine(pool: Pool, family: str) -> None:
    """The make-believe engine's modules in their state dicts, and either spec in checkpoints."""
    for engine, local in pool.run(2, keys, model_of(family).to_dict(), 2):
        assert engine[0] == recorded(family, "ours", 2)
        assert engine[1] == RECORDED[family]["ours"]["extra_state"]
        assert engine[2] == local[2] == recorded(family, "ours", 1)  # whole, and without the extra state
        assert sorted(local[0].values()) == sorted(engine[0].values())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_UPSTREAM])
def test_our_model_is_upstreams(family: str) -> None:
    """But for SigLIP's last norm, whose output LLaVA doesn't take."""
    for tp in (1, 2):
        upstream = recorded(family, "upstream", tp)
        ours = {name: shape for name, shape in upstream.items() if not name.startswith(POST_NORM)}
        assert recorded(family, "ours", tp) == ours
    extra = [name for name in RECORDED[family]["upstream"]["extra_state"] if not name.startswith(POST_NORM)]
    assert sorted(RECORDED[family]["ours"]["extra_state"]) == sorted(extra)


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_of_conversion(family: str) -> None:
    """The native format's names are the engine's, and tensor parallelism cuts as the engine does."""
    rows = {row.native: row for row in rows_of(model_of(family))}
    assert {name: list(row.native_shape) for name, row in rows.items()} == recorded(family, "ours", 1)
    for name, shape in recorded(family, "ours", 2).items():
        whole = torch.empty(rows[name].native_shape)
        for rank in (0, 1):
            assert list(rows[name].shard.shard(whole, rank, 2).shape) == shape, name


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_UPSTREAM])
def test_classic_files_hold_what_the_engines_model_takes(tmp_path: Path, family: str) -> None:
    model = model_of(family)
    rows = rows_of(model)
    dtypes = {row.native: torch.float32 for row in rows}
    ClassicWriter(tmp_path, rows, dtypes, ClassicLayout(tp=2, pp=1, vpp=1, layers=(2,)), model)
    for rank in (0, 1):
        content = torch.load(tmp_path / f"mp_rank_{rank:02d}" / FILE, weights_only=False)
        assert BESIDE not in content
        expected = recorded(family, "upstream", 2)
        expected = {name: shape for name, shape in expected.items() if not name.startswith(POST_NORM)}
        assert {name: list(tensor.shape) for name, tensor in content["model"].items()} == expected


# What releases of the engine have left under the name: nothing, bytes in a tensor, or a file in memory.
EXTRA_STATES = [None, torch.empty(0, dtype=torch.uint8), torch.ones(9, dtype=torch.uint8), io.BytesIO(b"x")]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_UPSTREAM])
def test_classic_files_of_the_engines_model_are_read(tmp_path: Path, family: str) -> None:
    rows = rows_of(model_of(family))
    for rank in (0, 1):
        state: dict[str, Any] = {
            name: torch.full(shape, 1.0) for name, shape in recorded(family, "upstream", 2).items()
        }
        for number, name in enumerate(RECORDED[family]["upstream"]["extra_state"]):
            state[name] = EXTRA_STATES[number % len(EXTRA_STATES)]
        folder = tmp_path / f"mp_rank_{rank:02d}"
        folder.mkdir()
        torch.save({"model": state, "checkpoint_version": 3.0}, folder / FILE)
    reader = ClassicReader(tmp_path, {row.native: row.shard for row in rows})
    assert {name: reader.shape(name) for name in reader.names} == {
        row.native: row.native_shape for row in rows
    }
