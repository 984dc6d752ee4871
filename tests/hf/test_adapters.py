"""Adapters in a checkpoint: as a PEFT adapter, merged, and read back."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers

from megatron_vlm.architecture.lora import LANGUAGE_TARGETS, VISION_TARGETS, LoRAConfig
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import HF_FOLDER, RUN_CONFIG, read_manifest, write_manifest
from megatron_vlm.config.run import RunConfig
from megatron_vlm.hf.adapters import export_adapter, find_adapters, read_adapter
from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.hf.formats.native import NativeReader, NativeWriter
from megatron_vlm.hf.tables.model import build_table
from megatron_vlm.hf.tables.ops import REPLICATED
from megatron_vlm.hf.tables.table import detect_prefixes
from tests.hf.test_scripts import run
from tests.models.test_parity import make_batch
from tests.tiny import save_tiny_llava


def add_adapters(release: Path, folder: Path, lora: LoRAConfig) -> dict[str, torch.Tensor]:
    """Write the checkpoint ``folder``: that of ``release`` with random adapters, which are returned."""
    folder.mkdir()
    manifest = read_manifest(release)
    model = ModelConfig.from_dict(manifest["model"])
    table = build_table(model, model.language.vocab_size, detect_prefixes([]))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.1 * torch.randn(shape, generator=generator)
        for adapter in find_adapters(table, lora).values()
        for name, shape in adapter.tensors(lora.rank).items()
    }
    reader, writer = NativeReader(release), NativeWriter(folder)
    for name, tensor in {**{name: reader.read(name) for name in reader.names}, **tensors}.items():
        writer.write(name, tensor, REPLICATED.chunks(tuple(tensor.shape), 1))
    writer.close()
    shutil.copytree(release / HF_FOLDER, folder / HF_FOLDER)
    RunConfig.from_flags(["--lora-rank", "4"]).save(str(folder / RUN_CONFIG))
    write_manifest(folder, {**manifest, "model": {**manifest["model"], "lora": lora.__dict__}})
    return tensors


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("siglip-llama-biases", (*LANGUAGE_TARGETS, *VISION_TARGETS)),
        ("clip-llama-linear", ("v_proj", "gate_proj")),
        ("clip-qwen2-tied", ("q_proj", "down_proj", "vision.fc2")),
    ],
)
def test_adapter_equals_merged(tmp_path: Path, family: str, targets: tuple[str, ...]) -> None:
    save_tiny_llava(tmp_path / "hf", family)
    release = import_hf(tmp_path / "hf", tmp_path / "megatron", tp=1, pp=1)
    lora = LoRAConfig(rank=4, alpha=6, dropout=0.1, targets=targets, rslora=True)
    tensors = add_adapters(release, tmp_path / "adapted", lora)
    export_hf(tmp_path / "adapted", tmp_path / "merged")
    export_adapter(tmp_path / "adapted", tmp_path / "adapter", force=False)

    model = ModelConfig.from_dict(read_manifest(tmp_path / "adapted")["model"])
    batch = make_batch(model, 1, [1], 50)
    inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
    base = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    merged = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        before = base(**inputs).logits
        expected = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**inputs).logits
        found = merged(**inputs).logits
    # fp32: the same sums in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert float((before - expected).abs().max()) > 0.05 * float(expected.abs().max())

    back = read_adapter(tmp_path / "adapter", model)
    for name, tensor in tensors.items():
        assert torch.equal(back.pop(name), tensor), name
    reader = NativeReader(release)
    assert back and all(torch.equal(tensor, reader.read(name)) for name, tensor in back.items())


def test_models_that_cut_images(tmp_path: Path) -> None:
    """Their ``image_newline`` trains with the projector, and is of no module that PEFT could save."""
    save_tiny_llava(tmp_path / "hf", "next-clip-llama")
    release = import_hf(tmp_path / "hf", tmp_path / "megatron", tp=1, pp=1)
    adapted = tmp_path / "adapted"
    tensors = add_adapters(release, adapted, LoRAConfig(4, 8, 0.0, ("q_proj",)))
    export_hf(adapted, tmp_path / "merged")
    nets = [
        transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / name)
        for name in ("hf", "merged")
    ]
    before, after = (net.model.language_model.layers[1].self_attn.q_proj.weight for net in nets)
    prefix = "language_model.decoder.layers.1.self_attention.linear_qkv.adapters.q_proj"
    product = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
    torch.testing.assert_close(after, before + 2 * product, rtol=0, atol=1e-6)

    with pytest.raises(ValueError, match=r"image_newline was trained too, which no adapter holds"):
        export_adapter(adapted, tmp_path / "adapter", force=False)
    trained = ["--lora-rank", "4", "--train-modules", "lora"]
    RunConfig.from_flags(trained).save(str(adapted / RUN_CONFIG))
    export_adapter(adapted, tmp_path / "adapter", force=False)
    model = ModelConfig.from_dict(read_manifest(adapted)["model"])
    back = read_adapter(tmp_path / "adapter", model)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_merged_is_rounded_once(tmp_path: Path) -> None:
    net = save_tiny_llava(tmp_path / "fp32", "clip-llama").bfloat16()
    net.save_pretrained(tmp_path / "hf")
    release = import_hf(tmp_path / "hf", tmp_path / "megatron", tp=1, pp=1)
    lora = LoRAConfig(rank=4, alpha=8, dropout=0.0, targets=("o_proj",))
    tensors = add_adapters(release, tmp_path / "adapted", lora)
    export_hf(tmp_path / "adapted", tmp_path / "merged")
    merged = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype="auto")
    for number, layer in enumerate(net.model.language_model.layers):
        prefix = f"language_model.decoder.layers.{number}.self_attention.linear_proj.adapters.o_proj"
        a, b = tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"]
        expected = (layer.self_attn.o_proj.weight.double() + 2.0 * b.double() @ a.double()).bfloat16()
        found = merged.model.language_model.layers[number].self_attn.o_proj.weight
        assert found.dtype == torch.bfloat16
        # A tie may round the other way in fp32 than in fp64.
        assert (found != expected).sum() <= 0.01 * found.numel()


def test_resharding_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    save_tiny_llava(tmp_path / "hf", "clip-llama")
    release = import_hf(tmp_path / "hf", tmp_path / "megatron", tp=1, pp=1)
    add_adapters(release, tmp_path / "adapted", LoRAConfig(4, 8, 0.0, ("q_proj",)))
    flags = ["--megatron-dir", tmp_path / "adapted", "--save-dir", tmp_path / "cut"]
    for more in ([], ["--format", "classic"]):
        capsys.readouterr()
        assert run(monkeypatch, "reshard", *flags, *more) == 2
        error = capsys.readouterr().err
        assert error == (
            f"error: {tmp_path}/adapted has adapters; merge them with "
            "scripts/convert/convert_megatron_to_hf.py\n"
        )
    assert not (tmp_path / "cut").exists()


def test_nan_in_an_adapter_is_named(tmp_path: Path) -> None:
    save_tiny_llava(tmp_path / "hf", "clip-llama")
    release = import_hf(tmp_path / "hf", tmp_path / "megatron", tp=1, pp=1)
    lora = LoRAConfig(4, 8, 0.0, ("q_proj",))
    tensors = add_adapters(release, tmp_path / "adapted", lora)
    reader, writer = NativeReader(tmp_path / "adapted"), NativeWriter(tmp_path / "adapted")
    found = {name: reader.read(name) for name in reader.names}
    name = next(name for name in tensors if "lora_B" in name)
    found[name][1, 2] = float("nan")
    for own, tensor in found.items():
        writer.write(own, tensor, REPLICATED.chunks(tuple(tensor.shape), 1))
    writer.close()
    for call in (
        lambda: export_hf(tmp_path / "adapted", tmp_path / "out"),
        lambda: export_adapter(tmp_path / "adapted", tmp_path / "out", force=False),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(name)} holds NaN or infinite values$"):
            call()
    assert not (tmp_path / "out").exists()


def test_other_parts_are_refused(tmp_path: Path) -> None:
    save_tiny_llava(tmp_path / "hf", "clip-llama")
    release = import_hf(tmp_path / "hf", tmp_path / "megatron", tp=1, pp=1)
    add_adapters(release, tmp_path / "adapted", LoRAConfig(4, 8, 0.0, ("q_proj",)))
    RunConfig.from_flags(["--lora-rank", "4", "--train-vision"]).save(str(tmp_path / "adapted" / RUN_CONFIG))
    with pytest.raises(ValueError, match="vision was trained too, which no adapter holds"):
        export_adapter(tmp_path / "adapted", tmp_path / "adapter", force=False)
