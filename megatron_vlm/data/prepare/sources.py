"""The sources of a dataset: files of records, known by their content, cut into units that are read alone."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from megatron_vlm.artifacts.dataset import RECORD_SUFFIXES, TEXT_ONLY_KEY
from megatron_vlm.data.prepare.files import irregular
from megatron_vlm.data.prepare.records.shapes import TURN_KEYS, to_conversation
from megatron_vlm.data.prepare.records.values import Image, Rejected, TarPart, named_fields

UNIT_BYTES = 64 << 20  # of JSON lines, and of Parquet's row groups: what one worker reads in one go
_ROWS = 64  # of a table, in memory at a time
_CHUNK = 1 << 20
_LONGEST_RECORD = 1 << 28
_SPACE = re.compile(r"[\s,]*")
_IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # as webdataset and energon cut a name


@dataclass(frozen=True)
class Unit:
    """A part of an input that is read from its start to its end, independently of the others.

    Attributes:
        kind: ``json`` (an array), ``jsonl``, ``parquet``, ``arrow`` or ``tar``.
        path: the file.
        start, end: bytes of ``jsonl`` in which lines begin, row groups of ``parquet``; else unused.
        size: bytes, for the progress bar.
    """

    kind: str
    path: str
    start: int = 0
    end: int = 0
    size: int = 0


@dataclass
class Raw:
    """The record at one position of a unit, as it stands there.

    Attributes:
        position: from 1 on: the line, the array's element, the row, the tar's sample.
        fields: the record; None at a blank line, and where ``problem`` says why there is none.
        images: where they are not among the fields.
        done: share of the unit that has been read.
    """

    position: int
    done: float
    fields: dict[str, Any] | None = None
    images: list[Image] | None = None
    problem: Rejected | None = field(default=None, repr=False)


def find_units(inputs: Sequence[str]) -> list[Unit]:
    """Find all units of files and folders, in a fixed order.

    Raises:
        ValueError: there is nothing to read, or it is of no known kind.
    """
    return [unit for path in inputs for file in _files(path) for unit in _cut(file)]


def read_unit(unit: Unit) -> Iterator[Raw]:
    """Yield the records of a unit.

    Raises:
        ValueError: the file is damaged from some point on.
    """
    readers = {
        "json": _read_json,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
        "tar": _read_tar,
    }
    return readers[unit.kind](unit)


def kind_of(path: str) -> str:
    """Return the kind of a file, by its first bytes: ``json``, ``jsonl``, ``parquet``, ``arrow`` or ``tar``.

    Raises:
        ValueError: none of these.
    """
    with _readable(path), _open(path) as file:
        head = file.read(4096)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if head[257:262] == b"ustar" or (path.endswith(".tar") and tarfile.is_tarfile(path)):
        return "tar"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return "json"
    if text.startswith(b"{"):
        if text.split(b"\n")[0].strip() == b"{" and len(text.strip()) > 1:
            raise ValueError(
                f"--input {path}: one JSON object over several lines; give the list of records, or one "
                f"record a line{_its_fields(path)}"
            )
        return "jsonl"
    what = "it is empty" if not head else f"it begins with {head[:8]!r}"
    raise ValueError(f"--input {path}: neither JSON, JSON lines, Parquet, Arrow nor tar; {what}")


def _its_fields(path: str) -> str:
    """Return the fields of a file's one object, for a message; empty where it is too long to look or
    damaged."""
    found = _json_file(path) if os.path.getsize(path) < _LONGEST_RECORD else {}
    return f"; {named_fields(found)}" if found else ""


def _files(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [_checked_file(path)]
    splits = _json_file(os.path.join(path, "dataset_dict.json")).get("splits")
    if splits:
        if len(splits) > 1:
            raise ValueError(
                f"--input {path}: it holds the splits {', '.join(splits)}; name the one to prepare, such as "
                + os.path.join(path, splits[0])
            )
        path = os.path.join(path, splits[0])
    state = _json_file(os.path.join(path, "state.json"))
    if "_data_files" in state:  # what datasets' save_to_disk writes
        if state.get("_indices_data_files"):
            raise ValueError(f"--input {path}: saved with an indices mapping; call flatten_indices() first")
        return [os.path.join(path, item["filename"]) for item in state["_data_files"]]
    found = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if name.removesuffix(".gz").endswith(RECORD_SUFFIXES) and not name.startswith(".")
    ]
    found = sorted(name for name in found if "/." not in name[len(path) :])
    found = [_checked_file(name) for name in found]
    # A folder of tables or tars has JSON files that describe it.
    data = [
        name for name in found if name.removesuffix(".gz").endswith((".parquet", ".arrow", ".tar", ".tgz"))
    ]
    if not found:
        raise ValueError(f"--input {path}: no {', '.join(RECORD_SUFFIXES)} in it")
    others = [name for name in found if name not in data and _has_conversations(name)] if data else []
    if others:
        raise ValueError(
            f"--input {path}: it holds tables or tars, such as {data[0]}, and JSON with conversations, "
            f"{others[0]}; name the files to read"
        )
    return data or found


def _checked_file(path: str) -> str:
    try:
        kind = irregular(os.stat(path).st_mode)
    except FileNotFoundError:
        what = "a link to nothing" if os.path.islink(path) else "no such file or folder"
        raise ValueError(f"--input {path}: {what}") from None
    if kind:
        raise ValueError(f"--input {path}: {kind}, and files are read in parts; write it to a file first")
    return path


def _has_conversations(path: str) -> bool:
    """Return whether a JSON file's first record could be a sample."""
    try:
        raw = next(read_unit(_cut(path)[0]), None)
        if raw is None or raw.fields is None:
            return False
        to_conversation(raw.fields)
    except ValueError:
        return False
    except Rejected as rejected:
        return rejected.reason != "no conversation"
    return True


def _cut(path: str) -> list[Unit]:
    kind, size = kind_of(path), os.path.getsize(path)
    if kind == "jsonl" and not _is_gzip(path):
        starts = range(0, size, UNIT_BYTES)
        return [
            Unit(kind, path, start, min(start + UNIT_BYTES, size), min(UNIT_BYTES, size - start))
            for start in starts
        ]
    if kind == "parquet":
        return _cut_parquet(path)
    return [Unit(kind, path, size=size)]


def _cut_parquet(path: str) -> list[Unit]:
    parquet = _arrow_module("pyarrow.parquet")
    with _readable(path), parquet.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    units, start, size = [], 0, 0
    for group, group_size in enumerate(sizes):
        size += group_size
        if size >= UNIT_BYTES or group == len(sizes) - 1:
            units.append(Unit("parquet", path, start, group + 1, size))
            start, size = group + 1, 0
    return units


def _read_jsonl(unit: Unit) -> Iterator[Raw]:
    with _readable(unit.path), _open(unit.path) as file:
        begin = unit.start
        if begin:  # the line that reaches over the start belongs to the unit before
            file.seek(begin - 1)
            begin += len(file.readline()) - 1
        at, end = begin, unit.end or float("inf")
        for position in itertools.count(1):
            line = file.readline() if at < end else b""
            if not line:
                return
            at += len(line)
            yield _parsed(line, position, min(1.0, (at - unit.start) / max(1, unit.size)))


def _parsed(line: bytes, position: int, done: float) -> Raw:
    try:
        text = line.decode("utf-8-sig").strip()
        value = json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        return Raw(position, done, problem=Rejected("bad JSON", str(error)))
    return _record(value, position, done) if text else Raw(position, done)


def _record(value: Any, position: int, done: float) -> Raw:
    if isinstance(value, dict):
        return Raw(position, done, value)
    return Raw(position, done, problem=Rejected("bad record", f"it is no object but {type(value).__name__}"))


def _read_json(unit: Unit) -> Iterator[Raw]:
    """Yield the elements of an array of any length, in the memory of one chunk or its longest record."""
    decoder = json.JSONDecoder()
    with _readable(unit.path), _open(unit.path) as raw:
        chunks = iter(lambda: raw.read(_CHUNK), b"")
        text = _decoded(chunks)
        buffer, at = next(text).lstrip()[1:], 0
        for position in itertools.count(1):
            while True:
                at = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]
                if buffer.startswith("]", at):
                    return
                try:
                    value, at = decoder.raw_decode(buffer, at)
                    break
                except ValueError as error:
                    more = "".join(itertools.islice(text, 1 + (len(buffer) - at) // _CHUNK))
                    if not more or len(buffer) - at > _LONGEST_RECORD:
                        raise ValueError(f"not JSON after record {position - 1}: {error}") from None
                    buffer, at = buffer[at:] + more, 0
            yield _record(value, position, min(1.0, raw.tell() / max(1, unit.size)))


def _decoded(chunks: Iterator[bytes]) -> Iterator[str]:
    """Yield the chunks' text, never empty: a chunk may hold but a part of one character."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    for chunk in chunks:
        if text := decoder.decode(chunk):
            yield text
    decoder.decode(b"", final=True)


def _read_parquet(unit: Unit) -> Iterator[Raw]:
    parquet = _arrow_module("pyarrow.parquet")
    with _readable(unit.path), parquet.ParquetFile(unit.path) as file:
        groups = range(unit.start, unit.end)
        total = sum(file.metadata.row_group(group).num_rows for group in groups)
        batches = file.iter_batches(_ROWS, row_groups=list(groups), use_threads=False)
        rows = (row for batch in batches for row in batch.to_pylist())
        for position, row in enumerate(rows, 1):
            yield Raw(position, position / total, row)


def _read_arrow(unit: Unit) -> Iterator[Raw]:
    arrow = _arrow_module("pyarrow")
    with _readable(unit.path), arrow.memory_map(unit.path) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = (arrow.ipc.open_file if is_file else arrow.ipc.open_stream)(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        slices = (batch.slice(i, _ROWS) for batch in batches for i in range(0, batch.num_rows, _ROWS))
        rows = (row for part in slices for row in part.to_pylist())
        for position, row in enumerate(rows, 1):
            yield Raw(position, 0.0 if is_file else source.tell() / max(1, unit.size), row)


def _read_tar(unit: Unit) -> Iterator[Raw]:
    """Yield samples of files that share a key: ``jpg``/``txt``/``json``, or conversations and images."""
    compressed = _is_gzip(unit.path)
    with _readable(unit.path), tarfile.open(unit.path, "r:*") as tar:
        members = (member for member in tar if not member.isdir())
        named = ((match, member) for member in members if (match := MEMBER.fullmatch(member.name)))
        groups = itertools.groupby(named, key=lambda item: item[0][1])
        for position, (key, group) in enumerate(groups, 1):
            parts: dict[str, bytes | TarPart] = {}
            strange = ""
            for match, member in group:
                done = member.offset / max(1, unit.size)
                name = match[2]
                if not member.isreg():
                    kind = "a link" if member.issym() or member.islnk() else "a device or a pipe"
                    strange = strange or f"{member.name} is {kind}"
                elif _suffix(name) in _IMAGE_SUFFIXES and not compressed and not member.issparse():
                    parts[name] = TarPart(unit.path, member.offset_data, member.size)
                else:
                    content = tar.extractfile(member)
                    assert content is not None
                    parts[name] = content.read()
            sample = _tar_sample(key, parts, position, min(1.0, done))
            if strange:
                sample.problem = Rejected("link or device in a tar", strange)
            yield sample
        if not compressed:
            check_end(tar)


def check_end(tar: tarfile.TarFile) -> None:
    """Check that an uncompressed tar that was read through didn't stop before its end.

    tarfile takes a damaged or cut header for the end.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header at byte {tar.offset}, and no end")


def _tar_sample(key: str, parts: dict[str, bytes | TarPart], position: int, done: float) -> Raw:
    try:
        text = {name: part.decode() for name in ("json", "txt") if isinstance(part := parts.get(name), bytes)}
        fields = json.loads(text.get("json", "{}"))
    except (ValueError, RecursionError) as error:
        return Raw(position, done, {"id": key}, problem=Rejected("bad JSON", f"{key}: {error}"))
    if not isinstance(fields, dict):
        return Raw(
            position, done, {"id": key}, problem=Rejected("bad record", f"{key}: its json is no object")
        )
    fields.setdefault("id", key)
    names = [name for name in parts if _suffix(name) in _IMAGE_SUFFIXES]
    listed = fields.get("images")
    if isinstance(listed, list) and sorted(map(str, listed)) == sorted(names):
        names = listed
    images: list[Image] = [parts[name] for name in names]
    if TEXT_ONLY_KEY in key:
        images = []
    if not any(key in fields for keys in TURN_KEYS.values() for key in keys):
        if "txt" not in text and not any(name in fields for name in ("response", "answer", "answers")):
            return Raw(position, done, fields, problem=Rejected("no answer", f"{key}: it has no txt"))
        fields.setdefault("question", "")
        if "txt" in text:
            fields["response"] = text["txt"]
    return Raw(position, done, fields, images)


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


class _readable:
    """A block in which readers' errors of a damaged file become one line that names it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, (ValueError, RecursionError, tarfile.TarError, EOFError, gzip.BadGzipFile)) or (
            isinstance(error, OSError) and error.errno is None  # pyarrow's
        ):
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"--input {self._path}: damaged or cut off ({reason})") from None


def _is_gzip(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _open(path: str) -> IO[bytes]:
    opened: Any = gzip.open(path, "rb") if _is_gzip(path) else open(path, "rb")
    return opened


def _json_file(path: str) -> dict[str, Any]:
    try:
        with _open(path) as file:
            found = json.loads(file.read().decode("utf-8-sig"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _arrow_module(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ValueError("Parquet and Arrow need pyarrow; pip install 'megatron-vlm[data]'") from None
