"""A built model's tokenizer: sentencepiece's tokens, special tokens, and the chat template."""

import io
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoProcessor, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from megatron_vlm.hf.build.join import build_llava
from megatron_vlm.hf.build.tokenizer import replace_chat_template
from tests.hf.build.test_join import make_text, make_tower


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return make_text(tmp_path / "text")


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    return make_tower(tmp_path / "tower")


def test_a_padding_token_of_its_own_is_kept(tmp_path: Path, tower: Path) -> None:
    text = make_text(tmp_path / "text", pad=True)
    build_llava(tmp_path / "llava", str(text), str(tower))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llava")
    assert tokenizer.pad_token == "<|pad|>"
    assert "<pad>" not in tokenizer.get_vocab()
    assert tokenizer.tokenize("a<image><image>b").count("<image>") == 2


def test_a_padding_token_that_is_the_end_token(tmp_path: Path, tower: Path) -> None:
    text = make_text(tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(text)
    built = build_llava(tmp_path / "llava", str(text), str(tower))
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert tokenizer.pad_token == "<pad>"
    config = LlavaConfig.from_pretrained(built)
    generation = transformers.GenerationConfig.from_pretrained(built)
    assert config.text_config.pad_token_id == generation.pad_token_id == tokenizer.pad_token_id
    assert generation.eos_token_id == tokenizer.eos_token_id == 1


def test_a_special_token_that_the_embedding_lacks(tmp_path: Path, tower: Path) -> None:
    """Some tokenizers got a padding token after training: its row is new too."""
    text = make_text(tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(text)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(text)
    built = build_llava(tmp_path / "llava", str(text), str(tower))
    old = transformers.AutoModelForCausalLM.from_pretrained(text).get_input_embeddings().weight
    new = LlavaForConditionalGeneration.from_pretrained(built).get_input_embeddings().weight
    assert AutoTokenizer.from_pretrained(built).pad_token == "[PAD]" and len(new) == rows + 2 == len(old) + 2
    torch.testing.assert_close(new[rows:], old.mean(0).expand(2, -1))


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
    several = [
        {"type": "text", "text": "1: "},
        {"type": "image"},
        {"type": "text", "text": "2: "},
        {"type": "image"},
    ]
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": several}]
    text_of_two = processor.apply_chat_template(system)
    assert text_of_two.startswith("s") and "1: <image>\n2: <image>\n" in text_of_two
    encoded = processor.tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert processor.tokenizer.decode(said) == " a</s>"


@pytest.mark.parametrize(
    "own, kept",
    [
        ("{% for p in messages[0].content %}{{ p.text or '<image>' }}{% endfor %}", True),
        ("{# no image #}{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}", False),
        ("{% for m in messages %}{{ m['content'] }}image{% endfor %}", False),  # writes the list of parts
    ],
)
def test_a_template_that_places_images_is_kept(
    tmp_path: Path, text: Path, tower: Path, own: str, kept: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.chat_template = own
    tokenizer.save_pretrained(text)
    build_llava(tmp_path / "llava", str(text), str(tower), lang="en")
    template = AutoProcessor.from_pretrained(tmp_path / "llava").chat_template
    assert template == own if kept else "USER: " in template
    assert AutoTokenizer.from_pretrained(tmp_path / "llava").chat_template == template


def sentencepiece_model(folder: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Put a ``tokenizer.model`` in a folder in place of its tokenizer; returns the reference."""
    text = ["Which digit is this? What is in the picture?", "これは画像です。何が写っていますか。"] * 20
    text += ["The quick brown fox jumps over the lazy dog 0123456789.", "猫が窓の外を見ている。"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        **{
            "vocab_size": 400,
            "hard_vocab_limit": False,
            "byte_fallback": True,
            "minloglevel": 2,
            **options,
        },
    )
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


LLAMA = dict(model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False)
T5 = dict(model_type="unigram", byte_fallback=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.mark.parametrize(
    "options",
    [
        LLAMA,
        dict(model_type="unigram"),  # with NFKC and no double spaces, as Japanese models have it
        dict(
            model_type="unigram",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n", "<mask>"],
        ),
        dict(model_type="bpe", pad_id=3, user_defined_symbols=["<image>"]),
    ],
)
def test_sentencepiece_alone(tmp_path: Path, tower: Path, options: dict[str, Any]) -> None:
    """Token ids equal sentencepiece's own, but where a BPE model's are changed by transformers: it leaves a
    normalizer out, and puts no space before text that begins with one."""
    text = make_text(tmp_path / "text", extra_rows=300)
    reference = sentencepiece_model(text, **options)
    (text / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    built = build_llava(tmp_path / "llava", str(text), str(tower))
    assert (built / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(built)
    transformers_own = AutoTokenizer.from_pretrained(text)
    for line in (
        "Which digit is this, 1234?",
        "これは猫です。ＡＢＣ①ﾊﾝｶｸ\u3000何が写っていますか",
        "  two  spaces  ",
        "a\nb\n\nc\td",
        "🙂 ﬁ ½ кот",
    ):
        expected = reference.encode(line)
        if options["model_type"] == "bpe":
            expected = transformers_own(line, add_special_tokens=False).input_ids
        assert tokenizer(line).input_ids == [reference.bos_id(), *expected]
        assert tokenizer.decode(reference.encode(line)) == reference.decode(reference.encode(line))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.pad_token == "<pad>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = tokenizer("a<image>b", add_special_tokens=False).input_ids
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert ids.count(image) == 1 and ids[: ids.index(image)] == reference.encode("a")
    if "pad_id" in options:  # both were there already, so nothing is added
        assert len(tokenizer) == reference.vocab_size()


def texts(*special: str) -> list[str]:
    """Conversations, and a few hundred texts with special tokens beside whatever text may be beside them."""
    user = "USER: <image>\nHi ASSISTANT: Hello!</s>USER: Count them. ASSISTANT: これは 5</s>"
    found = [user, "<s>" + user, "<image>", "a<image> b", "</s>\n</s> x", " <image>\n"]
    parts = [
        *special,
        *special,
        "\n",
        " ",
        "   ",
        "Which digit",
        " is this? ",
        "\t",
        "猫が",
        "ＡＢ①",
        "🙂",
        "x",
    ]
    choice = random.Random(0)
    return found + ["".join(choice.choices(parts, k=choice.randint(1, 9))) for _ in range(300)]


@pytest.mark.parametrize(
    "options, settings",
    [
        (LLAMA, {"legacy": True}),
        (LLAMA, {"legacy": False, "add_bos_token": True}),
        (LLAMA, {}),
        (LLAMA, {"add_prefix_space": False}),
        (dict(model_type="bpe"), {"legacy": False}),  # its normalizer is not what differs
        (dict(model_type="bpe", user_defined_symbols=["<image>", "<mask>"]), {"legacy": True}),
        (dict(LLAMA, add_dummy_prefix=False), {"tokenizer_class": None}),
        (T5, {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}),
    ],
    ids=["legacy", "not legacy", "absent", "no prefix", "nfkc", "symbols", "no class", "t5"],
)
def test_ids_equal_those_of_the_source_in_transformers(
    tmp_path: Path, tower: Path, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    text = make_text(tmp_path / "text", extra_rows=300)
    sentencepiece_model(text, **options)
    named = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "unk_token": "<unk>"}
    if options is T5:
        (text / "tokenizer.model").rename(text / "spiece.model")
    else:
        named["bos_token"] = "<s>"
    (text / "tokenizer_config.json").write_text(json.dumps({**named, **settings}))
    tokenizer = AutoTokenizer.from_pretrained(build_llava(tmp_path / "llava", str(text), str(tower)))
    reference = AutoTokenizer.from_pretrained(text)
    reference.add_special_tokens({"additional_special_tokens": ["<image>"]})
    for line in texts("</s>", "<image>", *(["<s>"] if options is not T5 else [])):
        expected = reference(line, add_special_tokens=False).input_ids
        assert tokenizer(line, add_special_tokens=False).input_ids == expected, line
    if settings.get("add_bos_token"):
        assert tokenizer("x").input_ids == reference("x").input_ids


@pytest.mark.parametrize("legacy", [True, False])
def test_unigram_around_special_tokens(tmp_path: Path, tower: Path, legacy: bool) -> None:
    """As the Llama tokenizer of transformers 4 has it, which asks sentencepiece itself."""
    text = make_text(tmp_path / "text", extra_rows=300)
    sentencepiece_model(text, model_type="unigram")
    (text / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy})
    )
    proto = ModelProto()
    proto.ParseFromString((text / "tokenizer.model").read_bytes())
    proto.normalizer_spec.add_dummy_prefix = legacy
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    unknown = len(reference.encode("<unk>"))

    def expected(line: str) -> list[int]:
        ids: list[int] = []
        line = line if legacy else " " + line
        for part in re.split("(</s>|<image>)", line):
            if part in ("</s>", "<image>"):
                ids.append(tokenizer.convert_tokens_to_ids(part))
            elif legacy or not part.startswith(" "):
                ids += reference.encode(part)
            else:
                ids += reference.encode("<unk>" + part)[unknown:]
        return ids

    tokenizer = AutoTokenizer.from_pretrained(build_llava(tmp_path / "llava", str(text), str(tower)))
    for line in (
        "Which digit<image> is this?</s>What is</s>   two  spaces <image>猫が ＡＢ①</s>",
        "これは<image>画像です。</s> 何が",
        "a\nb </s> <image>",
    ):
        assert tokenizer(line, add_special_tokens=False).input_ids == expected(line), line


def test_a_sentencepiece_model_that_cannot_be_converted(tmp_path: Path, tower: Path) -> None:
    """It removes double spaces, but for those on either side of a symbol: no normalizer does that."""
    text = make_text(tmp_path / "text", extra_rows=300)
    sentencepiece_model(text, user_defined_symbols=["\n"])
    with pytest.raises(ValueError, match=r"--text-model .*no tokenizer\.json can stand for .* instead of"):
        build_llava(tmp_path / "llava", str(text), str(tower))


def test_sentencepiece_is_not_installed(tmp_path: Path, tower: Path, monkeypatch) -> None:
    text = make_text(tmp_path / "text", extra_rows=300)
    sentencepiece_model(text)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModuleNotFoundError) as error:  # cli.run says what to do
        build_llava(tmp_path / "llava", str(text), str(tower))
    assert error.value.name == "sentencepiece"


def test_a_tokenizer_that_appends_its_end_token(tmp_path: Path, tower: Path) -> None:
    """The built one doesn't: transformers' prompts don't end before they are answered."""
    text = make_text(tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.add_bos_token = tokenizer.add_eos_token = True
    tokenizer.save_pretrained(text)
    assert AutoTokenizer.from_pretrained(text)("a").input_ids[-1] == 1
    processor = AutoProcessor.from_pretrained(build_llava(tmp_path / "llava", str(text), str(tower)))
    plain = processor.tokenizer("a", add_special_tokens=False).input_ids
    assert processor.tokenizer("a").input_ids == [0, *plain]


def test_the_end_of_the_text_models_own_template(tmp_path: Path, text: Path, tower: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    tokenizer.save_pretrained(text)
    built = build_llava(tmp_path / "llava", str(text), str(tower))
    end = AutoTokenizer.from_pretrained(built).convert_tokens_to_ids("<|im_end|>")
    assert transformers.GenerationConfig.from_pretrained(built).eos_token_id == [end, 1]


def test_the_template_of_a_llavas_processor(tmp_path: Path, text: Path, tower: Path) -> None:
    """A LLaVA as the text model: its template stays, though the file of older releases has it."""
    first = build_llava(tmp_path / "first", str(text), str(tower), lang="en")
    own = (first / "chat_template.jinja").read_text().replace("USER", "HUMAN")
    (first / "chat_template.jinja").unlink()
    (first / "chat_template.json").write_text(json.dumps({"chat_template": {"default": own, "rag": ""}}))
    built = build_llava(tmp_path / "second", str(first), str(tower))
    found = AutoProcessor.from_pretrained(built)
    assert found.chat_template == found.tokenizer.chat_template == own


def test_generation_stops_where_a_template_that_was_there_already_ends_an_answer(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("as it was")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "do_sample": true}')
    replace_chat_template(tmp_path, "as it was", 6)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [5, 6]
    replace_chat_template(tmp_path, "as it was", 7)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written == {"eos_token_id": [5, 6, 7], "do_sample": True}
