"""The section of a run config that says what is trained on, and how samples become batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Optional

from megatron_vlm.artifacts.image_rule import ALPHAS, LOADED, ORIENTATIONS, ImageRule
from megatron_vlm.artifacts.templates import TEMPLATES
from megatron_vlm.config.checks import between, not_negative, positive
from megatron_vlm.config.flags import flag
from megatron_vlm.config.headings import DATA, TRAINING


@dataclass(frozen=True)
class DataSection:
    """The flags that say what the model is trained on."""

    data_path: Optional[str] = flag(
        DATA, None, "dataset folder on which `energon prepare` was run, or a mixture of several: a .yaml file"
    )
    seq_length: int = flag(DATA, 1024, "longest sequence in tokens, those of the images included")
    overlong: str = flag(
        DATA,
        "truncate",
        "what happens to a sample longer than --seq-length; it is counted either way",
        choices=("truncate", "drop"),
    )
    template: Optional[str] = flag(
        DATA,
        None,
        "how a conversation becomes text: chat is the tokenizer's own template, the others are built in",
        choices=TEMPLATES,
        shown_default="chat where the tokenizer has one, else plain in --stage 1 and v1 otherwise",
    )
    mask_thinking: bool = flag(DATA, False, "leave the <think>...</think> of answers out of the loss")
    image_orientation: Optional[str] = flag(
        DATA,
        None,
        "turn images as their EXIF data says, as transformers loads a file, or take them as they are stored",
        choices=ORIENTATIONS,
        shown_default="exif; stored in a run that was begun without this flag",
    )
    image_alpha: Optional[str] = flag(
        DATA,
        None,
        "drop an image's alpha channel, as transformers loads a file, or lay it on white",
        choices=ALPHAS,
        shown_default="drop; white in a run that was begun without this flag",
    )
    lang: str = flag(TRAINING, "jp", "language of the prompts", choices=("jp", "en"))
    data_workers: Optional[int] = flag(
        DATA,
        None,
        "data loader workers of the whole run; the data-parallel size divides it, and it divides "
        "--global-batch-size / --micro-batch-size",
        shown_default="the smallest such number that is 4 or more, else the largest",
    )
    shuffle_buffer_size: int = flag(DATA, 1000, "samples shuffled among each other, per loader worker")
    packing: bool = flag(
        DATA,
        False,
        "put several samples into each sequence of --seq-length tokens, where none sees the others; batch "
        "sizes then count sequences",
    )
    group_by_length: bool = flag(
        DATA, False, "make micro batches of samples of like length, with images or without, against padding"
    )
    packing_buffer_size: int = flag(
        DATA,
        200,
        "samples from which --packing or --group-by-length chooses what goes together, per loader worker",
    )
    max_corrupt_rate: float = flag(DATA, 0.1, "stop when more than this part of the samples cannot be read")

    def __post_init__(self) -> None:
        positive(self, "seq_length", "data_workers", "packing_buffer_size")
        if self.template == "llm_jp" and self.lang != "jp":
            raise ValueError("--template llm_jp is Japanese, and --lang en is not; leave one of them out")
        not_negative(self, "shuffle_buffer_size")
        between(self, "max_corrupt_rate", 0.0, 1.0)
        if self.packing and self.group_by_length:
            raise ValueError("--group-by-length has no padding to save with --packing; drop one of them")

    def image_rule(self, otherwise: ImageRule = LOADED) -> ImageRule:
        """Return the rule by which image files are read, as the flags say; what they leave out is as in
        ``otherwise``."""
        return otherwise.but(self.image_orientation, self.image_alpha)

    def with_image_rule(self, otherwise: ImageRule = LOADED) -> DataSection:
        """Return the same section with that rule written out."""
        rule = self.image_rule(otherwise)
        return replace(self, image_orientation=rule.orientation, image_alpha=rule.alpha)
