"""build_llava: what it joins, what it adds, and that transformers takes it as it is."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from megatron_vlm.config.model import ModelConfig
from megatron_vlm.hf.build import build_llava
from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.hf.verify import verify

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


def make_tower(folder: Path, kind: str = "CLIP") -> Path:
    torch.manual_seed(2)
    config = getattr(transformers, f"{kind}VisionConfig")(**TOWER)
    getattr(transformers, f"{kind}VisionModel")(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return make_text(tmp_path / "text")


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    return make_tower(tmp_path / "tower")


@pytest.mark.parametrize(
    "kind, tied", [("Llama", False), ("Llama", True), ("Mistral", False), ("Qwen2", True), ("Qwen3", True)]
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


def test_a_padding_token_of_its_own_is_kept(tmp_path: Path, tower: Path) -> None:
    text = make_text(tmp_path / "text", pad=True)
    build_llava(tmp_path / "llava", str(text), str(tower))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llava")
    assert tokenizer.pad_token == "<|pad|>"
    assert "<pad>" not in tokenizer.get_vocab()
    assert tokenizer.tokenize("a<image><image>b").count("<image>") == 2


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


@pytest.mark.parametrize("lang, user", [("en", "USER: "), ("jp", "ユーザー: ")])
def test_chat_template(tmp_path: Path, text: Path, tower: Path, lang: str, user: str) -> None:
    processor = AutoProcessor.from_pretrained(
        build_llava(tmp_path / "llava", str(text), str(tower), lang=lang)
    )
    question = [{"type": "image"}, {"type": "text", "text": "q"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]
    both = processor.apply_chat_template(messages)
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert both.startswith(prompt) and both == prompt + " a</s>"
    assert prompt.startswith(user + "<image>\nq")
    encoded = processor.tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert processor.tokenizer.decode(said) == " a</s>"


def test_a_template_that_places_images_is_kept(tmp_path: Path, text: Path, tower: Path) -> None:
    own = "{% for m in messages %}{{ m['content'] | replace('<image>', '<image>') }}{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.chat_template = own
    tokenizer.save_pretrained(text)
    build_llava(tmp_path / "llava", str(text), str(tower))
    assert AutoProcessor.from_pretrained(tmp_path / "llava").chat_template == own


def test_errors(tmp_path: Path, text: Path, tower: Path) -> None:
    def build(text_model: object, vision_model: object) -> None:
        build_llava(tmp_path / "llava", str(text_model), str(vision_model))

    with pytest.raises(ValueError, match=r"--text-model .*nowhere: cannot be loaded"):
        build(tmp_path / "nowhere", tower)
    with pytest.raises(ValueError, match=r"--vision-model .*text: model_type is 'llama'; supported"):
        build(text, text)
    with pytest.raises(ValueError, match=r"--text-model .*tower: model_type is 'clip_vision_model'"):
        build(tower, tower)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}
    ).save_pretrained(tower)
    with pytest.raises(ValueError, match="makes 64 image tokens of 40 x 40 pixels, the tower 16"):
        build(text, tower)
    (tower / "preprocessor_config.json").unlink()
    weights = load_file(tower / "model.safetensors")
    del weights["encoder.layers.0.mlp.fc1.bias"]
    save_file(weights, tower / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"--vision-model .*layers\.0\.mlp\.fc1\.bias is missing"):
        build(text, tower)
    assert not (tmp_path / "llava").exists()
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "x").touch()
    with pytest.raises(ValueError, match="--force"):
        build(text, tower)
