"""Questions for the model: read from flags or a file, and rendered as training rendered its samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import HF_FOLDER, RUN_CONFIG
from megatron_vlm.artifacts.end_tokens import end_tokens, with_end_token
from megatron_vlm.config.generation import GenerationConfig, PromptSection
from megatron_vlm.config.run import RunConfig
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.data.processing import build_processing
from megatron_vlm.data.templates import SampleError
from megatron_vlm.inference.generator import Prompt
from megatron_vlm.plan.start import saved_config

_KEYS = ("prompt", "image")
_CARRIED = ("id", "question_id", "meta")  # of no meaning here, written beside the answer
_EXAMPLE = '{"prompt": "What is this?", "image": "a.jpg"}'
_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Question:
    """One question, as it was given."""

    where: str  # names it in messages
    text: str
    images: tuple[Path, ...]
    fields: dict[str, Any]  # what its answer is written beside

    @property
    def files(self) -> dict[str, tuple[Path, ...]]:
        """The files of the question's media, by kind."""
        return {IMAGE.name: self.images} if self.images else {}


def read_questions(prompts: PromptSection) -> list[Question]:
    """Return the questions of the flags, or of each line of ``--input``.

    Image files are looked for beside the input file, unless their paths are absolute.

    Raises:
        ValueError: a line is malformed, or names an image that isn't there.
    """
    if prompts.input is None:
        text = prompts.prompt or ""
        images = tuple(Path(path) for path in prompts.image)
        fields = {"prompt": text, **({"image": list(prompts.image)} if images else {})}
        return [Question("--prompt", text, images, fields)]
    path = Path(prompts.input)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--input {path}: cannot be read ({error})") from None
    questions = []
    for number, line in enumerate(lines):
        if line.strip():
            questions.append(_read_line(f"{path} line {number + 1}", line, path.parent))
    if not questions:
        raise ValueError(f"--input {path}: it holds no questions")
    return questions


def _read_line(where: str, line: str, folder: Path) -> Question:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected an object such as {_EXAMPLE}")
    unread = [key for key in fields if key not in (*_KEYS, *_CARRIED)]
    if unread:
        raise ValueError(
            f"{where}: nothing reads {', '.join(map(repr, unread))}; a question has {' and '.join(_KEYS)}, "
            f"and {', '.join(_CARRIED)}, which are written beside its answer: meta may hold anything"
        )
    if not any(key in fields for key in _KEYS):
        raise ValueError(f"{where}: expected an object such as {_EXAMPLE}")
    text, images = fields.get("prompt", ""), fields.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(text, str):
        raise ValueError(f"{where}: prompt is {text!r}; expected a text")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"{where}: image is {images!r}; expected a file or a list of files")
    files = tuple(folder / image for image in images)
    for file in files:
        if not file.is_file():
            raise ValueError(f"{where}: image {file}: no such file")
    return Question(where, text, files, fields)


class Questions:
    """The checked questions, and the parts that turn them into prompts: the tokenizer, template and image
    processor of the training run.

    Args:
        checkpoint: the checkpoint's folder. What the flags leave out is as the run that wrote it was told.

    Raises:
        ValueError: tokenizer, template or image processor is missing or doesn't fit the model, or a
            question is malformed, too long, or names an image that isn't there.
    """

    def __init__(self, config: GenerationConfig, checkpoint: Path, model: ModelConfig) -> None:
        self.raw = config.prompts.raw_prompt
        self.positions = model.language.max_position_embeddings
        if model.language.sliding_window is not None:
            self.positions = min(self.positions, model.language.sliding_window)
        run = _training_config(config, checkpoint, self.positions)
        self.processing = build_processing(run, model, str(checkpoint / HF_FOLDER))
        named = end_tokens(checkpoint / HF_FOLDER, self.processing.tokenizer.eos_token_id)
        self.end_tokens = with_end_token(named, self.processing.template.end_token_id)
        self.questions = read_questions(config.prompts)
        self.input_ids = [self._encode(question) for question in self.questions]
        self.max_new_tokens = self._max_new_tokens(config.sampling.max_new_tokens)

    def __len__(self) -> int:
        return len(self.questions)

    def encode(self, numbers: Sequence[int]) -> list[Prompt]:
        """Return these questions as prompts that the model takes.

        Raises:
            ValueError: an image can't be decoded.
        """
        return [self._prompt(n, self.questions[n]) for n in numbers]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return an answer's text, without its end token, which the tokenizer may not know for a special
        token."""
        tokens = tokens[:-1] if tokens and tokens[-1] in self.end_tokens else tokens
        text: str = self.processing.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def _encode(self, question: Question) -> list[int]:
        try:
            opened = self._open(question)
            sizes = {kind: self.processing.readers[kind].sizes(own) for kind, own in opened.items()}
            ids = self.processing.encode_prompt(question.text, sizes, self.raw)
        except SampleError as error:
            raise ValueError(f"{question.where}: {error}") from None
        if not ids:
            raise ValueError(f"{question.where}: it has no tokens")
        return ids

    def _max_new_tokens(self, wanted: int | None) -> int:
        """Return the number of tokens that fit after the longest question, if the flags name none."""
        longest = max(range(len(self)), key=lambda number: len(self.input_ids[number]))
        length = len(self.input_ids[longest])
        left = self.positions - length
        if left < (wanted or 1):
            advice = f"use --max-new-tokens {left}" if left > 0 else "ask something shorter"
            raise ValueError(
                f"{self.questions[longest].where}: {length} tokens and {wanted or 1} new ones are more than "
                f"the model's {self.positions} positions; {advice}"
            )
        return wanted or min(_MAX_NEW_TOKENS, left)

    def _open(self, question: Question) -> dict[str, list[Any]]:
        opened: dict[str, list[Any]] = {}
        for kind, paths in question.files.items():
            for path in paths:
                try:
                    opened.setdefault(kind, []).extend(self.processing.open({kind: [path]})[kind])
                except SampleError as error:
                    raise ValueError(f"{path}: {error}") from None
        return opened

    def _prompt(self, number: int, question: Question) -> Prompt:
        media = {}
        for kind, opened in self._open(question).items():
            reader = self.processing.readers[kind]
            try:
                decoded = reader.decoded(reader.media(opened), opened)
            except SampleError as error:
                files = ", ".join(map(str, question.files[kind]))
                raise ValueError(f"{files}: {error}") from None
            media[kind] = replace(decoded, tensors=reader.finish(decoded.tensors, torch.float32))
        return Prompt(number, self.input_ids[number], media)


def _training_config(config: GenerationConfig, checkpoint: Path, positions: int) -> RunConfig:
    """Return the settings of text: those of the checkpoint's run, if it is of one, and those that the
    flags give."""
    source, of_a_run = config.source, (checkpoint / RUN_CONFIG).is_file()
    run = saved_config(checkpoint) if of_a_run else RunConfig.from_dict({})
    tokenizer_dir = source.tokenizer_load_dir or run.model.tokenizer_load_dir
    if source.tokenizer_load_dir is None and not Path(tokenizer_dir or "").is_dir():
        tokenizer_dir = None  # the run's own is gone; the checkpoint carries one
    return replace(
        run,
        model=replace(run.model, tokenizer_load_dir=tokenizer_dir),
        data=replace(
            run.data,
            template=source.template or run.data.template,
            lang=source.lang or run.data.lang,
            image_orientation=source.image_orientation or run.data.image_orientation,
            image_alpha=source.image_alpha or run.data.image_alpha,
            seq_length=positions,
        ),
    )
