"""The section of a run config that says which model is trained, and which parts of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Tuple

from megatron_vlm.architecture.train_modules import TrainEntry, parse_train_modules, preset
from megatron_vlm.config.checks import not_negative, positive
from megatron_vlm.config.flags import REQUIRED, flag
from megatron_vlm.config.headings import (
    OTHER,
    PARALLEL,
    SAVE_LOAD,
    TOKENIZER,
    TRAINING,
)


@dataclass(frozen=True)
class ModelSection:
    """The flags that say which model is trained, and which parts of it."""

    freeze_lm: bool = flag(
        TRAINING,
        REQUIRED,
        "train without changing the language model",
        shown_default="on in --stage 1, else off",
    )
    train_vision: bool = flag(TRAINING, False, "train the vision tower too; it is frozen otherwise")
    train_modules: Optional[str] = flag(
        TRAINING,
        None,
        "what is trained, each part at its own peak learning rate: "
        "'projector:1e-3|language:2e-5|vision.last_block:2e-6'; a part without one has --lr",
        shown_default="as --stage, --freeze-lm and --train-vision say",
    )
    megatron_load_dir: Optional[str] = flag(
        SAVE_LOAD, None, "checkpoint to start from: its folder, the root above it, or a run folder"
    )
    base: Optional[str] = flag(
        SAVE_LOAD,
        None,
        "the checkpoint with all weights, for one saved with --save-trained-only",
        shown_default="where it was then",
    )
    tokenizer_load_dir: Optional[str] = flag(
        SAVE_LOAD,
        None,
        "Hugging Face folder with tokenizer and image processor",
        shown_default="the one that the checkpoint carries",
    )
    init: bool = flag(
        SAVE_LOAD,
        False,
        "start from random weights, made by --seed for the config.json in --tokenizer-load-dir",
    )
    image_token_id: Optional[int] = flag(
        TOKENIZER, None, "id of the image token", shown_default="from the tokenizer and the model"
    )
    pad_token_id: Optional[int] = flag(
        TOKENIZER, None, "id of the padding token", shown_default="from the tokenizer"
    )
    no_add_class_token: Optional[bool] = flag(
        OTHER,
        None,
        "the tower has no class token (SigLIP); --add-class-token: it has one (CLIP); only checked here",
        shown_default="from the model",
    )
    make_vocab_size_divisible_by: int = flag(
        PARALLEL, 128, "the vocabulary is padded to a multiple of this times --tp"
    )

    def __post_init__(self) -> None:
        positive(self, "make_vocab_size_divisible_by")
        not_negative(self, "image_token_id", "pad_token_id")
        _ = self.trained

    @property
    def trained(self) -> Tuple[TrainEntry, ...]:
        """The parts that are trained; what none of them names is frozen."""
        if self.train_modules is None:
            return preset(self.freeze_lm, self.train_vision)
        return parse_train_modules(self.train_modules)
