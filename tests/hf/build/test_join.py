"""build_llava: what it joins, what it adds, and that transformers takes it as it is."""

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from benchmarks.conversion import make_llava, measure, write_tokenizer
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.media.images import ImageTransform
from megatron_vlm.hf import Difference
from megatron_vlm.hf.build.join import build_llava
from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.hf.mm_projector import export_projector
from megatron_vlm.hf.verify import check_manifest, verify

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SIZES = dict(
    hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
TOWER = dict(
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=20,
    patch_size=5,
)


def make_text(
    folder: Path, kind: str = "Llama", extra_rows: int = 0, pad: bool = False, **config: Any
) -> Path:
    """A text model with random weights and a byte tokenizer."""
    words = ["<s>", "</s>", *(["<|pad|>"] if pad else []), *BYTES]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(words[: 3 if pad else 2])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        **(dict(pad_token="<|pad|>") if pad else {}),
    ).save_pretrained(folder)
    torch.manual_seed(1)
    model_config = getattr(transformers, f"{kind}Config")(
        **SIZES, vocab_size=len(words) + extra_rows, bos_token_id=0, eos_token_id=1, **config
    )
    getattr(transformers, f"{kind}ForCausalLM")(model_config).save_pretrained(folder)
    return folder


def make_tower(folder: Path, kind: str = "CLIP", **sizes: int) -> Path:
    torch.manual_seed(2)
    config = getattr(transformers, f"{kind}VisionConfig")(**{**TOWER, **sizes})
    getattr(transformers, f"{kind}VisionModel")(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return make_text(tmp_path / "text")


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    return make_tower(tmp_path / "tower")


@pytest.mark.parametrize(
    "kind, tied",
    [
        ("Llama", False),
        ("Llama", True),
        ("Mistral", False),
        ("Mixtral", False),
        ("Qwen2", True),
        ("Qwen3", True),
    ],
)
@pytest.mark.parametrize("vision", ["CLIP", "Siglip"])
def test_parts_are_copied_and_new_rows_are_the_mean(
    tmp_path: Path, kind: str, tied: bool, vision: str, caplog
) -> None:
    text = make_text(tmp_path / "text", kind, tie_word_embeddings=tied)
    built = build_llava(tmp_path / "llava", str(text), str(make_tower(tmp_path / "tower", vision)))
    caplog.clear()
    logging.getLogger("transformers").propagate = True
    model, info = LlavaForConditionalGeneration.from_pretrained(built, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(built)
    assert not any(info.values()), info
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "torchvision" not in r.message]

    original = transformers.AutoModelForCausalLM.from_pretrained(text)
    rows = original.config.vocab_size
    copied = model.model.language_model.state_dict()
    for name, tensor in original.model.state_dict().items():
        if name != "embed_tokens.weight":
            assert torch.equal(copied[name], tensor), name
    for new, old in (
        (model.get_input_embeddings(), original.get_input_embeddings()),
        (model.get_output_embeddings(), original.get_output_embeddings()),
    ):
        assert torch.equal(new.weight[:rows], old.weight)
        assert new.weight.shape[0] == len(processor.tokenizer) > rows
        # fp32 means of the same rows: equal up to the order of the sum.
        torch.testing.assert_close(new.weight[rows:], old.weight.mean(0).expand_as(new.weight[rows:]))
    assert model.config.text_config.tie_word_embeddings is tied
    assert (model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()) is tied
    source = getattr(transformers, f"{vision}VisionModel").from_pretrained(tmp_path / "tower")
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor), name

    words = torch.randint(rows, (2, 9))
    with torch.no_grad():
        hidden, logits = model.model(words)[0], original(words).logits
        assert torch.equal(hidden, original.model(words)[0])
        assert torch.equal(torch.nn.functional.linear(hidden, model.lm_head.weight[:rows]), logits)
        # With all rows of the head a sum may be taken in another order.
        atol = 1e-6 * logits.abs().max().item()
        torch.testing.assert_close(model(words).logits[..., :rows], logits, rtol=0, atol=atol)

    config = ModelConfig.from_hf_dir(str(built))
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    batch = processor(text=prompt, images=Image.new("RGB", (33, 21)), return_tensors="pt")
    assert int((batch["input_ids"] == config.image_token_id).sum()) == config.image_tokens == 16
    assert model.config.image_seq_length == 16
    output = model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert output.shape[1] > batch["input_ids"].shape[1]
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id

    import_hf(built, tmp_path / "megatron", 2, 1)
    assert verify(built, export_hf(tmp_path / "megatron", tmp_path / "back"))


def test_spare_rows_are_used_before_new_ones(tmp_path: Path, tower: Path) -> None:
    """As in Qwen2, whose embedding has more rows than its tokenizer has tokens."""
    text = make_text(tmp_path / "text", "Llama", extra_rows=30)
    built = build_llava(tmp_path / "llava", str(text), str(tower))
    old = transformers.AutoModelForCausalLM.from_pretrained(text).get_input_embeddings().weight
    new = LlavaForConditionalGeneration.from_pretrained(built).get_input_embeddings().weight
    assert new.shape == old.shape
    image = AutoTokenizer.from_pretrained(built).convert_tokens_to_ids("<image>")
    known = len(BYTES) + 2
    assert image == known
    torch.testing.assert_close(new[image], old[:known].mean(0))
    assert torch.equal(new[known + 2 :], old[known + 2 :])


@pytest.mark.parametrize("extra_rows, padded", [(0, 384), (384 - 258, 384), (385 - 258, 512)])
def test_vocabulary_padding(tmp_path: Path, tower: Path, extra_rows: int, padded: int) -> None:
    """258 tokens, two more, and spare rows; what is divisible already isn't padded."""
    text = make_text(tmp_path / "text", extra_rows=extra_rows)
    build_llava(tmp_path / "llava", str(text), str(tower), vocab_size_padding=True)
    assert ModelConfig.from_hf_dir(str(tmp_path / "llava")).language.vocab_size == padded


def test_linear_projector(tmp_path: Path, text: Path, tower: Path) -> None:
    built = build_llava(tmp_path / "llava", str(text), str(tower), projector_type="linear", seed=3)
    assert ModelConfig.from_hf_dir(str(built)).projector.kind == "linear"
    projector = LlavaForConditionalGeneration.from_pretrained(built).model.multi_modal_projector
    features = torch.randn(5, 24)
    # The identity behind it is exact: multiplications by one and sums with zero.
    assert torch.equal(projector(features), projector.linear_1(features))


def test_seed_and_dtype(tmp_path: Path, text: Path, tower: Path) -> None:
    folders = [
        build_llava(tmp_path / str(i), str(text), str(tower), seed=seed, dtype=dtype)
        for i, (seed, dtype) in enumerate([(1, None), (1, None), (2, None), (1, "bfloat16")])
    ]
    assert verify(folders[0], folders[1])
    with pytest.raises(ValueError, match=r"multi_modal_projector.linear_1.* has other values"):
        verify(folders[0], folders[2])
    loaded = LlavaForConditionalGeneration.from_pretrained(folders[3])
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_mean_is_rounded_once(tmp_path: Path, tower: Path, dtype: str) -> None:
    text = make_text(tmp_path / "text")
    model = transformers.AutoModelForCausalLM.from_pretrained(text, dtype=getattr(torch, dtype))
    model.save_pretrained(text)
    new = LlavaForConditionalGeneration.from_pretrained(
        build_llava(tmp_path / "llava", str(text), str(tower)), dtype="auto"
    )
    old = model.get_output_embeddings().weight.detach()
    assert new.dtype == old.dtype
    # Rounding once what is nearly the exact mean: off by at most one step where it lies between two.
    expected = old.double().mean(0).to(old.dtype)
    torch.testing.assert_close(new.get_output_embeddings().weight[-1], expected, rtol=2**-7, atol=1e-7)
    assert (new.get_output_embeddings().weight[-1] == expected).float().mean() > 0.9


def test_parts_of_larger_models(tmp_path: Path, text: Path) -> None:
    """A whole CLIP as tower; and a LLaVA's language model and tower, under either generation of names."""
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=dict(SIZES, vocab_size=50), vision_config=TOWER, projection_dim=16
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    built = build_llava(tmp_path / "llava", str(text), str(tmp_path / "clip"), lang="en")
    model = LlavaForConditionalGeneration.from_pretrained(built)
    for name, tensor in clip.vision_model.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor), name

    state = {f"{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    running = tmp_path / "running"
    shutil.copytree(built, running)
    save_file(state, running / "model.safetensors", {"format": "pt"})
    for source in (built, running):
        again = build_llava(tmp_path / f"again-{source.name}", str(source), str(source), lang="jp")
        other = LlavaForConditionalGeneration.from_pretrained(again).state_dict()
        assert other.keys() == state.keys()
        for name, tensor in state.items():
            if "projector" not in name:
                assert torch.equal(other[name], tensor), name
        assert len(AutoTokenizer.from_pretrained(again)) == len(AutoTokenizer.from_pretrained(built))


@pytest.mark.parametrize("vision", ["CLIP", "Siglip"])
@pytest.mark.parametrize("pinpoints", [None, [(20, 60), (60, 20), (40, 40)]])
def test_images_in_tiles(tmp_path: Path, text: Path, vision: str, pinpoints: Any, caplog) -> None:
    """transformers' processor and model agree with our count of features."""
    tower = make_tower(tmp_path / "tower", vision)
    built = build_llava(
        tmp_path / "llava", str(text), str(tower), model_type="llava_next", grid_pinpoints=pinpoints
    )
    caplog.clear()
    logging.getLogger("transformers").propagate = True
    model, info = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        built, output_loading_info=True
    )
    processor = AutoProcessor.from_pretrained(built)
    assert not any(info.values()), info
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "torchvision" not in r.message]
    expected = pinpoints or [(20, 40), (40, 20), (40, 40), (60, 20), (20, 60)]
    assert [tuple(size) for size in model.config.image_grid_pinpoints] == expected
    assert model.model.image_newline.std() < 0.3 and model.model.image_newline.abs().min() > 0

    config = ModelConfig.from_hf_dir(str(built))
    for size in ((33, 21), (12, 60), (9, 8)):
        batch = processor(text="<image>?", images=Image.new("RGB", size[::-1], "red"), return_tensors="pt")
        count = int((batch["input_ids"] == config.image_token_id).sum())
        assert count == config.count_tokens(size)
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()
    transform = ImageTransform.from_dir(str(built), 20, 3, config.anyres)
    assert transform.mean == tuple(processor.image_processor.image_mean)
    import_hf(built, tmp_path / "megatron", 2, 1)
    assert verify(built, export_hf(tmp_path / "megatron", tmp_path / "back"))
    again = build_llava(tmp_path / "again", str(built), str(built))  # as a source of both parts
    assert isinstance(AutoProcessor.from_pretrained(again).image_processor, type(own_processor(vision)))


def own_processor(vision: str) -> Any:
    return {"CLIP": CLIPImageProcessor, "Siglip": transformers.SiglipImageProcessor}[vision]()


def test_generation_config_of_a_greedy_model(tmp_path: Path, text: Path, tower: Path, caplog) -> None:
    """Llama 2's says temperature without do_sample, which transformers warns of and refuses to write."""
    path = text / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": [7, 8]}))
    built = build_llava(tmp_path / "llava", str(text), str(tower))
    generation = transformers.GenerationConfig.from_pretrained(built)
    assert generation.eos_token_id == [1, 7, 8]
    generation.validate(strict=True)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Anonymous memory: what Python, torch and transformers take, an embedding, and what waits to be written.

    A LLaVA's own parts are what is joined.
    """
    peaks, sizes = [], []
    for layers in (1, 6):
        folder = tmp_path / str(layers)
        sizes.append(make_llava(folder / "hf", layers=layers, hidden_size=512, vision_layers=2))
        write_tokenizer(folder / "hf")
        code = (
            f"import os; os.chdir({str(folder)!r}); "
            "from megatron_vlm.hf.build import join; from megatron_vlm.hf.formats import streaming; "
            "streaming.MAX_WAITING = 16 << 20; "
            "join.build_llava('new', './hf', './hf', vocab_size_padding=True)"
        )
        peaks.append(measure([sys.executable, "-c", code], folder / "new")[1])
    embedding = 32064 * 512 * 2
    assert sizes[1] - sizes[0] > 5 * embedding and peaks[0] > embedding
    # Both have the same embedding and head, so what the second needs more is what grows.
    assert peaks[1] - peaks[0] < embedding
    assert peaks[1] < 3 * embedding + 800e6


def test_a_tag_in_the_hubs_cache(tmp_path: Path, text: Path, tower: Path, monkeypatch) -> None:
    cache = tmp_path / "cache"
    for name, folder in (("org/text", text), ("org/tower", tower), ("org/half", tower)):
        repository = cache / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    built = build_llava(tmp_path / "llava", "org/text", "org/tower")
    assert verify(built, build_llava(tmp_path / "again", str(text), str(tower)), weights_only=True)
    config = json.loads((built / "config.json").read_text())
    assert [config[part]["_name_or_path"] for part in ("text_config", "vision_config")] == [
        "org/text",
        "org/tower",
    ]
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()
    export_projector(built, tmp_path / "projector")
    assert json.loads((tmp_path / "projector/config.json").read_text())["mm_vision_tower"] == "org/tower"
    for tag in ("org/half", "org/nothing"):
        with pytest.raises(ValueError, match=f"--vision-model {tag}: .*hf download {tag}"):
            build_llava(tmp_path / "other", "org/text", tag)


def test_the_manifest_tells_of_damage(tmp_path: Path, text: Path, tower: Path) -> None:
    built = build_llava(tmp_path / "llava", str(text), str(tower))
    assert check_manifest(built) > 50
    with open(built / "model.safetensors", "r+b") as file:
        file.seek(-100, 2)
        file.write(b"\x11" * 4)
    with pytest.raises(Difference, match="is not what was written"):
        check_manifest(built)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_errors(tmp_path: Path, text: Path, tower: Path) -> None:
    """Each is one line that names the flag, and nothing is written."""

    def refused(message: str, text_model: object = text, vision_model: object = tower, **more: Any) -> None:
        with pytest.raises(ValueError, match=message) as error:
            build_llava(tmp_path / "llava", str(text_model), str(vision_model), **more)
        assert "\n" not in str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir() if "llava" in path.name) == []

    refused(r"--text-model .*nowhere: no such folder", tmp_path / "nowhere")
    refused(r"--text-model .*config.json: a file; give the folder", text / "config.json")
    refused(r"--text-model a b: no such folder, and no tag", "a b")
    refused(r"--text-model .*: no config.json", tmp_path)
    refused(r"--vision-model .*text: model_type is 'llama'; it belongs behind --text-model", text, text)
    refused(r"--text-model .*tower: model_type is 'clip_vision_model'; it belongs behind", tower, tower)
    with pytest.raises(ValueError, match="lie in each other"):
        build_llava(text / "llava", str(text), str(tower), force=True)

    def copy(folder: Path, number: int) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy{number}"))

    changed = copy(text, 1)
    edit_json(changed / "config.json", model_type="gemma2")
    refused(r"--text-model .*copy1: model_type is 'gemma2' \(it soft-caps .*; supported: 'llama'", changed)
    refused(r"--vision-model .*copy1: model_type is 'gemma2'; supported: 'clip_vis", text, changed)
    edit_json(changed / "config.json", model_type="llava_llama", mm_vision_tower="openai/clip")
    refused(
        r"--text-model .*copy1: model_type is 'llava_llama' with mm_vision_tower .*LLaVA-1.5 in the", changed
    )
    refused(r"--vision-model .*copy1: .*convert_llava_weights_to_hf.py", text, changed)
    shutil.copyfile(text / "config.json", changed / "config.json")
    edit_json(changed / "config.json", model_type="unheard-of")
    refused(r"--text-model .*model_type is 'unheard-of'; supported", changed)
    (changed / "config.json").write_text("{}")
    refused(r"--text-model .*config.json cannot be used", changed)
    (changed / "config.json").write_text("[")
    refused(r"--text-model .*config.json cannot be read", changed)
    original = text / "config.json"
    shutil.copyfile(original, changed / "config.json")
    edit_json(changed / "config.json", quantization_config={"quant_method": "fp8"})
    refused(r"--text-model .*copy1: quantization_config is set: the weights are quantised", changed)
    shutil.copyfile(original, changed / "config.json")
    edit_json(changed / "config.json", vocab_size=300)
    refused(r"embed_tokens.weight has 258 rows, config.json says vocab_size 300", changed)
    edit_json(changed / "config.json", vocab_size=258, num_hidden_layers=3)
    refused(r"--text-model .*layers\.2\.\S+ is missing in its weights", changed)
    edit_json(changed / "config.json", num_hidden_layers=1)
    refused(r"--text-model .*layers\.1\.\S+ is no part of the model", changed)
    edit_json(changed / "config.json", num_hidden_layers=2, intermediate_size=41)
    refused(r"--text-model .*mlp\.\S+ has shape \[32, 40\]; config.json implies \[32, 41\]", changed)
    edit_json(changed / "config.json", intermediate_size=40, tie_word_embeddings=True)
    refused(r"lm_head.weight differs from the embedding, but config.json ties them", changed)

    edit_json(changed / "config.json", tie_word_embeddings=False)
    edit_json(changed / "generation_config.json", num_return_sequences=3)
    refused(r"--text-model .*generation_config.json cannot be used", changed)
    (changed / "generation_config.json").write_text("[]")
    refused(r"--text-model .*generation_config.json cannot be read", changed)

    changed = copy(text, 2)
    for file in changed.glob("*token*"):
        file.unlink()
    refused(r"--text-model .*: its tokenizer cannot be loaded", changed)
    (changed / "tokenizer.model").write_bytes(b"not a model")
    refused(r"--text-model .*: its tokenizer cannot be loaded .*not a sentencepiece model", changed)
    (changed / "tokenizer.json").write_text("{}")
    refused(r"--text-model .*: its tokenizer cannot be loaded", changed)
    shutil.copyfile(text / "tokenizer.json", changed / "tokenizer.json")
    (changed / "tokenizer_config.json").write_text("{}")
    refused(r"--text-model .*: its tokenizer has no eos_token", changed)
    content = json.loads((text / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 270, "content": "<x>"})
    (changed / "tokenizer.json").write_text(json.dumps(content))
    refused(r"tokenizer.json says that <x> is token 270, and it loads as 258", changed)
    changed = copy(text, 3)
    state = load_file(changed / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:200].contiguous()
    save_file(state, changed / "model.safetensors", {"format": "pt"})
    edit_json(changed / "config.json", vocab_size=200)
    refused(r"its tokenizer has 258 tokens .*its embedding 200 rows; the tokenizer is another", changed)
    changed = copy(text, 4)
    state = load_file(changed / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, changed / "model.safetensors", {"format": "pt"})
    refused(r"model.norm.weight holds NaN", changed)
    state["model.norm.weight"][3] = 70000.0
    save_file(state, changed / "model.safetensors", {"format": "pt"})
    refused(r"model.norm.weight has values beyond 65504, float16's largest", changed, dtype="float16")
    state["score.weight"] = torch.ones(2)
    save_file(state, changed / "model.safetensors", {"format": "pt"})
    refused(r"--text-model .*: score.weight is no part of a language model", changed)
    del state["lm_head.weight"], state["score.weight"]
    save_file(state, changed / "model.safetensors", {"format": "pt"})
    refused(r"lm_head.weight is missing; give a causal language model", changed)
    refused(
        r"no language model in its weights, which have no embed_tokens.weight",
        with_weights_of(text, tower, tmp_path / "mixed"),
    )

    CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}).save_pretrained(
        tower
    )
    refused("makes 64 image tokens of 40 x 40 pixels, the tower 16")
    (tower / "preprocessor_config.json").write_text('{"image_processor_type": "Unknown"}')
    refused("--vision-model .*: its image processor cannot be used")
    (tower / "preprocessor_config.json").unlink()
    os.mkfifo(text / "tokenizer_config")
    refused("tokenizer_config: a pipe, a device or a link to nothing; move it away")
    (text / "tokenizer_config").unlink()
    weights = load_file(tower / "model.safetensors")
    del weights["encoder.layers.0.mlp.fc1.bias"]
    save_file(weights, tower / "model.safetensors", {"format": "pt"})
    refused(r"--vision-model .*layers\.0\.mlp\.fc1\.bias is missing")
    refused(
        r"image_grid_pinpoints is \[\[30, 40\]\]; supported: multiples of the 20 pixels of a tile",
        vision_model=make_tower(tmp_path / "whole"),
        model_type="llava_next",
        grid_pinpoints=[(30, 40)],
    )
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "x").touch()
    for force, message in ((False, "--force"), (True, "no Hugging Face folder; --force doesn't replace")):
        with pytest.raises(ValueError, match=message):
            build_llava(tmp_path / "llava", str(text), str(tower), force=force)


def with_weights_of(folder: Path, other: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    shutil.copyfile(other / "model.safetensors", target / "model.safetensors")
    return target


def test_too_little_room(tmp_path: Path, text: Path, tower: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"its file system has 1\.0 KiB left"):
        build_llava(tmp_path / "llava", str(text), str(tower))
    assert not (tmp_path / "llava").exists()


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, text: Path, tower: Path) -> None:
    def fail(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_llava(tmp_path / "llava", str(text), str(tower), progress=fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text", "tower"]
    seen: list[tuple[int, int]] = []
    build_llava(tmp_path / "llava", str(text), str(tower), progress=lambda *now: seen.append(now))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 10_000 and len(seen) > 50
