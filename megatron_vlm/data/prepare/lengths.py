"""Lengths in tokens, counted as training will count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.data.batch import IGNORE_INDEX
from megatron_vlm.data.media.kinds import IMAGE
from megatron_vlm.data.prepare.pictures import Picture
from megatron_vlm.data.prepare.shards import Rendering
from megatron_vlm.data.processing import load_processing
from megatron_vlm.data.templates import Turn

_LONGEST = 1 << 40


class Lengths:
    """A counter of the tokens of samples.

    Raises:
        ValueError: the folder is no model's, or can't be used with this template.
    """

    def __init__(self, rendering: Rendering) -> None:
        folder = rendering.tokenizer_load_dir
        model = ModelConfig.from_hf_dir(folder, "--tokenizer-load-dir")
        self._processing = load_processing(
            folder, model, seq_length=_LONGEST, template=rendering.template, lang=rendering.lang
        )

    def __call__(
        self, key: str, messages: Sequence[Mapping[str, Any]], pictures: Sequence[Picture]
    ) -> dict[str, int]:
        """Return the numbers of a sample's tokens, by kind.

        Raises:
            SampleError: training leaves it out.
        """
        turns = [Turn(item["role"], item["content"], item.get("loss", True)) for item in messages]
        opened = self._processing.open({IMAGE.name: [picture.data for picture in pictures]})
        sample = self._processing.tokenize(key, turns, opened)
        image_tokens = sample.input_ids.count(self._processing.image_token_id)
        return {
            "tokens": len(sample.input_ids),
            "text tokens": len(sample.input_ids) - image_tokens,
            "image tokens": image_tokens,
            "trained tokens": sum(label != IGNORE_INDEX for label in sample.labels),
        }
