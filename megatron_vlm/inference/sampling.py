"""The choice of the next token: the most likely one, or one drawn from the model's distribution."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.config.generation import SamplingSection


class Sampler:
    """A chooser of the next token of each sequence of a batch.

    Logits are processed by transformers' own classes, in the order of its ``generate``: repetition
    penalty, temperature, top-k, top-p. Each prompt has a random number generator of its own, which gives
    one number per token: what is drawn depends on the seed and the prompt's number, not on the layout or
    on what else is in the batch.

    Args:
        numbers: of the batch's prompts, among all prompts of the input.
    """

    def __init__(self, sampling: SamplingSection, numbers: Sequence[int]) -> None:
        self.greedy = sampling.temperature == 0
        self.processors = _processors(sampling)
        self.generators = [random.Random(f"{sampling.seed} {number}") for number in numbers]

    def choose(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Return the next token of each sequence.

        Args:
            tokens: int64 ``[b, s]``, what each sequence holds so far; order and repeats don't matter.
            logits: float32 ``[b, vocabulary]``.

        Returns:
            int64 ``[b]``.
        """
        scores = self.processors(tokens, logits)
        if self.greedy:
            return scores.argmax(dim=-1)
        uniform = [generator.random() for generator in self.generators]
        return draw(scores.softmax(dim=-1, dtype=torch.float64), uniform)


def draw(probabilities: Tensor, uniform: Sequence[float]) -> Tensor:
    """Return the token at which the cumulative probability passes a number from [0, 1).

    Args:
        probabilities: float64 ``[b, vocabulary]``.
        uniform: one number per row.

    Returns:
        int64 ``[b]``; never a token of probability 0.
    """
    cumulative = probabilities.cumsum(dim=-1)
    target = torch.tensor(uniform, dtype=torch.float64, device=probabilities.device).unsqueeze(1)
    # The last sum is 1 but for rounding.
    return torch.searchsorted(cumulative, target * cumulative[:, -1:], right=True).squeeze(1)


def _processors(sampling: SamplingSection) -> Any:
    from transformers.generation import logits_process as hf

    chosen = []
    if sampling.repetition_penalty != 1:
        chosen.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0, 1):
        chosen.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chosen.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chosen.append(hf.TopPLogitsWarper(sampling.top_p))
    return hf.LogitsProcessorList(chosen)
