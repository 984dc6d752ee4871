"""Mixtures: which datasets a run reads, in which proportions and how; a YAML file that ``--data-path`` names.

Launcher and training read it with the same parser, of the part of YAML that such a file needs, since a
launcher may have no PyYAML.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from megatron_vlm.architecture.connectors.anyres import ASPECT_RATIOS
from megatron_vlm.artifacts.dataset import split_samples
from megatron_vlm.artifacts.templates import TEMPLATES
from megatron_vlm.system.yaml_subset import Value, read_yaml

OPTIONS = ("template", "lang", "overlong", "mask_thinking", "image_aspect_ratio")
_NAME = re.compile(r"\w[\w.-]*")


def is_mixture(path: str) -> bool:
    """Return whether ``--data-path`` names a mixture and not a dataset's folder."""
    return path.endswith((".yaml", ".yml"))


@dataclass(frozen=True)
class Subset:
    """Consecutive samples of a split, the end left out.

    Attributes:
        start, end: samples, or parts of the split as fractions; an ``end`` of None is the split's.
    """

    start: Union[int, Fraction] = 0
    end: Union[int, Fraction, None] = None

    def bounds(self, total: int) -> Tuple[int, int]:
        """Return the first sample and the one after the last, of a split of ``total``; parts are rounded
        down, so that [0%, 30%] and [30%, 100%] share no sample and miss none.

        Raises:
            ValueError: the split has not so many samples, or none is left.
        """
        start, end = (
            int(bound * total) if isinstance(bound, Fraction) else bound
            for bound in (self.start, total if self.end is None else self.end)
        )
        if end > total:
            raise ValueError(f"subset {self} reaches beyond its {total} samples")
        if start >= end:
            raise ValueError(f"subset {self} of its {total} samples is empty")
        return start, end

    def __str__(self) -> str:
        return f"[{_bound_text(self.start)}, {'end' if self.end is None else _bound_text(self.end)}]"


def _bound_text(bound: Union[int, Fraction]) -> str:
    return f"{float(bound * 100):g}%" if isinstance(bound, Fraction) else str(bound)


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of a mixture.

    Attributes:
        name: in metrics and messages.
        path: the prepared folder.
        weight: its share of the samples that are drawn is this over the sum of all; None with epochs.
        epochs: how often each of its samples comes in one pass over the mixture; None with weights.
        subset: the part of its train split that is trained on.
        train, val: whether it is trained on, and evaluated on.
        options: what :data:`OPTIONS` names, with values of its own.
    """

    name: str
    path: str
    weight: Optional[float]
    epochs: Optional[int]
    subset: Subset
    train: bool
    val: bool
    options: Dict[str, Any]

    @property
    def passes(self) -> int:
        """The number of times that each sample counts in one pass over the mixture."""
        return self.epochs or 1

    def __str__(self) -> str:
        """Return the source's settings that the order of samples, and what is made of them, depend on."""
        parts = [f"epochs {self.passes}" if self.weight is None else f"weight {self.weight:g}"]
        parts += [f"subset {self.subset}"] if self.subset != Subset() else []
        return ", ".join(parts + [f"{key} {value}" for key, value in self.options.items()])


@dataclass(frozen=True)
class MixtureConfig:
    """The datasets of a mixture, in the file's order."""

    path: str
    sources: Tuple[SourceConfig, ...]

    @classmethod
    def load(cls, path: str) -> MixtureConfig:
        """Read a mixture from its file.

        Raises:
            ValueError: it is missing or malformed; one line that says where, and what would work.
        """
        where = f"--data-path {path}"
        try:
            with open(path, encoding="utf-8") as file:
                content = read_yaml(file.read())
        except FileNotFoundError:
            raise ValueError(f"{where}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where}: can't be read ({error})") from None
        except ValueError as error:
            raise ValueError(f"{where}, {error}") from None
        try:
            return cls(path, tuple(_sources(content, os.path.dirname(os.path.abspath(path)))))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @property
    def weighted(self) -> bool:
        """Return whether datasets are drawn from by weight, without end, and not each for a number of
        epochs."""
        return any(source.weight is not None for source in self.sources)

    def lines(self) -> List[str]:
        """Return a line for each dataset that is trained on, and its share of the samples; for a person."""
        total = sum(source.weight or 0 for source in self.sources)
        return [
            f"{source.name}: {source}"
            + (f" ({100 * source.weight / total:.1f} % of the samples)" if source.weight is not None else "")
            for source in self.of_split("train")
        ]

    def of_split(self, split: str) -> Tuple[SourceConfig, ...]:
        """Return the datasets that are trained on, or those whose ``val`` or ``test`` split is looked at."""
        return tuple(source for source in self.sources if (source.train if split == "train" else source.val))


def data_folders(path: str) -> List[str]:
    """Return the dataset folders behind ``--data-path``: itself, or those of its mixture.

    Raises:
        ValueError: as :meth:`MixtureConfig.load`.
    """
    return [source.path for source in MixtureConfig.load(path).sources] if is_mixture(path) else [path]


def trained_sources(path: str) -> List[str]:
    """Return the names of the datasets that are trained on; empty for a single folder.

    Raises:
        ValueError: as :meth:`MixtureConfig.load`.
    """
    return [source.name for source in MixtureConfig.load(path).of_split("train")] if is_mixture(path) else []


def one_pass(path: str) -> Optional[int]:
    """Return the number of samples in one pass over the training split of a folder or a mixture; None where
    that can't be told without YAML.

    Raises:
        ValueError: as :meth:`MixtureConfig.load` and :meth:`Subset.bounds`.
    """
    if not is_mixture(path):
        return split_samples(path)
    parts = _train_samples(path, MixtureConfig.load(path))
    return None if parts is None else sum(samples * source.passes for source, samples in parts)


def _train_samples(path: str, config: MixtureConfig) -> Optional[List[Tuple[SourceConfig, int]]]:
    found = []
    for source in config.of_split("train"):
        samples = split_samples(source.path)
        if samples is None:
            return None
        try:
            start, end = source.subset.bounds(samples)
        except ValueError as error:
            raise ValueError(f"--data-path {path}: dataset {source.name}: {error}") from None
        found.append((source, end - start))
    return found


def worker_shares(path: str) -> Dict[str, int]:
    """Return the shares of a training split that :func:`check_shares` takes; empty where that can't be told
    without YAML.

    Raises:
        ValueError: as :func:`one_pass`.
    """
    config = MixtureConfig.load(path) if is_mixture(path) else None
    if config is None or not config.weighted:
        samples = one_pass(path)
        return {} if samples is None else {f"--data-path {path}": samples}
    parts = _train_samples(path, config) or ()
    return {f"--data-path {path}: dataset {source.name}": samples for source, samples in parts}


def check_shares(shares: Mapping[str, int], split: str, data_workers: int) -> None:
    """Check that every loader worker has samples: of each dataset where weights say how many come from it.

    Args:
        shares: samples by what to call them.

    Raises:
        ValueError: there are fewer samples than workers.
    """
    for where, samples in shares.items():
        if samples < data_workers:
            raise ValueError(
                f"{where}: {samples} samples in the {split} split are fewer than --data-workers "
                f"{data_workers}; use fewer workers or more data"
            )


def _sources(content: Value, folder: str) -> Iterator[SourceConfig]:
    if isinstance(content, dict) and "__class__" in content:
        raise ValueError("this is energon's own format; write `datasets:` and below it each one's name")
    top = _mapping("the file", content)
    for key in top:
        if key != "datasets":
            raise ValueError(f"unknown key {key!r}; the file begins with `datasets:`, all else is below it")
    datasets = _mapping("datasets", top.get("datasets"))
    sources = [_source(name, _mapping(f"dataset {name}", value), folder) for name, value in datasets.items()]
    weights = {source.name: source.weight is not None for source in sources if source.train}
    if not weights:
        raise ValueError("no dataset is left to train on: all have train: false")
    if any(source.epochs is not None for source in sources) and any(weights.values()):
        raise ValueError("some datasets have weights and some have epochs; give all of them one or the other")
    if len(set(weights.values())) > 1:
        missing = next(name for name, has_weight in weights.items() if not has_weight)
        raise ValueError(f"dataset {missing} has no weight, as others have; give one to it too")
    folders: Dict[str, str] = {}
    for source in sources:
        real = os.path.realpath(source.path)
        if real in folders:
            raise ValueError(
                f"datasets {folders[real]} and {source.name} are one folder, {source.path}; name it once, "
                "with a larger weight or more epochs"
            )
        folders[real] = source.name
    yield from sources


def _source(name: str, given: Dict[str, Value], folder: str) -> SourceConfig:
    where = f"dataset {name}"
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: a name has letters, digits, '_', '-' and '.', and no others")
    for key in given:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, list(_KEYS), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_KEYS)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    if "path" not in given:
        raise ValueError(f"{where} has no path; give its folder, absolute or from this file's")
    values = {key: _KEYS[key](f"{where}: {key}", value) for key, value in given.items()}
    if "weight" in values and "epochs" in values:
        raise ValueError(f"{where} has a weight and epochs; give one")
    train = values.get("train", True)
    idle = [key for key in ("weight", "epochs", "subset") if not train and key in values]
    if idle:
        raise ValueError(f"{where}: {idle[0]} does nothing with train: false; leave one out")
    if not train and not values.get("val", True):
        raise ValueError(f"{where} is neither trained nor evaluated on; leave it out")
    return SourceConfig(
        name=name,
        path=os.path.join(folder, os.path.expanduser(values["path"])),
        weight=values.get("weight"),
        epochs=values.get("epochs"),
        subset=values.get("subset", Subset()),
        train=train,
        val=values.get("val", True),
        options={key: values[key] for key in OPTIONS if key in values},
    )


def _mapping(where: str, value: Optional[Value]) -> Dict[str, Value]:
    if not isinstance(value, dict) or not value:
        example = "datasets: {a name: {path: a folder, weight: 1}}"
        raise ValueError(f"{where} has nothing below it; write it as {example}")
    return value


def _path(where: str, value: Value) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} {value}: not a folder")
    return value


def _weight(where: str, value: Value) -> float:
    try:
        weight = math.nan if isinstance(value, (bool, list, dict)) else float(value)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"{where} {value}: must be a number above 0; to leave a dataset out, train: false")
    return weight


def _epochs(where: str, value: Value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{where} {value}: must be a whole number from 1 on; for a part of a dataset, subset: [0%, 50%]"
        )
    return value


def _subset(where: str, value: Value) -> Subset:
    bounds: List[Any] = []
    for bound in value if isinstance(value, list) else ():
        if isinstance(bound, str) and re.fullmatch(r"\d+(\.\d+)?%", bound, re.ASCII):
            bounds.append(Fraction(bound[:-1]) / 100)
        elif bound == "end" and len(bounds) == 1:
            bounds.append(None)
        elif isinstance(bound, int) and not isinstance(bound, bool):
            bounds.append(bound)
    start, end = bounds if len(bounds) == 2 else (None, None)
    kinds = {type(bound) for bound in (start, end) if bound is not None}
    largest = 1 if isinstance(end, Fraction) else math.inf
    if (
        start is None
        or len(kinds) != 1
        or start < 0
        or (end is not None and not start < end <= largest)
        or (isinstance(start, Fraction) and start >= 1)
    ):
        text = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else value
        raise ValueError(f"{where} {text}: write it as [0%, 50%], [0, 1000] or [1000, end]")
    return Subset(start, end)


def _bool(where: str, value: Value) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} {value}: must be true or false")
    return value


def _choice(choices: Sequence[str]) -> Callable[[str, Value], str]:
    def read(where: str, value: Value) -> str:
        if not isinstance(value, str) or value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
            raise ValueError(f"{where} {value}: unknown; {hint}")
        return value

    return read


_KEYS: Dict[str, Callable[[str, Value], Any]] = {
    "path": _path,
    "weight": _weight,
    "epochs": _epochs,
    "subset": _subset,
    "train": _bool,
    "val": _bool,
    "template": _choice(TEMPLATES),
    "lang": _choice(("jp", "en")),
    "overlong": _choice(("truncate", "drop")),
    "mask_thinking": _bool,
    "image_aspect_ratio": _choice(ASPECT_RATIOS),
}
