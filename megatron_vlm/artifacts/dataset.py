"""Folders of shards: the command that makes a dataset of one, for messages, and the notes of prepare.py in
it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import tarfile
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Tuple

FIELD_MAP = {"image": "jpg", "context": "json[question]", "answers": "txt"}
PREPARED = "prepare.json"  # in .nv-meta: of each shard what prepare.py knows, samples, bytes and hashes
REPORT = "report.json"  # of prepare.py: what has become of the records
# Of files of records, which scripts/data/prepare.py reads; each may end in .gz besides.
RECORD_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".tar", ".tgz")
TEXT_ONLY_KEY = "-noimage"  # in a sample's key: it has no image, whatever files it comes with
_END = 1 << 16  # bytes
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_QUESTIONS, _ANSWERS = ("question", "context", "prompt"), ("answer", "answers", "caption", "text")


def prepare_command(path: str, ratio: str = "9,1,0") -> str:
    """Return the command that prepares a folder of shards without asking, quoted for a shell.

    A folder that scripts/data/prepare.py made is made by it again: energon would split it by whole shards.

    Args:
        path: its first sample says whether it holds conversations, questions and answers, or captions.
        ratio: shards for training, validation and test.
    """
    if os.path.isfile(os.path.join(path, ".nv-meta", PREPARED)):
        return f"python scripts/data/prepare.py --force --input <its files> --save-dir {shlex.quote(path)}"
    command = ["energon", "prepare", "--non-interactive", "--force-overwrite", "--split-ratio", ratio]
    if holds_conversations(path):
        command += ["--sample-type", "CrudeWebdataset"]
    else:
        kind, field_map = _question_fields(*_first_sample(path))
        command += ["--sample-type", kind, "--field-map", json.dumps(field_map, separators=(",", ":"))]
    return shlex.join([*command, path])


def _question_fields(files: List[str], fields: Dict[str, Any]) -> Tuple[str, Dict[str, str]]:
    """Return energon's class and the field map of a sample, by its files and what is in its JSON."""
    image = next((name for name in files if name in _IMAGES), FIELD_MAP["image"])
    asked = [f"json[{name}]" for name in _QUESTIONS if name in fields]
    said = [name for name in files if name == "txt"] + [
        f"json[{name}]" for name in _ANSWERS if name in fields
    ]
    if said and not asked and image in files:
        return "CaptioningSample", {"image": image, "caption": said[0]}
    if not said or not asked:
        return "VQASample", FIELD_MAP
    return "VQASample", {"image": image, "context": asked[0], "answers": said[0]}


def not_prepared(path: str) -> str:
    """Return the message for a path that is no folder on which ``energon prepare`` was run: what makes one of
    it."""
    records = _records(path)
    if records is not None:
        made = re.sub(r"(?<=[^/])(\.\w+)?(\.gz)?/*$", "", path, count=1) + "-prepared"
        command = (
            f"python scripts/data/prepare.py --input {shlex.quote(records)} --save-dir {shlex.quote(made)}"
        )
        return (
            f"--data-path {path}: its records are not prepared; run: {command}, and give {shlex.quote(made)}"
        )
    if not os.path.isdir(path):
        what = "no folder" if os.path.exists(path) else "no such folder"
        return f"--data-path {path}: {what}; give one that scripts/data/prepare.py or `energon prepare` made"
    if not any(name.endswith(".tar") for _, _, names in os.walk(path) for name in names):
        return f"--data-path {path}: it holds no .tar shards; make a dataset with scripts/data/prepare.py"
    return f"--data-path {path}: not prepared; run: {prepare_command(path)}"


def _records(path: str) -> Optional[str]:
    """Return the path that scripts/data/prepare.py is to read where ``path`` is people's own data: a file
    of records, or a folder of such that are no shards. None where it is neither."""
    if not os.path.isdir(path):
        return path if os.path.isfile(path) and _is_records(path) else None
    try:  # what datasets' save_to_disk writes: a folder of one split, or of several
        with open(os.path.join(path, "dataset_dict.json"), encoding="utf-8") as file:
            splits = json.load(file)["splits"]
        return os.path.join(path, "train" if "train" in splits else splits[0])
    except (OSError, ValueError, LookupError, TypeError):
        pass
    names = [name for _, _, files in os.walk(path) for name in files if not name.startswith(".")]
    if any(name.endswith(".tar") for name in names) or not any(map(_is_records, names)):
        return None
    return path


def _is_records(name: str) -> bool:
    return (name[:-3] if name.endswith(".gz") else name).endswith(RECORD_SUFFIXES)


def holds_conversations(path: str) -> bool:
    """Return whether a folder's samples are conversations: prepared so, or its first JSON file has
    ``messages``."""
    try:
        with open(os.path.join(path, ".nv-meta", "dataset.yaml"), encoding="utf-8") as file:
            return "CrudeWebdataset" in file.read()
    except (OSError, ValueError):
        pass
    return "messages" in _first_sample(path)[1]


def _first_sample(path: str) -> Tuple[List[str], Dict[str, Any]]:
    """Return the files of a folder's first sample, by what follows its key, and its JSON; as far as
    they're whole."""
    shards = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if name.endswith(".tar")
    )
    files: List[str] = []
    fields: Any = {}
    first = None
    try:
        with tarfile.open(shards[0], "r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is None:
                    continue
                folder, name = os.path.split(member.name)
                key, _, suffix = name.partition(".")
                if first not in (None, (folder, key)):
                    break
                first = (folder, key)
                files.append(suffix)
                if suffix == "json":
                    fields = json.loads(content.read())
    except (OSError, ValueError, IndexError, RecursionError, tarfile.TarError):
        pass
    return files, fields if isinstance(fields, dict) else {}


def shard_counts(path: str) -> Dict[str, int]:
    """Return the number of samples of each shard, by its path below the dataset's folder.

    Raises:
        ValueError: what ``energon prepare`` has written is damaged or not there.
    """
    info = os.path.join(path, ".nv-meta", ".info.json")
    try:
        with open(info, encoding="utf-8") as file:
            written = json.load(file)
        counts: Dict[str, int] = written["shard_counts"]
        is_sound = all(type(count) is int and count >= 0 for count in counts.values())
        if not is_sound or not isinstance(written.get("energon_version", ""), (str, type(None))):
            raise ValueError("not what energon writes")
        return counts
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{info}: damaged; run again: {prepare_command(path)}") from None


def samples_end(shard: str, samples: int) -> Optional[int]:
    """Return where a shard's last sample ends, by the index that energon wrote beside it: 64-bit offsets, of
    each sample and of that end. None where the index is gone, or shorter than that.

    Raises:
        OSError: it is there, and can't be read.
    """
    try:
        with open(shard + ".idx", "rb") as file:
            if os.fstat(file.fileno()).st_size < 8 * (samples + 1):
                return None
            file.seek(-8, os.SEEK_END)
            end = int.from_bytes(file.read(8), "little")
    except FileNotFoundError:
        return None
    return end if end or not samples else None


def meta_problems(path: str) -> Iterator[str]:
    """Yield what is wrong with the loader's files in ``.nv-meta``, as far as it can be seen without YAML."""
    meta = os.path.join(path, ".nv-meta")
    splits = [name for name in ("split.yaml", "split.json") if os.path.exists(os.path.join(meta, name))]
    if not splits:
        yield "split.yaml is missing"
    elif split_parts(path) is None and "split_parts" not in _top_keys(os.path.join(meta, splits[0])):
        yield f"{splits[0]} is damaged: it has no split_parts"
    dataset = os.path.join(meta, "dataset.yaml")
    if os.path.isfile(dataset) and os.path.getsize(dataset) and not _top_keys(dataset):
        yield "dataset.yaml is damaged: it holds no keys"


def index_problem(path: str) -> str:
    """Return what is wrong with energon's index of a folder's samples, as far as its beginning tells; else
    empty."""
    try:
        with open(os.path.join(path, ".nv-meta", "index.sqlite"), "rb") as file:
            is_database = file.read(16) == b"SQLite format 3\0"
            return "" if is_database else "index.sqlite is damaged: it is no database"
    except OSError:
        return "index.sqlite is missing"


def _top_keys(path: str) -> List[str]:
    """Return the keys at the top of a YAML or JSON file; empty where it is no text, or has none."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return []
    if text.lstrip().startswith("{"):
        try:
            return list(json.loads(text))
        except ValueError:
            return re.findall(r"[{,]\s*[\"']?(\w+)[\"']?:", text) if text.rstrip().endswith("}") else []
    if re.search(r"[\x00-\x08\x0e-\x1f]", text):
        return []
    return re.findall(r"^[\"']?(\w+)[\"']?:(?=\s|$)", text, re.MULTILINE)


@dataclass(frozen=True)
class PreparedShard:
    """A shard as scripts/data/prepare.py has noted it: its bytes, and :func:`ends_hash`, None in a folder
    that an older version made."""

    size: int
    ends: Optional[str]

    def difference(self, path: str) -> str:
        """Return what tells a file from the one that was prepared, as far as its size and ends do; else
        empty."""
        size = os.path.getsize(path)
        if size != self.size:
            return f"{size} bytes, it had {self.size}"
        return "its first or last bytes are others" if self.ends not in (None, ends_hash(path)) else ""


def prepared_shards(path: str) -> Dict[str, PreparedShard]:
    """Return each shard as prepared, where scripts/data/prepare.py has made the folder; else empty."""
    try:
        with open(os.path.join(path, ".nv-meta", PREPARED), encoding="utf-8") as file:
            shards = json.load(file)["shards"]
        return {name: PreparedShard(int(shard["bytes"]), shard.get("ends")) for name, shard in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def ends_hash(path: str) -> str:
    """Hash of a file's first and last 64 KiB: what can be looked at in every shard whenever a run starts."""
    with open(path, "rb") as file:
        first = file.read(_END)
        file.seek(max(0, os.path.getsize(path) - _END))
        return hashlib.blake2b(first + file.read(_END), digest_size=16).hexdigest()


def split_parts(path: str) -> Optional[Dict[str, List[str]]]:
    """Return the shards of ``train``, ``val`` and ``test``, as far as they can be read without YAML.

    Returns:
        None where they can't: there is no split, or it is written by hand in other ways than
        ``energon prepare`` writes it.
    """
    folder = os.path.join(path, ".nv-meta")
    try:
        with open(os.path.join(folder, "split.yaml"), encoding="utf-8") as file:
            parts, excluded = _parse_split(file.read())
    except FileNotFoundError:
        try:
            with open(os.path.join(folder, "split.json"), encoding="utf-8") as file:
                loaded = json.load(file)
            parts, excluded = dict(loaded["split_parts"]), list(loaded.get("exclude", []))
        except (OSError, ValueError, KeyError, TypeError):
            return None
    except (OSError, ValueError):
        return None
    try:
        left_out = {name for pattern in excluded for name in _expand(pattern)}
        expanded = {part: [name for item in items for name in _expand(item)] for part, items in parts.items()}
    except ValueError:
        return None
    return {part: [name for name in names if name not in left_out] for part, names in expanded.items()}


def split_samples(path: str, split: str = "train") -> Optional[int]:
    """Return the number of samples of a split; None where that can't be told without YAML."""
    parts = split_parts(path)
    if parts is None:
        return None
    try:
        counts = shard_counts(path)
        return sum(counts[name] for name in parts.get(split, []))
    except (ValueError, KeyError):
        return None


def train_images(path: str) -> Optional[int]:
    """Return the number of images of the training split; None where scripts/data/prepare.py has not made
    the folder."""
    try:
        with open(os.path.join(path, REPORT), encoding="utf-8") as file:
            return int(json.load(file)["splits"]["train"]["images"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


@dataclass(frozen=True)
class Shard:
    """A shard of a split: its name, its number of samples, its size in bytes."""

    name: str
    samples: int
    size: int


def shards_fingerprint(path: str, split: str, shards: Tuple[Shard, ...]) -> str:
    """Return a hash that changes with the shards of a split, in order, and with a new ``energon prepare``."""
    try:
        with open(os.path.join(path, ".nv-meta", "index.uuid"), encoding="utf-8", errors="replace") as file:
            uuid = file.read().strip()
    except FileNotFoundError:
        uuid = ""
    return hashlib.sha256(repr((uuid, split, shards)).encode()).hexdigest()[:16]


def split_fingerprint(path: str, split: str = "train") -> Optional[str]:
    """Return the :func:`shards_fingerprint` of a split; None where it can't be told without YAML, or files
    are gone."""
    names = (split_parts(path) or {}).get(split)
    try:
        counts = shard_counts(path)
        shards = [
            Shard(name, counts[name], os.path.getsize(os.path.join(path, name))) for name in names or ()
        ]
    except (OSError, ValueError, KeyError):
        return None
    return shards_fingerprint(path, split, tuple(shards)) if shards else None


# A key with or without an empty list, or an item: all that prepare writes.
_LINE = re.compile(
    r"""( *)(?:(\w+):(?: \[\])?|- (?:'([^']+)'|([^-?:'"\[\]{},&*!|>%@`#\s](?:[^:#]|:(?=\S)|(?<=\S)#)*)))"""
)
_BRACES = re.compile(r"\{([^{}]*)\}")


def _parse_split(text: str) -> Tuple[Dict[str, List[str]], List[str]]:
    """Return ``split_parts`` and ``exclude`` of a ``split.yaml``.

    Raises:
        ValueError: it uses more of YAML than ``energon prepare`` does.
    """
    lists: Dict[str, List[str]] = {}
    top, items = "", None
    for line in text.splitlines():
        match = _LINE.fullmatch(line.rstrip())
        if match is None:
            raise ValueError(f"{line!r} is not as energon prepare writes it")
        indent, key, quoted, plain = match.groups()
        if key is None:
            if items is None:
                raise ValueError(f"{line!r} belongs to no list")
            items.append(quoted or plain)
        else:
            top = key if not indent else top
            items = lists.setdefault(f"{top}.{key}" if indent else key, [])
    parts = {name.partition(".")[2]: shards for name, shards in lists.items() if "." in name}
    if "split_parts" not in lists:
        raise ValueError("no split_parts")
    return parts, lists.get("exclude", [])


def _expand(pattern: str) -> List[str]:
    """Expand ``{000..002}.tar`` and ``{a,b}.tar`` as a shell does, which prepare writes for many shards.

    Raises:
        ValueError: its braces are of another kind.
    """
    braces = _BRACES.search(pattern)
    if braces is None:
        if "{" in pattern or "}" in pattern:
            raise ValueError(f"{pattern!r}: braces that don't match")
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1], re.ASCII)
    if numbers:
        first, last = numbers.groups()
        padded = any(len(text) > 1 and text[0] == "0" for text in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        options = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    elif "," in braces[1]:
        options = braces[1].split(",")
    else:
        raise ValueError(f"{pattern!r}: braces of another kind")
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [name for option in options for name in _expand(before + option + after)]
