"""The loss and the counts of each dataset of a mixture: summed where they arise, reduced once a line of
the log."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_vlm.data.batch import IGNORE_INDEX, Microbatch
from megatron_vlm.models.loss import LossParts
from megatron_vlm.parallel import Layout


class SourceTotals:
    """The totals of each dataset since the last :meth:`take`. Every rank has one.

    Args:
        names: of the datasets, in the mixture's order.
    """

    def __init__(self, names: Sequence[str], layout: Layout) -> None:
        self.names = names
        self.layout = layout
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        count, device = len(self.names), self.layout.device
        self._losses = torch.zeros(count, dtype=torch.float64, device=device)  # on ranks of the last stage
        self._counts = torch.zeros(3, count, dtype=torch.float64)  # on the ranks that read

    def count(self, microbatches: Sequence[Microbatch]) -> None:
        """Count a batch that this rank has read."""
        for microbatch in microbatches:
            own = torch.tensor(microbatch.sources, dtype=torch.int64)
            lengths = microbatch.lengths[: len(own)]  # rows of padding stand at the end
            packed = lengths.tolist() if microbatch.packed else []
            of_tokens = token_sources(microbatch.sources, packed, *microbatch.labels.shape)
            trained = of_tokens[microbatch.labels != IGNORE_INDEX]
            size = len(self.names)
            self._counts[0] += own.bincount(minlength=size)
            self._counts[1] += own.bincount(weights=lengths.double(), minlength=size)
            self._counts[2] += trained.bincount(minlength=size)

    def parts(self, sources: Tensor) -> LossParts:
        """Return where the model puts the losses of a microbatch, ``sources`` being those of its tokens."""
        return LossParts(sources, self._losses)

    def take(self) -> dict[str, float | None]:
        """Return the mean loss, samples, tokens and trained tokens of each dataset, by their names in
        metrics.

        A collective call. The loss is None where nothing was trained, or it is not finite.
        """
        layout = self.layout
        totals = torch.zeros(4, len(self.names), dtype=torch.float64, device=layout.device)
        totals[:3] = self._counts.to(layout.device)
        if layout.is_last_stage and layout.tp_rank == 0:  # one rank of each model copy speaks for it
            totals[3] = self._losses
        dist.all_reduce(totals)
        self.reset()
        found: dict[str, float | None] = {}
        for name, (samples, tokens, trained, loss) in zip(self.names, totals.t().tolist(), strict=True):
            found[f"source/{name}/loss"] = loss / trained if trained and math.isfinite(loss) else None
            found[f"source/{name}/samples"] = int(samples)
            found[f"source/{name}/tokens"] = int(tokens)
            found[f"source/{name}/trained_tokens"] = int(trained)
        return found


def token_sources(sources: Sequence[int], packed: Sequence[int], rows: int, length: int) -> Tensor:
    """Return the dataset of each token, int64 ``[rows, length]``; 0 where there is only padding.

    Args:
        sources: of the samples.
        packed: lengths of the samples where they share one row; else empty.
    """
    own = torch.tensor(sources, dtype=torch.int64)
    if packed:
        own = own.repeat_interleave(torch.tensor(packed))
        return F.pad(own, (0, length - len(own))).view(1, length)
    return F.pad(own, (0, rows - len(own))).view(rows, 1).expand(rows, length)
