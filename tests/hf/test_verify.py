"""Comparison by content: what counts as equal, and what is said of a difference."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.artifacts.checkpoint import read_manifest
from megatron_vlm.hf import Difference
from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.hf.formats.native import NativeReader, NativeWriter
from megatron_vlm.hf.tables.ops import REPLICATED
from megatron_vlm.hf.verify import check_manifest, verify
from tests.hf.test_convert import hub_names, make, rewrite
from tests.hf.test_scripts import run

KEY = "language_model.model.layers.1.self_attn.k_proj.weight"
NORM = "language_model.decoder.final_layernorm.weight"


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return make(tmp_path / "llava", "clip-llama")


@pytest.fixture
def other(llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llava, tmp_path / "other"))


def rewrite_native(folder: Path, change) -> None:
    """Replace a checkpoint's tensors by what ``change`` makes of them."""
    reader = NativeReader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    change(tensors)
    writer = NativeWriter(folder)
    for name, tensor in tensors.items():
        writer.write(name, tensor, REPLICATED.chunks(tuple(tensor.shape), 1))
    writer.close()


@pytest.mark.parametrize("family", ["clip-llama", "clip-qwen2-tied", "siglip-llama-biases"])
def test_across_formats(tmp_path: Path, family: str) -> None:
    source = make(tmp_path / "hf", family)
    count = len(load_file(source / "model.safetensors"))
    one = import_hf(source, tmp_path / "one", 1, 1)
    two = import_hf(source, tmp_path / "two", 2, 2)  # another padding and other cuts
    for a, b in ((source, one), (two, source), (one, two), (two.parent, source)):
        assert verify(a, b) == count
    assert check_manifest(one) == len(NativeReader(one).names) + len(read_manifest(one)["carried"])


def test_names_of_both_generations(llava: Path, other: Path) -> None:
    weights = load_file(other / "model.safetensors")
    renamed = {n: t for n, t in hub_names(weights).items() if "position_ids" not in n and "inv_freq" not in n}
    assert renamed.keys() != weights.keys()
    save_file(renamed, other / "model.safetensors", {"format": "pt"})
    assert verify(llava, other) == len(weights)


def test_how_tensors_are_spread_over_files_does_not_count(llava: Path, tmp_path: Path) -> None:
    import_hf(llava, tmp_path / "megatron", 1, 1)
    assert verify(llava, export_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=50_000))


def test_the_first_difference_is_named(llava: Path, other: Path) -> None:
    (other / "tokenizer.json").write_bytes(b"x")
    with pytest.raises(Difference, match=r"^tokenizer\.json differs between \S+/llava and \S+/other$"):
        verify(llava, other)
    assert verify(llava, other, weights_only=True)
    (other / "tokenizer.model").unlink()
    with pytest.raises(Difference, match=r"tokenizer\.json differs .*; 2 files differ"):
        verify(llava, other)
    rewrite(other, lambda t: t[KEY].view(torch.int32).view(-1)[49].add_(1))
    with pytest.raises(Difference, match=rf"{KEY} has other values .*: 1 of 1152, the first at \[1, 1\], "):
        verify(llava, other)
    rewrite(other, lambda t: [tensor.add_(1) for name, tensor in t.items() if "k_proj" in name])
    with pytest.raises(Difference, match=r"; \d+ of \d+ tensors differ"):
        verify(llava, other)
    rewrite(other, lambda t: t.update({KEY: t[KEY].half()}))
    rewrite(
        llava, lambda t: [tensor.zero_() for name, tensor in t.items() if "k_proj" in name and name != KEY]
    )
    rewrite(
        other, lambda t: [tensor.zero_() for name, tensor in t.items() if "k_proj" in name and name != KEY]
    )
    with pytest.raises(Difference, match=rf"{KEY}: float32 \[24, 48\] .* float16 .*; 1 of"):
        verify(llava, other)
    rewrite(other, lambda t: t.pop(KEY))
    with pytest.raises(Difference, match=f"^{KEY} is in .*llava but not in .*other$"):
        verify(llava, other)
    with pytest.raises(Difference, match=f"^{KEY} is in .*llava but not in .*other$"):
        verify(other, llava)


def test_bits_count_not_values(llava: Path, other: Path) -> None:
    """0 and -0 are equal numbers."""
    for folder, zero in ((llava, 0.0), (other, -0.0)):
        rewrite(folder, lambda t, zero=zero: t[KEY].fill_(zero))
    with pytest.raises(Difference, match=KEY):
        verify(llava, other)


def test_a_wider_dtype_is_equal_where_rounding_loses_nothing(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", "clip-llama", dtype=torch.bfloat16)
    folder = import_hf(source, tmp_path / "megatron", 1, 1)
    rewrite_native(folder, lambda t: t.update({name: tensor.float() for name, tensor in t.items()}))
    assert verify(source, folder)
    rewrite_native(folder, lambda t: t[NORM].mul_(1 + 2**-20))  # less than half of bfloat16's last bit
    with pytest.raises(Difference, match=r"language_model\.model\.norm\.weight: bfloat16 .* float32"):
        verify(source, folder)


def test_against_the_manifest(llava: Path, tmp_path: Path) -> None:
    folder = import_hf(llava, tmp_path / "megatron", 2, 1)
    back = export_hf(folder, tmp_path / "back")
    assert check_manifest(back) == len(load_file(llava / "model.safetensors"))
    assert check_manifest(folder) == check_manifest(folder.parent)
    rewrite(back, lambda t: t[KEY].view(torch.int32).view(-1)[7].add_(1))
    with pytest.raises(Difference, match=f"{KEY} in .*back is not what was written; 1 of"):
        check_manifest(back)
    rewrite_native(folder, lambda t: t[NORM].view(torch.int32)[7].add_(1))
    with pytest.raises(Difference, match=f"{NORM} in .* is not what was written; 1 of"):
        check_manifest(folder)
    carried = folder / "hf" / "carried.safetensors"
    data = bytearray(carried.read_bytes())
    data[-1] ^= 1
    carried.write_bytes(data)
    rewrite_native(folder, lambda t: t[NORM].view(torch.int32)[7].sub_(1))
    with pytest.raises(Difference, match=r"^vision_tower\..* is not what was written; 1 of"):
        check_manifest(folder)
    rewrite(back, lambda t: t.update(extra=torch.zeros(1)))
    with pytest.raises(Difference, match=r"^extra in .*back was not written there$"):
        check_manifest(back)
    with pytest.raises(ValueError, match=r"no conversion\.json to compare with"):
        check_manifest(llava)


def test_the_script(llava: Path, other: Path, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "verify", llava, other) == 0
    assert capsys.readouterr().out.startswith("equal: ")
    rewrite(other, lambda t: t[KEY].zero_())
    assert run(monkeypatch, "verify", llava, other) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"different: {KEY} has other values") and error.endswith("tensors differ")
    for wrong in (["nowhere", llava], [llava, "nowhere"], [llava, llava / "config.json"], [], [llava]):
        assert run(monkeypatch, "verify", *wrong) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
