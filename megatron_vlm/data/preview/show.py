"""The samples that the flags of scripts/data/preview.py choose, printed or written as a page."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import HF_FOLDER, checkpoint_layers, read_model
from megatron_vlm.config.preview import PreviewConfig, PreviewSection
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.dataset import RawSample
from megatron_vlm.data.mixture import Mixture, Source
from megatron_vlm.data.preview.page import page
from megatron_vlm.data.preview.text import terminal
from megatron_vlm.data.preview.views import View, look
from megatron_vlm.data.processing import Processing, build_processing
from megatron_vlm.plan.start import first_image_rule
from megatron_vlm.system.files import write_whole


def show(config: PreviewConfig) -> int:
    """Print the samples that the flags choose, or write the page; returns the exit code.

    Raises:
        ValueError: dataset, model or tokenizer can't be used; the message names the flag.
    """
    if config.run.data.data_path is None:
        raise ValueError("--data-path is missing: a folder prepared by energon")
    model, hf_dir = _model(config.run)
    data = config.run.data.with_image_rule(first_image_rule(config.run))
    processing = build_processing(dataclasses.replace(config.run, data=data), model, hf_dir)
    mixture = Mixture.open(config.run.data.data_path, config.preview.split)
    processings = mixture.processings(processing)
    views = []
    for number, raw in _chosen(mixture, config.preview, config.run.training.seed):
        source = mixture.sources[number]
        view = look(source.dataset, processings[number], raw)
        views.append(dataclasses.replace(view, shard=os.path.join(source.name, view.shard)))
    about = _about(config.run, processings, views)
    if config.preview.html is not None:
        write_whole(
            Path(config.preview.html), page(views, about, config.run.data.seq_length, config.preview.ids)
        )
        print(f"{config.preview.html}: {about['samples']}", file=sys.stderr)
    if config.preview.json:
        values = {**about, "views": [to_json(view) for view in views]}
        print(json.dumps(values, ensure_ascii=False, indent=2))
    elif config.preview.html is None:
        colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for view in views:
            print(terminal(view, colored, config.preview.ids), end="\n\n")
        print("\n".join(f"{name}: {value}" for name, value in about.items()))
    return 0


def to_json(view: View) -> dict[str, Any]:
    """Return a view as JSON values; pixels are left out."""
    return {
        "key": view.key,
        "shard": view.shard,
        "state": view.state,
        "reason": view.reason,
        "turns": [dataclasses.asdict(turn) for turn in view.turns],
        "written": view.written,
        "text": "".join(piece.text for piece in view.pieces),
        "pieces": [
            {
                "text": piece.text,
                "tokens": len(piece.tokens),
                "trained": piece.trained,
                "image": piece.picture,
            }
            for piece in view.pieces
        ],
        "images": [
            {
                "size": [picture.width, picture.height],
                "tokens": picture.tokens,
                "grid": list(picture.grid),
                "fed": [list(tile.shape) for tile in picture.tiles],
            }
            for picture in view.pictures
        ],
        "tokens": view.num_tokens,
        "trained_tokens": view.num_trained,
        "image_tokens": view.num_image_tokens,
        "truncated": view.sample is not None and view.sample.truncated,
        "input_ids": view.sample.input_ids if view.sample else [],
        "labels": view.sample.labels if view.sample else [],
    }


def _chosen(mixture: Mixture, choice: PreviewSection, seed: int) -> Iterator[tuple[int, RawSample]]:
    """Yield samples, of each dataset as many as the flags say, with the dataset's number."""
    for key in choice.keys:
        found = [
            (number, raw) for number, source in enumerate(mixture.sources) for raw in _named(source, key)
        ]
        if not found:
            raise ValueError(f"--data-path {mixture.path}: there is no sample {key}")
        yield from found
    for number, source in enumerate(mixture.sources) if not choice.keys else ():
        numbers = list(range(source.start, source.end))
        if choice.shuffle:
            random.Random(seed).shuffle(numbers)
        chosen = numbers[choice.skip : choice.skip + choice.samples]
        if not chosen:
            where = f" of {source.name}" if source.name else ""
            raise ValueError(
                f"--skip {choice.skip}: the {choice.split} split{where} has {source.num_samples} samples"
            )
        for raw in source.dataset.pick(chosen):
            yield number, raw


def _named(source: Source, key: str) -> Sequence[RawSample]:
    try:
        return list(source.dataset.pick([key]))
    except ValueError:
        return ()


def _model(config: RunConfig) -> tuple[ModelConfig, str | None]:
    """Return the model that is trained, and the Hugging Face files that its checkpoint carries."""
    if config.model.megatron_load_dir is not None:
        folder = checkpoint_layers(config.model.megatron_load_dir, config.model.base, "--megatron-load-dir")[
            -1
        ]
        return read_model(folder), str(folder / HF_FOLDER)
    if config.model.tokenizer_load_dir is None:
        raise ValueError(
            "--tokenizer-load-dir is missing: the Hugging Face folder of the model, or a checkpoint"
        )
    return ModelConfig.from_hf_dir(config.model.tokenizer_load_dir, "--tokenizer-load-dir"), None


def _about(config: RunConfig, processings: Sequence[Processing], views: Sequence[View]) -> dict[str, str]:
    """Return the facts below the samples: what was looked at, and what came of it, one line each."""
    states = Counter(view.state for view in views)
    used = [view for view in views if view.sample is not None]
    cut = sum(view.sample is not None and view.sample.truncated for view in used)
    tokens, trained = sum(view.num_tokens for view in used), sum(view.num_trained for view in used)
    images = sum(view.num_image_tokens for view in used)
    counts = [f"{states['used']} used" + (f" ({cut} cut off)" if cut else "")]
    counts += [f"{states[name]} {name}" for name in ("dropped", "corrupt") if states[name]]
    return {
        "samples": f"{len(views)}: {', '.join(counts)}",
        "tokens": f"{tokens:,}: {trained:,} trained, {images:,} of images",
        "template": ", ".join(dict.fromkeys(each.template.name for each in processings)),
        "tokenizer": processings[0].tokenizer.name_or_path,
        "data": str(config.data.data_path),
        "images": str(processings[0].images.rule),
        "--seq-length": f"{config.data.seq_length}",
    }
