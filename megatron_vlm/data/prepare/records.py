"""A record of any of the known shapes to one conversation: messages, and what its images are.

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

import base64
import binascii
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vlm.data.conversations import UntrainableError, trainable_turns
from megatron_vlm.data.templates import IMAGE_MARKER, Turn

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "system": "system",
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
VIDEO_MARKER, VIDEO_KEY = "<video>", "video_frames"  # of VITA and Ovis
OTHER_MARKERS = ("<audio>", VIDEO_MARKER)  # where they stay text
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
_NO_BASE64 = 512  # characters: a string without a scheme that is shorter is a path


class Rejected(Exception):
    """A record that becomes no sample. ``reason`` is what it is counted under, ``detail`` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class TarPart:
    """Bytes that lie as they are in a tar file."""

    path: str
    offset: int
    size: int


Image = str | bytes | TarPart  # a path, an encoded image, or where one lies


@dataclass
class Conversation:
    """A sample, its images not read yet.

    Attributes:
        messages: ``{"role": ..., "content": ...}``, ``"loss": False`` where an answer isn't trained.
        images: one for each ``<image>``, in order.
        extra: the record's other fields, which travel along.
        shape: of the record.
        notes: what was done to it, for the report.
    """

    messages: list[dict[str, Any]]
    images: list[Image]
    extra: dict[str, Any]
    shape: str
    notes: tuple[str, ...] = ()


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
    image_key, given = _images_of(record) if images is None else ("", list(images))
    videos = _videos_of(record) if images is None else []
    turns, used = _turns(record, found, has_image=bool(given or videos))
    messages, inline = [], []
    for turn in turns:
        content, parts_images = _content(turn.pop("content"))
        inline += parts_images
        messages.append({**turn, "content": content})
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    all_images = [given.pop(0) if image is None and given else image for image in inline] + (
        [] if inline else given
    )
    if any(image is None for image in all_images):
        raise Rejected("missing image", "its text has more image parts than there are images")
    placed = _place_frames(messages, [image for image in all_images if image is not None], videos)
    if record.get("video") and any(VIDEO_MARKER in m["content"] for m in messages if m["role"] == "user"):
        raise Rejected("video without frames", f"give them as {VIDEO_KEY}: {record['video']}"[:200])
    notes = _keep_trainable(messages) + _place_images(messages, len(placed))
    notes += _check_text(messages)
    left = {key: value for key, value in record.items() if key not in used and key != image_key}
    extra = {key: value for key, value in left.items() if value is not None and _is_json(value)}
    paths = [image for image in all_images if isinstance(image, str)]
    if paths and len(paths) == len(all_images):  # where the images came from
        extra["image" if image_key in ("", "images") else image_key] = paths[0] if len(paths) == 1 else paths
    if left.keys() - extra.keys() - {key for key, value in left.items() if value is None} - {VIDEO_KEY}:
        notes += ("field that JSON can't hold left out",)
    return Conversation(messages, placed, extra, found, notes)


def _shape_of(record: Mapping[str, Any]) -> str:
    for shape in ("openai", "llava", "sharegpt"):
        if any(_as_list(record.get(key)) is not None for key in TURN_KEYS[shape]):
            return shape
    if isinstance(record.get("instruction"), str) and "output" in record:
        return "alpaca"
    has_answer = any(record.get(key) is not None for key in _ANSWERS)
    if has_answer and any(isinstance(record.get(key), str) for key in _QUESTIONS):
        return "query"
    if any(key in record for key in _CAPTIONS) or has_answer:
        return "caption"
    raise Rejected("no conversation", f"its fields are {', '.join(map(str, record)) or 'none'}"[:200])


def _turns(record: Mapping[str, Any], shape: str, has_image: bool) -> tuple[list[dict[str, Any]], set[str]]:
    """Turns of ``role``, ``content`` and perhaps ``loss``; and the fields that they are from."""
    used = {"images"}
    turns: list[dict[str, Any]] = []
    if shape in TURN_KEYS:
        key = next((key for key in TURN_KEYS[shape] if _as_list(record.get(key)) is not None), None)
        if key is None:
            raise Rejected("no conversation", f"it has no list {' or '.join(TURN_KEYS[shape])}")
        used.add(key)
        for item in _as_list(record[key]) or []:
            turns += _turn(item)
    else:
        history = _as_list(record.get("history") or [])
        if history is None or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
            raise Rejected("bad record", "its history is no list of question and answer pairs")
        for pair in history:
            turns += _pair(*pair)
        question, answer, names = _question_and_answer(record, shape, has_image)
        turns += _pair(question, answer)
        used |= {"history", *names}
    system = record.get("system")
    if isinstance(system, str) and not any(turn["role"] == "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": system})
        used.add("system")
    return turns, used


def _question_and_answer(
    record: Mapping[str, Any], shape: str, has_image: bool
) -> tuple[Any, Any, tuple[str, ...]]:
    if shape == "alpaca":
        question, more = record.get("instruction"), record.get("input")
        if isinstance(question, str) and isinstance(more, str) and more.strip():
            question = f"{question}\n{more}"
        return question, record.get("output"), ("instruction", "input", "output")
    answers = _ANSWERS if shape == "query" else (*_CAPTIONS, *_ANSWERS)
    asked = next((key for key in _QUESTIONS if record.get(key) is not None), "")
    answered = next((key for key in answers if record.get(key) is not None), "")
    answer = record.get(answered)
    if isinstance(answer, (list, tuple)):  # several that are accepted: the first is the one to learn
        answer = answer[0] if answer else None
    if not asked and not has_image:
        raise Rejected("no conversation", f"its fields are {', '.join(map(str, record))}"[:200])
    return record.get(asked, ""), answer, (asked, answered)


def _turn(item: Any) -> list[dict[str, Any]]:
    """A turn, or the two of a pair."""
    if not isinstance(item, Mapping):
        raise Rejected("bad record", "a turn is no object")
    for first, second in _PAIRS:
        if first in item and second in item:
            system = [{"role": "system", "content": item["system"]}] if item.get("system") else []
            return system + _pair(item[first], item[second])
    role = item["role"] if item.get("role") is not None else item.get("from")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Rejected("unknown role", repr(role)[:80])
    content = next((item[key] for key in ("content", "value", "text") if item.get(key) is not None), "")
    turn = {"role": ROLES[role.lower()], "content": content}
    if turn["role"] == "assistant" and (item.get("loss") is False or item.get("weight") in (0, 0.0)):
        turn["loss"] = False
    return [turn]


def _pair(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "" if question is None else question},
        {"role": "assistant", "content": "" if answer is None else answer},
    ]


def _content(content: Any) -> tuple[str, list[Image | None]]:
    """Text with a marker for each image part, and the images; None for one that is named elsewhere."""
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
        elif kind in ("image", "image_url", "input_image"):
            source = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key)), None)
            if isinstance(source, Mapping) and "url" in source:
                source = source["url"]
            text += IMAGE_MARKER
            images.append(None if source is None else _image(source))
        else:
            raise Rejected("unknown content part", repr(kind)[:80])
    return text, images


def _images_of(record: Mapping[str, Any]) -> tuple[str, list[Image]]:
    """The first field that holds images, and these."""
    for key in IMAGE_KEYS:
        value = record.get(key)
        values = value if isinstance(value, (list, tuple)) else [value]
        values = [item for item in values if item is not None and item != ""]
        if values:
            return key, [_image(item) for item in values]
    return "", []


def _videos_of(record: Mapping[str, Any]) -> list[list[Image]]:
    """The frames of a video, or of each of several."""
    value = record.get(VIDEO_KEY)
    if not value:
        return []
    frames = _as_list(value)
    if frames is None:
        raise Rejected("bad record", f"its {VIDEO_KEY} are no list of images")
    nested = all(isinstance(frame, (list, tuple)) for frame in frames)
    return [[_image(frame) for frame in video] for video in (frames if nested else [frames])]


def _image(value: Any) -> Image:
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, TarPart):
        return value
    if not isinstance(value, str):
        raise Rejected("missing image", f"its image is {type(value).__name__}")
    if value.startswith("data:"):
        header, _, data = value.partition(",")
        if not header.endswith(";base64"):
            raise Rejected("corrupt image", "its data URI is not base64")
        return _base64(data)
    if value.startswith(("http://", "https://", "s3://", "gs://")):
        raise Rejected("remote image", value[:200])
    if len(value) > _NO_BASE64 and "." not in value:
        return _base64(value)
    return value.removeprefix("file://")


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Rejected("corrupt image", "its base64 is damaged") from None


def _keep_trainable(messages: list[dict[str, Any]]) -> tuple[str, ...]:
    """Take out what the loader would not train on, by its own rule."""
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


def _place_frames(
    messages: Sequence[dict[str, Any]], images: list[Image], videos: list[list[Image]]
) -> list[Image]:
    """Make of each ``<video>`` an ``<image>`` for each of its frames, as VITA does.

    Without ``<video>``, frames are images where there are no others. Without ``video_frames``, the images
    are the frames of a single ``<video>`` where no ``<image>`` asks for them.

    Returns:
        images and frames, in the order of their markers.
    """
    questions = [message for message in messages if message["role"] == "user"]
    num_images, num_videos = (
        sum(question["content"].count(marker) for question in questions)
        for marker in (IMAGE_MARKER, VIDEO_MARKER)
    )
    if num_videos == 1 and images and not num_images and not videos:
        images, videos = [], [images]
    if not num_videos:
        return images or [frame for video in videos for frame in video]
    if not videos:
        return images
    if num_videos != len(videos):
        raise Rejected("markers and images differ", f"{num_videos} {VIDEO_MARKER}, {len(videos)} videos")
    left, rest, placed = list(images), iter(videos), list[Image]()

    def place(marker: re.Match[str]) -> str:
        taken = next(rest) if marker[0] == VIDEO_MARKER else [left.pop(0)] if left else []
        placed.extend(taken)
        return IMAGE_MARKER * max(1, len(taken))  # one that lacks its image is found where they are counted

    for question in questions:
        question["content"] = re.sub(f"{IMAGE_MARKER}|{VIDEO_MARKER}", place, question["content"])
    return placed + left


def _place_images(messages: list[dict[str, Any]], num_images: int) -> tuple[str, ...]:
    """Put markers before the first question where there are none."""
    markers = sum(message["content"].count(IMAGE_MARKER) for message in messages)
    notes: tuple[str, ...] = ()
    if num_images and not markers:
        first = next(message for message in messages if message["role"] == "user")
        text = first["content"]
        first["content"] = "\n".join([IMAGE_MARKER] * num_images + ([text] if text else []))
        markers, notes = num_images, ("images without a marker put first",)
    if markers != num_images:
        raise Rejected("markers and images differ", f"{markers} {IMAGE_MARKER}, {num_images} images")
    return notes


def _check_text(messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    for message in messages:
        if not message["content"].strip():
            raise Rejected("empty answer" if message["role"] == "assistant" else "empty question")
        try:
            message["content"].encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            raise Rejected("broken text", "it holds half of a surrogate pair") from None
    unfilled = any(marker in message["content"] for marker in OTHER_MARKERS for message in messages)
    return ("<audio> or <video> in its text, which stays text",) if unfilled else ()


def _as_list(value: Any) -> list[Any] | None:
    """A list, also one that a table's column holds as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return list(value) if isinstance(value, (list, tuple)) else None


def _is_json(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return True
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        return False
    return True
