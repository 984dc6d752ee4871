"""Random weights: what transformers itself would make, whatever the order they are made in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_vlm.hf.build.random_weights import RandomWeights
from megatron_vlm.hf.convert import export_hf, import_hf
from tests.tiny import FAMILIES, build, tiny_config


def save_config(folder: Path, family: str, dtype: str = "float32") -> Path:
    config = tiny_config(**FAMILIES[family])
    config.dtype = dtype
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_as_transformers_initialises(tmp_path: Path, family: str) -> None:
    folder = save_config(tmp_path / "config", family)
    model = build(tiny_config(**FAMILIES[family]))
    model.save_pretrained(tmp_path / "reference")
    expected = load_file(tmp_path / "reference/model.safetensors")
    weights = RandomWeights(folder, seed=3)
    assert weights.tensors.keys() == expected.keys()
    for name, other in expected.items():
        tensor = weights.read(name)
        assert tensor.shape == other.shape == weights.tensors[name].shape
        if FAMILIES[family].get("projector") == "linear" and ".linear_2." in name:
            continue  # the identity, which transformers has no initialiser for
        if other.unique().numel() <= 2:  # biases and norms, and SigLIP's probe of ones or zeros
            assert torch.equal(tensor, other), name
            continue
        # Two samples of one distribution: the deviation of n numbers is known to 1 part in sqrt(2 n).
        allowed = 6 * (2 / (2 * other.numel())) ** 0.5
        assert float(tensor.std() / other.std()) == pytest.approx(1.0, abs=allowed), name
        assert abs(float(tensor.mean())) < 6 * float(other.std()) / other.numel() ** 0.5, name
        assert not torch.equal(tensor, other)


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    folder = save_config(tmp_path / "config", "clip-llama")
    one, other = RandomWeights(folder, 1), RandomWeights(folder, 1)
    forwards = {name: one.read(name) for name in one.tensors}
    backwards = {name: other.read(name) for name in reversed(other.tensors)}
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)
    third = RandomWeights(folder, 2)
    key = "language_model.model.layers.{}.self_attn.q_proj.weight"
    assert not torch.equal(third.read(key.format(0)), forwards[key.format(0)])
    assert not torch.equal(forwards[key.format(1)], forwards[key.format(0)])


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    weights = RandomWeights(save_config(tmp_path / "config", "clip-llama"), 1)
    whole = sum(info.nbytes for info in weights.tensors.values())
    largest = 0
    for name in weights.tensors:
        weights.read(name)
        largest = max(largest, sum(tensor.nbytes for tensor in weights._filled[1].values()))
    assert largest < whole / 4


@pytest.mark.parametrize("family", ["clip-qwen3-tied", "clip-llama-linear"])
def test_a_checkpoint_for_every_layout(tmp_path: Path, family: str) -> None:
    folder = save_config(tmp_path / "config", family, "bfloat16")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "gone.safetensors"}})
    )
    (folder / "tokenizer.json").write_text("{}")
    exported = []
    for tp in (1, 2):
        import_hf(folder, tmp_path / f"tp{tp}", tp, 1, random_seed=7)
        exported.append(export_hf(tmp_path / f"tp{tp}", tmp_path / f"hf{tp}"))
    one, two = (load_file(path / "model.safetensors") for path in exported)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        exported[0], output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert sorted(path.name for path in exported[0].iterdir()) == [
        "config.json",
        "conversion.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_what_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        RandomWeights(tmp_path, 1)
    folder = save_config(tmp_path / "config", "clip-llama")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = 50  # not four heads of any size
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="transformers cannot build this model"):
        RandomWeights(folder, 1)
