"""The processing of samples: from text and files to token ids, labels and media."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Sequence, Union

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.chat_template import chat_template
from megatron_vlm.artifacts.image_rule import LOADED, ImageRule
from megatron_vlm.data.batch import IGNORE_INDEX, Sample
from megatron_vlm.data.chat_templates import caption_prompt
from megatron_vlm.data.conversations import trainable_turns
from megatron_vlm.data.media.base import ItemSize, MediaReader, ReaderSettings
from megatron_vlm.data.media.images import ImageReader, ImageTransform
from megatron_vlm.data.media.kinds import IMAGE, KINDS
from megatron_vlm.data.media.readers import load_readers
from megatron_vlm.data.templates import IMAGE_MARKER, ChatTemplate, SampleError, Turn

if TYPE_CHECKING:
    from megatron_vlm.config.run import RunConfig

Files = Mapping[str, Sequence[Union[bytes, Path]]]  # a sample's media, encoded, by kind
Opened = Mapping[str, Sequence[Any]]  # the same, as their readers open them
Sizes = Mapping[str, Sequence[ItemSize]]


@dataclass(frozen=True)
class Processing:
    """The parts that turn one raw sample into a :class:`Sample`: tokenizer, template, readers of media.

    Holds no state.

    Attributes:
        tokenizer: a transformers tokenizer.
        template: renders conversations.
        readers: of the media that the model takes, by kind.
        model: what is trained or asked.
        pad_token_id: fills up short samples; carries no loss.
        seq_length: longest sample, in tokens, placeholders included.
        overlong: what happens to longer ones, ``truncate`` or ``drop``.
        lang: language of the caption prompt, ``jp`` or ``en``.
    """

    tokenizer: Any
    template: ChatTemplate
    readers: Dict[str, MediaReader]
    model: ModelConfig
    pad_token_id: int
    seq_length: int
    overlong: str
    lang: str

    @property
    def images(self) -> ImageTransform:
        """The reader of images."""
        reader = self.readers[IMAGE.name]
        assert isinstance(reader, ImageReader)
        return reader.transform

    @property
    def image_token_id(self) -> int:
        """The id of the images' placeholder."""
        return self.readers[IMAGE.name].token_id

    def encode(self, key: str, turns: Sequence[Turn], files: Files) -> Sample:
        """Encode a conversation and its media.

        Args:
            key: the sample's name.
            turns: a user's text may hold ``<image>`` where an image goes; images whose places are not marked
                come first. Images without a question ask for a caption. Of an empty answer only the end
                token is trained. The places of other media have to be marked.
            files: by kind, encoded, in the order of their places.

        Raises:
            SampleError: the sample can't be used; names the reason, not the sample.
        """
        opened = self.open(files)
        return self.decode(self.tokenize(key, turns, opened), opened)

    def open(self, files: Files) -> Opened:
        """Read as much of a sample's media as their sizes need.

        Args:
            files: encoded, or the files that hold them, by kind; of kinds that the model takes.

        Raises:
            SampleError: one can't be read, of kind ``corrupt``; or the model doesn't take its kind.
        """
        for kind in files:
            if files[kind] and kind not in self.readers:
                raise SampleError(f"it has {KINDS[kind].field}, which this model doesn't take")
        return {kind: self.readers[kind].open(own) for kind, own in files.items() if own}

    def tokenize(self, key: str, turns: Sequence[Turn], opened: Opened) -> Sample:
        """Encode as :meth:`encode` does, without tensors: media are opened, for their sizes, and not
        decoded."""
        images = len(opened.get(IMAGE.name, ()))
        turns = self._written(self._asking(key, trainable_turns(turns), images))
        ids, trained = self.template.encode(turns, images)
        media = {kind: self.readers[kind].media(own) for kind, own in opened.items() if own}
        ids, trained = self._expand(ids, trained, {kind: own.sizes.tolist() for kind, own in media.items()})
        if True not in trained[1:]:  # of the first token there is nothing to predict it from
            raise SampleError("none of its tokens is trained")
        labels = [
            token if is_trained else IGNORE_INDEX
            for token, is_trained in zip(ids[1:], trained[1:], strict=True)
        ] + [IGNORE_INDEX]
        truncated = len(ids) > self.seq_length
        if truncated:
            ids, labels = self._truncate(ids, labels)
        return Sample(key, ids, labels, media, truncated)

    def decode(self, sample: Sample, opened: Opened) -> Sample:
        """Return the sample with the tensors of its media.

        Raises:
            SampleError: one can't be decoded.
        """
        media = {kind: self.readers[kind].decoded(own, opened[kind]) for kind, own in sample.media.items()}
        return replace(sample, media=media)

    def varied(
        self,
        template: str | None = None,
        lang: str | None = None,
        mask_thinking: bool | None = None,
        overlong: str | None = None,
        image_aspect_ratio: str | None = None,
    ) -> Processing:
        """Return the processing with some of its settings changed.

        Args:
            image_aspect_ratio: as :meth:`ImageTransform.with_aspect_ratio`.

        Raises:
            ValueError: as :class:`ChatTemplate` and :meth:`ImageTransform.with_aspect_ratio`.
        """
        options = {"lang": lang, "mask_thinking": mask_thinking}
        changed = {name: value for name, value in options.items() if value is not None}
        of_readers = {"image_aspect_ratio": image_aspect_ratio} if image_aspect_ratio else {}
        return replace(
            self,
            template=self.template.varied(template, **changed) if template or changed else self.template,
            lang=lang or self.lang,
            overlong=overlong or self.overlong,
            readers={kind: reader.varied(**of_readers) for kind, reader in self.readers.items()},
        )

    def encode_prompt(self, question: str, sizes: Sizes, raw: bool = False) -> List[int]:
        """Return the token ids that a model answers, as :meth:`encode` would have them before the answer.

        Args:
            question: as for :meth:`encode`.
            sizes: of its media, by kind, as their readers have them.
            raw: it is the whole prompt, nothing is put around it; every item has to be marked.

        Raises:
            SampleError: markers and images differ in number, or the template refuses the question.
        """
        images = len(sizes.get(IMAGE.name, ()))
        if not raw:
            question = self._question("", question, images)
        (turn,) = self._written([Turn("user", question)])
        if raw:
            ids = self.template.encode_text(turn.text, images)
        else:
            ids = self.template.encode_prompt([turn], images)
        return self._expand(ids, [False] * len(ids), sizes)[0]

    def _written(self, turns: List[Turn]) -> List[Turn]:
        """Return the turns with placeholders in place of markers, but for images', which the template
        writes."""
        for reader in self.readers.values():
            turns = [
                replace(turn, text=reader.write(turn.text)) if reader.kind.marker in turn.text else turn
                for turn in turns
            ]
        return turns

    def _asking(self, key: str, turns: List[Turn], num_images: int) -> List[Turn]:
        """Return the turns; where images come without any question, the first one asks for a caption."""
        first = int(turns[0].role == "system")
        question = Turn("user", self._question(key, turns[first].text, num_images))
        return [*turns[:first], question, *turns[first + 1 :]]

    def _question(self, key: str, question: str, num_images: int) -> str:
        """Return the question, or where an image comes without any, one that asks for a caption."""
        if num_images and not question.replace(IMAGE_MARKER, "").strip():
            return question + caption_prompt(key, self.lang)
        return question

    def _expand(self, ids: List[int], trained: List[bool], sizes: Sizes) -> tuple[List[int], List[bool]]:
        """Repeat each item's placeholder as often as it has tokens."""
        places: List[tuple[int, int, int]] = []  # where an item's one placeholder is, its token, and how many
        for kind, reader in self.readers.items():
            own, place = sizes.get(kind, ()), -1
            if ids.count(reader.token_id) != len(own):
                raise SampleError(
                    f"its text has {ids.count(reader.token_id)} {kind} markers, but {len(own)} "
                    f"{reader.kind.field} belong to it"
                )
            for size in own:
                place = ids.index(reader.token_id, place + 1)
                places.append((place, reader.token_id, reader.count_tokens(size)))
        expanded: List[int] = []
        expanded_trained: List[bool] = []
        start = 0
        for place, token_id, count in sorted(places):
            expanded += ids[start:place] + [token_id] * count
            expanded_trained += trained[start:place] + [False] * count
            start = place + 1
        return expanded + ids[start:], expanded_trained + trained[start:]

    def _truncate(self, ids: List[int], labels: List[int]) -> tuple[List[int], List[int]]:
        limit = f"{len(ids)} tokens are more than --seq-length {self.seq_length}"
        if self.overlong == "drop":
            raise SampleError(limit)
        for kind, reader in self.readers.items():
            if reader.token_id in ids[self.seq_length :]:
                raise SampleError(f"{limit}, and its {kind} does not fit")
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
    """Build a processing as :func:`build_processing` does, from plain arguments.

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
    readers = load_readers(
        ReaderSettings(
            model=model,
            tokenizer=tokenizer,
            tokenizer_dir=tokenizer_dir,
            processor_dir=image_processor_dir or tokenizer_dir,
            image_rule=image_rule,
            token_ids={} if image_token_id is None else {IMAGE.name: image_token_id},
        )
    )
    if seq_length <= model.min_image_tokens:
        raise ValueError(
            f"--seq-length {seq_length} does not hold one image of {model.min_image_tokens} tokens and text; "
            f"try {1 << (model.image_tokens + 256).bit_length()}"
        )
    jinja = chat_template(Path(tokenizer_dir))
    if template is None:
        template = "chat" if jinja is not None else "plain" if stage == 1 else "v1"
    return Processing(
        tokenizer=tokenizer,
        template=ChatTemplate(tokenizer, template, readers[IMAGE.name].token, jinja, lang, mask_thinking),
        readers=readers,
        model=model,
        pad_token_id=_pad_token_id(tokenizer, model, readers, pad_token_id),
        seq_length=seq_length,
        overlong=overlong,
        lang=lang,
    )


def _pad_token_id(
    tokenizer: Any, model: ModelConfig, readers: Mapping[str, MediaReader], override: int | None
) -> int:
    candidates = (override, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_token_id = next(candidate for candidate in candidates if candidate is not None)
    flag = "the tokenizer's pad token" if override is None else f"--pad-token-id {override}"
    if not 0 <= pad_token_id < model.language.vocab_size:
        raise ValueError(f"{flag}: the model embeds tokens 0 to {model.language.vocab_size - 1}")
    for kind, reader in readers.items():
        if pad_token_id == reader.token_id:
            raise ValueError(f"{flag} is the {kind} token; choose another with --pad-token-id")
    return int(pad_token_id)
