"""The conversion of records of any known shape to conversations: messages and images.

The shapes are told apart by their keys, record by record:

llava     ``conversations`` of ``from``/``value`` turns; ``image``, a string or a list
sharegpt  the same, ``conversation`` and ``texts`` too, also of ``role``/``content`` turns or of pairs
openai    ``messages``, whose ``content`` is text or parts
alpaca    ``instruction``, ``input``, ``output``
query     ``query``, ``question`` or ``prompt`` with ``response``, ``answer`` or ``answers``; ``history``
caption   an image with a ``caption`` or ``text``

A video is the images that are its frames: Ovis' ``video_frames``.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_vlm.data.conversations import UntrainableError, trainable_turns
from megatron_vlm.data.prepare.records.fields import (
    LOSS_KEYS,
    OBJECT_MARKERS,
    TOOL_ROLES,
    asks_for_loss,
    check_no_tools,
    fill_objects,
    is_trained,
    options_of,
    thought_of,
    with_options,
    with_thought,
)
from megatron_vlm.data.prepare.records.places import (
    VIDEO_KEY,
    VIDEO_MARKER,
    place_frames,
    place_images,
    take_spellings,
)
from megatron_vlm.data.prepare.records.values import (
    Image,
    Rejected,
    as_image,
    as_list,
    is_nothing,
    named_fields,
)
from megatron_vlm.data.templates import IMAGE_MARKER, Turn

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TURN_KEYS = {
    "openai": ("messages",),
    "llava": ("conversations",),
    "sharegpt": ("conversations", "conversation", "messages", "texts"),
}
SHAPES = ("llava", "sharegpt", "openai", "alpaca", "query", "caption")
IMAGE_KEYS = (
    "images",
    "image",
    "image_path",
    "image_paths",
    "image_file",
    "file_name",
    "img",
    "jpg",
    "image_bytes",
)
_NUMBERED_IMAGE = re.compile(r"image_?(\d+)")  # MMMU's columns
_QUESTIONS = ("query", "question", "prompt")
_ANSWERS = ("response", "answer", "answers", "completion")
_CAPTIONS = ("caption", "text", "txt")
_PAIRS = (
    ("user", "assistant"),
    ("human", "gpt"),
    ("human", "assistant"),
    ("question", "answer"),
    ("input", "output"),
)


@dataclass
class Conversation:
    """A sample, its images not read yet.

    Attributes:
        messages: ``{"role": ..., "content": ...}``, ``"loss": False`` where an answer isn't trained.
        images: one for each ``<image>``, in order.
        extra: the record's other fields, which travel along.
        shape: of the record.
        notes: what was done to it, for the report.
        ignored: values of which nothing was made, by their fields; those of turns as ``messages[].name``.
    """

    messages: list[dict[str, Any]]
    images: list[Image]
    extra: dict[str, Any]
    shape: str
    notes: tuple[str, ...] = ()
    ignored: dict[str, Any] = field(default_factory=dict)


def to_conversation(
    record: Mapping[str, Any], shape: str | None = None, images: Sequence[Image] | None = None
) -> Conversation:
    """Convert a record.

    Args:
        record: a JSON object, a table's row.
        shape: the only one it may have, of :data:`SHAPES`; None for any.
        images: its images, where they are known from elsewhere than its fields.

    Raises:
        Rejected: it can't be a sample.
    """
    found = _shape_of(record) if shape is None else shape
    image_keys, given = _images_of(record) if images is None else ((), list(images))
    videos = _videos_of(record) if images is None else []
    ignored: dict[str, Any] = {}
    turns, used, notes = _turns(record, found, bool(given or videos), ignored)
    messages, inline = [], []
    for turn in turns:
        content, parts_images = _content(turn["content"], f"{turn.pop('path', '')}.content[]", ignored)
        inline += parts_images
        thought = turn.pop("thought", "")
        if thought and content.strip():
            content = with_thought(thought, content)
        messages.append({**turn, "content": content})
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    all_images = [given.pop(0) if image is None and given else image for image in inline] + (
        [] if inline else given
    )
    if any(image is None for image in all_images):
        raise Rejected("missing image", "its text has more image parts than there are images")
    if inline and given:
        ignored.update((key, record[key]) for key in image_keys)
    if fill_objects(messages, record.get("objects")):
        used.add("objects")
    ordered, spelled = take_spellings(messages, [image for image in all_images if image is not None])
    placed, frames_placed = place_frames(messages, ordered, videos)
    if not is_nothing(record.get("video")) and any(
        VIDEO_MARKER in m["content"] for m in messages if m["role"] == "user"
    ):
        raise Rejected("video without frames", f"give them as {VIDEO_KEY}: {record['video']}"[:200])
    notes += _keep_trainable(messages) + spelled + place_images(messages, len(placed)) + _check_text(messages)
    left = {key: value for key, value in record.items() if key not in used and key not in image_keys}
    extra = {key: value for key, value in left.items() if not _is_null(value) and _is_json(value)}
    paths = [image for image in all_images if isinstance(image, str)]
    if paths and len(paths) == len(all_images):  # where the images came from
        key = image_keys[0] if image_keys and image_keys[0] in IMAGE_KEYS[1:] else "image"
        extra[key] = paths[0] if len(paths) == 1 else paths
    if left.keys() - extra.keys() - {key for key, value in left.items() if _is_null(value)} - {VIDEO_KEY}:
        notes += ("field that JSON can't hold left out",)
    known = {"id", *([VIDEO_KEY, "video"] if videos and frames_placed else [])}
    ignored.update((key, value) for key, value in left.items() if key not in known and not is_nothing(value))
    return Conversation(messages, placed, extra, found, tuple(dict.fromkeys(notes)), ignored)


def _shape_of(record: Mapping[str, Any]) -> str:
    for shape in ("openai", "llava", "sharegpt"):
        if any(as_list(record.get(key)) is not None for key in TURN_KEYS[shape]):
            return shape
    if isinstance(record.get("instruction"), str) and "output" in record:
        return "alpaca"
    has_answer = any(record.get(key) is not None for key in _ANSWERS)
    if has_answer and any(isinstance(record.get(key), str) for key in _QUESTIONS):
        return "query"
    if any(key in record for key in _CAPTIONS) or has_answer:
        return "caption"
    raise Rejected("no conversation", named_fields(record))


def _turns(
    record: Mapping[str, Any], shape: str, has_image: bool, ignored: dict[str, Any]
) -> tuple[list[dict[str, Any]], set[str], tuple[str, ...]]:
    """Return turns of ``role``, ``content``, perhaps ``loss`` and ``thought``; the fields they are from;
    notes."""
    used = {"images"}
    turns: list[dict[str, Any]] = []
    notes: tuple[str, ...] = ()
    if shape in TURN_KEYS:
        key = next((key for key in TURN_KEYS[shape] if as_list(record.get(key)) is not None), None)
        if key is None:
            raise Rejected("no conversation", f"it has no list {' or '.join(TURN_KEYS[shape])}")
        used.add(key)
        for item in as_list(record[key]) or []:
            turns += _turn(item, f"{key}[]", ignored)
        asked = [turn for turn in turns if turn["role"] != "assistant" and turn.pop("loss", False)]
        notes = ("loss asked for a question or a system turn, which is never trained",) if asked else ()
    else:
        history = as_list([] if is_nothing(record.get("history")) else record["history"])
        if history is None or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
            raise Rejected("bad record", "its history is no list of question and answer pairs")
        for pair in history:
            turns += _pair(*pair)
        question, answer, names = _question_and_answer(record, shape, has_image)
        option_names, options = options_of(record)
        if options and question:
            question, answer = with_options(question, answer, options)
            used |= {*option_names}
        if isinstance(answer, (list, tuple)):  # several that are accepted: the first is the one to learn
            notes = ("several answers, of which the first is trained",) if len(answer) > 1 else ()
            answer = answer[0] if answer else None
        turns += _pair(question, answer)
        used |= {"history", *names}
    system = record.get("system")
    if isinstance(system, str) and not any(turn["role"] == "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": system})
        used.add("system")
    return turns, used, notes


def _question_and_answer(
    record: Mapping[str, Any], shape: str, has_image: bool
) -> tuple[Any, Any, tuple[str, ...]]:
    if shape == "alpaca":
        question, more = record.get("instruction"), record.get("input")
        if isinstance(question, str) and isinstance(more, str) and more.strip():
            question = f"{question}\n{more}"
        return question, record.get("output"), ("instruction", "input", "output")
    answers = _ANSWERS if shape == "query" else (*_CAPTIONS, *_ANSWERS)
    asked = next((key for key in _QUESTIONS if not _is_null(record.get(key))), "")
    answered = next((key for key in answers if not _is_null(record.get(key))), "")
    if not asked and not has_image:
        raise Rejected("no conversation", named_fields(record))
    return record.get(asked, ""), record.get(answered), (asked, answered)


def _turn(item: Any, path: str, ignored: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a turn, or the two of a pair."""
    if not isinstance(item, Mapping):
        raise Rejected("bad record", "a turn is no object")
    check_no_tools(item)
    left = {key: value for key, value in item.items() if key not in LOSS_KEYS and not is_nothing(value)}
    for first, second in _PAIRS:
        if first in item and second in item:
            trained = is_trained(item)
            system = [{"role": "system", "content": left["system"]}] if "system" in left else []
            turns = _pair(item[first], item[second])
            _ignore(left, ("system", first, second), path, ignored)
            if trained is False:
                turns[1]["loss"] = False
            return system + turns
    role_key = "role" if item.get("role") is not None else "from"
    role = item.get(role_key)
    if not isinstance(role, str) or role.lower() not in ROLES:
        of_tool = ": write what tools say into the content" if str(role).lower() in TOOL_ROLES else ""
        raise Rejected("unknown role", repr(role)[:80] + of_tool)
    key = next((key for key in ("content", "value", "text") if not _is_null(item.get(key))), "")
    turn = {"role": ROLES[role.lower()], "content": item.get(key, ""), "path": path}
    thought_key = ""
    if turn["role"] == "assistant":
        thought_key, turn["thought"] = thought_of(item)
        if "<think>" in str(turn["content"]) and turn["thought"].strip() not in str(turn["content"]):
            raise Rejected("two thoughts", f"one in its text, another in its {thought_key}")
        if "<think>" in str(turn["content"]):
            turn["thought"] = ""
        if is_trained(item) is False:
            turn["loss"] = False
    elif asks_for_loss(item):
        turn["loss"] = True  # for a note: it is never trained
    _ignore(left, (role_key, key, thought_key), path, ignored)
    return [turn]


def _ignore(fields: Mapping[str, Any], used: Sequence[str], path: str, ignored: dict[str, Any]) -> None:
    """Note the fields of an object that weren't used; of each the first one of a record."""
    for key, value in fields.items():
        if key not in used:
            ignored.setdefault(f"{path}.{key}", value)


def _pair(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "" if question is None else question},
        {"role": "assistant", "content": "" if answer is None else answer},
    ]


def _content(content: Any, path: str, ignored: dict[str, Any]) -> tuple[str, list[Image | None]]:
    """Return text with a marker for each image part, and the images; None for one that is named elsewhere."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, (list, tuple)):
        raise Rejected("bad record", f"its text is {type(content).__name__}")
    text, images = "", []
    for part in content:
        if isinstance(part, str):
            text += part
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            text += part["text"]
            used = ["type", "text"]
        elif kind in ("image", "image_url", "input_image"):
            keys = ("image_url", "image", "url", "path")
            used = ["type", next((key for key in keys if not is_nothing(part.get(key))), "")]
            source = part.get(used[1])
            if isinstance(source, Mapping) and "url" in source:
                source = source["url"]
            text += IMAGE_MARKER
            images.append(None if source is None else as_image(source))
        else:
            raise Rejected("unknown content part", repr(kind)[:80])
        _ignore({key: value for key, value in part.items() if not is_nothing(value)}, used, path, ignored)
    return text, images


def _images_of(record: Mapping[str, Any]) -> tuple[tuple[str, ...], list[Image]]:
    """Return the first field that holds images, or the numbered ones, and their content."""
    numbered = {int(match[1]): key for key in record if (match := _NUMBERED_IMAGE.fullmatch(str(key)))}
    for keys in (*((key,) for key in IMAGE_KEYS), tuple(numbered[number] for number in sorted(numbered))):
        values = [
            item
            for value in map(record.get, keys)
            for item in (value if isinstance(value, (list, tuple)) else [value])
            if not is_nothing(item)
        ]
        if values:
            return keys, [as_image(item) for item in values]
    return (), []


def _videos_of(record: Mapping[str, Any]) -> list[list[Image]]:
    """Return the frames of a video, or of each of several."""
    value = record.get(VIDEO_KEY)
    if is_nothing(value):
        return []
    frames = as_list(value)
    if frames is None:
        raise Rejected("bad record", f"its {VIDEO_KEY} are no list of images")
    nested = all(isinstance(frame, (list, tuple)) for frame in frames)
    return [[as_image(frame) for frame in video] for video in (frames if nested else [frames])]


def _keep_trainable(messages: list[dict[str, Any]]) -> tuple[str, ...]:
    """Take out the turns that the loader would not train on, by its own rule."""
    if all(message["role"] == "system" for message in messages):
        raise Rejected("no conversation", "it has no turns")
    turns = [Turn(item["role"], item["content"], item.get("loss", True)) for item in messages]
    try:
        left_out = len(turns) - len(trainable_turns(turns))
    except UntrainableError as error:
        raise Rejected(error.reason, str(error)) from None
    first = int(turns[0].role == "system")
    del messages[first : first + left_out]
    talk = [message["role"] for message in messages[first:]]
    notes: tuple[str, ...] = ()
    if left_out:
        notes = ("what the assistant says before the first question left out",)
    if any(before == after for before, after in itertools.pairwise(talk)):
        notes += ("two turns of one role in a row",)
    return (*notes, "ends with the user") if talk[-1] == "user" else notes


def _check_text(messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    for message in messages:
        if not message["content"].strip():
            raise Rejected("empty answer" if message["role"] == "assistant" else "empty question")
        try:
            message["content"].encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            raise Rejected("broken text", "it holds half of a surrogate pair") from None
    objects = [marker for marker in OBJECT_MARKERS for item in messages if marker in item["content"]]
    return tuple(f"{marker} in its text, which stays text" for marker in objects)


def _is_null(value: Any) -> bool:
    """Return whether a value is None, or NaN as pandas writes it."""
    return value is None or (isinstance(value, float) and value != value)


def _is_json(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return True
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        return False
    return True
