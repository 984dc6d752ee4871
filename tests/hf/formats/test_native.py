"""The torch_dist format against megatron-core's own reader and writer, and what is refused."""

import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.hf.formats.native import NativeReader, NativeWriter, check_before_loading, read_metadata
from megatron_vlm.hf.tables.model import build_table
from megatron_vlm.hf.tables.ops import COLUMN, GATED, REPLICATED, ROW, Concatenate, MergeQKV, ShardRule
from megatron_vlm.hf.tables.table import detect_prefixes
from megatron_vlm.hf.verify import verify
from tests.tiny import save_tiny_llava


@pytest.fixture
def one_rank(monkeypatch) -> Iterator[None]:
    """A process group of one, and the two CUDA calls that megatron-core makes when it saves."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def requests(name: str, whole: torch.Tensor, rule: ShardRule, tp: int, data: bool) -> dict[str, object]:
    """megatron-core's ShardedTensors of all ranks, made as its parallel layers make them."""
    from megatron.core.dist_checkpointing import ShardedTensor

    made: dict[str, object] = {}
    for rank in range(tp):
        local = rule.shard(whole, rank, tp)
        parts = [local] if rule.dim is None else list(local.chunk(rule.blocks, rule.dim))
        for block, part in enumerate(parts):
            cut = [] if rule.dim is None else [(rule.dim, block * tp + rank, rule.blocks * tp)]
            tensor = part.clone() if data else torch.full_like(part, float("nan"))
            made[f"{name}/{rank}/{block}"] = ShardedTensor.from_rank_offsets(
                name, tensor, *cut, replica_id=0 if cut else rank
            )
    return made


def test_megatron_core_loads_what_is_written(tmp_path: Path, one_rank: None) -> None:
    """A checkpoint cut for TP 1 is read at TP 2, and the other way round, rank by rank."""
    from megatron.core import dist_checkpointing

    save_tiny_llava(tmp_path / "hf", "clip-llama")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    text = "language_model.model.layers.1."
    q, k, v, o, gate, up, norm = (
        tensors[text + name + ".weight"]
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "input_layernorm",
        )
    )
    embedding = torch.zeros(256, 48)  # 203 words, padded
    embedding[:203] = tensors["language_model.model.embed_tokens.weight"]
    layer = "language_model.decoder.layers.1."
    expected = {
        "language_model.embedding.word_embeddings.weight": (embedding, COLUMN),
        layer + "self_attention.linear_qkv.weight": (MergeQKV(4, 2).to_native([q, k, v]), COLUMN),
        layer + "self_attention.linear_qkv.layer_norm_weight": (norm, REPLICATED),
        layer + "self_attention.linear_proj.weight": (o, ROW),
        layer + "mlp.linear_fc1.weight": (Concatenate(2).to_native([gate, up]), GATED),
    }
    for written_tp, read_tp in ((1, 2), (2, 1)):
        folder = import_hf(tmp_path / "hf", tmp_path / f"megatron-{written_tp}", written_tp, 1)
        asked, wanted = {}, {}
        for name, (whole, rule) in expected.items():
            asked.update(requests(name, whole, rule, read_tp, data=False))
            wanted.update(requests(name, whole, rule, read_tp, data=True))
        loaded = dist_checkpointing.load(asked, str(folder), strict="raise_unexpected")
        for key, tensor in wanted.items():
            assert torch.equal(loaded[key], tensor.data), key


@pytest.mark.parametrize("tp", [1, 2])
def test_what_megatron_core_saves_is_read(tmp_path: Path, one_rank: None, tp: int) -> None:
    """Other grids, other files, optimizer entries and extra state: the model's tensors come out whole."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject

    save_tiny_llava(tmp_path / "hf", "siglip-qwen2")
    written = import_hf(tmp_path / "hf", tmp_path / "written", 1, 1)
    reader = NativeReader(written)
    state: dict[str, object] = {"iteration": 7}
    model = ModelConfig.from_hf_dir(str(tmp_path / "hf"))
    rules = {row.native: row.shard for row in build_table(model, 256, detect_prefixes([])).rows}
    for name, rule in rules.items():
        state.update(requests(name, reader.read(name), rule, tp, data=True))
        state.update(requests("optimizer.state.exp_avg." + name, reader.read(name), rule, tp, data=True))
    state["extra"] = ShardedObject("language_model.decoder.final_layernorm._extra_state", None, (1,), (0,))
    saved = tmp_path / "saved"
    saved.mkdir()
    dist_checkpointing.save(state, str(saved))
    again = NativeReader(saved)
    for name in reader.names:
        assert torch.equal(again.read(name), reader.read(name)), name
    # With the manifest and the small files beside it, it converts.
    for name in ("manifest.json", "hf"):
        os.rename(written / name, saved / name)
    assert verify(tmp_path / "hf", export_hf(saved, tmp_path / "back"))


def test_weights_trained_in_another_dtype_are_rounded_back(tmp_path: Path) -> None:
    """bfloat16 weights that were trained as float32 come back as bfloat16."""
    save_tiny_llava(tmp_path / "hf", "clip-llama").bfloat16().save_pretrained(tmp_path / "hf")
    folder = import_hf(tmp_path / "hf", tmp_path / "megatron", 1, 1)
    reader = NativeReader(folder)
    tensors = {name: reader.read(name).float() for name in reader.names}
    (folder / "__0_0.distcp").unlink()
    writer = NativeWriter(folder)
    for name, tensor in tensors.items():
        writer.write(name, tensor, REPLICATED.chunks(tuple(tensor.shape), 1))
    writer.close()
    assert verify(tmp_path / "hf", export_hf(folder, tmp_path / "back"))


class Exploit:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch exploited",))


class Indirect:
    """Reaches for a function through an admitted module."""

    def __reduce__(self):
        return (torch.serialization.load, ("x",))


class Attribute:
    """Reaches for a function as an attribute of an admitted class, as Python 3.11.2 does for enum members."""

    def __reduce__(self):
        return (getattr, (torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING, "mro"))


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tiny_llava(tmp_path / "hf", "clip-llama")
    return import_hf(tmp_path / "hf", tmp_path / "megatron", 1, 1)


@pytest.mark.parametrize("content", [Exploit(), Indirect(), Attribute(), {"a": Exploit()}, [1], "x"])
def test_a_crafted_metadata_is_not_executed(checkpoint: Path, content: object) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="refused"):
        read_metadata(checkpoint)
    with pytest.raises(ValueError, match="refused"):
        export_hf(checkpoint, "back")
    assert not Path("exploited").exists()


def test_metadata_written_by_an_early_python_3_11(checkpoint: Path, monkeypatch) -> None:
    metadata = read_metadata(checkpoint)
    encoding = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    # As 3.11.2, Debian 12's, pickles the member of an enum, whatever Python runs this test.
    monkeypatch.setattr(encoding, "__reduce_ex__", lambda member, _: (getattr, (encoding, member.name)))
    content = pickle.dumps(metadata)
    assert b"getattr" in content
    (checkpoint / ".metadata").write_bytes(content)
    assert read_metadata(checkpoint).state_dict_metadata == metadata.state_dict_metadata


def test_an_exploit_inside_genuine_metadata_is_not_executed(checkpoint: Path) -> None:
    metadata = read_metadata(checkpoint)
    metadata.planner_data = Exploit()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="refused"):
        read_metadata(checkpoint)
    pickle.loads(pickle.dumps(Exploit()))  # the exploit works: it is the reader that stops it
    assert Path("exploited").exists()


def test_what_would_be_unpickled_is_refused_before_loading(checkpoint: Path) -> None:
    """An entry that is called bytes, though it looks like the tensor asked for: torch would unpickle it."""
    check_before_loading(checkpoint)
    path = checkpoint / ".metadata"
    loaded = read_metadata(checkpoint)
    name, tensor = next(iter(loaded.state_dict_metadata.items()))
    disguised = BytesStorageMetadata()
    disguised.__dict__.update(tensor.__dict__)
    loaded.state_dict_metadata[name] = disguised
    path.write_bytes(pickle.dumps(loaded))
    with pytest.raises(ValueError, match=f"refused, {re.escape(name)} is not a tensor"):
        check_before_loading(checkpoint)


def test_a_file_outside_of_the_checkpoint_is_refused(checkpoint: Path) -> None:
    loaded = read_metadata(checkpoint)
    next(iter(loaded.storage_data.values())).relative_path = "../elsewhere"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(loaded))
    with pytest.raises(ValueError, match=r"refused, names '\.\./elsewhere'"):
        check_before_loading(checkpoint)


def test_damage_is_found_before_loading(checkpoint: Path) -> None:
    (checkpoint / "common.pt").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match=r"common\.pt: refused or damaged"):
        check_before_loading(checkpoint)
    chunk = next(checkpoint.glob("*.distcp"))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"distcp is cut off \([\d,]+ of [\d,]+ bytes\); copy"):
        check_before_loading(checkpoint)


def test_a_crafted_chunk_is_not_executed(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    with open(file, "r+b") as stream:
        torch.save(Exploit(), stream)
    with pytest.raises(ValueError, match=r"__0_0\.distcp: .* cannot be read"):
        export_hf(checkpoint, "back")
    assert not Path("exploited").exists() and not Path("back").exists()


def change_metadata(checkpoint: Path, change) -> None:
    metadata = read_metadata(checkpoint)
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


NAME = "language_model.decoder.final_layernorm.weight"


def test_damaged_checkpoints(checkpoint: Path) -> None:
    metadata_file, data = checkpoint / ".metadata", checkpoint / "__0_0.distcp"
    genuine = metadata_file.read_bytes()

    change_metadata(checkpoint, lambda m: m.state_dict_metadata.pop(NAME))
    with pytest.raises(ValueError, match=f"{NAME} is missing"):
        export_hf(checkpoint, "back")

    metadata_file.write_bytes(genuine)
    change_metadata(
        checkpoint, lambda m: m.state_dict_metadata.update({NAME + "_b": m.state_dict_metadata[NAME]})
    )
    with pytest.raises(ValueError, match=f"{NAME}_b has no row"):
        export_hf(checkpoint, "back")

    metadata_file.write_bytes(genuine)
    change_metadata(checkpoint, lambda m: setattr(m.state_dict_metadata[NAME], "size", torch.Size([47])))
    with pytest.raises(ValueError, match=rf"{NAME} has shape \[47\]; hf/config.json implies \[48\]"):
        export_hf(checkpoint, "back")

    metadata_file.write_bytes(genuine)
    change_metadata(checkpoint, lambda m: m.state_dict_metadata[NAME].chunks.clear())
    with pytest.raises(ValueError, match="don't cover the tensor"):
        export_hf(checkpoint, "back")

    metadata_file.write_bytes(genuine)
    change_metadata(
        checkpoint,
        lambda m: [setattr(i, "relative_path", "../" + i.relative_path) for i in m.storage_data.values()],
    )
    with pytest.raises(ValueError, match="not a file of the checkpoint"):
        export_hf(checkpoint, "back")

    metadata_file.write_bytes(genuine[:-20])
    with pytest.raises(ValueError, match="not the metadata of a checkpoint"):
        export_hf(checkpoint, "back")

    metadata_file.write_bytes(genuine)
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(ValueError, match="cannot be read"):
        export_hf(checkpoint, "back")
    data.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        export_hf(checkpoint, "back")
    metadata_file.unlink()
    with pytest.raises(ValueError, match="not a torch_dist checkpoint"):
        export_hf(checkpoint, "back")
    assert not Path("back").exists()


def test_nan_in_a_checkpoint(checkpoint: Path) -> None:
    reader = NativeReader(checkpoint)
    tensors = {name: reader.read(name) for name in reader.names}
    tensors[NAME][3] = float("nan")
    writer = NativeWriter(checkpoint)
    for name, tensor in tensors.items():
        writer.write(name, tensor, REPLICATED.chunks(tuple(tensor.shape), 1))
    writer.close()
    with pytest.raises(ValueError, match=f"{NAME} holds NaN"):
        export_hf(checkpoint, "back")
    assert not Path("back").exists()


def test_large_checkpoints_are_spread_over_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_vlm.hf.formats.native._BYTES_PER_FILE", 4000)
    writer = NativeWriter(tmp_path)
    tensors = {f"t{i}": torch.randn(20, 30) for i in range(5)}
    for name, tensor in tensors.items():
        writer.write(name, tensor, COLUMN.chunks((20, 30), 2))
    writer.close()
    assert len(list(tmp_path.glob("__0_*.distcp"))) > 2
    reader = NativeReader(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor)
