"""A text model's tokenizer as a LLaVA needs it: one ``tokenizer.json``, with ``<image>`` and padding; and the
replacement of a folder's tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_vlm.artifacts.chat_template import DEFAULT, EXTRAS, KEY, LEGACY, RAW, chat_template
from megatron_vlm.artifacts.end_tokens import end_tokens, find_end_token, with_end_token
from megatron_vlm.hf.build.spm import fast_tokenizer, is_llama
from megatron_vlm.system.files import read_json

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.model", "spm.model")
_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    f"{EXTRAS}/*.jinja",
)
_QUESTION = [{"type": "image"}, {"type": "text", "text": "?"}]
_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

# One turn after the other, images where they stand among the parts of its content, which may be a string
# too. The generation marks tell transformers which tokens the assistant said.
_CHAT_TEMPLATE = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{% if part['type'] == 'image' %}{{ 'IMAGE\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endmacro %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT:' }}"
    "{% generation %}{{ ' ' + text(message['content']) + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + text(message['content']) + 'BREAK' }}"
    "{% else %}{{ text(message['content']) + 'BREAK' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_CHAT_WORDS = {
    "en": {"USER": "USER", "ASSISTANT": "ASSISTANT", "BREAK": " "},  # as Vicuna and LLaVA-1.5
    "jp": {"USER": "ユーザー", "ASSISTANT": "アシスタント", "BREAK": "\\n"},
}


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder, as its files have it.

    ``tokenizer.json`` is taken as it is: AutoTokenizer may put together another tokenizer from its
    vocabulary, by what the class in ``tokenizer_config.json`` is called. Where there is only a sentencepiece
    model, that is converted.

    Raises:
        ValueError: there is no tokenizer, or none that can be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    model = next((folder / name for name in _SENTENCEPIECE if (folder / name).is_file()), None)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            _check_ids(tokenizer, read_json(folder / "tokenizer.json"))
            return tokenizer
        if model is not None:
            return _from_sentencepiece(folder, model)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the tokenizers library raises plain exceptions for damaged files
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"its tokenizer cannot be loaded ({reason})") from None


def _check_ids(tokenizer: Any, content: Any) -> None:
    """Check that added tokens' ids leave no gap, where the tokenizers library numbers them anew without a
    word."""
    for entry in content["added_tokens"]:
        token, wanted = entry["content"], entry["id"]
        found = tokenizer.convert_tokens_to_ids(token)
        if found != wanted:
            raise ValueError(f"tokenizer.json says that {token} is token {wanted}, and it loads as {found}")


def _from_sentencepiece(folder: Path, model: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    converted = fast_tokenizer(model, settings)
    with tempfile.TemporaryDirectory() as temporary:
        for name in _SETTINGS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(temporary) / name)
        converted.tokenizer.save(str(Path(temporary) / "tokenizer.json"))
        # What a Llama tokenizer does unless told otherwise; other classes are told.
        llama = is_llama(settings)
        settings.pop("tokenizer_class", None)
        settings.pop("auto_map", None)
        path = Path(temporary) / "tokenizer_config.json"
        path.write_text(json.dumps({**converted.named, **settings}), encoding="utf-8")
        loaded = PreTrainedTokenizerFast.from_pretrained(temporary)
    loaded.add_bos_token = settings.get("add_bos_token", llama)
    loaded.add_eos_token = settings.get("add_eos_token", False)
    converted.check(lambda text: list(loaded(text, add_special_tokens=False, verbose=False)["input_ids"]))
    return loaded


def add_tokens(tokenizer: Any, rows: int) -> list[int]:
    """Give a tokenizer ``<image>`` and, where it has none of its own, a padding token.

    A padding token that is the end or the start token too doesn't count: what is trained on, or masked,
    by its id would be the other as well.

    Args:
        rows: of the text model's embedding.

    Returns:
        The ids whose rows in the embedding mean nothing yet: those of the tokens added here, and of special
        tokens that the text model's tokenizer has and its embedding lacks.

    Raises:
        ValueError: there is no end token, or the tokenizer is another model's.
    """
    from transformers import AddedToken

    if tokenizer.eos_token is None:
        raise ValueError(
            "its tokenizer has no eos_token to end an answer with; name one in tokenizer_config.json"
        )
    known = tokenizer.get_vocab()
    beyond = {token: i for token, i in known.items() if i >= rows}
    strange = sorted(set(beyond) - {str(token) for token in tokenizer.added_tokens_decoder.values()})
    if strange:
        raise ValueError(
            f"its tokenizer has {max(known.values()) + 1} tokens (such as {strange[0]!r}), its embedding "
            f"{rows} rows; the tokenizer is another model's"
        )
    own_pad = tokenizer.pad_token not in (None, tokenizer.eos_token, tokenizer.bos_token)
    wanted = [IMAGE_TOKEN] if own_pad else [IMAGE_TOKEN, PAD_TOKEN]
    # normalized=False: found in the text as it is, whatever the tokenizer does to other text.
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in wanted], special_tokens=True)
    if not own_pad:
        tokenizer.pad_token = PAD_TOKEN
    ids = tokenizer.get_vocab()
    return sorted({i for token, i in ids.items() if token not in known or i >= rows})


def template_with_images(tokenizer: Any, lang: str) -> str:
    """Return the tokenizer's own chat template if it places images, otherwise one in ``lang``."""
    own = tokenizer.chat_template
    if isinstance(own, str) and _places_images(tokenizer, own):
        return own
    template = _CHAT_TEMPLATE
    for word, replacement in {**_CHAT_WORDS[lang], "IMAGE": IMAGE_TOKEN}.items():
        template = template.replace(word, replacement)
    return template


def answer_end(tokenizer: Any, template: str | None = None) -> int | None:
    """Return the token that a chat template writes behind an answer; None where it writes none.

    Args:
        template: the tokenizer's own if not given.
    """
    answer = "\ue000"
    for content in ([{"type": "text", "text": answer}], answer):
        turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": content}]
        with suppress(Exception):  # a template may raise anything on content that is not for it
            text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
            _, found, suffix = text.partition(answer)
            if found:
                added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
                end = find_end_token(suffix, added, tokenizer.eos_token)
                return tokenizer.convert_tokens_to_ids(end) if end else None
    return None


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a folder that make up its tokenizer, relative to it.

    Raises:
        ValueError: it has none.
    """
    found = [path for pattern in _FILES for path in sorted(folder.glob(pattern)) if path.is_file()]
    if not any(path.name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json") for path in found):
        raise ValueError(f"{folder}: no tokenizer (tokenizer.json, tokenizer.model, tokenizer_config.json)")
    return [path.relative_to(folder) for path in found]


def take_tokenizer(folder: Path, source: Path) -> None:
    """Give a model folder another folder's tokenizer and, where that has one, its chat template.

    Generation then stops where the template ends an answer, too.

    Raises:
        ValueError: the other folder has no tokenizer.
    """
    files, template = tokenizer_files(source), chat_template(source)
    kept = chat_template(folder) if template is None else template
    for pattern in _FILES:  # of two tokenizers' files, transformers might take either's
        for path in filter(Path.is_file, folder.glob(pattern)):
            path.unlink()
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / file, folder / file)
    drop_appended_end(folder)
    if kept is not None:
        end = None
        with suppress(ValueError, ModuleNotFoundError):  # whoever loads the tokenizer is told
            end = answer_end(load_tokenizer(folder), kept)
        replace_chat_template(folder, kept, end)


def replace_chat_template(folder: Path, template: str, end_token_id: int | None) -> None:
    """Give a model folder another chat template, and let generation end where that ends an answer.

    Files are replaced, not written into, since other folders may share them. One that says the same already
    stays as it is.
    """
    if chat_template(folder) != template:
        _write_chat_template(folder, template)
    known = end_tokens(folder)
    ends = with_end_token(known, end_token_id)
    if ends != known:
        path = folder / "generation_config.json"
        values = read_json(path) if path.is_file() else {}
        values["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        _replace(path, json.dumps(values, indent=2) + "\n")


def _write_chat_template(folder: Path, template: str) -> None:
    for path in (folder / LEGACY, folder / EXTRAS / f"{DEFAULT}.jinja"):
        path.unlink(missing_ok=True)
    for name in ("tokenizer_config.json", "processor_config.json"):
        path = folder / name
        values = _settings(path)
        if values.pop(KEY, None) is not None:
            _replace(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    _replace(folder / RAW, template)


def drop_appended_end(folder: Path) -> None:
    """Let a folder's tokenizer put nothing behind a text, for a prompt with an end token is not answered.

    Nothing changes where it puts nothing there. Files are replaced, as by :func:`replace_chat_template`.
    """
    settings = _settings(folder / "tokenizer_config.json")
    if settings.pop("add_eos_token", None):  # without the key, tokenizer.json alone decides
        _replace(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    content = _settings(folder / "tokenizer.json")
    processor = content.get("post_processor") or {}
    changed = False
    for step in [processor, *processor.get("processors", [])]:
        for key in ("single", "pair"):
            pieces = step.get(key) if step.get("type") == "TemplateProcessing" else None
            while pieces and "SpecialToken" in pieces[-1]:
                pieces.pop()
                changed = True
    if changed:
        _replace(folder / "tokenizer.json", json.dumps(content, indent=2, ensure_ascii=False))


def _settings(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; nothing where it is missing, or damaged, which its reader will
    say."""
    with suppress(OSError, ValueError):
        values = read_json(path)
        return values if isinstance(values, dict) else {}
    return {}


def _replace(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def _places_images(tokenizer: Any, template: str) -> bool:
    """Return whether content in parts, as transformers' processors have it, leaves one token for an image."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _QUESTION}], chat_template=template, tokenize=False
        )
    except Exception:  # a template may raise anything on content that is not for it
        return False
    return bool(text.count(IMAGE_TOKEN) == 1)
