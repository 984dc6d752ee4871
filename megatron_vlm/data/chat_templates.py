"""The built-in chat templates in Jinja, the system prompts that belong to them, and questions for captions.

What each must equal, character for character:

    plain     LLaVA's conv_llava_plain: the image, its caption, a newline; questions are left out
    v1        LLaVA's conv_vicuna_v1, from Vicuna 1.1; also called vicuna
    llama_2   LLaVA's conv_llava_llama_2, which is Llama 2's, without taking spaces off
    llama_3   Llama 3 Instruct (Llama 3.1's begins with dates; it comes with its tokenizer, as chat)
    chatml    ChatML, without a system turn of its own
    qwen      Qwen2 Instruct: ChatML, with one
    mistral   Mistral 7B Instruct v0.3; a system turn begins the first question, as in v0.2's, for v0.3's
              stands in prompts alone and is lost from a finished conversation
    gemma     Gemma 3; Gemma 2's refuses a system turn and is the same otherwise
    llm_jp    LLM-jp-3 Instruct; a conversation's own system turn takes the place of its fixed sentence
"""

from __future__ import annotations

import json
import zlib
from typing import Dict, Optional, Tuple

# transformers calls raise_exception; the sample is then left out and counted.
_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant have to take turns') }}{% endif %}"
)
# A system turn stands in front of the first question's text.
_SYSTEM_FIRST = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
    "{% set turns = messages if system is none else messages[1:] %}"
)
_PLAIN = (
    "{% for message in messages if message['role'] != 'system' %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}"
)
_VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_LLAMA_2 = (
    _SYSTEM_FIRST + "{% for message in turns %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system is not none %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MISTRAL = (
    _SYSTEM_FIRST
    + "{{ bos_token }}{% for message in turns %}"
    + _ALTERNATE
    + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' }}{% if loop.first and system is not none %}{{ system + '\n\n' }}{% endif %}"
    "{{ message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA = (
    _SYSTEM_FIRST + "{{ bos_token }}{% for message in turns %}" + _ALTERNATE + "{{ '<start_of_turn>' }}"
    "{{ 'user\n' if message['role'] == 'user' else 'model\n' }}"
    "{% if loop.first and system is not none %}{{ system + '\n\n' }}{% endif %}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_LLM_JP = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\n\n### 指示:\n' + message['content'] }}"
    "{% else %}{{ '\n\n### 応答:\n' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### 応答:\n' }}{% endif %}"
)
BUILTIN_TEMPLATES: Dict[str, str] = {
    "plain": _PLAIN,
    "v1": _VICUNA,
    "vicuna": _VICUNA,
    "llama_2": _LLAMA_2,
    "llama_3": _LLAMA_3,
    "chatml": _CHATML,
    "qwen": _CHATML,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "llm_jp": _LLM_JP,
}

_VICUNA_PROMPTS = {
    "en": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "jp": "これは好奇心旺盛なユーザーと人工知能アシスタントの会話です。"
    "アシスタントはユーザーの質問に、親切に、詳しく、丁寧に答えます。",
}
_LLM_JP_PROMPT = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
_QWEN_PROMPT = "You are a helpful assistant."
# Template: language of --lang: the system turn of a conversation that has none.
SYSTEM_PROMPTS: Dict[str, Dict[str, str]] = {
    "v1": _VICUNA_PROMPTS,
    "vicuna": _VICUNA_PROMPTS,
    "llama_2": {
        "en": "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language.",
        "jp": "あなたは言語と視覚を扱う、役に立つアシスタントです。"
        "ユーザーが示す画像の内容を理解し、自然な言葉でさまざまな作業を助けます。",
    },
    "qwen": {"en": _QWEN_PROMPT, "jp": _QWEN_PROMPT},
    "llm_jp": {"en": _LLM_JP_PROMPT, "jp": _LLM_JP_PROMPT},
}
# Before a template here, for processors of transformers: content in parts becomes text, and a conversation
# without a system turn gets one.
_FROM_PARTS = (
    "{% macro written(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{% if part['type'] == 'image' %}{{ IMAGE + '\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
    "{% set whole = namespace(turns=SYSTEM if messages[0]['role'] != 'system' else []) %}"
    "{% for message in messages %}{% set whole.turns = "
    "whole.turns + [{'role': message['role'], 'content': written(message['content'])}] %}{% endfor %}"
    "{% set messages = whole.turns %}"
)

# Asked of an image that comes with an answer but no question.
CAPTION_PROMPTS: Dict[str, Tuple[str, ...]] = {
    "en": (
        "Describe the image.",
        "Provide a brief description of the given image.",
        "What is in the image?",
        "Summarize the visual content of the image.",
    ),
    "jp": (
        "この画像を説明してください。",
        "画像の内容を簡潔に説明してください。",
        "この画像には何が写っていますか。",
        "画像に見えるものを要約してください。",
    ),
}


def folder_template(name: str, lang: str, image_token: str) -> Optional[str]:
    """Return a built-in template as a model folder carries it, for transformers' processors and tokenizers.

    Args:
        lang: ``jp`` or ``en``, the language of the system turn that it writes where a conversation has none.

    Returns:
        None for ``plain``, which leaves questions out: no one can ask with it.
    """
    if name == "plain":
        return None
    prompt = SYSTEM_PROMPTS.get(name, {}).get(lang)
    system = [] if prompt is None else [{"role": "system", "content": prompt}]
    # JSON's strings are Jinja's, too.
    values = {"IMAGE": image_token, "SYSTEM": system}
    text = _FROM_PARTS
    for word, value in values.items():
        text = text.replace(word, json.dumps(value, ensure_ascii=False))
    return text + BUILTIN_TEMPLATES[name]


def caption_prompt(key: str, lang: str) -> str:
    """Return the question for a sample that has none: one of ``CAPTION_PROMPTS[lang]``, fixed by its key."""
    prompts = CAPTION_PROMPTS[lang]
    return prompts[zlib.crc32(key.encode()) % len(prompts)]
