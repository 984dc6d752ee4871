"""The lengths of a dataset's samples in tokens, from prepare.py's report."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from typing import Any, List, Mapping, Optional, Sequence, Tuple

from megatron_vlm.artifacts.dataset import REPORT, shard_counts

_TOKENS = "tokens"  # the histogram of a report


@dataclass(frozen=True)
class TokenLengths:
    """Lengths of a dataset's samples, as the histogram of a report has them.

    Attributes:
        counted_with: the Hugging Face folder that ``prepare.py --tokenizer-load-dir`` named.
        shortest: tokens of the shortest sample.
        bins: first and last length of each bin, its samples, and its skew: they are taken to lie at
            ``first + (last - first) * u ** skew`` for u from 0 to 1, so that their sum is that of the bin's;
            in a report without sums of bins, one skew so that all bins together have the sum of all.
    """

    counted_with: str
    shortest: int
    bins: Tuple[Tuple[int, int, int, float], ...]

    @classmethod
    def read(cls, folder: str) -> Optional[TokenLengths]:
        """Read the lengths of a prepared dataset; None where its tokens weren't counted, or its report is
        damaged."""
        try:
            with open(os.path.join(folder, REPORT), encoding="utf-8") as file:
                report = json.load(file)
            histogram = report["histograms"].get(_TOKENS)
            with_folder = str(report["settings"]["tokenizer_load_dir"])
            return None if histogram is None else cls._of(histogram, with_folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return None

    @classmethod
    def _of(cls, histogram: Mapping[str, Any], counted_with: str) -> Optional[TokenLengths]:
        low, high, total = (int(histogram[name]) for name in ("min", "max", "total"))
        bins = []
        for name, samples in histogram["bins"].items():
            top = int(name)
            # A bin ends at its name, and begins behind half of that, or is a single value up to 8.
            first = top if top <= 8 else top // 2 + 1
            bins.append((max(first, low), min(top, high), int(samples)))
        if not bins:
            return None
        sums = histogram.get("sums")
        if sums is None:
            skews = [_skew(bins, total)] * len(bins)
        else:
            skews = [_skew([own], int(sums[name])) for own, name in zip(bins, histogram["bins"])]
        return cls(counted_with, low, tuple((*own, skew) for own, skew in zip(bins, skews)))

    def draw(self, number: int, numbers: random.Random) -> List[int]:
        """Draw the lengths of ``number`` samples."""
        chosen = numbers.choices(self.bins, [samples for _, _, samples, _ in self.bins], k=number)
        return [first + round((last - first) * numbers.random() ** skew) for first, last, _, skew in chosen]


def _skew(bins: Sequence[Tuple[int, int, int]], total: int) -> float:
    """Return the skew of bins whose values add up to ``total``."""
    least = sum(first * samples for first, _, samples in bins)
    span = sum((last - first) * samples for first, last, samples in bins)
    return 1 / min(max((total - least) / span, 0.001), 1.0) - 1 if span else 0.0


@dataclass(frozen=True)
class ShortestSample:
    """The shortest sample of a dataset, as prepare.py's report has it, and how its tokens were counted.

    Attributes:
        images: the fewest of a sample.
        tokens: the fewest of a sample; None where they weren't counted.
        tokenizer_load_dir, template, lang: flags of prepare.py.
        modified: when the report was written, in seconds since the epoch.
    """

    images: int
    tokens: Optional[int]
    tokenizer_load_dir: Optional[str]
    template: Optional[str]
    lang: Optional[str]
    modified: float

    @classmethod
    def read(cls, folder: str) -> Optional[ShortestSample]:
        """Read a report; None where there is no whole one, or it isn't of the shards that are there."""
        file_name = os.path.join(folder, REPORT)
        try:
            with open(file_name, encoding="utf-8") as file:
                report = json.load(file)
            if int(report["kept"]) != sum(shard_counts(folder).values()):
                return None
            settings, histograms = report["settings"], report["histograms"]
            return cls(
                int(histograms["images"]["min"]) if "images" in histograms else 0,
                int(histograms[_TOKENS]["min"]) if _TOKENS in histograms else None,
                settings.get("tokenizer_load_dir"),
                settings.get("template"),
                settings.get("lang"),
                os.stat(file_name).st_mtime,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return None

    def counted_like(self, folder: Optional[str], template: Optional[str], lang: str) -> bool:
        """Return whether a run surely has as many tokens: its tokenizer folder is the one they were counted
        with, unchanged since, and its template is named and the same.

        Args:
            folder, template, lang: flags of the run.
        """
        if folder is None or self.tokenizer_load_dir is None or template is None:
            return False  # which template is the default depends on --stage
        try:
            same = os.path.samefile(folder, self.tokenizer_load_dir)
            newest = max(os.stat(entry.path).st_mtime for entry in os.scandir(folder))
        except (OSError, ValueError):
            return False
        return same and newest < self.modified and (template, lang) == (self.template, self.lang)
