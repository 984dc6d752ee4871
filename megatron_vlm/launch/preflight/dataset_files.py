"""Checks that a dataset is prepared, whole and not empty, made without energon."""

from __future__ import annotations

import os
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from megatron_vlm.architecture.train_modules import TrainEntry
from megatron_vlm.artifacts.dataset import (
    PreparedShard,
    index_problem,
    meta_problems,
    not_prepared,
    prepare_command,
    prepared_shards,
    samples_end,
    shard_counts,
    split_parts,
    split_samples,
    train_images,
)
from megatron_vlm.artifacts.image_rule import LOADED
from megatron_vlm.artifacts.mixture import MixtureConfig, data_folders, is_mixture
from megatron_vlm.artifacts.token_lengths import ShortestSample
from megatron_vlm.config.sections.data import DataSection
from megatron_vlm.system.units import count_text


def dataset_problems(path: str) -> Iterator[str]:
    """Yield why ``path`` is no prepared energon dataset with samples, or no mixture of such.

    Raises:
        ValueError: the mixture's file, or what ``energon prepare`` has written, is damaged.
    """
    if not is_mixture(path):
        yield from _folder_problems(path)
        return
    for source in MixtureConfig.load(path).sources:
        try:
            problems = list(_folder_problems(source.path, needs_train=source.train))
        except ValueError as error:
            problems = [str(error)]
        for problem in problems:
            yield f"--data-path {path}: dataset {source.name}: " + problem.replace("--data-path ", "", 1)


def _folder_problems(path: str, needs_train: bool = True) -> Iterator[str]:
    if not os.path.isfile(os.path.join(path, ".nv-meta", ".info.json")):
        yield not_prepared(path)
        return
    counts = shard_counts(path)
    if not sum(counts.values()):
        yield f"--data-path {path}: its shards hold no samples"
    elif needs_train and split_samples(path) == 0:
        yield (
            f"--data-path {path}: its train split is empty ({len(counts)} shards; energon splits by whole "
            f"shards); write more shards, or prepare again: {prepare_command(path, '1,0,0')}"
        )
    for problem in meta_problems(path):
        yield f"--data-path {path}: .nv-meta/{problem}; bring it back, or run: {prepare_command(path)}"
    named = {name for names in (split_parts(path) or {}).values() for name in names}
    for name in sorted(named - set(counts)) if counts else ():
        yield f"--data-path {path}: {name} is of a split, and was never indexed; run: {prepare_command(path)}"
    found: Dict[str, List[str]] = {}
    prepared = prepared_shards(path)
    for name, samples in counts.items():
        state = _shard_state(os.path.join(path, name), samples, prepared.get(name))
        if state:
            found.setdefault(state, []).append(name)
    for state, names in found.items():
        some = f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
        yield f"--data-path {path}: shard {some} {state}; bring it back, or run: {prepare_command(path)}"


def index_doubts(path: str) -> Iterator[str]:
    """Yield what is wrong with energon's index of samples, with which training only looks for exchanged
    shards."""
    for folder in data_folders(path):
        problem = index_problem(folder)
        if problem:
            yield (
                f"--data-path {path}: {os.path.join(folder, '.nv-meta', '')}{problem}; training goes without "
                f"it, and can't tell whether shards are those that were prepared; run: "
                f"{prepare_command(folder)}"
            )


def length_problems(
    path: str, data: DataSection, image_tokens: int, tokenizer_load_dir: Optional[str]
) -> Tuple[List[str], List[str]]:
    """Return the datasets of which no sample fits into ``--seq-length``, by prepare.py's report.

    Args:
        image_tokens: of the smallest image.
        tokenizer_load_dir: of the run.

    Returns:
        What surely is so, and what was counted with another tokenizer or template, or perhaps was.
    """
    errors: List[str] = []
    doubts: List[str] = []
    sources = MixtureConfig.load(path).of_split("train") if is_mixture(path) else ()
    own: List[Tuple[str, str, Mapping[str, str]]] = [
        (f"dataset {source.name}: ", source.path, source.options) for source in sources
    ]
    for name, folder, options in own or [("", path, {})]:
        least = ShortestSample.read(folder)
        if least is None:
            continue
        if least.images * image_tokens >= data.seq_length:
            errors.append(
                f"--data-path {path}: {name}no sample fits into --seq-length {data.seq_length}: each has "
                f"{count_text(least.images, 'image')} or more, of {count_text(image_tokens, 'token')} or "
                "more; give a larger one"
            )
        elif (
            options.get("overlong", data.overlong) == "drop"
            and least.tokens is not None
            and least.tokens > data.seq_length
        ):
            problem = (
                f"--data-path {path}: {name}every sample is longer than --seq-length {data.seq_length}, and "
                f"--overlong drop leaves them all out; the shortest has {count_text(least.tokens, 'token')}, "
                f"as prepare.py counted them with {least.tokenizer_load_dir}: give as many, or --overlong "
                "truncate"
            )
            template = options.get("template", data.template)
            others = options.keys() - {"overlong", "template"}
            as_there = not others and data.image_rule() == LOADED
            sure = as_there and least.counted_like(tokenizer_load_dir, template, data.lang)
            (errors if sure else doubts).append(problem)
    return errors, doubts


def held_out_problems(path: str) -> Iterator[str]:
    """Yield why there are no samples for evaluations, as far as splits tell that can be read without YAML."""
    if is_mixture(path):
        parts = [split_parts(source.path) for source in MixtureConfig.load(path).of_split("val")]
        if all(part is not None and not part.get("val") for part in parts):
            yield (
                f"--eval-interval needs held-out samples, and no dataset of --data-path {path} has a val "
                "split with samples; leave it out, or prepare one with more shards"
            )
        return
    own = split_parts(path)
    if own is not None and not own.get("val"):
        yield (
            f"--eval-interval needs held-out samples, and the val split of --data-path {path} is empty; "
            f"leave it out, or write more shards and prepare again: {prepare_command(path)}"
        )


def image_problems(path: str, trained: Sequence[TrainEntry]) -> Iterator[str]:
    """Yield why nothing would be trained: no sample has an image, by the counts of scripts/data/prepare.py.

    Args:
        trained: the parts that are; adapters are taken to be the language model's.
    """
    if any(entry.name == "lora" or entry.may_train("language") for entry in trained):
        return
    sources = [s.path for s in MixtureConfig.load(path).of_split("train")] if is_mixture(path) else [path]
    if all(train_images(source) == 0 for source in sources):
        parts = " and ".join(entry.name for entry in trained)
        yield (
            f"--data-path {path}: no training sample has an image, so that {parts} would get no gradient; "
            "give data with images, or train the language model, too (--stage 2)"
        )


def _shard_state(path: str, samples: int, prepared: Optional[PreparedShard]) -> str:
    """Return what is wrong with a shard, by the index that prepare wrote beside it and its notes."""
    try:
        size = os.stat(path).st_size
    except OSError:
        return "gone since it was prepared"
    if not os.access(path, os.R_OK):
        return "not readable by you"
    end = samples_end(path, samples)
    if end is None:
        return "without its index, the .idx beside it, or with a damaged one"
    if size < end:
        return "cut off since it was prepared"
    return "not the file that was prepared" if prepared and prepared.difference(path) else ""
