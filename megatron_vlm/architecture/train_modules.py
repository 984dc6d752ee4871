"""The entries of ``--train-modules``: the parts that are trained, each at a learning rate of its own.

    projector:1e-3|language:2e-5|vision.last_block:2e-6

The syntax is Ovis' ``train_modules`` (https://github.com/AIDC-AI/Ovis). What no entry names is frozen;
where two entries name one parameter, the later one has it. An entry without a rate takes ``--lr``.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Dict, Iterable, List, Optional, Tuple

from megatron_vlm.architecture.model import ModelConfig

# Parameters are known by the names that checkpoints and their manifests have for them.
VISION, PROJECTOR, LANGUAGE = "vision_model.", "vision_projection.", "language_model."
_PARTS: Dict[str, Tuple[str, ...]] = {
    "all": ("*",),
    "projector": (f"{PROJECTOR}*",),
    "vision": (f"{VISION}*",),
    "vision.embeddings": tuple(
        f"{VISION}{name}" for name in ("class_token", "conv1.*", "position_embeddings.*")
    ),
    "vision.layers": (f"{VISION}decoder.layers.*",),
    "vision.last_block": (),  # its number is the model's
    "language": (f"{LANGUAGE}*",),
    "language.embedding": (f"{LANGUAGE}embedding.*",),
    "language.layers": (f"{LANGUAGE}decoder.layers.*",),
    "language.output_layer": (f"{LANGUAGE}output_layer.*",),
    "lora": ("*.lora_[AB].weight",),
}
_LAYERS = re.compile(r"(vision|language)\.layers\.(\d+)(?:-(\d+))?")
# What Ovis calls a part that LLaVA has too.
_ALIASES = {
    "llm": "language",
    "visual_tokenizer.vit": "vision",
    "visual_tokenizer.vit.last_block": "vision.last_block",
}
# Ovis' head and visual embedding table stand where LLaVA has one projector.
_NEAREST = {"visual_tokenizer": "vision|projector", "visual_tokenizer.head": "projector", "vte": "projector"}


@dataclass(frozen=True)
class TrainEntry:
    """One entry: a part of the model, or a pattern on parameter names.

    Attributes:
        name: of :data:`_PARTS`, layers such as ``language.layers.0-3``, or a pattern.
        lr: its highest learning rate; None: that of ``--lr``.
    """

    name: str
    lr: Optional[float] = None

    def __str__(self) -> str:
        return self.name if self.lr is None else f"{self.name}:{self.lr!r}"

    @property
    def is_pattern(self) -> bool:
        """Return whether the name is a pattern on parameter names."""
        return _is_pattern(self.name)

    def may_train(self, part: str) -> bool:
        """Return whether the entry reaches into ``"vision"`` or ``"language"``, as far as its name tells."""
        if self.is_pattern:
            return not self.name.startswith((VISION, PROJECTOR, LANGUAGE)) or self.name.startswith(f"{part}_")
        return self.name == "all" or self.name.partition(".")[0] == part

    def patterns(self, model: ModelConfig) -> Tuple[str, ...]:
        """Return the shell-style patterns that cover the entry's parameters.

        Raises:
            ValueError: the model has no such layers, or no output layer of its own.
        """
        if self.is_pattern:
            return (self.name,)
        # Features may come from an inner layer: the blocks after it aren't run, so they can't be trained.
        counts = {"vision": model.num_vision_layers_run, "language": model.language.num_layers}
        if self.name == "vision.last_block":
            if not counts["vision"]:
                raise ValueError("--train-modules: vision.last_block: this model runs no block of its tower")
            return (f"{VISION}decoder.layers.{counts['vision'] - 1}.*",)
        if self.name == "language.output_layer" and model.language.tie_word_embeddings:
            raise ValueError(
                "--train-modules: the output layer of this model is its embedding; use language.embedding"
            )
        layers = _LAYERS.fullmatch(self.name)
        if layers is None:
            return _PARTS[self.name]
        part, first = layers[1], int(layers[2])
        last = int(layers[3] or first)
        if not first <= last < counts[part]:
            raise ValueError(
                f"--train-modules: {self.name}: layers 0 to {counts[part] - 1} of the {part} model are run"
            )
        prefix = VISION if part == "vision" else LANGUAGE
        return tuple(f"{prefix}decoder.layers.{number}.*" for number in range(first, last + 1))


def parse_train_modules(text: str) -> Tuple[TrainEntry, ...]:
    """Read the flag's value.

    Raises:
        ValueError: an entry is empty or given twice, names no part, or has a rate that isn't a number
            above 0.
    """
    entries: List[TrainEntry] = []
    for item in text.split("|"):
        name, _, rate = (word.strip() for word in item.partition(":"))
        if not name:
            raise ValueError(f"--train-modules {text!r}: an entry has no name; write name[:lr]|name[:lr]")
        name = _ALIASES.get(name, name)
        if not (_is_pattern(name) or name in _PARTS or _LAYERS.fullmatch(name)):
            raise ValueError(f"--train-modules: there is no part {name!r}{_suggestion(name)}")
        if any(entry.name == name for entry in entries):
            raise ValueError(f"--train-modules names {name} twice; give it one learning rate")
        entries.append(TrainEntry(name, _rate(name, rate) if ":" in item else None))
    return tuple(entries)


def preset(freeze_lm: bool, train_vision: bool) -> Tuple[TrainEntry, ...]:
    """Return the entries that ``--stage``, ``--freeze-lm`` and ``--train-vision`` stand for: the projector
    always.

    LLaVA's stage 1 trains the projector alone, stage 2 the language model too; the tower is frozen in
    both (Liu et al., https://arxiv.org/abs/2304.08485).
    """
    names = ["projector"] + ["language"] * (not freeze_lm) + ["vision"] * train_vision
    return tuple(TrainEntry(name) for name in names)


def assign(
    entries: Tuple[TrainEntry, ...], model: ModelConfig, names: Iterable[str]
) -> Dict[str, TrainEntry]:
    """Return the entry that trains each parameter; parameters that none trains are left out.

    Args:
        names: of all parameters, as checkpoints name them.

    Raises:
        ValueError: an entry has no parameter; the message says what it could name instead.
    """
    names = list(names)
    assigned: Dict[str, TrainEntry] = {}
    matched = set()
    for entry in entries:
        patterns = entry.patterns(model)
        for name in names:
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                assigned[name] = entry
                matched.add(entry)
    for entry in entries:
        if entry not in matched:
            near = difflib.get_close_matches(entry.name, names, n=3, cutoff=0.0)
            raise ValueError(
                f"--train-modules: {entry.name} matches no parameter; there are {', '.join(near)}"
            )
        if entry not in assigned.values():
            raise ValueError(
                f"--train-modules: later entries take all parameters of {entry.name}; leave it out, "
                "or put it after them"
            )
    for name in names:
        weight = f"{name.partition('.adapters.')[0]}.weight"
        if ".adapters." in name and weight in assigned:
            raise ValueError(
                f"--train-modules: {assigned[weight].name} trains {weight}, which has adapters beside it; "
                "leave it or --lora-rank out"
            )
    return assigned


def _is_pattern(name: str) -> bool:
    return any(c in name for c in "*?[") or name.startswith((VISION, PROJECTOR, LANGUAGE))


def _rate(name: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0.0 < rate < math.inf:
        raise ValueError(
            f"--train-modules {name}:{text}: the learning rate must be a number above 0; "
            f"leave {name} out to freeze it"
        )
    return rate


def _suggestion(name: str) -> str:
    if name in _NEAREST:
        return f"; what Ovis calls so is {_NEAREST[name]} here"
    layers = ["vision.layers.0-3", "language.layers.0-3"]
    near = difflib.get_close_matches(name, [*_PARTS, *layers], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{hint}; there are {', '.join([*_PARTS, *layers])}, and patterns such as '*.layernorm*'"
