"""The places of images in a conversation: spellings of ``<image>``, frames of videos, no marker at all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_vlm.data.prepare.records.values import Image, Rejected
from megatron_vlm.data.templates import IMAGE_MARKER

VIDEO_MARKER, VIDEO_KEY = "<video>", "video_frames"  # of VITA and Ovis
_OTHER_MARKERS = ("<audio>", VIDEO_MARKER)  # where they stay text
_MINICPM = f"({IMAGE_MARKER}./</image>)"
# What others write where an image goes; a group holds the image's number.
_SPELLED = re.compile(
    r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<\|image_pad\|>"  # Qwen2-VL and later
    r"|<img>(?:<IMG_CONTEXT>)+</img>|<IMG_CONTEXT>|<ImageHere>"  # InternVL; InternLM-XComposer
    r"|<\|?(?:[Ii]mage|IMAGE|img|IMG)[ _-]?(\d+)\|?>"  # Phi-3's <|image_1|>, MMMU's <image 1>, <image1>
    r"|<\|image\|>|<Image>|<IMAGE>|<img>[^<>\n]*</img>|<img>|<IMG>|\[IMG\]|\[IMAGE\]"
    r"|<(?:image|img)[_-]placeholder>|<image_token>|<image_soft_token>|<start_of_image>"
)


def take_spellings(
    messages: Sequence[dict[str, Any]], images: list[Image]
) -> tuple[list[Image], tuple[str, ...]]:
    """Make ``<image>`` of what others write for it, where there are images and nothing else marks a place.

    Numbers say which image is meant, from 1 on, or from 0 on where there is a 0. One that is marked twice is
    shown twice.

    Returns:
        images in the order of their places, and notes.

    Raises:
        Rejected: the places are not those of the images.
    """
    questions = [message for message in messages if message["role"] == "user"]
    if images:
        for question in questions:
            question["content"] = question["content"].replace(_MINICPM, IMAGE_MARKER)
    marked = any(marker in item["content"] for item in questions for marker in (IMAGE_MARKER, VIDEO_MARKER))
    found = [match for item in questions for match in _SPELLED.finditer(item["content"])]
    notes: list[str] = []
    if images and found and not marked:
        numbers = [int(match[1]) for match in found if match[1]]
        wanted = [number - (0 not in numbers) for number in numbers]
        one_each = len(found) == len(images) if not numbers else set(wanted) == set(range(len(images)))
        if not one_each or len(numbers) not in (0, len(found)):
            shown = ", ".join(dict.fromkeys(match[0] for match in found))[:80]
            raise Rejected("markers and images differ", f"{len(found)} of {shown}; {len(images)} images")
        images = [images[number] for number in wanted] if numbers else images
        notes = [f"{_kind(match)} taken for {IMAGE_MARKER}" for match in found]
        for question in questions:
            question["content"] = _SPELLED.sub(IMAGE_MARKER, question["content"])
    notes += [f"{kind} in its text, which stays text" for kind in _left(messages)]
    return images, tuple(dict.fromkeys(notes))


def _left(messages: Sequence[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        yield from (_kind(match) for match in _SPELLED.finditer(message["content"]))


def _kind(match: re.Match[str]) -> str:
    """Return a spelling without its number, and without repeats of the mark that stands for one patch."""
    text = re.sub(r"\d+", "N", match[0]) if match[1] else match[0]
    text = re.sub(r"<img>[^<]+</img>", "<img>...</img>", text)
    return re.sub(r"(<\|image_pad\|>|<IMG_CONTEXT>)\1+", r"\1...", text)


def place_frames(
    messages: Sequence[dict[str, Any]], images: list[Image], videos: list[list[Image]]
) -> tuple[list[Image], bool]:
    """Make of each ``<video>`` an ``<image>`` for each of its frames, as VITA does.

    Without ``<video>``, frames are images where there are no others. Without ``video_frames``, the images
    are the frames of a single ``<video>`` where no ``<image>`` asks for them.

    Returns:
        images and frames, in the order of their markers; and whether all that was given is among them.
    """
    questions = [message for message in messages if message["role"] == "user"]
    num_images, num_videos = (
        sum(question["content"].count(marker) for question in questions)
        for marker in (IMAGE_MARKER, VIDEO_MARKER)
    )
    if num_videos == 1 and images and not num_images and not videos:
        images, videos = [], [images]
    if not num_videos:
        return images or [frame for video in videos for frame in video], not (images and videos)
    if not videos:
        return images, True
    if num_videos != len(videos):
        raise Rejected("markers and images differ", f"{num_videos} {VIDEO_MARKER}, {len(videos)} videos")
    left, rest, placed = list(images), iter(videos), list[Image]()

    def place(marker: re.Match[str]) -> str:
        taken = next(rest) if marker[0] == VIDEO_MARKER else [left.pop(0)] if left else []
        placed.extend(taken)
        return IMAGE_MARKER * max(1, len(taken))  # one that lacks its image is found where they are counted

    for question in questions:
        question["content"] = re.sub(f"{IMAGE_MARKER}|{VIDEO_MARKER}", place, question["content"])
    return placed + left, True


def place_images(messages: list[dict[str, Any]], num_images: int) -> tuple[str, ...]:
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
    unfilled = any(marker in message["content"] for marker in _OTHER_MARKERS for message in messages)
    return (*notes, "<audio> or <video> in its text, which stays text") if unfilled else notes
