"""A prepared folder looked through before training: every shard, every sample, every image.

Samples are read as the loader reads them. What is compared: shards with ``.nv-meta/.info.json``, their
samples with energon's two indices, and, where prepare.py has made the folder, sizes and content hashes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_vlm.artifacts.dataset import PREPARED, index_problem, meta_problems, shard_counts, split_parts
from megatron_vlm.data.conversations import trainable_turns
from megatron_vlm.data.dataset import PreparedDataset, RawSample, index_rows
from megatron_vlm.data.field_maps import read_field_map
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.data.prepare.files import read_json_if_there
from megatron_vlm.data.prepare.pictures import Encoding
from megatron_vlm.data.prepare.records.values import Rejected
from megatron_vlm.data.prepare.shards import content_hash
from megatron_vlm.data.prepare.sources import MEMBER, check_end
from megatron_vlm.data.shards import read_index
from megatron_vlm.data.templates import SampleError
from megatron_vlm.system.processes import die_with_parent


@dataclass(frozen=True)
class _Task:
    """A shard to look through. ``prepared`` is its entry in ``prepare.json``, None without one."""

    dataset: PreparedDataset
    name: str
    number: int
    samples: int
    prepared: Mapping[str, Any] | None


def check(
    path: str, workers: int = 1, progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> Iterator[str]:
    """Yield all that is wrong with a prepared folder, a line each, with the shard's and the sample's name.

    Raises:
        ValueError: it was never prepared, or what says what it holds is gone.
    """
    if not os.path.isdir(path):
        raise ValueError(f"--check {path}: no such folder")
    if not os.path.isdir(os.path.join(path, ".nv-meta")):
        raise ValueError(f"--check {path}: not prepared, it has no .nv-meta")
    counts = shard_counts(path)
    listed = (read_json_if_there(os.path.join(path, ".nv-meta", PREPARED)) or {}).get("shards")
    dataset = PreparedDataset(path, "train", (), read_field_map(path), "")
    tasks = [
        _Task(dataset, name, number, count, None if listed is None else listed.get(name))
        for number, (name, count) in enumerate(counts.items())
    ]
    yield from _folder_problems(path, set(counts), None if listed is None else set(listed))
    # Forked, so that energon is imported once; nothing here has started a thread.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork, die_with_parent, (os.getpid(),)) as pool:
        for number, found in enumerate(pool.map(_shard_problems, tasks), 1):
            yield from found
            progress("checking", number, len(tasks))


def _folder_problems(path: str, counted: set[str], listed: set[str] | None) -> Iterator[str]:
    yield from (f".nv-meta/{problem}" for problem in meta_problems(path))
    problem = index_problem(path)
    if problem and (listed is not None or "damaged" in problem):  # older energons made none
        yield f".nv-meta/{problem}"
    there = {
        os.path.relpath(os.path.join(folder, name), path)
        for folder, _, names in os.walk(path)
        for name in names
        if name.endswith(".tar")
    }
    yield from (
        f"{name}: in the folder, but not among the prepared shards" for name in sorted(there - counted)
    )
    if listed is not None:
        yield from (
            f"{name}: prepared, but .nv-meta/.info.json lacks it" for name in sorted(listed - counted)
        )
    parts = split_parts(path) or {}
    for part, names in parts.items():
        yield from (
            f"{name}: of the {part} split, but never indexed" for name in names if name not in counted
        )
    if parts and not parts.get("train"):
        yield "the train split is empty"


def _shard_problems(task: _Task) -> list[str]:
    path = os.path.join(task.dataset.path, task.name)
    try:
        return [f"{task.name}: {problem}" for problem in _problems(task, path)]
    except OSError as error:
        return [f"{task.name}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror}"]


def _problems(task: _Task, path: str) -> Iterator[str]:
    size = os.path.getsize(path)
    if task.prepared is not None and size != task.prepared["bytes"]:
        what = "cut off" if size < task.prepared["bytes"] else "another file"
        yield f"{what}, {size} bytes in place of {task.prepared['bytes']}"
    elif task.prepared is not None and content_hash(path) != task.prepared["hash"]:
        yield "not the file that was prepared: its content hash differs"
    indexed = _indexed(task)
    found: list[tuple[str, int]] = []
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for key, offset, parts in _samples(tar):
                found.append((key, offset))
                if key in seen:
                    yield f"sample {key}: its files don't stand together, or its key is another sample's too"
                seen.add(key)
                yield from (f"sample {key}: {problem}" for problem in _sample_problems(task, key, parts))
            check_end(tar)
    except tarfile.TarError as error:
        yield f"cut off or damaged after {len(found)} of {task.samples} samples ({error})"
        return
    if indexed is not None and found != indexed:
        yield "swapped or changed since it was prepared: its samples are not those of the index"
    elif len(found) != task.samples:
        yield f"{len(found)} samples in place of {task.samples}"
    elif _index_beside(path) != [offset for _, offset in found]:
        yield "its index, the .idx beside it, is missing or of another file"


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, int, dict[str, bytes]]]:
    """Yield key, offset and files of each sample, cut as energon does."""
    members = (member for member in tar if member.isreg())
    named = ((match, member) for member in members if (match := MEMBER.fullmatch(member.name)))
    for key, group in itertools.groupby(named, key=lambda item: item[0][1]):
        parts, first = {}, -1
        for match, member in group:
            first = member.offset if first < 0 else first
            content = tar.extractfile(member)
            assert content is not None
            parts[match[2]] = content.read()
        yield key, first, parts


def _sample_problems(task: _Task, key: str, parts: dict[str, bytes]) -> Iterator[str]:
    try:
        turns, files = task.dataset.read(RawSample(__key__=key, __restore_key__=(), parts=parts))
        trainable_turns(turns)
    except SampleError as error:
        yield str(error)
        return
    for number, image in enumerate(files.get(IMAGE.name, ())):
        try:
            Encoding()(image)
        except Rejected as error:
            yield f"image {number} can't be decoded ({error.detail})"


def _index_beside(path: str) -> list[int]:
    """Return the offsets of the shard's samples as the loader finds them; empty where it finds none."""
    try:
        return read_index(path)[:-1].tolist()
    except (OSError, ValueError):
        return []


def _indexed(task: _Task) -> list[tuple[str, int]] | None:
    """Return keys and offsets of the shard's samples when energon indexed it; None where there is no
    index."""
    query = "select sample_key, byte_offset from samples where tar_file_id = ? order by sample_index"
    rows = index_rows(task.dataset.path, query, [(task.number,)])
    return rows[0] if rows else None
