"""Keys and values of the tokens that a model has seen, so that generating one more runs that one alone."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """The cache of one batch, for the layers of one pipeline stage.

    Prompts are padded on the right. The first pass holds all positions of the prompts and attends
    causally, which keeps padding away from every real token. Each later pass holds one token per
    sequence: it takes the place of padding right after that sequence's last token, and sees the keys up
    to itself.

    Args:
        lengths: int64 ``[b]``, tokens of each prompt, on the model's device.
        padded_length: positions of the padded prompts.
        capacity: positions of a prompt and all that may follow it.
    """

    def __init__(self, lengths: Tensor, padded_length: int, capacity: int) -> None:
        self.capacity = capacity
        self.first_pass = True
        self.visible: Tensor | None = None  # bool [b, 1, 1, keys], after the first pass
        self.positions = torch.arange(padded_length, device=lengths.device)  # [s], or [b] in later passes
        self.last = lengths - 1  # where in a pass's hidden states each sequence's last token is
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self._lengths = lengths
        self._keys_seen = padded_length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def next_pass(self) -> None:
        """Make room for one more token of each sequence."""
        self.first_pass = False
        self.positions = self._lengths
        self.last = torch.zeros_like(self._lengths)
        self._lengths = self._lengths + 1
        self._keys_seen += 1
        columns = torch.arange(self._keys_seen, device=self._lengths.device)
        self.visible = (columns < self._lengths.unsqueeze(1))[:, None, None, :]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values that this pass adds to a layer.

        Args:
            layer: its number.
            key, value: ``[b, n, s, d]``; ``s`` is 1 after the first pass.

        Returns:
            Keys and values to attend to, ``[b, n, keys, d]``.
        """
        if self.first_pass:
            self._layers[layer] = self._allocate(key), self._allocate(value)
            return key, value
        kept = self._layers[layer]
        for whole, new in zip(kept, (key, value), strict=True):
            whole[self.rows, :, self.positions] = new[:, :, 0]
        return kept[0][:, :, : self._keys_seen], kept[1][:, :, : self._keys_seen]

    def _allocate(self, first: Tensor) -> Tensor:
        b, n, s, d = first.shape
        # Not empty: what is masked is still multiplied, and NaN times 0 is NaN.
        whole = first.new_zeros(b, n, self.capacity, d)
        whole[:, :, :s] = first
        return whole
