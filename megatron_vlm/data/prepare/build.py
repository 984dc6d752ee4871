"""The whole way from people's files to a dataset: two passes, energon's own prepare, a report.

Everything is made in ``<save_dir>.partial`` and gets its name when it is whole. That folder also holds what
is finished, so that the same command goes on where it was killed:

    settings.json        what was asked for; other settings don't go on with it
    units/, shards/      the first pass's units, and a file for each finished shard
    dataset/             what becomes <save_dir>
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_vlm.artifacts.dataset import PREPARED, REPORT, ends_hash
from megatron_vlm.data.prepare.energon import energon_prepare
from megatron_vlm.data.prepare.files import read_json_if_there, write_json
from megatron_vlm.data.prepare.pictures import ENCODINGS, Encoding
from megatron_vlm.data.prepare.plan import DUPLICATES, SPLITS, ShardPlan, duplicates, plan_shards, sample_rows
from megatron_vlm.data.prepare.records.ignored import merge
from megatron_vlm.data.prepare.records.shapes import SHAPES
from megatron_vlm.data.prepare.rejections import DUPLICATE, Places, RejectionLog, Rejections, read_logs
from megatron_vlm.data.prepare.report import make_report, to_markdown
from megatron_vlm.data.prepare.shards import HASH, Rendering, ShardFacts, finished, rejections_of
from megatron_vlm.data.prepare.sources import Unit, find_units
from megatron_vlm.data.prepare.stage import Reading, unit_facts, unit_index
from megatron_vlm.data.prepare.workers import Workers, call_forked, check_measure
from megatron_vlm.system.files import write_whole
from megatron_vlm.system.locks import locked
from megatron_vlm.system.units import size_text

VERSION = 2  # of what is written; a folder begun by another version is not gone on with
MOST_SAMPLES = 10_000  # in a shard, exclusive: what energon's documentation asks for
_ROUNDING = 0.005  # of shares, as in 0.333,0.333,0.333
_SPARE = 1.05  # of the space that is needed: index, block sizes

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True)
class Options:
    """The options of :func:`prepare`. The flags of scripts/data/prepare.py are these, by name.

    Attributes:
        image_root: see :class:`~megatron_vlm.data.prepare.stage.Reading`.
        format: the only shape that records may have, of ``SHAPES``; None for any.
        split: shares of train, val and test, or their ratio in whole numbers; those left out are 0.
        duplicates: what is left out, see :func:`~megatron_vlm.data.prepare.plan.duplicates`.
        shard_samples, shard_bytes: the most in one shard.
        max_side, encode, quality: see :class:`~megatron_vlm.data.prepare.pictures.Encoding`.
        tokenizer_load_dir: the model's Hugging Face folder, for lengths in tokens; None: without them.
        template, lang: as training will be told.
        force: replace a finished dataset, and what other settings have begun.
    """

    input: tuple[str, ...]
    save_dir: str
    image_root: str | None = None
    format: str | None = None
    split: tuple[float, ...] = (0.98, 0.01, 0.01)
    seed: int = 0
    workers: int = 1
    duplicates: str = "content"
    shard_samples: int = 5000
    shard_bytes: int = 1_000_000_000
    max_side: int | None = None
    encode: str | None = None
    quality: int = 92
    tokenizer_load_dir: str | None = None
    template: str | None = None
    lang: str = "jp"
    force: bool = False

    def __post_init__(self) -> None:
        _check_choice("--format", self.format, SHAPES)
        _check_choice("--duplicates", self.duplicates, DUPLICATES)
        _check_choice("--encode", self.encode, ENCODINGS)
        if (
            not 1 <= len(self.split) <= len(SPLITS)
            or not all(0 <= share < float("inf") for share in self.split)
            or not self.split[0] > 0
        ):
            raise ValueError("--split: give the shares of train, val and test, such as 0.98,0.01,0.01")
        whole = all(float(share).is_integer() for share in self.split)  # a ratio, as energon takes it
        if not whole and not abs(sum(self.split) - 1) < _ROUNDING:
            shares = ",".join(f"{share:g}" for share in self.split)
            raise ValueError(
                f"--split {shares}: these shares of train, val and test add up to {sum(self.split):g}; give "
                "some that add up to 1, such as 0.98,0.01,0.01, or a ratio of whole numbers, such as 98,1,1"
            )
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: must not be negative")
        if not 1 <= self.shard_samples < MOST_SAMPLES:
            raise ValueError(f"--shard-samples {self.shard_samples}: give 1 to {MOST_SAMPLES - 1}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality}: give 1 to 100")
        if self.image_root is not None and not os.path.isdir(self.image_root):
            raise ValueError(f"--image-root {self.image_root}: no such folder")

    @property
    def partial(self) -> str:
        return self.save_dir.rstrip("/") + ".partial"

    @property
    def rendering(self) -> Rendering | None:
        if self.tokenizer_load_dir is None:
            return None
        return Rendering(self.tokenizer_load_dir, self.template, self.lang)

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.max_side, self.encode, self.quality)


@dataclass
class Staged:
    """The findings of the first pass.

    Attributes:
        read: records of each file.
        notes, shapes: how many samples have each.
        ignored: fields of which nothing is trained, as records/ignored.py merges them.
        places: where a sample stands in the input.
        logs: files that name what was lost so far, and from which place on each counts.
    """

    read: Counter[str]
    notes: Counter[str]
    shapes: Counter[str]
    ignored: dict[str, dict[str, Any]]
    places: Places
    logs: list[tuple[str, int]]


def prepare(options: Options, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Make a dataset, or finish one that was begun.

    Returns:
        the report.

    Raises:
        ValueError: the inputs can't be read, nothing of them can be used, there is too little space, or the
            folder is in the way; the message says what would work.
    """
    _check_target(options)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_named_space(options))
        with Workers(options.workers, options.rendering) as workers:
            workers.call(check_measure)
            units: list[Unit] = workers.call(find_units, options.input)
            stack.enter_context(_locked(options.partial))
            _check_settings(options, units)
            _first_pass(options, units, workers, progress)
            staged, plans = _plan(options, units)
            _second_pass(options, plans, workers, progress)
        rejections = _rejections(options, staged, plans)
        shards = [shard for shard in (_finished(options, plan) for plan in plans) if shard.samples]
        if not any(shard.name.startswith(SPLITS[0]) for shard in shards):
            shutil.rmtree(options.partial)
            raise ValueError(f"nothing is left to train on; {rejections}")
        counted = (staged.read, staged.notes, staged.shapes, staged.ignored)
        report = make_report(_settings(options, units), *counted, rejections, shards)
        call_forked(energon_prepare, _dataset(options), options.workers)
        _finish(options, shards, report)
    return report


def _check_choice(flag: str, value: str | None, choices: Any) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{flag} {value}: unknown; choose from {', '.join(choices)}")


def _check_target(options: Options) -> None:
    target = options.save_dir
    parent = os.path.dirname(os.path.abspath(target))
    if not os.path.isdir(parent):
        raise ValueError(
            f"--save-dir {target}: the folder to make it in is not there; mkdir -p {shlex.quote(parent)}"
        )
    if not os.path.lexists(target) or (os.path.isdir(target) and not os.listdir(target)):
        return
    if not os.path.isdir(os.path.join(target, ".nv-meta")):
        raise ValueError(f"--save-dir {target}: it is there, and no prepared dataset; give another name")
    if not options.force:
        if not os.path.isdir(os.path.join(options.partial, "dataset")):
            shutil.rmtree(options.partial, ignore_errors=True)  # killed after it was finished
        raise ValueError(f"--save-dir {target}: already prepared; --force makes it anew")


@contextlib.contextmanager
def _named_space(options: Options) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"--save-dir {options.save_dir}: no space is left there; make room and run the same command again"
        ) from None


@contextlib.contextmanager
def _locked(partial: str) -> Iterator[None]:
    os.makedirs(partial, exist_ok=True)
    lock = os.path.join(partial, "lock")
    with open(lock, "w"), locked(lock, or_say=f"{partial}: another prepare.py is at work there"):
        yield


def _settings(options: Options, units: Sequence[Unit]) -> dict[str, Any]:
    """Return all settings that the result depends on."""
    settings = asdict(options)
    for name in ("workers", "force", "save_dir"):
        del settings[name]
    files = {unit.path: os.stat(unit.path) for unit in units}
    settings["files"] = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in files.items()]
    return {"version": VERSION, **settings, "split": list(options.split), "input": list(options.input)}


def _check_settings(options: Options, units: Sequence[Unit]) -> None:
    path = os.path.join(options.partial, "settings.json")
    settings, begun = _settings(options, units), read_json_if_there(path)
    if begun is not None and begun != settings:
        if not options.force and _any_shard(options):
            names = [name for name in settings if settings[name] != begun.get(name)]
            named = {"files": "changed input files", "version": "another version of prepare.py"}
            what = named.get(names[0]) or "another --" + names[0].replace("_", "-")
            raise ValueError(
                f"{options.partial}: begun with {what}; give the same again, or --force to begin anew"
            )
        for name in ("units", "shards", "dataset"):
            shutil.rmtree(os.path.join(options.partial, name), ignore_errors=True)
    for name in ("units", "shards", "dataset"):
        os.makedirs(os.path.join(options.partial, name), exist_ok=True)
    write_json(path, settings)


def _any_shard(options: Options) -> bool:
    return any(name.endswith(".json") for name in os.listdir(os.path.join(options.partial, "shards")))


def _unit_path(options: Options, number: int) -> str:
    return os.path.join(options.partial, "units", str(number))


def _first_pass(options: Options, units: Sequence[Unit], workers: Workers, progress: Progress) -> None:
    left = [i for i in range(len(units)) if unit_facts(_unit_path(options, i)) is None]
    # Text is copied, and so are images that came inside of it; those of tars and files stay where they are.
    _check_space(options, sum(units[i].size for i in left if units[i].kind != "tar"))
    total = sum(unit.size for unit in units)
    reading = Reading(options.format, options.image_root)
    begun = total - sum(units[i].size for i in left)
    workers.stage([(units[i], _unit_path(options, i), reading) for i in left], begun, total, progress)


def _plan(options: Options, units: Sequence[Unit]) -> tuple[Staged, list[ShardPlan]]:
    """Return the counts of the first pass, and the shards to write."""
    facts = [unit_facts(_unit_path(options, i)) or {} for i in range(len(units))]
    indices = [unit_index(_unit_path(options, i)) for i in range(len(units))]
    positions = [fact["positions"] for fact in facts]
    bases: list[int] = np.cumsum([0, *positions]).tolist()
    places = Places([unit.path for unit in units], bases)
    staged = Staged(
        read=_read_of_files(units, facts),
        notes=sum((Counter(fact["notes"]) for fact in facts), Counter[str]()),
        shapes=sum((Counter(fact["shapes"]) for fact in facts), Counter[str]()),
        ignored=merge(zip([fact["ignored"] for fact in facts], bases, strict=False), places),
        places=places,
        logs=[(_unit_path(options, i) + ".losses", bases[i]) for i in range(len(units))],
    )
    rows = sample_rows(indices, positions)
    ids, contents = (np.concatenate([index[name] for index in indices]) for name in ("id", "content"))
    repeats, same_id = duplicates(ids, contents, options.duplicates)
    staged.logs.append((_log_duplicates(options, rows[repeats]), 0))
    if same_id:
        staged.notes["same id as an earlier sample, other content"] = same_id
    if repeats.all():
        rejections = _rejections(options, staged, [])
        shutil.rmtree(options.partial)
        raise ValueError(
            f"nothing that can be used in {', '.join(options.input)}; {staged.read.total()} records read; "
            f"{rejections}" + (f"; the first is {rejections.example}" if rejections.example else "")
        )
    try:
        plans = plan_shards(
            rows[~repeats], options.split, options.seed, options.shard_samples, options.shard_bytes
        )
    except ValueError as error:
        rejections = _rejections(options, staged, [])
        shutil.rmtree(options.partial)
        raise ValueError(f"{error}; {staged.read.total()} records read; {rejections}") from None
    return staged, plans


def _read_of_files(units: Sequence[Unit], facts: Sequence[dict[str, Any]]) -> Counter[str]:
    """Return the number of records by file, one without any among them."""
    read: Counter[str] = Counter()
    for unit, fact in zip(units, facts, strict=True):
        read[unit.path] += fact["read"]
    return read


def _log_duplicates(options: Options, rows: np.ndarray) -> str:
    path = os.path.join(options.partial, "duplicates.losses")
    with RejectionLog(path) as rejections:
        for row in rows:
            with open(_unit_path(options, int(row["unit"])) + ".jsonl", "rb") as file:
                file.seek(int(row["offset"]))
                identity = json.loads(file.readline())["extra"].get("id")
            rejections.add(DUPLICATE, int(row["ordinal"]), identity, "")
    return path


def _rejections(options: Options, staged: Staged, plans: Sequence[ShardPlan]) -> Rejections:
    """Count both passes' rejections, and write all of them to ``dropped.jsonl``."""
    rejections = Rejections()
    logs = staged.logs + [(rejections_of(_done(options, plan)), 0) for plan in plans]
    with open(os.path.join(_dataset(options), "dropped.jsonl"), "wb") as file:
        for rejection in read_logs(logs, staged.places):
            rejections.add(rejection)
            file.write(json.dumps(rejection, ensure_ascii=False).encode() + b"\n")
    return rejections


def _done(options: Options, plan: ShardPlan) -> str:
    return os.path.join(options.partial, "shards", plan.name + ".json")


def _dataset(options: Options) -> str:
    return os.path.join(options.partial, "dataset")


def _finished(options: Options, plan: ShardPlan) -> ShardFacts:
    facts = finished(plan, _dataset(options), _done(options, plan))
    assert facts is not None, f"{plan.name} was written and is gone"
    return facts


def _second_pass(options: Options, plans: Sequence[ShardPlan], workers: Workers, progress: Progress) -> None:
    left = [plan for plan in plans if finished(plan, _dataset(options), _done(options, plan)) is None]
    _check_space(options, sum(int((plan.rows["bytes"] + plan.rows["length"] + 2048).sum()) for plan in left))
    total = sum(len(plan.rows) for plan in plans)
    folders = (_dataset(options), os.path.join(options.partial, "units"))
    workers.write(
        [(plan, *folders, _done(options, plan), options.encoding) for plan in left],
        total - sum(len(plan.rows) for plan in left),
        total,
        progress,
    )


def _check_space(options: Options, needed: int) -> None:
    free = shutil.disk_usage(options.partial).free
    if needed * _SPARE > free:
        raise ValueError(
            f"--save-dir {options.save_dir}: {size_text(free)} are free there, about "
            f"{size_text(needed * _SPARE)} are needed; make room and run the same command again"
        )


def _finish(options: Options, shards: Sequence[ShardFacts], report: dict[str, Any]) -> None:
    dataset = _dataset(options)
    meta = os.path.join(dataset, ".nv-meta")
    # energon draws a new one each time; the same data has the same here.
    identity = uuid.uuid5(uuid.NAMESPACE_OID, "".join(f"{shard.name} {shard.hash}\n" for shard in shards))
    write_whole(os.path.join(meta, "index.uuid"), str(identity).encode())
    listed = {
        s.name: {
            "samples": s.samples,
            "bytes": s.bytes,
            "hash": s.hash,
            "ends": ends_hash(os.path.join(dataset, s.name)),
        }
        for s in shards
    }
    write_json(os.path.join(meta, PREPARED), {"version": VERSION, "hash": HASH, "shards": listed}, indent=1)
    write_json(os.path.join(dataset, REPORT), report, indent=1)
    write_whole(os.path.join(dataset, "report.md"), to_markdown(report).encode(errors="replace"))
    if os.path.isdir(options.save_dir):
        os.rename(options.save_dir, os.path.join(options.partial, f"replaced-{uuid.uuid4()}"))
    os.rename(dataset, options.save_dir)
    shutil.rmtree(options.partial)
