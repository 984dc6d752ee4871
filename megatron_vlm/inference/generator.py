"""The generator's passes through the model: all prompts first, then one token of each answer at a time."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.config.generation import SamplingSection
from megatron_vlm.data.media.base import Media, join
from megatron_vlm.inference.sampling import Sampler
from megatron_vlm.models.cache import KeyValueCache
from megatron_vlm.models.modalities.base import Placed
from megatron_vlm.models.modalities.table import place_media
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.payload import payload_rows
from megatron_vlm.models.vlm import VisionLanguageModel, build_model
from megatron_vlm.models.weights import check_unchanged, load_weights
from megatron_vlm.parallel import Layout


@dataclass(frozen=True)
class Prompt:
    """A prompt: token ids and media that the model answers."""

    number: int  # among all prompts of the input; what is drawn depends on it
    input_ids: list[int]  # each item of the media is as many placeholders as it has features
    media: Mapping[str, Media] = field(default_factory=dict)  # by kind; tensors as the encoders take them


class Generator:
    """The generator of answers, with one copy of the model, spread over all ranks.

    Args:
        chunk: this rank's stage of the model, with its weights.
        end_tokens: ids that end an answer.
    """

    def __init__(self, chunk: VisionLanguageModel, layout: Layout, end_tokens: Collection[int]) -> None:
        assert layout.dp == 1
        self.chunk = chunk.eval().requires_grad_(False)
        self.layout = layout
        self.end_tokens = frozenset(end_tokens)
        self.chooser = layout.world_size - layout.tp  # the rank of the last stage that chooses tokens

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSection,
        on_token: Callable[[list[list[int]]], None] | None = None,
    ) -> list[list[int]]:
        """Answer a batch of prompts; a collective call.

        Args:
            prompts: the same on every rank.
            on_token: called after each pass with the answers so far.

        Returns:
            The tokens of each answer, on every rank. The last of them is an end token, unless
            ``max_new_tokens`` came first.
        """
        assert sampling.max_new_tokens is not None
        device = self.layout.device
        ids, lengths = self._pad(prompts)
        media: Mapping[str, Placed] = {
            kind: placed.to(device)
            for kind, placed in place_media(ids, self._media(prompts), self.chunk.modalities).items()
        }
        step, lengths = ids.to(device), lengths.to(device)
        padded = ids.shape[1]
        # What padding is made of takes no part in a repetition penalty.
        in_prompt = torch.arange(padded, device=device) < lengths.unsqueeze(1)
        seen = step.where(in_prompt, step[:, :1])
        cache = KeyValueCache(lengths, padded, padded + sampling.max_new_tokens)
        sampler = None
        if self.layout.rank == self.chooser:
            sampler = Sampler(sampling, [prompt.number for prompt in prompts])

        answers: list[list[int]] = [[] for _ in prompts]
        unfinished = set(range(len(prompts)))
        while True:
            logits = self._forward(step, cache, media)
            chosen = torch.empty_like(lengths)
            if sampler is not None:
                chosen = sampler.choose(seen, logits)
            dist.broadcast(chosen, src=self.chooser)
            for row, token in enumerate(chosen.tolist()):
                if row in unfinished:
                    answers[row].append(token)
                    if token in self.end_tokens or len(answers[row]) == sampling.max_new_tokens:
                        unfinished.discard(row)
            if on_token is not None:
                on_token(answers)
            if not unfinished:
                return answers
            seen = torch.cat([seen, chosen.unsqueeze(1)], dim=1)
            step, media = chosen.unsqueeze(1), {}
            cache.next_pass()

    def _pad(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Return ids ``[b, s]``, padded on the right with anything but placeholders, and lengths ``[b]``."""
        lengths = [len(prompt.input_ids) for prompt in prompts]
        placeholders = {modality.token_id for modality in self.chunk.modalities.values()}
        filler = next(token for token in itertools.count() if token not in placeholders)
        ids = [
            prompt.input_ids + [filler] * (max(lengths) - length)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        return torch.tensor(ids), torch.tensor(lengths)

    def _media(self, prompts: Sequence[Prompt]) -> dict[str, Media]:
        """Return the prompts' media one after the other, in the model's dtype."""
        dtype = self.chunk.config.params_dtype
        joined = join(prompt.media for prompt in prompts)
        return {
            kind: replace(own, tensors={name: t.to(dtype) for name, t in own.tensors.items()})
            for kind, own in joined.items()
        }

    def _forward(self, ids: Tensor, cache: KeyValueCache, media: Mapping[str, Placed]) -> Tensor:
        """Return logits ``[b, vocabulary]`` on the ranks of the last stage, hidden states on the others."""
        layout = self.layout
        if not layout.is_first_stage:
            config = self.chunk.config
            shape = (payload_rows(ids.shape[1]), ids.shape[0], config.hidden_size)
            hidden = torch.empty(shape, dtype=config.params_dtype, device=layout.device)
            dist.recv(hidden, group=layout.pp_group, group_src=layout.pp_rank - 1)
            self.chunk.set_input_tensor(hidden)
        output = self.chunk.next_token_logits(ids, cache, media)
        if not layout.is_last_stage:
            dist.send(output, group=layout.pp_group, group_dst=layout.pp_rank + 1)
        return output


def load_generator(
    checkpoint: Path,
    model: ModelConfig,
    layout: Layout,
    precision: str | None,
    end_tokens: Collection[int],
    base: str | None = None,
) -> Generator:
    """Build a generator with a checkpoint's weights; a collective call.

    Args:
        precision: ``"bf16"``, ``"fp32"``, or None for what the weights are stored in.
        base: where the rest of a checkpoint of trained weights only is; None for where it was.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    precision = precision or model.precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # The local layers on GPUs too: Transformer Engine's attention knows nothing of the cache.
    chunks = build_model(model, layout, ModelOptions(dtype, impl="local"))

    def say(message: str) -> None:
        if layout.rank == 0:
            print(message, file=sys.stderr)

    check_unchanged(checkpoint, base, True, say)
    load_weights(checkpoint, chunks, base)
    return Generator(chunks[0], layout, end_tokens)
