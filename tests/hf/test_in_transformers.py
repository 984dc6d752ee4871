"""What is exported loads in transformers as it was, without a word."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.hf.verify import verify
from tests.hf.test_convert import with_tower_level
from tests.tiny import save_llava, save_tiny_llava, tiny_llava

# Everything that a model folder is asked for. What is said meanwhile goes to stdout, as JSON.
_LOAD = """
import json, logging, sys, warnings
from PIL import Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

said = []
class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())

for name in (None, "transformers", "huggingface_hub"):
    logging.getLogger(name).addHandler(Keep(logging.WARNING))
disable_progress_bar()
folder = sys.argv[1]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    generation = GenerationConfig.from_pretrained(folder)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    batch = processor(text=text, images=Image.new("RGB", (31, 18)), return_tensors="pt")
    model.generate(**batch, max_new_tokens=2)
print(json.dumps({
    "said": said + [str(item.message) for item in caught] + [str(keys) for keys in info.values() if keys],
    "end": generation.eos_token_id, "template": tokenizer.chat_template == processor.chat_template,
}))
"""


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_an_export_loads_without_a_word(tmp_path: Path, kind: str) -> None:
    """Sharded: model, tokenizer, processor, template and generation config."""
    source = tmp_path / "hf"
    save_llava(source, tie_word_embeddings=False, kind=kind)
    generation = {"eos_token_id": [2, 7], "pad_token_id": 0, "temperature": 0.7, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(generation))
    import_hf(source, tmp_path / "megatron", 2, 1)
    back = export_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=100_000)
    assert len(list(back.glob("model-*.safetensors"))) > 2
    done = subprocess.run([sys.executable, "-c", _LOAD, str(back)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"said": [], "end": [2, 7], "template": True}
    assert done.stderr == ""


@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin with the hub's names"])
def test_shards(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "hf"
    model = tiny_llava("siglip-qwen2")
    model.save_pretrained(source, max_shard_size="50KB")
    assert len(list(source.glob("model-*"))) > 2
    if kind != "safetensors":
        renamed = with_tower_level if "hub" in kind else dict
        index = json.loads((source / "model.safetensors.index.json").read_text())
        names = {file: file.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
                 for file in set(index["weight_map"].values())}  # fmt: skip
        for file, new in names.items():
            torch.save(renamed(load_file(source / file)), source / new)
            (source / file).unlink()
        index["weight_map"] = {name: names[file] for name, file in renamed(index["weight_map"]).items()}
        (source / "model.safetensors.index.json").unlink()
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    import_hf(source, tmp_path / "megatron", 2, 1)
    back = export_hf(tmp_path / "megatron", tmp_path / "back")
    assert verify(source, back)
    assert len(list(back.glob("*.safetensors"))) > 2
    wide = export_hf(tmp_path / "megatron", tmp_path / "wide", dtype=torch.bfloat16)
    for folder in (back, wide):  # what transformers says of its size, too
        promised = json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        held = (load_file(file) for file in folder.glob("*.safetensors"))
        assert promised == sum(tensor.nbytes for tensors in held for tensor in tensors.values())
    loaded, info = LlavaForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", ["clip-llama", "siglip-qwen2"])
def test_other_shards_on_export_load_in_transformers(tmp_path: Path, family: str) -> None:
    model = save_tiny_llava(tmp_path / "hf", family)
    import_hf(tmp_path / "hf", tmp_path / "megatron", 1, 1)
    back = export_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=50_000)
    sizes = [file.stat().st_size for file in back.glob("*.safetensors")]
    assert len(sizes) > 2 and sorted(sizes)[-2] < 60_000
    assert verify(tmp_path / "hf", back)
    loaded, info = LlavaForConditionalGeneration.from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
