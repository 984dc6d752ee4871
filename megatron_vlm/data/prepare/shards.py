"""The second pass: planned samples become shards, each with a file beside it that says it is done.

A sample is ``<key>.json``, ``{"messages": [...], "images": ["0.jpg", ...], ...}``, and its images
``<key>.0.jpg``, ...; the key is its place in the input.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import xxhash

from megatron_vlm.data.conversations import identity_of
from megatron_vlm.data.prepare.files import open_regular, read_json_if_there, write_json
from megatron_vlm.data.prepare.histogram import Histogram
from megatron_vlm.data.prepare.pictures import Encoding, Picture
from megatron_vlm.data.prepare.plan import ShardPlan
from megatron_vlm.data.prepare.records.values import Rejected
from megatron_vlm.data.prepare.rejections import UNTRAINED, RejectionLog
from megatron_vlm.data.templates import SampleError

HASH = "xxh3_128"
# Of a key, messages and images: lengths in tokens, by name; a SampleError where training leaves it out.
Measure = Callable[[str, Sequence[Mapping[str, Any]], Sequence[Picture]], Mapping[str, int]]
_REPORT_EVERY = 16


@dataclass(frozen=True)
class Rendering:
    """The way samples become tokens, as flags of the same names will tell training."""

    tokenizer_load_dir: str
    template: str | None
    lang: str


@dataclass(frozen=True)
class ShardFacts:
    """The content of a finished shard."""

    name: str
    samples: int
    images: int
    bytes: int
    hash: str
    histograms: dict[str, Any]


def write_shard(
    plan: ShardPlan,
    folder: str,
    units: str,
    done: str,
    encoding: Encoding,
    measure: Measure | None = None,
    progress: Callable[[int], None] = lambda samples: None,
) -> None:
    """Write one shard, and then a note of its content to ``done``. No tar where none of its samples is whole.

    Args:
        folder: of the shard.
        units: folder of the first pass's files.
        done: the file that says the shard is finished; what it lost is logged beside it.
        progress: told how many more samples are done.
    """
    path = os.path.join(folder, plan.name)
    histograms: dict[str, Histogram] = {}
    samples = num_images = 0
    with (
        _Hashed(path + ".tmp") as file,
        _Reader(units) as reader,
        RejectionLog(rejections_of(done)) as rejections,
    ):
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for number, row in enumerate(plan.rows, 1):
                if number % _REPORT_EVERY == 0:
                    progress(_REPORT_EVERY)
                unit, ordinal = int(row["unit"]), int(row["ordinal"])
                line = json.loads(reader.line(unit, int(row["offset"]), int(row["length"])))
                try:
                    pictures = [encoding(reader.image(unit, reference)) for reference in line["images"]]
                except Rejected as error:
                    rejections.add(error.reason, ordinal, identity_of(line["extra"]), error.detail)
                    continue
                names = [f"{i}.{picture.suffix}" for i, picture in enumerate(pictures)]
                value = {"messages": line["messages"], "images": names, **line["extra"]}
                _add(tar, f"{ordinal:09d}.json", json.dumps(value, ensure_ascii=False).encode())
                for name, picture in zip(names, pictures, strict=True):
                    _add(tar, f"{ordinal:09d}.{name}", picture.data)
                samples, num_images = samples + 1, num_images + len(pictures)
                lengths = _lengths(line["messages"], pictures)
                if measure is not None:
                    try:
                        tokens = measure(f"{ordinal:09d}", line["messages"], pictures)
                        lengths.update({name: [length] for name, length in tokens.items()})
                    except SampleError as error:
                        rejections.add(UNTRAINED, ordinal, identity_of(line["extra"]), str(error))
                for name, values in lengths.items():
                    for length in values:
                        histograms.setdefault(name, Histogram()).add(length)
        digest, size = file.digest(), file.size
    os.replace(path + ".tmp", path) if samples else os.unlink(path + ".tmp")
    facts = ShardFacts(
        name=plan.name,
        samples=samples,
        images=num_images,
        bytes=size if samples else 0,
        hash=digest,
        histograms={name: histogram.state() for name, histogram in histograms.items()},
    )
    write_json(done, vars(facts))
    progress(len(plan.rows) % _REPORT_EVERY)


def rejections_of(done: str) -> str:
    """Return the path of the log of a shard's rejections."""
    return done.removesuffix(".json") + ".losses"


def finished(plan: ShardPlan, folder: str, done: str) -> ShardFacts | None:
    """Return the content of a shard that is written and as long as it was; else None."""
    found = read_json_if_there(done)
    if found is None:
        return None
    facts = ShardFacts(**found)
    path = os.path.join(folder, plan.name)
    size = os.path.getsize(path) if os.path.exists(path) else 0
    return facts if size == facts.bytes else None


def content_hash(path: str) -> str:
    """Return the :attr:`ShardFacts.hash` of a file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _lengths(messages: Sequence[Mapping[str, Any]], pictures: Sequence[Picture]) -> dict[str, list[int]]:
    return {
        "turns": [sum(message["role"] != "system" for message in messages)],
        "images": [len(pictures)],
        "characters": [sum(len(message["content"]) for message in messages)],
        "longer side": [max(picture.width, picture.height) for picture in pictures],
        "shorter side": [min(picture.width, picture.height) for picture in pictures],
        "image bytes": [len(picture.data) for picture in pictures],
    }


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # no time and no owner: the same samples are the same bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


class _Hashed:
    """A new file whose hash is known when it is written."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "wb")
        self._hash = xxhash.xxh3_128()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def digest(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> _Hashed:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


class _Reader:
    """A reader of the first pass's lines and images wherever they lie; it keeps files open."""

    _MOST_OPEN = 64

    def __init__(self, units: str) -> None:
        self._units = units
        self._files: dict[str, IO[bytes]] = {}

    def line(self, unit: int, offset: int, length: int) -> bytes:
        return self._part(os.path.join(self._units, f"{unit}.jsonl"), offset, length)

    def image(self, unit: int, reference: Any) -> bytes:
        """Return an image's bytes.

        Raises:
            Rejected: it is gone, or can't be read.
        """
        try:
            if isinstance(reference, str):
                with open_regular(reference) as file:
                    return file.read()
            path, offset, size = reference
            data = self._part(path or os.path.join(self._units, f"{unit}.bin"), offset, size)
        except FileNotFoundError as error:
            raise Rejected("missing image", str(error.filename)) from None
        except OSError as error:
            raise Rejected("unreadable image", f"{error.filename or reference}: {error.strerror}") from None
        if len(data) != size:
            raise Rejected("corrupt image", f"{path} ends before it")
        return data

    def _part(self, path: str, offset: int, size: int) -> bytes:
        if path not in self._files:
            if len(self._files) >= self._MOST_OPEN:
                self._close()
            self._files[path] = open(path, "rb")
        return os.pread(self._files[path].fileno(), size, offset)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
