"""A shuffle buffer that ends with the epoch."""

from __future__ import annotations

from typing import Any, Iterator

from megatron.energon.state import FlexState
from megatron.energon.wrappers import ShuffleBufferDataset
from megatron.energon.wrappers.buffer import SavableSampleBuffer


class EpochShuffle(ShuffleBufferDataset[Any]):
    """energon's shuffle buffer for samples that come to an end: a pass over a dataset.

    energon shuffles behind the repetition, where the samples of the next epoch come into the buffer while
    those of this one still wait in it: of as many samples as an epoch has, some are drawn twice and others
    not at all. Here the buffer is emptied before the next epoch begins. That it is being emptied is part of
    its state, else a restore would fill it up.
    """

    _draining: bool

    _savable_fields = (*ShuffleBufferDataset._savable_fields, "_draining")

    def reset_state_own(self) -> None:
        super().reset_state_own()
        self._active_buffer = _Buffer(self.dataset, worker_config=self.worker_config)
        self._draining = False

    def __iter__(self) -> Iterator[Any]:
        buffer = self._active_buffer
        buffer.worker_start()
        coming = iter(buffer.append_iter())
        while not self._draining:
            if buffer.len_worker() >= self.size:
                yield self._pop()
            else:
                self._draining = next(coming, None) is None
        while buffer.len_worker() > 0:
            yield self._pop()
        self._draining = False

    def _pop(self) -> Any:
        return self._active_buffer.pop(self._worker_rng.randbelow(self._active_buffer.len_worker()))


class _Buffer(SavableSampleBuffer[Any]):
    def save_state(self) -> FlexState:
        # energon copies each key and the tuples in it, which takes most of the time of a save.
        return FlexState(__class__=type(self).__name__, _restore_keys=list(self._restore_keys))
