"""The first pass: every unit's records become conversations, laid down where any of them can be read again.

A unit makes ``<n>.jsonl`` (a conversation a line), ``<n>.bin`` (images that came inside the records),
``<n>.npy`` (an :data:`INDEX` row for each line), ``<n>.losses`` (what became none) and, last of all,
``<n>.json``, without which the others don't count. Images that lie in files or tars stay there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vlm.data.conversations import identity_of
from megatron_vlm.data.prepare.files import irregular, read_json_if_there, write_json
from megatron_vlm.data.prepare.records.ignored import IgnoredFields
from megatron_vlm.data.prepare.records.shapes import Conversation, to_conversation
from megatron_vlm.data.prepare.records.values import Image, Rejected, TarPart
from megatron_vlm.data.prepare.rejections import RejectionLog
from megatron_vlm.data.prepare.sources import Unit, read_unit
from megatron_vlm.system.units import size_text

INDEX = np.dtype(
    [
        ("position", "<i8"),  # in the unit, from 1 on
        ("offset", "<i8"),  # of the line
        ("length", "<i4"),
        ("bytes", "<i8"),  # of the images
        ("id", "<u8"),  # hashes: of the record's id, 0 without one; of messages and images
        ("content", "<u8"),
    ]
)
MOST_IMAGE_BYTES = 1 << 30  # far beyond any picture: what is larger isn't read into memory
_REPORT_EVERY = 64


@dataclass(frozen=True)
class Reading:
    """The way records are read.

    Attributes:
        shape: the only one that they may have; None for any.
        image_root: where relative paths of images begin, and below which all images lie; None: relative paths
            begin at the folder of the file that names them, and images may lie anywhere.
    """

    shape: str | None
    image_root: str | None


def stage_unit(
    unit: Unit, path: str, reading: Reading, progress: Callable[[int], None] = lambda size: None
) -> None:
    """Read a unit and lay its conversations down.

    Args:
        path: of the files to make, without their suffixes.
        progress: told how many bytes more have been read.

    Raises:
        ValueError: the input is damaged.
    """
    notes, shapes, ignored = Counter[str](), Counter[str](), IgnoredFields()
    read = last = reported = 0
    rows: list[tuple[int, ...]] = []
    start = os.path.abspath(reading.image_root or os.path.dirname(unit.path))
    fence = start if reading.image_root else "/"
    with (
        open(path + ".jsonl.tmp", "wb") as lines,
        open(path + ".bin.tmp", "wb") as images,
        RejectionLog(path + ".losses") as rejections,
    ):
        for raw in read_unit(unit):
            last = raw.position
            if last % _REPORT_EVERY == 0:
                progress(int(raw.done * unit.size) - reported)
                reported = int(raw.done * unit.size)
            if raw.fields is None and raw.problem is None:
                continue
            read += 1
            try:
                if raw.problem:
                    raise raw.problem
                assert raw.fields is not None
                conversation = to_conversation(raw.fields, reading.shape, raw.images)
                stored = [_store(image, images, start, fence) for image in conversation.images]
            except Rejected as error:
                rejections.add(error.reason, last, identity_of(raw.fields or {}), error.detail)
                continue
            except RecursionError:
                rejections.add("bad record", last, identity_of(raw.fields or {}), "it is nested too deeply")
                continue
            shapes[conversation.shape] += 1
            notes.update(conversation.notes)
            ignored.add(conversation.ignored, last, identity_of(raw.fields))
            offset = lines.tell()
            line = _line(conversation, [reference for reference, _, _ in stored])
            lines.write(line)
            sizes = sum(size for _, size, _ in stored)
            digests = [digest for _, _, digest in stored]
            rows.append(
                (last, offset, len(line), sizes, _id_hash(conversation), _content_hash(conversation, digests))
            )
    np.save(path + ".npy.tmp.npy", np.array(rows, dtype=INDEX))
    for suffix, made in ((".jsonl", ".jsonl.tmp"), (".bin", ".bin.tmp"), (".npy", ".npy.tmp.npy")):
        os.replace(path + made, path + suffix)
    facts: dict[str, Any] = {"positions": last, "read": read, "notes": dict(notes), "shapes": dict(shapes)}
    facts["ignored"] = ignored.state
    write_json(path + ".json", facts)
    progress(unit.size - reported)


def unit_facts(path: str) -> dict[str, Any] | None:
    """Return the counts of :func:`stage_unit`; None if it has not come to its end."""
    return read_json_if_there(path + ".json")


def unit_index(path: str) -> np.ndarray:
    """Return a unit's rows of :data:`INDEX`."""
    return np.load(path + ".npy", allow_pickle=False)


def _store(image: Image, images: Any, start: str, fence: str) -> tuple[Any, int, str]:
    """Return how the second pass finds an image, its size, and the hash that tells it from others.

    Args:
        images: the file that takes images which came inside of records.
        start: the folder in which relative paths begin.
        fence: the folder below which all paths lie.

    Raises:
        Rejected: its file isn't there, is none, or lies outside ``fence``.
    """
    if isinstance(image, bytes):
        offset = images.tell()
        images.write(image)
        return ["", offset, len(image)], len(image), hashlib.blake2b(image, digest_size=16).hexdigest()
    if isinstance(image, TarPart):
        reference = [os.path.abspath(image.path), image.offset, image.size]
        return reference, image.size, repr(reference)
    path = os.path.normpath(os.path.join(start, image))
    # Links are not looked through: whoever owns the folder has put them there.
    if os.path.commonpath((fence, path)) != fence:
        more = "links in it may lead out, and without --image-root a path may lead anywhere"
        raise Rejected("image outside --image-root", f"{image}: not below {fence}; {more}")
    try:
        facts = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise Rejected("missing image", image) from None
    except OSError as error:  # no permission, links that go round in a circle, a name that is too long
        raise Rejected("unreadable image", f"{image}: {error.strerror}") from None
    kind = irregular(facts.st_mode)
    if kind or facts.st_size > MOST_IMAGE_BYTES:
        raise Rejected("unreadable image", f"{image}: it is {kind or size_text(facts.st_size) + ' long'}")
    return path, facts.st_size, path


def _line(conversation: Conversation, images: list[Any]) -> bytes:
    extra = {key: value for key, value in conversation.extra.items() if key not in ("messages", "images")}
    value = {"messages": conversation.messages, "images": images, "extra": extra}
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _id_hash(conversation: Conversation) -> int:
    identity = conversation.extra.get("id")
    return 0 if identity is None else _hash(json.dumps(identity)) | 1


def _content_hash(conversation: Conversation, images: list[str]) -> int:
    return _hash(json.dumps([conversation.messages, images], sort_keys=True))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
