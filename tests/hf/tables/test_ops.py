"""Ops and shard rules against references written out element by element."""

import pytest
import torch

from megatron_vlm.hf.tables.ops import (
    COLUMN,
    GATED,
    REPLICATED,
    ROW,
    Chunk,
    Concatenate,
    MergeQKV,
    PadVocabulary,
    Unsqueeze,
)

HEAD_DIM = 3


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def qkv(heads: int, groups: int, *rest: int) -> list[torch.Tensor]:
    return [numbered(n * HEAD_DIM, *rest) + 1000 * i for i, n in enumerate((heads, groups, groups))]


@pytest.mark.parametrize("heads, groups", [(8, 8), (16, 8), (8, 2), (4, 1)])
@pytest.mark.parametrize("rest", [(5,), ()], ids=["weight", "bias"])
def test_qkv_rows_are_ordered_by_group(heads: int, groups: int, rest: tuple[int, ...]) -> None:
    q, k, v = qkv(heads, groups, *rest)
    expected = []
    for group in range(groups):
        for head in range(group * heads // groups, (group + 1) * heads // groups):
            expected += [q[head * HEAD_DIM + i] for i in range(HEAD_DIM)]
        for tensor in (k, v):
            expected += [tensor[group * HEAD_DIM + i] for i in range(HEAD_DIM)]
    op = MergeQKV(heads, groups)
    merged = op.to_native([q, k, v])
    assert torch.equal(merged, torch.stack(expected))
    assert op.native_shape([tuple(t.shape) for t in (q, k, v)]) == tuple(merged.shape)
    for back, original in zip(op.to_hf(merged), (q, k, v), strict=True):
        assert torch.equal(back, original)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_rank_has_whole_key_value_groups(tp: int) -> None:
    heads, groups = 16, 8
    q, k, v = qkv(heads, groups, 5)
    whole = MergeQKV(heads, groups).to_native([q, k, v])
    local = MergeQKV(heads // tp, groups // tp)
    for rank in range(tp):
        parts = local.to_hf(COLUMN.shard(whole, rank, tp))
        for part, tensor in zip(parts, (q, k, v), strict=True):
            assert torch.equal(part, tensor.chunk(tp)[rank])


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_gate_and_up_are_cut_separately(tp: int) -> None:
    gate, up = numbered(16, 5), numbered(16, 5) + 1000
    op = Concatenate(2)
    whole = op.to_native([gate, up])
    assert torch.equal(whole, torch.cat([gate, up]))
    for rank in range(tp):
        expected = torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
        assert torch.equal(GATED.shard(whole, rank, tp), expected)
    for back, original in zip(op.to_hf(whole), (gate, up), strict=True):
        assert torch.equal(back, original)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "rule", [REPLICATED, COLUMN, ROW, GATED], ids=["replicated", "column", "row", "gated"]
)
def test_shards_put_together_are_the_tensor(rule, tp: int) -> None:
    whole = numbered(16, 8)
    assert torch.equal(rule.unshard([rule.shard(whole, rank, tp) for rank in range(tp)]), whole)
    covered = torch.zeros_like(whole)
    for chunk in rule.chunks((16, 8), tp):
        assert chunk.shape == tuple(chunk.of(whole).shape)
        chunk.of(covered).add_(1)
    assert torch.equal(covered, torch.ones_like(whole))


def test_an_uneven_cut_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be cut into 4"):
        GATED.chunks((6, 8), 2)


def test_class_token() -> None:
    token = numbered(6)
    native = Unsqueeze(2).to_native([token])
    assert native.shape == (1, 1, 6) == Unsqueeze(2).native_shape([(6,)])
    assert torch.equal(Unsqueeze(2).to_hf(native)[0], token)


@pytest.mark.parametrize("padded", [10, 16])
def test_vocabulary_padding(padded: int) -> None:
    rows = numbered(10, 3) + 1
    op = PadVocabulary(10, padded)
    native = op.to_native([rows])
    assert native.shape == (padded, 3) == op.native_shape([(10, 3)])
    assert torch.equal(native[:10], rows)
    assert not native[10:].any()
    assert torch.equal(op.to_hf(native)[0], rows)


def test_boxes() -> None:
    """Checked by marking the elements of each."""
    shape = (4, 6)
    boxes = [Chunk((row, column), (2, 3)) for row in range(-2, 4) for column in range(-3, 6)]
    inside = [box for box in boxes if box.is_in(shape)]
    assert len(inside) == 3 * 4 and not Chunk((0,), (2,)).is_in(shape) and Chunk((), ()).is_in(())
    marked = []
    for box in inside:
        marked.append(torch.zeros(shape, dtype=torch.bool))
        box.of(marked[-1]).fill_(True)
    for one, first in zip(inside, marked, strict=True):
        for other, second in zip(inside, marked, strict=True):
            assert one.overlaps(other) == bool((first & second).any())
