"""Records of every shape become the same kind of conversation; those that can't be one say why."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from megatron_vlm.data.conversations import read_conversation, trainable_turns
from megatron_vlm.data.prepare.records.shapes import to_conversation
from megatron_vlm.data.prepare.records.values import Rejected, TarPart
from megatron_vlm.data.templates import SampleError

PNG = b"\x89PNG not a real one"
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
ASKED = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}]
TEXT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
SHOWN = [{"from": "human", "value": "<video>\nWhat?"}, LLAVA[1]]
PART = TarPart("a.tar", 512, 9)

# name: record, shape, messages, images, other fields
GOOD: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]], list[Any], dict[str, Any]]] = {
    "llava": (
        {"id": "1", "image": "a.jpg", "conversations": LLAVA},
        "llava",
        ASKED,
        ["a.jpg"],
        {"id": "1", "image": "a.jpg"},
    ),
    "llava, two images in a list, one in the middle": (
        {
            "image": ["a.jpg", "b.jpg"],
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "<image> and <image>?"},
                {"from": "gpt", "value": "<think>so</think>Both."},
            ],
        },
        "llava",
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image> and <image>?"},
            {"role": "assistant", "content": "<think>so</think>Both."},
        ],
        ["a.jpg", "b.jpg"],
        {"image": ["a.jpg", "b.jpg"]},
    ),
    "llava without an image": (
        {
            "image": None,
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
        },
        "llava",
        TEXT,
        [],
        {},
    ),
    "an image whose place is not marked": (
        {"image": "a.jpg", "conversations": [{"from": "human", "value": "What?"}, LLAVA[1]]},
        "llava",
        ASKED,
        ["a.jpg"],
        {"image": "a.jpg"},
    ),
    "VITA": (
        {"set": "sharegpt4", "id": "7", "image": "c/a.jpg", "audio": ["x.wav"], "conversations": LLAVA},
        "llava",
        ASKED,
        ["c/a.jpg"],
        {"set": "sharegpt4", "id": "7", "audio": ["x.wav"], "image": "c/a.jpg"},
    ),
    "Ovis": (
        {"video_frames": ["f0.jpg", "f1.jpg"], "conversations": SHOWN},
        "llava",
        [{"role": "user", "content": "<image><image>\nWhat?"}, ASKED[1]],
        ["f0.jpg", "f1.jpg"],
        {"video_frames": ["f0.jpg", "f1.jpg"]},
    ),
    "frames whose place is not marked": (
        {"video_frames": '["f0.jpg", "f1.jpg"]', "question": "What?", "answer": "A cat."},
        "query",
        [{"role": "user", "content": "<image>\n<image>\nWhat?"}, ASKED[1]],
        ["f0.jpg", "f1.jpg"],
        {"video_frames": '["f0.jpg", "f1.jpg"]'},
    ),
    "an image among two videos, one of bytes": (
        {
            "image": "a.jpg",
            "video_frames": [[PNG], ["f0.jpg", "f1.jpg"]],
            "conversations": [
                {"from": "human", "value": "<video> or <image>?"},
                {"from": "gpt", "value": "Both."},
                {"from": "human", "value": "And <video>?"},
                {"from": "gpt", "value": "As <video> in HTML."},
            ],
        },
        "llava",
        [
            {"role": "user", "content": "<image> or <image>?"},
            {"role": "assistant", "content": "Both."},
            {"role": "user", "content": "And <image><image>?"},
            {"role": "assistant", "content": "As <video> in HTML."},
        ],
        [PNG, "a.jpg", "f0.jpg", "f1.jpg"],
        {"image": "a.jpg"},
    ),
    "images that are a video's frames": (
        {"image": ["f0.jpg", "f1.jpg"], "video": "f.mp4", "conversations": SHOWN},
        "llava",
        [{"role": "user", "content": "<image><image>\nWhat?"}, ASKED[1]],
        ["f0.jpg", "f1.jpg"],
        {"image": ["f0.jpg", "f1.jpg"], "video": "f.mp4"},
    ),
    "an image, and frames that no marker asks for": (
        {"image": "a.jpg", "video_frames": ["f0.jpg"], "conversations": LLAVA},
        "llava",
        ASKED,
        ["a.jpg"],
        {"image": "a.jpg", "video_frames": ["f0.jpg"]},
    ),
    "a question about HTML": (
        {"conversations": [{"from": "human", "value": "Is <video> a tag?"}, LLAVA[1]]},
        "llava",
        [{"role": "user", "content": "Is <video> a tag?"}, ASKED[1]],
        [],
        {},
    ),
    "sharegpt with roles": (
        {
            "system": "Be brief.",
            "images": ["a.jpg"],
            "conversations": [
                {"role": "user", "content": "<image>\nWhat?"},
                {"role": "assistant", "content": "A cat."},
            ],
        },
        "llava",
        [{"role": "system", "content": "Be brief."}, *ASKED],
        ["a.jpg"],
        {"image": "a.jpg"},
    ),
    "pairs, as in the Cauldron": (
        {
            "images": [{"bytes": PNG, "path": None}],
            "texts": [{"user": "What?", "assistant": "A cat.", "source": "x"}],
        },
        "sharegpt",
        ASKED,
        [PNG],
        {},
    ),
    "xtuner": (
        {
            "conversation": [
                {"system": "Be brief.", "input": "Hi", "output": "Hello."},
                {"input": "1", "output": "2"},
            ]
        },
        "sharegpt",
        [
            {"role": "system", "content": "Be brief."},
            *TEXT,
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "2"},
        ],
        [],
        {},
    ),
    "openai": (
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": URI}},
                        {"type": "text", "text": "or "},
                        {"type": "image_url", "image_url": "file:///data/b.jpg"},
                    ],
                },
                {"role": "assistant", "content": "No.", "weight": 0},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes.", "weight": 1},
            ]
        },
        "openai",
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image>or <image>"},
            {"role": "assistant", "content": "No.", "loss": False},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ],
        [PNG, "/data/b.jpg"],
        {},
    ),
    "messages of a table, image parts without a source": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}, {"type": "text", "text": "\nWhat?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            ],
            "images": [{"bytes": None, "path": "a.jpg"}],
        },
        "openai",
        ASKED,
        ["a.jpg"],
        {"image": "a.jpg"},
    ),
    "a table's column of JSON": (
        {"conversations": '[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]'},
        "llava",
        TEXT,
        [],
        {},
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Hello."]]},
        "alpaca",
        [*TEXT, {"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}],
        [],
        {},
    ),
    "query": (
        {"query": "Hi", "response": "Hello.", "history": [], "system": "Be brief."},
        "query",
        [{"role": "system", "content": "Be brief."}, *TEXT],
        [],
        {},
    ),
    "question and accepted answers": (
        {"image": PNG, "question": "What?", "answers": ["A cat.", "cat"], "score": 0.5},
        "query",
        ASKED,
        [PNG],
        {"score": 0.5},
    ),
    "caption": (
        {"file_name": "a.jpg", "text": "A cat."},
        "caption",
        [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A cat."}],
        ["a.jpg"],
        {"file_name": "a.jpg"},
    ),
    "ends with the user": (
        {"messages": [*TEXT, {"role": "user", "content": "And?"}]},
        "openai",
        [*TEXT, {"role": "user", "content": "And?"}],
        [],
        {},
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_shapes(name: str) -> None:
    record, shape, messages, images, extra = GOOD[name]
    found = to_conversation(record)
    assert (found.shape, found.messages, found.images, found.extra) == (shape, messages, images, extra)
    assert to_conversation(record, shape).messages == messages


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"conversations": turns("a", "b")[::-1]}, "no answer"),
        ({"conversations": turns("a", "b")[1:]}, "no answer"),
        ({"conversations": turns("a", " \n")}, "empty answer"),
        ({"conversations": turns(" ", "b")}, "empty question"),
        ({"conversations": turns("a")}, "no answer"),
        ({"messages": [TEXT[0], {**TEXT[1], "loss": False}]}, "no answer"),
        ({"conversations": []}, "no conversation"),
        ({"image": "a.jpg", "tags": 3}, "no conversation"),
        ({"text": "no image, no question"}, "no conversation"),
        ({"conversations": turns("<image> <image>", "b"), "image": "a.jpg"}, "markers and images differ"),
        ({"conversations": turns("<image>", "b")}, "markers and images differ"),
        ({"conversations": turns("a <image>", "b", "c"), "image": ["a", "b"]}, "markers and images differ"),
        ({"conversations": turns("a", "b <image>"), "image": "a.jpg"}, "marker outside a question"),
        (
            {"conversations": turns("<video> <video>", "b"), "video_frames": ["a"]},
            "markers and images differ",
        ),
        ({"conversations": turns("<video>", "b"), "video_frames": [[], ["a"]]}, "markers and images differ"),
        ({"conversations": turns("<image>", "b"), "video_frames": ["a", "b"]}, "markers and images differ"),
        (
            {"conversations": turns("<video> <image>", "b"), "video_frames": ["a"]},
            "markers and images differ",
        ),
        ({"conversations": turns("<video>", "b"), "video": "a.mp4"}, "video without frames"),
        ({"conversations": turns("<video>", "b"), "video_frames": "frames/"}, "bad record"),
        ({"conversations": [*turns("a", "b"), {"from": "system", "value": "s"}]}, "system turn not first"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "unknown role"),
        ({"conversations": [3]}, "bad record"),
        ({"query": "a", "response": "b", "history": 3}, "bad record"),
        ({"query": "a", "response": "b", "history": [["a"]]}, "bad record"),
        ({"messages": [{"role": "user", "content": 3}]}, "bad record"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "unknown content part"),
        ({"conversations": LLAVA, "image": "https://example.org/a.jpg"}, "remote image"),
        ({"conversations": LLAVA, "image": "data:image/png;base64,%%%"}, "corrupt image"),
        ({"conversations": LLAVA, "image": 17}, "missing image"),
        ({"conversations": turns("half \ud83d", "b")}, "broken text"),
    ],
)
def test_what_can_be_no_sample(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(Rejected) as error:
        to_conversation(record)
    assert error.value.reason == reason


TALKS = [
    ("assistant", "user", "assistant"),
    ("assistant", "assistant", "user", "assistant", "user"),
    ("system", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "assistant"),
    ("user", "user", "assistant"),
    ("user", "system", "assistant"),
    ("system", "system", "user", "assistant"),
    ("assistant", "user"),
    ("assistant",),
    ("user", "assistant", "user"),
]


@pytest.mark.parametrize("roles", TALKS, ids=" ".join)
@pytest.mark.parametrize("marked", [None, 0, 1, 2])
def test_what_is_kept_is_what_the_loader_trains_on(roles: tuple[str, ...], marked: int | None) -> None:
    """The same conversation through prepare.py, and as it stands in tars that people wrote themselves."""
    texts = [f"{role} {number}" + " <image>" * (number == marked) for number, role in enumerate(roles)]
    said = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    images = ["0.jpg"] * any("<image>" in text for text in texts)
    read, _ = read_conversation({"messages": said, "images": images}, {"0.jpg": b""})
    try:
        trained = trainable_turns(read)
    except SampleError:
        with pytest.raises(Rejected):
            to_conversation({"messages": said, "images": images})
        return
    found = to_conversation({"messages": said, "images": images})
    assert [(item["role"], item["content"]) for item in found.messages] == [(t.role, t.text) for t in trained]
    left_out = "what the assistant says before the first question left out"
    assert (left_out in found.notes) == (len(trained) < len(read))


def test_a_shape_that_is_asked_for_is_the_only_one() -> None:
    record = {"messages": TEXT, "instruction": "Add.", "output": "3"}
    assert to_conversation(record).messages == TEXT
    assert to_conversation(record, "alpaca").messages[1]["content"] == "3"
    with pytest.raises(Rejected, match="no conversation"):
        to_conversation(record, "llava")


def test_images_from_elsewhere_and_fields_that_json_cannot_hold() -> None:
    record = {"question": "What?", "response": "A cat.", "mask": b"\0", "id": "k"}
    found = to_conversation(record, images=[PART])
    assert (found.messages, found.images, found.extra) == (ASKED, [PART], {"id": "k"})
    assert found.notes == ("images without a marker put first", "field that JSON can't hold left out")
    assert to_conversation(record, images=[]).messages[0]["content"] == "What?"
    # What a tar's json says of its image is no image.
    assert to_conversation({**record, "image": "https://example.org/a.jpg"}, images=[PART]).images == [PART]
    long = base64.b64encode(PNG * 100).decode()
    assert to_conversation({"image": long, "conversations": LLAVA}).images == [PNG * 100]
