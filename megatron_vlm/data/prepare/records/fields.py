"""Keys beside a turn's text that say what is trained: of other trainers, of reasoning models, of quizzes."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from megatron_vlm.data.prepare.records.values import Rejected, as_list, is_nothing

# A turn's key: whether 1, or true, means that the turn is trained.
LOSS_KEYS: Mapping[str, bool] = {
    # ms-swift, xtuner; axolotl; OpenAI, mistral-finetune; xtuner's pairs; and people's own spellings.
    **dict.fromkeys(("loss", "loss_scale", "train", "training", "weight", "output_with_loss"), True),
    **dict.fromkeys(("trainable", "trained", "is_trained", "is_trainable", "train_on_turn"), True),
    **dict.fromkeys(("loss_mask", "loss_weight", "has_loss", "compute_loss", "learn"), True),
    # torchtune; and people's own spellings.
    **dict.fromkeys(("masked", "is_masked", "mask_loss", "ignore_loss", "no_loss", "no_train"), False),
}
# Of some, 1 means that a turn is trained, of others that it is masked.
_UNCLEAR_LOSS_KEYS = frozenset(("mask",))
_SPAN_KEYS = frozenset(("train_detail", "training_detail"))  # axolotl's: some characters of a turn alone
_FLAGS = {"true": True, "yes": True, "false": False, "no": False}
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
_TOOL_KEYS = frozenset(("tool_calls", "tool_call", "function_call", "function_calls"))
TOOL_ROLES = frozenset(
    ("tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython")
)
OPTION_KEYS = ("options", "choices")
_LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_LETTERED = re.compile(r"\(?([A-Z])[.):]\s*\S")
_NO_OPTION = "answer is none of its options"
OBJECT_MARKERS = ("<ref-object>", "<bbox>")  # ms-swift's: filled from the record's objects


def is_trained(turn: Mapping[str, Any]) -> bool | None:
    """Return whether a turn's keys say that it is trained; None where it has none of them.

    A turn is not trained as soon as one of its keys says so.

    Raises:
        Rejected: a key says neither, such as a weight of 0.5, or speaks of a part of the turn.
    """
    said = []
    for key in sorted(turn.keys() & (LOSS_KEYS.keys() | _UNCLEAR_LOSS_KEYS | _SPAN_KEYS)):
        value = turn[key]
        if is_nothing(value):
            continue
        if key in _UNCLEAR_LOSS_KEYS:
            raise Rejected("unclear loss", f"{key} {value!r}"[:80] + ": call it loss_mask, or masked")
        flag = None if key in _SPAN_KEYS else _flag(value)
        if flag is None:
            raise Rejected("unclear loss", f"{key} {value!r}"[:80] + ": a turn is trained in full or not")
        said.append(flag is LOSS_KEYS[key])
    return all(said) if said else None


def asks_for_loss(turn: Mapping[str, Any]) -> bool:
    """Return whether one of a turn's keys says that it is trained."""
    return any(_flag(turn[key]) is LOSS_KEYS[key] for key in turn.keys() & LOSS_KEYS.keys())


def _flag(value: Any) -> bool | None:
    if isinstance(value, str):
        value = _FLAGS.get(value.strip().lower(), value)
    try:
        return {0.0: False, 1.0: True}.get(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def thought_of(turn: Mapping[str, Any]) -> tuple[str, str]:
    """Return the first key that holds the assistant's thought before its answer, and the thought; both may be
    empty.

    ``True`` and ``False`` say whether a model is to think, and are no thought.

    Raises:
        Rejected: it is no text.
    """
    said = (key for key in THOUGHT_KEYS if not is_nothing(turn.get(key)))
    key = next((key for key in said if not isinstance(turn[key], bool)), "")
    thought = turn.get(key, "")
    if not isinstance(thought, str):
        raise Rejected("bad record", f"its {key} is {type(thought).__name__}")
    return key, thought


def with_thought(thought: str, answer: str) -> str:
    """Return an answer behind its thought, as the chat templates of Qwen3 and DeepSeek-V3.1 and later
    write both."""
    return "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + answer.lstrip("\n")


def check_no_tools(turn: Mapping[str, Any]) -> None:
    """Refuse a turn that calls a tool, for which every model has a notation of its own.

    Raises:
        Rejected: it does.
    """
    for key in sorted(turn.keys() & _TOOL_KEYS):
        calls = as_list(turn[key])
        if not is_nothing(turn[key]) if calls is None else calls:
            raise Rejected("tool calls", f"its {key}: write them into the content, as the model does")


def options_of(record: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the keys that hold a question's options, and the options by label: A, B, C, ...

    where they have none.

    Lists, also as JSON or as Python writes them (MMMU), mappings by letter, lists of ``label`` and ``text``
    (ARC), and columns ``A`` to ``D`` (MMBench) are known.
    """
    for key in OPTION_KEYS:
        options = _labelled(_parsed(record.get(key)))
        if options:
            return (key,), options
    columns = tuple(letter for letter in _LETTERS if not is_nothing(record.get(letter)))
    if len(columns) >= 2 and columns == _LETTERS[: len(columns)]:
        return columns, {letter: record[letter] for letter in columns}
    return (), {}


def _parsed(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return value


def _labelled(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        labels, texts = value.get("label"), value.get("text")
        if isinstance(labels, (list, tuple)) and isinstance(texts, (list, tuple)):
            value = dict(zip(labels, texts, strict=False)) if len(labels) == len(texts) else {}
        found = {str(label): text for label, text in value.items() if not is_nothing(text)}
    elif isinstance(value, (list, tuple)) and len(value) <= len(_LETTERS):
        found = dict(zip(_LETTERS, value, strict=False))
    else:
        return {}
    plain = all(isinstance(text, (str, int, float)) and not is_nothing(text) for text in found.values())
    return found if plain and len(found) > 1 else {}


def with_options(question: Any, answer: Any, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a question with a line ``A. ...`` for each of its options, and its answer.

    The answer stays as it is, a letter or a text; a number that is no label is an option's index, from 0 on,
    and becomes its label. Options that stand in the question already aren't repeated.

    Raises:
        Rejected: the answer is none of the options, or several of them.
    """
    texts = {label: str(text) for label, text in options.items()}
    if isinstance(answer, (list, tuple)):
        if len(answer) > 1 and all(str(item) in options for item in answer):
            raise Rejected(_NO_OPTION, f"it names several: {answer}"[:200])
        answer = answer[0] if len(answer) else None
    lines = list(texts.values())
    if [match and match[1] for match in map(_LETTERED.match, lines)] != list(texts):  # "A. a cat" already
        lines = [f"{label}. {text}" for label, text in texts.items()]
    if isinstance(question, str) and not all(_stands_in(question, *option) for option in texts.items()):
        question = "\n".join([question, *lines] if question.strip() else lines)
    # A text is one by what it says, a number by its type as well: beside texts it is an index.
    same = texts if isinstance(answer, str) else options
    is_option = any(type(text) is type(answer) and text == answer for text in same.values())
    return question, _answer_by(texts, answer, is_option)


def _stands_in(question: str, label: str, text: str) -> bool:
    """Return whether a question has an option's text behind its label, as in ``A. x`` or ``(A) x``.

    The text alone may be a word of the question, as ``1`` is in ``11 + 2``.
    """
    own = _LETTERED.match(text)
    bare = text[own.end() - 1 :] if own and own[1] == label else text
    if bare not in question:
        return False
    return re.search(rf"(?<!\w){re.escape(label)}\W{{1,6}}{re.escape(bare)}(?!\w)", question) is not None


def _answer_by(texts: Mapping[str, str], answer: Any, is_option: bool) -> Any:
    said = answer.strip() if isinstance(answer, str) else answer
    if isinstance(said, bool) or said is None or said != said:
        return answer
    if isinstance(said, float) and said.is_integer():
        said = int(said)
    labels = list(texts)
    if str(said) in labels:
        return str(said)
    if is_option:
        if isinstance(said, int) and 0 <= said < len(labels) and texts[labels[said]] != str(said):
            raise Rejected(_NO_OPTION, f"it is {said}, an option and the index of another")
        return str(answer)
    if isinstance(said, int) or (isinstance(said, str) and said.isdecimal()):
        if not 0 <= int(said) < len(labels):
            raise Rejected(_NO_OPTION, f"it is {said}; they are 0 to {len(labels) - 1}")
        return labels[int(said)]
    if isinstance(said, str) and said.upper() in _LETTERS:
        if said.upper() not in labels:
            raise Rejected(_NO_OPTION, f"it is {said}; they are {', '.join(labels)}"[:200])
        return said.upper()
    return answer


def fill_objects(messages: list[dict[str, Any]], objects: Any) -> bool:
    """Put the names of ms-swift's ``objects`` where ``<ref-object>`` stands; return whether there was one.

    Raises:
        Rejected: names and places differ in number; or a ``<bbox>`` asks for a box, which every model writes
            in its own numbers and signs.
    """
    ref, bbox = OBJECT_MARKERS
    texts = [message["content"] for message in messages]
    if is_nothing(objects) or not any(marker in text for marker in OBJECT_MARKERS for text in texts):
        return False
    if any(bbox in text for text in texts):
        raise Rejected("box without numbers", f"write {bbox} out in the model's way, as [0.1, 0.2, 0.5, 0.9]")
    objects = _parsed(objects)
    named = objects.get("ref") if isinstance(objects, Mapping) else None
    names, places = as_list(named) or [], sum(text.count(ref) for text in texts)
    if len(names) != places or not all(isinstance(name, str) for name in names):
        raise Rejected("bad record", f"{places} {ref}, {len(names)} names in its objects")
    left = iter(names)
    for message in messages:
        message["content"] = re.sub(ref, lambda _: next(left), message["content"])
    return True
