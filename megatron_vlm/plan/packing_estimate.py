"""An estimate of how many samples share a sequence with ``--packing``, from lengths that prepare.py
counted."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import List, Optional, Tuple

from megatron_vlm.artifacts.dataset import split_samples
from megatron_vlm.artifacts.mixture import MixtureConfig, is_mixture
from megatron_vlm.artifacts.token_lengths import TokenLengths
from megatron_vlm.config.run import RunConfig
from megatron_vlm.plan.grouping import Packing

_DRAWN = 4000  # samples, at least: enough that the estimate changes by less than 1 % with the seed


@dataclass(frozen=True)
class PackingEstimate:
    """The number of samples that share a sequence, and the folders by whose tokenizers they were counted."""

    samples_per_sequence: float
    counted_with: Tuple[str, ...]

    def iterations(self, samples: float, batch: int) -> int:
        """Return the number of iterations, of ``batch`` sequences each, that ``samples`` samples take."""
        return max(1, round(samples / self.samples_per_sequence / batch))


def estimate_run(config: RunConfig, world_size: int, samples: int) -> Optional[PackingEstimate]:
    """Pack samples as each loader worker of a run does.

    Args:
        samples: of one pass over the training split.

    Returns:
        As :func:`estimate_packing`.

    Raises:
        ValueError: as :meth:`RunConfig.data_workers` and :meth:`MixtureConfig.load`.
    """
    share = samples // config.data_workers(world_size)
    packing = Packing(config.data.packing_buffer_size, config.data.seq_length)
    packing = replace(packing, buffer_size=packing.buffer_within(share))
    return estimate_packing(str(config.data.data_path), packing, config.data.overlong)


def estimate_packing(path: str, packing: Packing, overlong: str) -> Optional[PackingEstimate]:
    """Pack samples of the lengths that reports tell.

    Args:
        path: ``--data-path``.
        packing: of a loader worker.
        overlong: what becomes of samples that are longer than a sequence, ``truncate`` or ``drop``.

    Returns:
        None where the tokens of a dataset weren't counted, or none fits.

    Raises:
        ValueError: as :meth:`MixtureConfig.load`.
    """
    parts: List[Tuple[TokenLengths, float, str]] = []  # lengths, share of the samples, overlong
    for folder, share, own in _shares(path):
        lengths = TokenLengths.read(folder)
        if lengths is None or share is None:
            return None
        parts.append((lengths, share, own or overlong))
    numbers = random.Random(0)
    samples = sequences = 0
    while samples < _DRAWN:
        drawn: List[int] = []
        while len(drawn) < packing.buffer_size:
            chosen = numbers.choices(parts, [share for _, share, _ in parts])[0]
            (length,) = chosen[0].draw(1, numbers)
            samples += 1
            if length <= packing.capacity or chosen[2] == "truncate":
                drawn.append(min(length, packing.capacity))
            elif samples > 10 * max(_DRAWN, packing.buffer_size):
                return None
        sequences += len(packing.select(drawn, [False] * len(drawn), 0))
    counted_with = tuple(dict.fromkeys(lengths.counted_with for lengths, _, _ in parts))
    return PackingEstimate(samples / sequences, counted_with)


def _shares(path: str) -> List[Tuple[str, Optional[float], Optional[str]]]:
    """Return each dataset that is trained on, its share of the samples (None: not known), and its
    ``overlong``."""
    if not is_mixture(path):
        return [(path, 1.0, None)]
    found: List[Tuple[str, Optional[float], Optional[str]]] = []
    for source in MixtureConfig.load(path).of_split("train"):
        share, samples = source.weight, split_samples(source.path)
        if share is None and samples is not None:
            start, end = source.subset.bounds(samples)
            share = float((end - start) * source.passes)
        found.append((source.path, share, source.options.get("overlong")))
    return found
