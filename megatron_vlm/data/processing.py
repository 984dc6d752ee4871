"""From a sample's text and image bytes to token ids, labels and pixels."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, List, Sequence

from megatron_vlm.architecture.connectors.anyres import Size
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.image_rule import LOADED, ImageRule
from megatron_vlm.data.batch import IGNORE_INDEX, Sample
from megatron_vlm.data.chat_templates import caption_prompt
from megatron_vlm.data.conversations import trainable_turns
from megatron_vlm.data.images import ImageTransform
from megatron_vlm.data.templates import IMAGE_MARKER, ChatTemplate, SampleError, Turn

if TYPE_CHECKING:
    from PIL import Image

    from megatron_vlm.config.run import RunConfig


@dataclass(frozen=True)
class Processing:
    """Everything that turns one raw sample into a :class:`Sample`. Holds no state.

    Attributes:
        tokenizer: a transformers tokenizer.
        template: renders conversations.
        images: decodes, resizes and cuts.
        model: says how many placeholders stand for an image.
        image_token_id: the placeholder's id.
        pad_token_id: fills up short samples; carries no loss.
        seq_length: longest sample, in tokens, image tokens included.
        overlong: what happens to longer ones, ``truncate`` or ``drop``.
        lang: language of the caption prompt, ``jp`` or ``en``.
    """

    tokenizer: Any
    template: ChatTemplate
    images: ImageTransform
    model: ModelConfig
    image_token_id: int
    pad_token_id: int
    seq_length: int
    overlong: str
    lang: str

    def encode(self, key: str, turns: Sequence[Turn], images: List[bytes]) -> Sample:
        """Encode a conversation and its images.

        Args:
            key: the sample's name.
            turns: a user's text may hold ``<image>`` where an image goes; images whose places are not marked
                come first. Images without a question ask for a caption. Of an empty answer only the end
                token is trained.
            images: encoded images, in the order of their places.

        Raises:
            SampleError: the sample can't be used; names the reason, not the sample.
        """
        opened = self.images.open(images)
        return self.decode(self.tokenize(key, turns, opened), opened)

    def tokenize(self, key: str, turns: Sequence[Turn], images: Sequence[Image.Image]) -> Sample:
        """As :meth:`encode`, without pixels: images are opened, for their sizes, and not decoded."""
        turns = self._asking(key, trainable_turns(turns), len(images))
        ids, trained = self.template.encode(turns, len(images))
        sizes = self.images.sizes(images)
        ids, trained = self._expand_images(ids, trained, sizes)
        if True not in trained[1:]:  # of the first token there is nothing to predict it from
            raise SampleError("none of its tokens is trained")
        labels = [
            token if is_trained else IGNORE_INDEX
            for token, is_trained in zip(ids[1:], trained[1:], strict=True)
        ] + [IGNORE_INDEX]
        truncated = len(ids) > self.seq_length
        if truncated:
            ids, labels = self._truncate(ids, labels)
        return Sample(key, ids, labels, [], truncated, sizes)

    def decode(self, sample: Sample, images: Sequence[Image.Image]) -> Sample:
        """The sample with the pixels of its images.

        Raises:
            SampleError: one can't be decoded.
        """
        return replace(sample, pixels=self.images.tiles(images))

    def varied(
        self,
        template: str | None = None,
        lang: str | None = None,
        mask_thinking: bool | None = None,
        overlong: str | None = None,
        image_aspect_ratio: str | None = None,
    ) -> Processing:
        """The same, but for what is given.

        Args:
            image_aspect_ratio: as :meth:`ImageTransform.with_aspect_ratio`.

        Raises:
            ValueError: as :class:`ChatTemplate` and :meth:`ImageTransform.with_aspect_ratio`.
        """
        options = {"lang": lang, "mask_thinking": mask_thinking}
        changed = {name: value for name, value in options.items() if value is not None}
        return replace(
            self,
            template=self.template.varied(template, **changed) if template or changed else self.template,
            lang=lang or self.lang,
            overlong=overlong or self.overlong,
            images=self.images.with_aspect_ratio(image_aspect_ratio) if image_aspect_ratio else self.images,
        )

    def encode_prompt(self, question: str, sizes: Sequence[Size], raw: bool = False) -> List[int]:
        """Token ids that a model answers, as :meth:`encode` would have them before the answer.

        Args:
            question: as for :meth:`encode`.
            sizes: of its images, as :meth:`ImageTransform.sizes` has them.
            raw: it is the whole prompt, nothing is put around it; every image has to be marked.

        Raises:
            SampleError: markers and images differ in number, or the template refuses the question.
        """
        if raw:
            ids = self.template.encode_text(question, len(sizes))
        else:
            question = self._question("", question, len(sizes))
            ids = self.template.encode_prompt([Turn("user", question)], len(sizes))
        return self._expand_images(ids, [False] * len(ids), sizes)[0]

    def _asking(self, key: str, turns: List[Turn], num_images: int) -> List[Turn]:
        """The turns; where images come without any question, the first one asks for a caption."""
        first = int(turns[0].role == "system")
        question = Turn("user", self._question(key, turns[first].text, num_images))
        return [*turns[:first], question, *turns[first + 1 :]]

    def _question(self, key: str, question: str, num_images: int) -> str:
        """The question, or where an image comes without any, one that asks for a caption."""
        if num_images and not question.replace(IMAGE_MARKER, "").strip():
            return question + caption_prompt(key, self.lang)
        return question

    def _expand_images(
        self, ids: List[int], trained: List[bool], sizes: Sequence[Size]
    ) -> tuple[List[int], List[bool]]:
        expanded: List[int] = []
        expanded_trained: List[bool] = []
        start = 0
        for size in sizes:
            count = self.model.count_tokens(size)
            place = ids.index(self.image_token_id, start)
            expanded += ids[start:place] + [self.image_token_id] * count
            expanded_trained += trained[start:place] + [False] * count
            start = place + 1
        return expanded + ids[start:], expanded_trained + trained[start:]

    def _truncate(self, ids: List[int], labels: List[int]) -> tuple[List[int], List[int]]:
        limit = f"{len(ids)} tokens are more than --seq-length {self.seq_length}"
        if self.overlong == "drop":
            raise SampleError(limit)
        if self.image_token_id in ids[self.seq_length :]:
            raise SampleError(f"{limit}, and its image does not fit")
        # The last position has nothing left to predict.
        labels = labels[: self.seq_length - 1] + [IGNORE_INDEX]
        if all(label == IGNORE_INDEX for label in labels):
            raise SampleError(f"{limit}, and nothing of its answer is left")
        return ids[: self.seq_length], labels


def build_processing(config: RunConfig, model: ModelConfig, hf_dir: str | None = None) -> Processing:
    """Read tokenizer, chat template and image processor as the run's flags say.

    Args:
        config: ``model.tokenizer_load_dir``, ``data.template``, ... .
        model: says how many tokens an image takes and what the tower's images look like.
        hf_dir: the checkpoint's own Hugging Face files, used for what ``--tokenizer-load-dir`` lacks.

    Raises:
        ValueError: something is missing or doesn't fit the model; the message names the flag.
    """
    folders = [folder for folder in (config.model.tokenizer_load_dir, hf_dir) if folder]
    if not folders:
        raise ValueError("no tokenizer: give --tokenizer-load-dir, the Hugging Face folder of the model")
    processor_configs = ("preprocessor_config.json", "processor_config.json")
    with_images = [f for f in folders if any(os.path.isfile(os.path.join(f, c)) for c in processor_configs)]
    return load_processing(
        folders[0],
        model,
        image_processor_dir=with_images[0] if with_images else None,
        seq_length=config.data.seq_length,
        template=config.data.template,
        stage=config.training.stage,
        lang=config.data.lang,
        overlong=config.data.overlong,
        mask_thinking=config.data.mask_thinking,
        image_rule=config.data.image_rule(),
        image_token_id=config.model.image_token_id,
        pad_token_id=config.model.pad_token_id,
    )


def load_processing(
    tokenizer_dir: str,
    model: ModelConfig,
    *,
    seq_length: int,
    image_processor_dir: str | None = None,
    template: str | None = None,
    stage: int | None = None,
    lang: str = "jp",
    overlong: str = "truncate",
    mask_thinking: bool = False,
    image_rule: ImageRule = LOADED,
    image_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> Processing:
    """As :func:`build_processing`, from plain arguments.

    Args:
        tokenizer_dir: Hugging Face folder with a tokenizer.
        image_processor_dir: folder with the image processor; the tokenizer's if not given.
        template: one of ``config.templates.TEMPLATES``. If not given: ``chat`` where the folder has a chat
            template, else ``plain`` in stage 1 and ``v1`` otherwise.
        mask_thinking: see :class:`ChatTemplate`.
        image_rule: how image files are read.
        image_token_id, pad_token_id: override the model's and the tokenizer's.
    """
    from transformers import AutoTokenizer

    if not os.path.isdir(tokenizer_dir):
        raise ValueError(f"--tokenizer-load-dir {tokenizer_dir}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_dir, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"--tokenizer-load-dir {tokenizer_dir}: no usable tokenizer ({reason})") from None
    if len(tokenizer) > model.language.vocab_size:
        raise ValueError(
            f"--tokenizer-load-dir {tokenizer_dir}: the tokenizer has {len(tokenizer)} tokens, but the model "
            f"embeds only {model.language.vocab_size}; give the folder of the model being trained"
        )
    image_token_id, image_token = _image_token(tokenizer, tokenizer_dir, model, image_token_id)
    if seq_length <= model.min_image_tokens:
        raise ValueError(
            f"--seq-length {seq_length} does not hold one image of {model.min_image_tokens} tokens and text; "
            f"try {1 << (model.image_tokens + 256).bit_length()}"
        )
    jinja = _chat_template(tokenizer_dir, tokenizer)
    if template is None:
        template = "chat" if jinja is not None else "plain" if stage == 1 else "v1"
    return Processing(
        tokenizer=tokenizer,
        template=ChatTemplate(tokenizer, template, image_token, jinja, lang, mask_thinking),
        images=ImageTransform.from_dir(
            image_processor_dir or tokenizer_dir,
            model.vision.image_size,
            model.vision.num_channels,
            model.anyres,
            image_rule,
        ),
        model=model,
        image_token_id=image_token_id,
        pad_token_id=_pad_token_id(tokenizer, model, image_token_id, pad_token_id),
        seq_length=seq_length,
        overlong=overlong,
        lang=lang,
    )


def _image_token(tokenizer: Any, folder: str, model: ModelConfig, override: int | None) -> tuple[int, str]:
    """The image token's id and text, checked to survive tokenisation."""
    image_token_id = model.image_token_id if override is None else override
    flag = "" if override is None else f"--image-token-id {override}: "
    if not 0 <= image_token_id < model.language.vocab_size:
        raise ValueError(f"{flag}the model embeds tokens 0 to {model.language.vocab_size - 1}")
    token = tokenizer.convert_ids_to_tokens(image_token_id) if image_token_id < len(tokenizer) else None
    # Added tokens are the ones that tokenisation never splits nor merges with their neighbours.
    if token is None or image_token_id not in tokenizer.added_tokens_decoder:
        candidate = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
        known = tokenizer.added_tokens_decoder.get(candidate)
        hint = (
            f"its {IMAGE_MARKER} is {candidate}, the model's {model.image_token_id}; "
            "give the folder that the model was built with"
            if known is not None and str(known) == IMAGE_MARKER
            else "give the Hugging Face folder that scripts/convert/build_llava_jp.py made"
        )
        raise ValueError(f"{flag}{folder}: token {image_token_id} of the tokenizer is no image token; {hint}")
    return image_token_id, token


def _pad_token_id(tokenizer: Any, model: ModelConfig, image_token_id: int, override: int | None) -> int:
    candidates = (override, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_token_id = next(candidate for candidate in candidates if candidate is not None)
    flag = "the tokenizer's pad token" if override is None else f"--pad-token-id {override}"
    if not 0 <= pad_token_id < model.language.vocab_size:
        raise ValueError(f"{flag}: the model embeds tokens 0 to {model.language.vocab_size - 1}")
    if pad_token_id == image_token_id:
        raise ValueError(f"{flag} is the image token; choose another with --pad-token-id")
    return int(pad_token_id)


def _chat_template(folder: str, tokenizer: Any) -> str | None:
    """The folder's chat template: a processor's, in the files of older releases, or the tokenizer's."""
    for name in ("chat_template.json", "processor_config.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                template = json.load(file).get("chat_template")
            if isinstance(template, str):
                return template
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template
