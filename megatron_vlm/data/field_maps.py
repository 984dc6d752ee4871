"""Field maps: a sample's question, answer and image, by the energon class that its folder was prepared
for."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml  # type: ignore[import-untyped]

from megatron_vlm.artifacts.dataset import FIELD_MAP, TEXT_ONLY_KEY, prepare_command
from megatron_vlm.data.conversations import checked_text
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.data.prepare.records.fields import with_options
from megatron_vlm.data.prepare.records.values import Rejected
from megatron_vlm.data.templates import SampleError, Turn

CHOICES, CORRECT = "choices", "correct_choice_idx"


@dataclass(frozen=True)
class SampleType:
    """A class of energon's whose samples are a question and an answer.

    Attributes:
        fields: what its fields are in a :class:`FieldMap`; all of them have to be mapped, others are left
            alone.
        question: what is asked where no field does; empty: for a caption, in the run's language.
    """

    fields: Mapping[str, str]
    question: str = ""


_VQA = SampleType({"image": "image", "context": "context", "answers": "answers"})
SAMPLE_TYPES = {
    "VQASample": _VQA,
    "VQAOCRSample": _VQA,
    "CaptioningSample": SampleType({"image": "image", "caption": "answers"}),
    "OCRSample": SampleType({"image": "image", "text": "answers"}, "What is written in the image?"),
    "MultiChoiceVQASample": SampleType(
        {"image": "image", "context": "context", CHOICES: CHOICES, CORRECT: CORRECT}
    ),
}
# What is trained here is an answer, to a question about images or text.
NOT_TRAINED = {
    "TextSample": "has no question",
    "InterleavedSample": "has no question",
    "SimilarityInterleavedSample": "has no question",
    "ImageSample": "has no text",
    "ImageClassificationSample": "has a class in place of an answer",
    "VidQASample": "has a video file, which isn't read",
}


@dataclass(frozen=True)
class FieldMap:
    """The file of a sample that holds each field, in energon's notation.

    Attributes:
        access: of ``image``, ``context`` and ``answers``, or ``choices`` and ``correct_choice_idx``.
        question: what is asked where ``context`` is not among them.
    """

    access: Mapping[str, str] = field(default_factory=lambda: dict(FIELD_MAP))
    question: str = ""

    @property
    def files(self) -> set[str]:
        """The suffixes of the files that are read, which follow a sample's key."""
        return {option[0] for access in self.access.values() for option in _options(access)}

    def read(self, key: str, parts: Mapping[str, bytes]) -> tuple[list[Turn], dict[str, list[bytes]]]:
        """Return a question, its answer and at most one image, which comes first unless the question marks
        its place.

        Raises:
            SampleError: a file is missing or malformed; of kind ``corrupt``.
        """
        question = self.question
        if "context" in self.access:
            question = _text(parts, self.access["context"], default="")
        if CHOICES in self.access:
            question, answer = self._choice(parts, question)
        else:
            answer = _text(parts, self.access["answers"])
        images: list[bytes] = []
        if TEXT_ONLY_KEY not in key:
            options = _options(self.access["image"])
            images = [parts[option[0]] for option in options if option[0] in parts][:1]
        files = {IMAGE.name: images} if images else {}
        return [Turn("user", question), Turn("assistant", answer)], files

    def _choice(self, parts: Mapping[str, bytes], question: str) -> tuple[str, str]:
        """Return the question with its choices below it, and the letter of the right one."""
        choices, correct = (_value(parts, self.access[name]) for name in (CHOICES, CORRECT))
        try:
            number = int(correct)
            if isinstance(choices, str) or not 0 <= number < len(choices) <= len(string.ascii_uppercase):
                raise ValueError(f"choice {number} of {choices!r}"[:200])
            texts = [checked_text(choice, "a choice") for choice in choices]
            options = dict(zip(string.ascii_uppercase, texts, strict=False))
            asked, _ = with_options(question, string.ascii_uppercase[number], options)
        except (TypeError, ValueError, Rejected) as error:
            raise SampleError(f"its choices can't be read ({error})", kind="corrupt") from None
        return str(asked), string.ascii_uppercase[number]


def read_field_map(path: str) -> FieldMap | None:
    """Read a folder's field map: from ``dataset.yaml``, as data, never run. None where it has none.

    Raises:
        ValueError: the file is damaged, or its samples are no questions and answers; says what would work.
    """
    file_name = os.path.join(path, ".nv-meta", "dataset.yaml")
    config: Any = {}
    if os.path.isfile(file_name):
        try:
            with open(file_name, encoding="utf-8") as file:
                config = yaml.safe_load(file) or {}
        except (yaml.YAMLError, UnicodeDecodeError):
            config = None
    accesses = config.get("field_map") if isinstance(config, dict) else ()
    if accesses is not None and not (
        isinstance(accesses, dict) and all(isinstance(access, str | int) for access in accesses.values())
    ):
        raise ValueError(f"{file_name}: damaged; run: {prepare_command(path)}")
    name = _sample_type(config)
    if name in NOT_TRAINED:
        raise ValueError(
            f"--data-path {path}: it was prepared for {name}, which {NOT_TRAINED[name]}; training reads "
            f"{', '.join(SAMPLE_TYPES)} and conversations, which scripts/data/prepare.py makes of records"
        )
    kind = SAMPLE_TYPES.get(name, _VQA)  # a class of one's own may have these fields too
    missing = [name for name in kind.fields if accesses and name not in accesses]
    if missing or config.get("sample_loader"):
        what = f"its field map lacks {', '.join(missing)}" if missing else "it has a sample_loader"
        raise ValueError(
            f"--data-path {path}: {what}, and training reads question-answer samples by a field map; "
            f"run: {prepare_command(path)}"
        )
    if not accesses:
        return None
    return FieldMap({role: str(accesses[name]) for name, role in kind.fields.items()}, kind.question)


def _sample_type(config: Mapping[str, Any]) -> str:
    """Return the name of the sample's class; older folders name the one of the whole dataset, such as
    ``CaptioningWebdataset``."""
    given = config.get("sample_type", config)
    name = given.get("__class__", "VQASample") if isinstance(given, dict) else "VQASample"
    return str(name).replace("Webdataset", "Sample")


def _options(access: str) -> list[list[str]]:
    """Parse ``"json[a][b],txt"`` to ``[["json", "a", "b"], ["txt"]]``: alternatives, the first that is
    there."""
    return [option.replace("]", "").split("[") for option in access.split(",")]


def _text(parts: Mapping[str, bytes], access: str, default: str | None = None) -> str:
    value = _value(parts, access, default)
    if isinstance(value, list) and value:  # several accepted answers: the first is the one to learn
        value = value[0]
    return checked_text(value, f"its {access}")


def _value(parts: Mapping[str, bytes], access: str, default: str | None = None) -> Any:
    for name, *path in _options(access):
        if name not in parts:
            continue
        try:
            value: Any = parts[name].decode("utf-8")
            if name.endswith("json"):
                value = json.loads(value)
            for step in path:
                value = value[int(step) if isinstance(value, list) else step]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            message = f"{type(error).__name__}: {error}"
            raise SampleError(f"its {access} can't be read ({message})", kind="corrupt") from None
        return value
    if default is not None:
        return default
    raise SampleError(f"it has no {access}", kind="corrupt")
