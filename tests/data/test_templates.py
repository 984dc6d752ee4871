"""Token ids equal transformers' own; trained tokens are what follows transformers' generation prompt."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.batch import IGNORE_INDEX, Sample
from megatron_vlm.data.processing import Processing, load_processing
from megatron_vlm.data.templates import ChatTemplate, SampleError, Turn
from tests.data.tiny_data import CHATML_TEMPLATE, LLAVA_TEMPLATE, asked, jpeg, llama_tokenizer, qwen_tokenizer

QUESTIONS = [
    "What is in this picture?",
    "これは何の画像ですか。",
    "ASSISTANT: </s> <|im_end|>\n{{ '{%' }}",
    "🐈‍⬛?",
]
ANSWERS = [
    "A cat.",
    "猫と犬",
    "",
    " \n two lines\n\n",
    "USER: no ASSISTANT: yes",
    "a </s> b <|im_end|>\n c",
    "é🐕",
]


def processing_for(
    name: str, folders: dict[str, Path], models: dict[str, ModelConfig], **options: Any
) -> Processing:
    return load_processing(str(folders[name]), models[name], **{"seq_length": 1024, **options})


def trained_ids(sample: Sample) -> list[int]:
    return [label for label in sample.labels if label != IGNORE_INDEX]


def reference(
    name: str, folder: Path, question: str, answer: str, with_image: bool
) -> tuple[list[int], list[int]]:
    """transformers' token ids of the whole conversation and of its prompt alone, image tokens expanded."""
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    image = Image.open(io.BytesIO(jpeg(1))) if with_image else None
    if name == "llava":
        user: Any = [{"type": "image"}] * with_image + [{"type": "text", "text": question}]
        reply: Any = [{"type": "text", "text": answer}]
    else:
        user, reply = "<image>\n" * with_image + question, answer
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    whole = processor.apply_chat_template(messages)
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    ids = []
    for text in (whole, prompt):
        # The rule of transformers' apply_chat_template(tokenize=True).
        writes_bos = processor.tokenizer.bos_token and text.startswith(processor.tokenizer.bos_token)
        output = processor(images=image, text=text, add_special_tokens=not writes_bos)
        ids.append(output["input_ids"][0])
    return ids[0], ids[1]


@pytest.mark.parametrize("name", ["llava", "qwen", "llama2"])
def test_folder_template_equals_transformers(
    name: str, folders: dict[str, Path], models: dict[str, ModelConfig]
) -> None:
    processing = processing_for(name, folders, models)
    assert processing.template.name == "chat"
    end = processing.tokenizer.eos_token_id
    for i, (question, answer) in enumerate((q, a) for q in QUESTIONS for a in ANSWERS):
        with_image = i % 3 != 0
        whole, prompt = reference(name, folders[name], question, answer, with_image)
        sample = processing.encode("key", asked(question, answer), {"image": [jpeg(1)] * with_image})
        # llava-1.5's template writes no end token; without one a model never learns to stop.
        expected = whole + [end] * (name == "llava")
        assert sample.input_ids == expected
        assert sample.input_ids.count(processing.image_token_id) == with_image * processing.model.image_tokens
        # Qwen's template puts a newline behind the end token: nothing that a model should write.
        newline = processing.tokenizer.encode("\n", add_special_tokens=False)
        written = expected[: -len(newline)] if name == "qwen" else expected
        assert written[: len(prompt)] == prompt and written[-1] == end
        assert trained_ids(sample) == written[len(prompt) :]
        assert [label for label in sample.labels if label != IGNORE_INDEX] == [
            token
            for token, label in zip(sample.input_ids[1:], sample.labels, strict=False)
            if label != IGNORE_INDEX
        ]


def test_default_template(folders: dict[str, Path], models: dict[str, ModelConfig]) -> None:
    assert processing_for("llava", folders, models, stage=1).template.name == "chat"
    assert processing_for("bare", folders, models, stage=1).template.name == "plain"
    assert processing_for("bare", folders, models, stage=2).template.name == "v1"
    with pytest.raises(ValueError, match="no chat template; use --template v1 or plain"):
        processing_for("bare", folders, models, template="chat")


def test_several_turns_train_every_answer() -> None:
    turns = [Turn("user", "1?"), Turn("assistant", "one"), Turn("user", "2?"), Turn("assistant", "two")]
    for tokenizer, jinja in ((llama_tokenizer(), LLAVA_TEMPLATE), (qwen_tokenizer(), CHATML_TEMPLATE)):
        ids, trained = ChatTemplate(tokenizer, "chat", "<image>", jinja).encode(turns, 1)
        runs = "".join("T" if t else " " for t in trained).split()
        assert len(runs) == 2
        text = tokenizer.decode([token for token, t in zip(ids, trained, strict=True) if t])
        assert text.replace(" ", "").replace(tokenizer.eos_token, "") == "onetwo"
        assert trained[-1] or tokenizer.decode(ids[-1]) == "\n"


def test_a_token_that_begins_in_the_prompt_is_trained() -> None:
    """The space that this template writes before an answer becomes part of the answer's first token."""
    jinja = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    jinja += "{{ 'assistant: ' if add_generation_prompt }}"
    tokenizer = qwen_tokenizer()
    turns = [Turn("user", "?"), Turn("assistant", "cat")]
    ids, trained = ChatTemplate(tokenizer, "chat", "<image>", jinja).encode(turns, 0)
    written = tokenizer.decode([token for token, t in zip(ids, trained, strict=True) if t])
    assert written == " cat<|im_end|>"


def test_no_question_asks_for_a_caption(folders: dict[str, Path], models: dict[str, ModelConfig]) -> None:
    for lang, word in (("jp", "画像"), ("en", "image")):
        processing = processing_for("qwen", folders, models, lang=lang)
        for question in ("", "<image>\n"):
            sample = processing.encode("key", asked(question, "A cat."), {"image": [jpeg(1)]})
            assert word in processing.tokenizer.decode(sample.input_ids).replace("<image>", "")
            assert (
                processing.encode("key", asked(question, "A cat."), {"image": [jpeg(1)]}).input_ids
                == sample.input_ids
            )
        text_only = processing.tokenizer.decode(processing.encode("key", asked("", "A cat."), {}).input_ids)
        assert word not in text_only


def test_a_sample_of_which_nothing_is_trained_is_dropped(
    folders: dict[str, Path], models: dict[str, ModelConfig]
) -> None:
    """Of an empty caption there is the newline behind it, which an image or a start token would predict."""
    processing = processing_for("qwen", folders, models, template="plain")
    with pytest.raises(SampleError, match="none of its tokens is trained") as error:
        processing.encode("key", asked("What?", ""), {})
    assert error.value.kind == "dropped"
    assert len(trained_ids(processing.encode("key", asked("What?", ""), {"image": [jpeg(1)]}))) == 1


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_image_marker_is_a_position(
    name: str, folders: dict[str, Path], models: dict[str, ModelConfig]
) -> None:
    processing = processing_for(name, folders, models)
    in_front = processing.encode("key", asked("What?", "A cat."), {"image": [jpeg(1)]}).input_ids
    assert (
        processing.encode("key", asked("<image>\nWhat?", "A cat."), {"image": [jpeg(1)]}).input_ids
        == in_front
    )
    if name == "qwen":  # llava-1.5's own template renders all images first
        ids = processing.encode("key", asked("Is <image> it?", "A cat."), {"image": [jpeg(1)]}).input_ids
        assert f"Is {'<image>' * processing.model.image_tokens} it?" in processing.tokenizer.decode(ids)


@pytest.mark.parametrize(
    "question, images, found",
    [("<image>\n<image>\nWhat?", 1, 2), ("<image>\nWhat?", 0, 1)],
)
def test_markers_without_image_are_dropped(
    question: str, images: int, found: int, folders: dict[str, Path], models: dict[str, ModelConfig]
) -> None:
    for name in ("llava", "qwen"):
        with pytest.raises(SampleError, match=f"{found} image markers, but {images} images") as error:
            processing_for(name, folders, models).encode(
                "key", asked(question, "A cat."), {"image": [jpeg(1)] * images}
            )
        assert error.value.kind == "dropped"


@pytest.mark.parametrize(
    "jinja, message",
    [
        ("{% for m in messages %}{{ m.content[0] }}{% endfor %}", "loses the image token <image>"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "can't be split into"),
        (
            "{% for m in messages %}{{ m.content }}{{ raise_exception('no') if not loop.first }}{% endfor %}",
            "no",
        ),
    ],
)
def test_unusable_template_is_one_clear_error(jinja: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(llama_tokenizer(), "chat", "<image>", jinja)


def test_a_template_that_rewrites_earlier_answers_trains_what_it_renders() -> None:
    """Like templates that cut the thoughts out of earlier answers."""
    jinja = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = llama_tokenizer()
    template = ChatTemplate(tokenizer, "chat", "<image>", jinja)
    turns = [Turn("user", "1?"), Turn("assistant", "so</think>1"), Turn("user", "2?"), Turn("assistant", "2")]
    ids, trained = template.encode(turns, 0)
    assert ids == tokenizer("user:1?</s>assistant:1</s>user:2?</s>assistant:2</s>")["input_ids"]
    written = tokenizer.decode([token for token, t in zip(ids, trained, strict=True) if t])
    assert written.replace(" ", "") == "1</s>2</s>"


def test_a_template_that_rewrites_its_turns_drops_the_sample() -> None:
    jinja = (
        "{% if messages | length > 2 %}{{ messages | length }}{% endif %}"
        "{% for m in messages %}{{ m.role + ':' }}{{ m.content if m.role == 'user' else m.content | upper }}"
        "{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    template = ChatTemplate(llama_tokenizer(), "chat", "<image>", jinja)
    turns = [Turn("user", "1?"), Turn("assistant", "one"), Turn("user", "2?"), Turn("assistant", "two")]
    ids, trained = template.encode(turns[:2], 0)  # what it makes of an answer is known there
    assert llama_tokenizer().decode([i for i, t in zip(ids, trained, strict=True) if t]).strip() == "ONE</s>"
    with pytest.raises(SampleError, match="rewrites its turns"):
        template.encode(turns, 0)
    # As long as the answers stand as they are, nothing before them matters.
    ids, trained = template.encode([replace(turn, text=turn.text.upper()) for turn in turns], 0)
    written = llama_tokenizer().decode([i for i, t in zip(ids, trained, strict=True) if t])
    assert written.replace(" ", "") == "ONE</s>TWO</s>"


def test_reading_a_folder_says_what_is_wrong(
    folders: dict[str, Path], models: dict[str, ModelConfig], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_processing(str(tmp_path / "none"), models["llava"], seq_length=64)
    with pytest.raises(ValueError, match="no usable tokenizer"):
        load_processing(str(tmp_path), models["llava"], seq_length=64)
    with pytest.raises(ValueError, match=r"its <image> is 420"):
        processing_for("llava", folders, models, image_token_id=7)
    with pytest.raises(ValueError, match="is no image token; its <image> is 403, the model"):
        load_processing(str(folders["qwen"]), models["llava"], seq_length=64)
    with pytest.raises(
        ValueError, match=r"images of \(3, 22, 22\), the vision tower takes uint8 \(3, 20, 20\)"
    ):
        processing_for("llava", folders, models, image_processor_dir=str(folders["qwen"]))
    with pytest.raises(ValueError, match="--pad-token-id 420 is the image token"):
        processing_for("llava", folders, models, pad_token_id=420)
    with pytest.raises(ValueError, match="--seq-length 25 does not hold one image of 25 tokens"):
        processing_for("llava", folders, models, seq_length=25)
    assert processing_for("llava", folders, models, pad_token_id=5).pad_token_id == 5
    assert processing_for("qwen", folders, models).pad_token_id == processing_for(
        "qwen", folders, models
    ).tokenizer.convert_tokens_to_ids("<|endoftext|>")


CHATML_BY_HAND = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)


def changed(folder: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model folder with another tokenizer.json."""
    shutil.copytree(folder, target)
    content = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
    edit(content)
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return target


def with_chatml(content: dict[str, Any], **flags: Any) -> None:
    first = 1 + max(token["id"] for token in content["added_tokens"])
    for number, token in enumerate(("<|im_start|>", "<|im_end|>"), start=first):
        content["added_tokens"].append({"id": number, "content": token, **CHATML_BY_HAND, **flags})


def with_appended_end(content: dict[str, Any]) -> None:
    processor = content["post_processor"]
    processor["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    processor["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}


@pytest.mark.parametrize("template", ["chatml", "chat"])
def test_an_end_token_that_is_not_flagged_special(
    folders: dict[str, Path], models: dict[str, ModelConfig], tmp_path: Path, template: str
) -> None:
    folder = changed(folders["bare"], tmp_path / "hf", with_chatml)
    (folder / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    processing = load_processing(str(folder), models["bare"], seq_length=200, template=template)
    end = processing.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert processing.template.end_token_id == end
    assert processing.template.check_end() == f"answers end with '<|im_end|>' ({end})"
    trained = trained_ids(processing.encode("key", asked("q", "a"), {}))
    assert processing.tokenizer.convert_ids_to_tokens(trained)[-2:] == ["a", "<|im_end|>"]


@pytest.mark.parametrize("name, template", [("llava", "chat"), ("llava", "v1"), ("llama2", "chat")])
def test_a_tokenizer_that_appends_an_end_token(
    folders: dict[str, Path], models: dict[str, ModelConfig], tmp_path: Path, name: str, template: str
) -> None:
    """What it appends is left out, so that all is as with a tokenizer that doesn't; its start token stays."""
    folder = changed(folders[name], tmp_path / "hf", with_appended_end)
    assert transformers.AutoTokenizer.from_pretrained(folder)("a").input_ids[-1] == 2
    appending = load_processing(str(folder), models[name], seq_length=1024, template=template)
    ordinary = processing_for(name, folders, models, template=template)
    assert appending.template.appended == [2] and ordinary.template.appended == []
    for question in QUESTIONS:
        turns = [*asked(question, "A cat."), *asked("And?", "No.")]
        sample, expected = (made.encode("key", turns, {"image": [jpeg(1)]}) for made in (appending, ordinary))
        assert (sample.input_ids, sample.labels) == (expected.input_ids, expected.labels)
        assert (
            sample.input_ids[0] == 1 and sample.input_ids[-2:].count(2) == 1 and trained_ids(sample)[-1] == 2
        )
        for raw in (False, True):
            prompt, wanted = (made.encode_prompt(question, {}, raw) for made in (appending, ordinary))
            assert prompt == wanted and prompt[-1] != 2
    appending.template.check_end()


def test_the_end_of_an_answer_is_said(folders: dict[str, Path], models: dict[str, ModelConfig]) -> None:
    for name, template, line in (
        ("llava", "chat", "answers end with '</s>' (2)"),
        ("qwen", "chat", "answers end with '<|im_end|>' (401)"),
        ("llama2", "chat", "answers end with '</s>' (2)"),
        ("bare", "plain", "answers end with a line break and no end token: LLaVA's plain template has none"),
    ):
        assert processing_for(name, folders, models, template=template).template.check_end().startswith(line)


@pytest.mark.parametrize("flags", [{"single_word": True}, {"normalized": True}])
def test_an_end_token_that_is_not_trained_is_refused(
    folders: dict[str, Path], models: dict[str, ModelConfig], tmp_path: Path, flags: dict[str, Any]
) -> None:
    """Behind a letter the tokenizer reads it as pieces, as Llama's of old with a normalizer do."""

    def edit(content: dict[str, Any]) -> None:
        with_chatml(content, **flags)
        content["pre_tokenizer"] = None
        content["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }

    folder = changed(folders["bare"], tmp_path / "hf", edit)
    template = load_processing(str(folder), models["bare"], seq_length=200, template="chatml").template
    with pytest.raises(
        ValueError,
        match=r"^--template chatml: an answer should end with '<\|im_end\|>' \(422\), but .* never stop",
    ):
        template.check_end()


def test_a_template_whose_prompts_end_with_the_end_token_is_refused() -> None:
    jinja = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    template = ChatTemplate(llama_tokenizer(), "chat", "<image>", jinja)
    with pytest.raises(
        ValueError, match=r"^--template chat: prompts end with '</s>' \(2\), .*generation_prompt"
    ):
        template.check_end()


def test_nothing_that_ends_an_answer_is_refused() -> None:
    tokenizer = llama_tokenizer()
    tokenizer.eos_token = None
    jinja = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"
    template = ChatTemplate(tokenizer, "chat", "<image>", jinja)
    assert template.end_token_id is None
    with pytest.raises(ValueError, match=r"^--template chat: nothing ends an answer: .* has no eos_token"):
        template.check_end()


@pytest.mark.parametrize(
    "text",
    ["m.content + ''", "m.content | map(attribute='text', default='<image>') | join"],
    ids=["text", "parts"],
)
def test_a_template_that_wants_a_system_turn_says_so(text: str) -> None:
    jinja = "{% if messages[0].role != 'system' %}{{ raise_exception('need system') }}{% endif %}"
    jinja += "{% for m in messages %}{{ m.role + ': ' + (" + text + ") + eos_token }}{% endfor %}"
    with pytest.raises(
        ValueError,
        match=r"^--template chat: .* wants a system turn in every conversation: .*need system.*; use ",
    ):
        ChatTemplate(llama_tokenizer(), "chat", "<image>", jinja)
