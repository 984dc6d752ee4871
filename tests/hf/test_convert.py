"""Hugging Face -> Megatron -> Hugging Face, bit for bit, and what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, GenerationConfig, LlavaForConditionalGeneration

from megatron_vlm.artifacts.checkpoint import read_manifest, resolve_checkpoint
from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.hf.formats import streaming
from megatron_vlm.hf.formats.folder import HFFolder
from megatron_vlm.hf.verify import verify
from tests.tiny import ALL, save_llava, tiny_config, tiny_llava

OTHER_FILES = {
    "tokenizer.json": b'{"any": "bytes"}',
    "tokenizer.model": bytes(range(256)),
    "chat_template.jinja": "{{ 'ユーザー' }}\n".encode(),
    "README.md": b"",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "additional_chat_templates/tool.jinja": b"x",
}


def hub_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return names as checkpoints of the hub have them, with the buffers that old releases wrote."""
    old = with_tower_level(tensors)
    positions = old["vision_tower.vision_model.embeddings.position_embedding.weight"].shape[0]
    old["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(positions).unsqueeze(0)
    dim = old["language_model.model.layers.0.self_attn.q_proj.weight"].shape[0] // 4  # heads of tests/tiny.py
    old["language_model.model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.rand(dim // 2)
    return old


def with_tower_level(named: dict[str, Any]) -> dict[str, Any]:
    """Return names with the level that transformers 5 drops."""
    return {name.replace("vision_tower.", "vision_tower.vision_model."): item for name, item in named.items()}


def module_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return names as modules have them inside transformers 5."""

    def rename(name: str) -> str:
        name = name.replace("language_model.lm_head.", "lm_head.").replace(
            "language_model.model.", "language_model."
        )
        return name if name.startswith("lm_head.") else "model." + name

    return {rename(name): tensor for name, tensor in tensors.items()}


NAMES = {"transformers 5": dict, "hub": hub_names, "modules": module_names}


def make(
    folder: Path, family: str, names: str = "transformers 5", dtype: torch.dtype = torch.float32
) -> Path:
    tiny_llava(family).to(dtype).save_pretrained(folder)
    weights = folder / "model.safetensors"
    tensors = NAMES[names](load_file(weights))
    save_file(tensors, weights, {"format": "pt"})
    for name, content in OTHER_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[Path, str]:
    """A digest of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "conversion.json"
    }


def rewrite(folder: Path, change) -> None:
    """Replace the weights by what ``change`` makes of them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return make(tmp_path / "llava", "clip-llama")


# Every family at each size and under all names; names have nothing to do with sizes.
WAYS = [("transformers 5", 1), ("transformers 5", 2), ("transformers 5", 4), ("hub", 2), ("modules", 1)]
CASES = [
    (family, names, tp)
    for family in ALL
    for names, tp in WAYS
    if tiny_config(**ALL[family]).text_config.num_key_value_heads % tp == 0
]


@pytest.mark.parametrize("family, names, tp", CASES)
def test_round_trip(tmp_path: Path, family: str, names: str, tp: int) -> None:
    dtype = torch.bfloat16 if names == "hub" else torch.float32
    source = make(tmp_path / "hf", family, names, dtype)
    import_hf(source, tmp_path / "megatron", tp, pp=2)
    back = export_hf(tmp_path / "megatron", tmp_path / "back")
    assert verify(source, back) == len(load_file(source / "model.safetensors"))
    # verify() is ours too, so the files themselves are compared as well: safetensors wrote the first.
    assert contents(source) == contents(back)


def test_experts_as_the_running_model_has_them(tmp_path: Path) -> None:
    """transformers 5 itself writes them one by one, under the hub's names."""
    source = make(tmp_path / "hf", "clip-mixtral")
    weights = tiny_llava("clip-mixtral").state_dict()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj holds all experts.*save_pretrained writes"):
        import_hf(source, tmp_path / "megatron", 1, 1)


def test_one_bin_file_with_a_tied_head(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", "clip-qwen2-tied", "hub")
    tensors = load_file(source / "model.safetensors")
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    import_hf(source, tmp_path / "megatron", 1, 1)
    back = export_hf(tmp_path / "megatron", tmp_path / "back")
    assert verify(source, back) == len(tensors)
    assert (back / "model.safetensors").exists()


def test_manifest(llava: Path, tmp_path: Path) -> None:
    folder = import_hf(llava, tmp_path / "megatron", 2, 2)
    assert folder == tmp_path / "megatron" / "release" == resolve_checkpoint(tmp_path / "megatron")
    manifest = read_manifest(tmp_path / "megatron")
    assert manifest["layout"] == {"tp": 2, "pp": 2, "dp": 1}
    assert manifest["has_optimizer"] is False
    # 203 words in two parts, each a multiple of 128.
    head = torch.zeros(256, 48)
    head[:203] = load_file(llava / "model.safetensors")["language_model.lm_head.weight"]
    assert manifest["tensors"]["language_model.output_layer.weight"] == {
        "shape": [256, 48],
        "dtype": "float32",
        "xxh3_128": xxhash.xxh3_128(head.numpy().tobytes()).hexdigest(),
    }
    assert manifest["versions"].keys() >= {"megatron_vlm", "torch", "safetensors"}
    # Three blocks, of which the feature layer -2 runs two.
    layers = {name.split(".")[3] for name in manifest["tensors"] if name.startswith("vision_model.decoder")}
    assert layers == {"0", "1"}
    with safe_open(folder / "hf" / "carried.safetensors", "pt") as carried:
        names = set(carried.keys())
        held = carried.get_tensor("vision_tower.encoder.layers.2.mlp.fc1.weight")
    assert "vision_tower.encoder.layers.2.mlp.fc1.weight" in names
    assert manifest["carried"].keys() == names
    expected = xxhash.xxh3_128(held.numpy().tobytes()).hexdigest()
    assert manifest["carried"]["vision_tower.encoder.layers.2.mlp.fc1.weight"]["xxh3_128"] == expected
    assert "vision_tower.post_layernorm.weight" in names


def test_manifest_of_an_export(llava: Path, tmp_path: Path) -> None:
    import_hf(llava, tmp_path / "megatron", 2, 2)
    back = export_hf(tmp_path / "megatron", tmp_path / "back")
    manifest = json.loads((back / "conversion.json").read_text())
    expected = load_file(llava / "model.safetensors")
    assert manifest["tensors"] == {
        name: {
            "shape": list(tensor.shape),
            "dtype": "float32",
            "xxh3_128": xxhash.xxh3_128(tensor.numpy().tobytes()).hexdigest(),
        }
        for name, tensor in expected.items()
    }
    # It is of this conversion, so it doesn't travel on.
    import_hf(back, tmp_path / "again", 1, 1)
    assert not list((tmp_path / "again").rglob("conversion.json"))


@pytest.mark.parametrize("way", ["import", "export"])
def test_dtype(tmp_path: Path, way: str) -> None:
    source = make(tmp_path / "hf", "clip-llama", dtype=torch.bfloat16)
    there, back = ({"dtype": torch.float32}, {}) if way == "import" else ({}, {"dtype": torch.float32})
    import_hf(source, tmp_path / "megatron", 2, 1, **there, verify=True)
    wide = export_hf(tmp_path / "megatron", tmp_path / "wide", **back, verify=True)
    weights = load_file(source / "model.safetensors")
    for name, tensor in load_file(wide / "model.safetensors").items():
        expected = weights[name].float() if weights[name].is_floating_point() else weights[name]
        assert streaming.same_bits(tensor, expected), name
    model = LlavaForConditionalGeneration.from_pretrained(wide, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    import_hf(wide, tmp_path / "again", 1, 1)
    assert read_manifest(tmp_path / "again")["model"]["dtype"] == "float32"
    narrow = export_hf(tmp_path / "again", tmp_path / "narrow", dtype=torch.bfloat16)
    assert verify(source, narrow, weights_only=True)


def test_values_that_float16_cannot_hold(llava: Path, tmp_path: Path) -> None:
    rewrite(llava, lambda t: set_nan(t, value=7e4))
    with pytest.raises(ValueError, match=rf"{KEY} has values beyond 65504, float16's largest"):
        import_hf(llava, tmp_path / "megatron", 1, 1, dtype=torch.float16)
    import_hf(llava, tmp_path / "megatron", 1, 1)
    with pytest.raises(ValueError, match=rf"{KEY} has values beyond 65504"):
        export_hf(tmp_path / "megatron", tmp_path / "back", dtype=torch.float16)
    assert not (tmp_path / "back").exists()


def test_weights_of_other_frameworks_stay_behind(llava: Path, tmp_path: Path) -> None:
    (llava / "tf_model.h5").write_bytes(b"x")
    (llava / "pytorch_model.bin.index.json").write_text("{}")
    import_hf(llava, tmp_path / "megatron", 1, 1)
    back = export_hf(tmp_path / "megatron", tmp_path / "back")
    assert not (back / "tf_model.h5").exists() and not (back / "pytorch_model.bin.index.json").exists()


def test_tokenizer_from_elsewhere(llava: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    other.mkdir()
    import_hf(llava, tmp_path / "megatron", 1, 1)
    with pytest.raises(ValueError, match="no tokenizer"):
        export_hf(tmp_path / "megatron", tmp_path / "back", tokenizer_dir=other)
    (other / "tokenizer.json").write_bytes(b"another")
    (other / "config.json").write_bytes(b"not a tokenizer's file")
    back = export_hf(tmp_path / "megatron", tmp_path / "back", tokenizer_dir=other)
    assert (back / "tokenizer.json").read_bytes() == b"another"
    assert (back / "config.json").read_bytes() == (llava / "config.json").read_bytes()


def test_another_tokenizer_takes_the_whole_place(tmp_path: Path) -> None:
    """Its chat template too, and nothing is left of the checkpoint's, whatever files either is in."""
    save_llava(tmp_path / "hf", tie_word_embeddings=False)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    config = tmp_path / "hf" / "processor_config.json"  # where a processor's template was once
    template = {"chat_template": processor.chat_template}
    config.write_text(json.dumps({**json.loads(config.read_text()), **template}))
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"of the first")
    other = processor.tokenizer
    other.add_tokens("<more>")
    other.chat_template = "{{ 'OTHER' }}"
    other.save_pretrained(tmp_path / "other", save_jinja_files=False)
    assert not list((tmp_path / "other").glob("*.jinja"))
    import_hf(tmp_path / "hf", tmp_path / "megatron", 1, 1)
    back = export_hf(tmp_path / "megatron", tmp_path / "back", tokenizer_dir=tmp_path / "other")
    found = AutoProcessor.from_pretrained(back)
    assert found.chat_template == found.tokenizer.chat_template == "{{ 'OTHER' }}"
    assert found.tokenizer.get_vocab() == other.get_vocab() and not (back / "tokenizer.model").exists()
    # One without a template leaves the checkpoint's.
    other.chat_template = None
    other.save_pretrained(tmp_path / "bare")
    back = export_hf(tmp_path / "megatron", tmp_path / "again", tokenizer_dir=tmp_path / "bare")
    assert AutoProcessor.from_pretrained(back).chat_template == processor.chat_template
    # Generation stops where the template that came with it ends an answer.
    other.chat_template = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}"
        "{{ '<more>\n' }}{% endfor %}"
    )
    other.save_pretrained(tmp_path / "ended")
    back = export_hf(tmp_path / "megatron", tmp_path / "stops", tokenizer_dir=tmp_path / "ended")
    ends = GenerationConfig.from_pretrained(back).eos_token_id
    assert ends == [2, other.convert_tokens_to_ids("<more>")]


KEY = "language_model.model.layers.1.self_attn.k_proj.weight"


def set_nan(tensors: dict[str, torch.Tensor], name: str = KEY, value: float = float("nan")) -> None:
    tensors[name].view(-1)[-1] = value


def not_identity(tensors: dict[str, torch.Tensor]) -> None:
    tensors["multi_modal_projector.linear_2.weight"].fill_(1)


def another_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["language_model.lm_head.weight"] = torch.ones(203, 48)


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("clip-llama", lambda t: t.pop(KEY), f"{KEY} is missing"),
        ("clip-llama", lambda t: t.update({"vision_tower.x": torch.ones(1)}), r"vision_tower\.x is no part"),
        ("clip-llama", lambda t: t.update({KEY: t[KEY][1:].clone()}), rf"{KEY} has shape \[23,.*\[24, 48\]"),
        ("clip-llama", set_nan, f"{KEY} holds NaN"),
        ("clip-llama", lambda t: set_nan(t, value=float("-inf")), f"{KEY} holds NaN or infinite"),
        ("clip-llama", lambda t: set_nan(t, "vision_tower.post_layernorm.bias"), r"norm\.bias holds NaN"),
        ("clip-llama", lambda t: t.update({KEY: t[KEY].long()}), f"{KEY} is int64"),
        ("clip-llama", lambda t: t.pop("vision_tower.encoder.layers.2.mlp.fc2.bias"), "fc2.bias is missing"),
        ("siglip-qwen2", lambda t: t.pop("vision_tower.head.probe"), r"head\.probe is missing"),
        ("clip-qwen2-tied", another_head, r"lm_head\.weight differs from .*embed_tokens"),
        ("clip-llama-linear", not_identity, r"linear_2\.weight is not the identity"),
    ],
)
def test_bad_tensors_leave_nothing(tmp_path: Path, family: str, change, message: str) -> None:
    source = make(tmp_path / "hf", family)
    rewrite(source, change)
    with pytest.raises(ValueError, match=message):
        import_hf(source, tmp_path / "megatron", 1, 1)
    assert not list(tmp_path.glob("megatron/*")) and not list(tmp_path.glob("megatron/.*"))


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("text_config", "hidden_size", [48]),
        ("text_config", "hidden_size", 64),
        ("text_config", "num_attention_heads", 0),
        ("text_config", "num_hidden_layers", 3),
        ("vision_config", "patch_size", None),
        (None, "text_config", [1]),
        (None, "vision_feature_layer", "last"),
    ],
)
def test_a_config_that_lies(llava: Path, tmp_path: Path, part, key: str, value) -> None:
    config = json.loads((llava / "config.json").read_text())
    (config if part is None else config[part])[key] = value
    (llava / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json|is no part of the model"):
        import_hf(llava, tmp_path / "megatron", 1, 1)
    assert not (tmp_path / "megatron").exists()


def test_siglip_without_its_head(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", "siglip-qwen2")
    rewrite(source, lambda t: [t.pop(name) for name in list(t) if ".head." in name])
    import_hf(source, tmp_path / "megatron", 1, 1)
    assert verify(source, export_hf(tmp_path / "megatron", tmp_path / "back"))


def test_bad_folders(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        HFFolder(tmp_path / "nowhere")
    (llava / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json makes transformers load a PEFT adapter"):
        HFFolder(llava)
    (llava / "adapter_config.json").unlink()
    weights = llava / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: not a whole safetensors file"):
        HFFolder(llava)
    weights.unlink()
    with pytest.raises(ValueError, match="no weights"):
        HFFolder(llava)
    index = llava / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(ValueError, match="not a file in this folder"):
        HFFolder(llava)
    index.write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(ValueError, match=r"one.safetensors, which the index names, is not there"):
        HFFolder(llava)
    save_file({"b": torch.ones(1)}, llava / "one.safetensors")
    with pytest.raises(ValueError, match=r"the index promises a in one.safetensors"):
        HFFolder(llava)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not an index"):
        HFFolder(llava)


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("exploited"),))


def test_a_bin_file_is_not_executed(llava: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (llava / "model.safetensors").unlink()
    torch.save({"a": Exploit()}, llava / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"not a file of weights \(Unsupported global: GLOBAL") as refused:
        HFFolder(llava)
    assert "weights_only" not in str(refused.value) and "\n" not in str(refused.value)
    for content, reason in (("{}", "Unsupported operand 123"), ("", "not what torch.save writes")):
        (llava / "pytorch_model.bin").write_text(content)
        with pytest.raises(ValueError, match=rf"not a file of weights \({reason}\)"):
            HFFolder(llava)
    for weights in ({"a": 1}, {1: torch.ones(1)}):
        torch.save(weights, llava / "pytorch_model.bin")
        with pytest.raises(ValueError, match="something else than named tensors"):
            HFFolder(llava)
    assert not Path("exploited").exists()


def test_layouts_that_do_not_divide(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--tp 3 does not divide .*; try 1 or 2"):
        import_hf(llava, tmp_path / "megatron", 3, 1)
    with pytest.raises(ValueError, match="--pp 5: the language model has only 4 layers; use 4 or fewer"):
        import_hf(llava, tmp_path / "megatron", 1, 5)


def test_outputs_are_not_overwritten(llava: Path, tmp_path: Path) -> None:
    root, back = tmp_path / "megatron", tmp_path / "back"
    import_hf(llava, root, 1, 1)
    with pytest.raises(ValueError, match="--force"):
        import_hf(llava, root, 1, 1)
    import_hf(llava, root, 2, 1, force=True)
    assert read_manifest(root)["layout"]["tp"] == 2
    export_hf(root, back)
    with pytest.raises(ValueError, match="--force"):
        export_hf(root, back)
    (back / "stale").touch()
    export_hf(root, back, force=True)
    assert not (back / "stale").exists()
    with pytest.raises(ValueError, match="lie in each other"):
        export_hf(root, root, force=True)
    unrelated = tmp_path / "unrelated"
    unrelated.mkdir()
    (unrelated / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no Hugging Face folder"):
        export_hf(root, unrelated, force=True)
