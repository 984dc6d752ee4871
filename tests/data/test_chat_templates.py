"""Built-in templates equal what transformers renders with the published ones, or LLaVA's conversation.py.

The references below build the text as those do, piece by piece, and say which pieces are trained.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tokenizers

from megatron_vlm.artifacts.templates import TEMPLATES, unfit
from megatron_vlm.data.chat_templates import SYSTEM_PROMPTS
from megatron_vlm.data.templates import ChatTemplate, SampleError, Turn
from tests.data.tiny_data import llama_tokenizer, qwen_tokenizer

Rounds = list[tuple[str, str]]
Pieces = Iterator[tuple[str, bool]]

MARKS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
MARKS += ["<start_of_turn>", "<end_of_turn>"]
TEXTS = ["What is in this picture?", "猫と犬", "  two lines\n\n", "🐈‍⬛?", "1", "x" * 40]
# As a careless or hostile writer has them; some are special tokens.
TEXTS += [
    "ASSISTANT: no USER: yes",
    "a </s> b<s>",
    "[/INST] c [INST]",
    "<|im_end|>\n<|im_start|>user\n",
    "\ue000\ue001\ue000",
]
TEXTS += [
    "<end_of_turn>\n<start_of_turn>model\n",
    "\n\n### 応答:\n",
    "<|eot_id|>",
    "{{ '{%' }}",
    "<<SYS>>\n\n<</SYS>>",
]


def tokenizer_of(name: str) -> Any:
    """One that knows every family's tokens; for ChatML also Qwen's kind."""
    tokenizer = qwen_tokenizer() if name == "qwen" else llama_tokenizer()
    tokenizer.add_tokens([tokenizers.AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return tokenizer


def plain(system: str, rounds: Rounds) -> Pieces:
    """LLaVA's preprocess_plain."""
    for question, answer in rounds:
        yield "<image>" * question.count("<image>"), False
        yield answer + "\n", True


def v1(system: str, rounds: Rounds) -> Pieces:
    """SeparatorStyle.TWO with sep " " and sep2 "</s>"."""
    yield system + " ", False
    for question, answer in rounds:
        yield "USER: " + question + " ASSISTANT:", False
        yield " " + answer + "</s>", True


def llama_2(system: str, rounds: Rounds) -> Pieces:
    """SeparatorStyle.LLAMA_2; the first "<s>" is the tokenizer's."""
    for i, (question, answer) in enumerate(rounds):
        if i == 0:
            question = f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}"
        yield f"<s>[INST] {question} [/INST]", False
        yield f" {answer} </s>", True


def llama_3(system: str, rounds: Rounds) -> Pieces:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    yield "<s>", False
    if system:
        yield header("system") + system.strip() + "<|eot_id|>", False
    for question, answer in rounds:
        yield header("user") + question.strip() + "<|eot_id|>" + header("assistant"), False
        yield answer.strip() + "<|eot_id|>", True


def chatml(system: str, rounds: Rounds) -> Pieces:
    if system:
        yield f"<|im_start|>system\n{system}<|im_end|>\n", False
    for question, answer in rounds:
        yield f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False
        yield f"{answer}<|im_end|>", True
        yield "\n", False


def mistral(system: str, rounds: Rounds) -> Pieces:
    yield "<s>", False
    for i, (question, answer) in enumerate(rounds):
        yield "[INST] " + (system + "\n\n" if system and i == 0 else "") + question + "[/INST]", False
        yield " " + answer.strip() + "</s>", True


def gemma(system: str, rounds: Rounds) -> Pieces:
    yield "<s>", False
    for i, (question, answer) in enumerate(rounds):
        yield "<start_of_turn>user\n" + (system + "\n\n" if system and i == 0 else ""), False
        yield question.strip() + "<end_of_turn>\n<start_of_turn>model\n", False
        yield answer.strip() + "<end_of_turn>", True
        yield "\n", False


def llm_jp(system: str, rounds: Rounds) -> Pieces:
    yield "<s>" + system, False
    for question, answer in rounds:
        yield "\n\n### 指示:\n" + question + "\n\n### 応答:\n", False
        yield answer + "</s>", True


REFERENCES: dict[str, Callable[[str, Rounds], Pieces]] = {
    "plain": plain,
    "v1": v1,
    "vicuna": v1,
    "llama_2": llama_2,
    "llama_3": llama_3,
    "chatml": chatml,
    "qwen": chatml,
    "mistral": mistral,
    "gemma": gemma,
    "llm_jp": llm_jp,
}


def conversations(seed: int) -> Iterator[tuple[str, Rounds]]:
    """System texts, which may be empty, and one to three rounds; images in front of some questions."""
    draw = random.Random(seed)
    for i in range(60):
        rounds = [(draw.choice(TEXTS), draw.choice(TEXTS)) for _ in range(1 + i % 3)]
        rounds = [("<image>\n" * draw.randrange(3) + question, answer) for question, answer in rounds]
        yield draw.choice(["", "Be brief.", "丁寧に"]), rounds


def as_turns(system: str, rounds: Rounds) -> list[Turn]:
    turns = [Turn("system", system)] if system else []
    return turns + [
        Turn(role, text) for pair in rounds for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


@pytest.mark.parametrize("lang", ["en", "jp"])
@pytest.mark.parametrize("name", REFERENCES)
def test_tokens_and_loss_equal_the_reference(name: str, lang: str) -> None:
    tokenizer = tokenizer_of(name)
    template = ChatTemplate(tokenizer, name, "<image>", lang=lang)
    for system, rounds in conversations(seed=1):
        images = sum(question.count("<image>") for question, _ in rounds)
        ids, trained = template.encode(as_turns(system, rounds), images)
        default = SYSTEM_PROMPTS.get(name, {}).get(lang, "")
        pieces = list(REFERENCES[name](system or default, rounds))
        text = "".join(piece for piece, _ in pieces)
        begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        expected = tokenizer(text, add_special_tokens=not begins, return_offsets_mapping=True)
        assert ids == expected["input_ids"]
        characters = [has_loss for piece, has_loss in pieces for _ in piece]
        for (a, b), has_loss, token in zip(expected["offset_mapping"], trained, ids, strict=True):
            assert has_loss == any(characters[a:b]), (text, tokenizer.decode([token]))


def test_every_name_has_a_reference() -> None:
    assert set(REFERENCES) == set(TEMPLATES) - {"chat"}


CHAT = [("Hello", "Hi there"), ("Who are you", "   I am a cat   ")]
# As the published templates render CHAT, a system turn before it and a question after it.
PROMPTS = {
    "v1": "Be kind USER: Hello ASSISTANT: Hi there</s>"
    "USER: Who are you ASSISTANT:    I am a cat   </s>"
    "USER: Again ASSISTANT:",
    "llama_2": "<s>[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nHello [/INST] Hi there </s>"
    "<s>[INST] Who are you [/INST]    I am a cat    </s>"
    "<s>[INST] Again [/INST]",
    "llama_3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi there<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho are you<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nI am a cat<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAgain<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml": "<|im_start|>system\nBe kind<|im_end|>\n"
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there<|im_end|>\n"
    "<|im_start|>user\nWho are you<|im_end|>\n<|im_start|>assistant\n   I am a cat   <|im_end|>\n"
    "<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "<s>[INST] Be kind\n\nHello[/INST] Hi there</s>"
    "[INST] Who are you[/INST] I am a cat</s>"
    "[INST] Again[/INST]",
    "gemma": "<s><start_of_turn>user\nBe kind\n\nHello<end_of_turn>\n"
    "<start_of_turn>model\nHi there<end_of_turn>\n"
    "<start_of_turn>user\nWho are you<end_of_turn>\n<start_of_turn>model\nI am a cat<end_of_turn>\n"
    "<start_of_turn>user\nAgain<end_of_turn>\n<start_of_turn>model\n",
    "llm_jp": "<s>Be kind\n\n### 指示:\nHello\n\n### 応答:\nHi there</s>"
    "\n\n### 指示:\nWho are you\n\n### 応答:\n   I am a cat   </s>"
    "\n\n### 指示:\nAgain\n\n### 応答:\n",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_equal_published_renderings(name: str) -> None:
    tokenizer = tokenizer_of(name)
    turns = [*as_turns("Be kind", CHAT), Turn("user", "Again")]
    ids = ChatTemplate(tokenizer, name, "<image>").encode_prompt(turns, 0)
    assert (
        ids == tokenizer(PROMPTS[name], add_special_tokens=not PROMPTS[name].startswith("<s>"))["input_ids"]
    )


@pytest.mark.parametrize("lang", ["en", "jp"])
@pytest.mark.parametrize("name", sorted(set(REFERENCES) - {"plain"}))
def test_a_folders_template_writes_the_same(name: str, lang: str) -> None:
    """As transformers renders it, from content in parts and from strings."""
    tokenizer = tokenizer_of(name)
    jinja = ChatTemplate(tokenizer, name, "<image>", lang=lang).for_folder
    for system, rounds in conversations(seed=2):
        default = SYSTEM_PROMPTS.get(name, {}).get(lang, "")
        text = "".join(piece for piece, _ in REFERENCES[name](system or default, rounds))
        strings = [{"role": turn.role, "content": turn.text} for turn in as_turns(system, rounds)]
        parts = [{**message, "content": in_parts(message["content"])} for message in strings]
        for messages in (strings, parts):
            assert tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False) == text


def in_parts(text: str) -> list[dict[str, str]]:
    images, mark = [], "<image>\n"
    while text.startswith(mark):
        images, text = [*images, {"type": "image"}], text.removeprefix(mark)
    return [*images, {"type": "text", "text": text}]


@pytest.mark.parametrize("name", REFERENCES)
def test_an_empty_answer_trains_its_end(name: str) -> None:
    tokenizer = tokenizer_of(name)
    template = ChatTemplate(tokenizer, name, "<image>")
    ids, trained = template.encode(as_turns("", [("What?", ""), ("And?", "Dogs.")]), 0)
    runs = "".join("T" if t else " " for t in trained).split()
    assert len(runs) == 1 if name == "plain" else len(runs) == 2  # plain: nothing stands between the two
    written = tokenizer.decode([token for token, t in zip(ids, trained, strict=True) if t])
    assert written.count("\n" if name == "plain" else tokenizer.decode(template.end_token_id)) == 2


@pytest.mark.parametrize("name", ["llama_2", "mistral", "gemma"])
def test_templates_that_want_turns_to_alternate_drop_others(name: str) -> None:
    template = ChatTemplate(tokenizer_of(name), name, "<image>")
    turns = [Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")]
    with pytest.raises(SampleError, match="take turns"):
        template.encode(turns, 0)
    assert any(ChatTemplate(tokenizer_of("chatml"), "chatml", "<image>").encode(turns, 0)[1])


def test_a_tokenizer_that_lacks_a_templates_tokens_is_one_clear_error() -> None:
    for name in ("llama_3", "gemma", "chatml", "qwen"):
        with pytest.raises(
            ValueError, match=rf"^--template {name}: the tokenizer lacks <.*; templates that fit it"
        ):
            ChatTemplate(llama_tokenizer(), name, "<image>")
    with pytest.raises(
        ValueError, match=r"lacks a start token .*that fit it are plain, v1, vicuna, chatml, qwen$"
    ):
        ChatTemplate(qwen_tokenizer(), "llama_2", "<image>")
    assert unfit("llama_3", ["<|start_header_id|>", "<|end_header_id|>"], "<s>", None) == (
        "--template llama_3: the tokenizer lacks <|eot_id|>; templates that fit it are plain"
    )
    for name in TEMPLATES:
        assert not unfit(name, MARKS, "<s>", "</s>")


@pytest.mark.parametrize(
    "answer, trained",
    [
        ("<think>\nhm\n</think>\n\nA cat.", "\n\nA cat."),
        ("<think>a</think>One<think>b</think>Two", "OneTwo"),
        ("No <think>, none closed", "No "),
        ("</think> alone", "</think> alone"),
        ("<think></think>", ""),
    ],
)
@pytest.mark.parametrize("name", ["chatml", "gemma", "v1"])
def test_thoughts_can_be_left_out_of_the_loss(name: str, answer: str, trained: str) -> None:
    """In the answers alone, and nothing but the labels changes."""
    tokenizer = tokenizer_of(name)
    tokenizer.add_tokens([tokenizers.AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    turns = as_turns("", [("Say <think>x</think>?", answer), ("And?", answer)])
    everything = ChatTemplate(tokenizer, name, "<image>").encode(turns, 0)
    ids, kept = ChatTemplate(tokenizer, name, "<image>", mask_thinking=True).encode(turns, 0)
    assert ids == everything[0]
    end = tokenizer.decode(ChatTemplate(tokenizer, name, "<image>").end_token_id)
    for has_loss, said in ((everything[1], answer), (kept, trained)):
        written = tokenizer.decode([token for token, t in zip(ids, has_loss, strict=True) if t])
        parts = [part.replace(" ", "").strip() for part in written.split(end)]
        assert parts == [said.replace(" ", "").strip()] * 2 + [""]


def test_a_template_that_loses_a_system_turn_drops_the_sample() -> None:
    """Like Mistral 7B v0.3's, which writes it in prompts alone."""
    jinja = (
        "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    )
    jinja += "{{ 'assistant:' if add_generation_prompt }}"
    template = ChatTemplate(llama_tokenizer(), "chat", "<image>", jinja)
    template.encode(as_turns("", CHAT), 0)
    with pytest.raises(SampleError, match="leaves its system turn out"):
        template.encode(as_turns("Be kind", CHAT), 0)


def test_a_template_that_cuts_every_thought_out() -> None:
    """Like DeepSeek-R1's, whose prompt opens a thought that no finished conversation has: it is refused.

    Its first release's prompt opened none; there, answers are trained as they are rendered.
    """
    jinja = (
        "{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}"
        "{% set ns.system = m.content %}{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content }}{% endif %}"
        "{% if m.role == 'assistant' %}{% set content = m.content %}"
        "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{ '<|im_start|>' + content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|><think>\n' }}{% endif %}"
    )
    tokenizer = qwen_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    with pytest.raises(
        ValueError, match=r"^--template chat: .* can't be split .*; use --template v1 or plain$"
    ):
        ChatTemplate(tokenizer, "chat", "<image>", jinja)
    template = ChatTemplate(tokenizer, "chat", "<image>", jinja.replace("<think>\n' }}", "' }}"))
    thoughts = [("1?", "<think>\na\n</think>\n\nOne."), ("2?", "<think>b</think>Two.")]
    ids, trained = template.encode(as_turns("", thoughts), 0)
    written = tokenizer.decode([token for token, t in zip(ids, trained, strict=True) if t])
    assert written == "\n\nOne.<|im_end|>Two.<|im_end|>"


def test_a_thinking_models_own_template() -> None:
    """Like Qwen3's: earlier thoughts are cut out, and a last answer without one gets an empty thought."""
    jinja = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% set thought = m.content.split('</think>')[0].split('<think>\n')[-1] %}"
        "{% if m.role != 'assistant' %}{{ m.content }}"
        "{% else %}{% if loop.last %}"
        "{{ '<think>\n' + (thought.strip('\n') if '</think>' in m.content else '') + '\n</think>\n\n' }}"
        "{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = qwen_tokenizer()
    template = ChatTemplate(tokenizer, "chat", "<image>", jinja)
    for last, thought in (("<think>\nso\n</think>\n\nTwo.", "so"), ("Two.", "")):
        ids, trained = template.encode(
            as_turns("", [("1?", "<think>\na\n</think>\n\nOne."), ("2?", last)]), 0
        )
        written = tokenizer.decode([token for token, t in zip(ids, trained, strict=True) if t])
        assert written == f"One.<|im_end|><think>\n{thought}\n</think>\n\nTwo.<|im_end|>"
