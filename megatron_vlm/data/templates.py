"""Conversations as token ids, with the trained tokens known by construction.

A conversation is rendered turn by turn with a Jinja chat template, as transformers renders it, and the
finished text is tokenised once, as transformers tokenises it. Where an answer begins and ends is known
from the lengths of what is rendered before and after it, so text that looks like a template can't move it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from megatron_vlm.artifacts.end_tokens import find_end_token
from megatron_vlm.artifacts.templates import TEMPLATES, unfit
from megatron_vlm.data.chat_templates import BUILTIN_TEMPLATES, SYSTEM_PROMPTS, folder_template
from megatron_vlm.data.media.kinds import IMAGE

IMAGE_MARKER = IMAGE.marker
_PROBE = "\ue000\ue001\ue000"  # private-use characters: hardly in anyone's text, and checked

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


class SampleError(Exception):
    """A sample that can't be used. ``kind`` is the counter it goes to: ``dropped`` or ``corrupt``."""

    def __init__(self, message: str, kind: str = "dropped") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. ``IMAGE_MARKER`` in a user's text says where an image goes."""

    role: str  # "system", "user" or "assistant"
    text: str
    loss: bool = True  # an answer's alone: whether it is trained


@dataclass(frozen=True)
class _Frame:
    """The text that a template writes around an answer."""

    prompt: str  # that asks for it, as for a model that is to answer
    prefix: str  # between that and the answer
    trained_suffix: str  # after it, up to its end token; all where there is none
    end_token: str  # or empty


class ChatTemplate:
    """A chat template and a tokenizer; they render and tokenise conversations as transformers does.

    Token ids equal those of ``LlavaProcessor.apply_chat_template(..., tokenize=True)`` before its image
    tokens are expanded, but for two things. Where the folder's own template ends an answer without any
    token of its own, the tokenizer's end token is put after the last answer, for a model that is never
    shown an end never stops. And of what a tokenizer puts around every text, the start is kept alone: with
    an end token behind them, prompts would end before they are answered.

    Attributes:
        end_token_id: the token that ends an answer, of all templates but LLaVA's ``plain``; None where
            nothing does.
        appended: ids that the tokenizer would put behind every text, and that are left out.

    Args:
        tokenizer: a transformers tokenizer backed by the tokenizers library.
        name: a built-in template's, or ``chat`` for ``jinja``.
        image_token: the tokenizer's token that stands for one image.
        jinja: the folder's own template, for ``chat``.
        lang: ``jp`` or ``en``, the language of the system prompt of a conversation that has none.
        mask_thinking: an answer's ``<think>...</think>`` is not trained; one that isn't closed reaches to
            the answer's end.

    Raises:
        ValueError: the template or the tokenizer can't be used; the message says why.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        image_token: str,
        jinja: str | None = None,
        lang: str = "jp",
        mask_thinking: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer gives no character offsets; it needs a tokenizer.json")
        if name not in TEMPLATES:
            raise ValueError(f"--template {name}: unknown; choose from {', '.join(TEMPLATES)}")
        if name == "chat" and jinja is None:
            raise ValueError(
                "--template chat: the tokenizer folder has no chat template; use --template v1 or plain"
            )
        special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        problem = unfit(name, special, tokenizer.bos_token, tokenizer.eos_token)
        if problem:
            raise ValueError(problem)
        self.name = name
        self._given = {"jinja": jinja, "lang": lang, "mask_thinking": mask_thinking}
        self._tokenizer = tokenizer
        self._jinja = jinja if name == "chat" else BUILTIN_TEMPLATES[name]
        self._image_token = image_token
        self._system = SYSTEM_PROMPTS[name][lang] if name in SYSTEM_PROMPTS else None
        self._mask_thinking = mask_thinking
        # For the folder of a model that it trains, in place of the folder's own; None: that stays.
        self.for_folder = folder_template(name, lang, image_token) if name != "chat" else jinja
        self._content_parts = name == "chat" and self._takes_content_parts()
        self._start, self.appended = self._added_around()
        self._frame = self._probe_frame()
        self._append_eos = name == "chat" and not self._frame.end_token and tokenizer.eos_token_id is not None
        self.end_token: str = tokenizer.eos_token if self._append_eos else self._frame.end_token
        self.end_token_id: int | None = None
        if self.end_token:
            self.end_token_id = tokenizer.convert_tokens_to_ids(self.end_token)

    def varied(self, name: str | None = None, **options: Any) -> ChatTemplate:
        """Return another template, or the same with other ``options``, for this tokenizer.

        Raises:
            ValueError: as the class.
        """
        name, options = name or self.name, {**self._given, **options}
        return ChatTemplate(self._tokenizer, name, self._image_token, **options)

    def check_end(self) -> str:
        """Check that a model can learn from this template where an answer ends; returns a line that says it.

        Raises:
            ValueError: nothing ends an answer, the token that should is not trained, or prompts end with it.
        """
        if self.name == "plain":
            return "answers end with a line break and no end token: LLaVA's plain template has none by design"
        where = f"--template {self.name}: "
        if self.end_token_id is None:
            raise ValueError(
                f"{where}nothing ends an answer: the chat template writes no token behind it, and the "
                "tokenizer has no eos_token; name one in tokenizer_config.json"
            )
        end = f"{self.end_token!r} ({self.end_token_id})"
        try:
            ids, trained = self.encode([Turn("user", "?"), Turn("assistant", "a")], 1)
            prompt = self.encode_prompt([Turn("user", "?")], 1)
        except SampleError as error:
            raise ValueError(f"{where}{error}; use --template v1 or plain") from None
        learnt = [token for token, has_loss in zip(ids, trained, strict=True) if has_loss]
        if learnt[-1:] != [self.end_token_id]:
            read = self._tokenizer.convert_ids_to_tokens(learnt)[-3:]
            raise ValueError(
                f"{where}an answer should end with {end}, but the tokenizer reads {' '.join(read)} there, so "
                "a model would never stop; make it an added token with single_word and normalized false"
            )
        if prompt[-1] == self.end_token_id:
            raise ValueError(
                f"{where}prompts end with {end}, the token that ends an answer; the chat template has to "
                "write what begins an answer where add_generation_prompt is set; use --template v1 or plain"
            )
        return f"answers end with {end}"

    def encode(self, turns: Sequence[Turn], num_images: int) -> Tuple[List[int], List[bool]]:
        """Return the token ids of a conversation, one image token per image, and which of them are trained.

        Args:
            turns: a system turn, if any, takes the place of the template's own. Images whose places are not
                marked come first.
            num_images: images that belong to the conversation.

        Raises:
            SampleError: markers and images differ in number, or the template refuses these turns or rewrites
                them so that its answers can't be told from the rest.
        """
        turns = self._with_system(turns)
        messages = self._messages(turns, num_images)
        text = self._render(messages)
        if turns[0].role == "system" and self.name != "plain" and turns[0].text.strip() not in text:
            raise SampleError("the chat template leaves its system turn out")
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.loss]
        ids, offsets = self._tokenize(text)
        trained = [False] * len(ids)
        for begin, said, end in self._answer_spans(text, messages, answers):
            inside = _tokens_between(offsets, begin, end)
            trained[inside] = [True] * (inside.stop - inside.start)
            for thought in _THOUGHT.finditer(text, begin, said) if self._mask_thinking else ():
                inside = _tokens_between(offsets, *thought.span())
                trained[inside] = [False] * (inside.stop - inside.start)
        if self._append_eos and answers and answers[-1] == len(turns) - 1:
            ids.append(self._tokenizer.eos_token_id)
            trained.append(True)
        self._check_images(ids, num_images)
        return ids, trained

    def encode_prompt(self, turns: Sequence[Turn], num_images: int) -> List[int]:
        """Return the token ids of a conversation up to where the assistant's next answer begins.

        Args:
            turns: user and assistant in turn, the last one the user's.
            num_images: images that belong to the conversation.

        Raises:
            SampleError: markers and images differ in number, or the template refuses the text.
        """
        text = self._render(self._messages(self._with_system(turns), num_images), add_generation_prompt=True)
        return self._encode(text, num_images)

    def encode_text(self, text: str, num_images: int) -> List[int]:
        """Return the token ids of text that needs no rendering, after the tokenizer's start token if it has
        one.

        Raises:
            SampleError: markers and images differ in number.
        """
        return self._encode(text.replace(IMAGE_MARKER, self._image_token), num_images)

    def _encode(self, text: str, num_images: int) -> List[int]:
        ids, _ = self._tokenize(text)
        self._check_images(ids, num_images)
        return ids

    def _tokenize(self, text: str) -> Tuple[List[int], np.ndarray]:
        """Return token ids, and where each token's characters begin and end, ``[tokens, 2]``."""
        encoding = self._tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,  # nothing about model_max_length: that is --seq-length's business
        )
        bos = self._tokenizer.bos_token
        # The rule of transformers' processors: a template that writes its own bos_token gets no second.
        start = [] if bos and text.startswith(bos) else self._start
        offsets = [(0, 0)] * len(start) + encoding["offset_mapping"]
        return [*start, *encoding["input_ids"]], np.array(offsets).reshape(-1, 2)

    def _added_around(self) -> Tuple[List[int], List[int]]:
        """Return the ids that the tokenizer puts before every text, and behind it."""
        text = self._image_token  # which every tokenizer here knows
        whole, own = (list(self._tokenizer(text, add_special_tokens=x)["input_ids"]) for x in (True, False))
        begin = next(i for i in range(len(whole)) if whole[i : i + len(own)] == own)
        return whole[:begin], whole[begin + len(own) :]

    def _check_images(self, ids: List[int], num_images: int) -> None:
        found = ids.count(self._tokenizer.convert_tokens_to_ids(self._image_token))
        if found != num_images:
            raise SampleError(f"its text has {found} image markers, but {num_images} images belong to it")

    def _answer_spans(
        self, text: str, messages: List[Dict[str, Any]], answers: Sequence[int]
    ) -> List[Tuple[int, int, int]]:
        """Return where in ``text`` each answer begins, where its words end, and where its end token does."""
        spans = self._spans_at_once(text, messages, answers)
        return spans or [self._answer_span(text, messages, answer) for answer in answers]

    def _spans_at_once(
        self, text: str, messages: List[Dict[str, Any]], answers: Sequence[int]
    ) -> List[Tuple[int, int, int]]:
        """Find the answers' spans from one rendering, with probes for answers; empty if more than those
        changed in it."""
        frame = self._frame
        probes = {answer: self._probe_message() for answer in answers}
        probed = self._render([probes.get(i, message) for i, message in enumerate(messages)])
        between = probed.split(_PROBE)
        if len(between) != len(answers) + 1 or not text.startswith(between[0]):
            return []
        spans, position = [], len(between[0])
        for answer, before, after in zip(answers, between[:-1], between[1:], strict=True):
            said = self._said(messages[answer])
            # Templates write what is said as it is, or take the spaces around it off.
            as_written = [s for s in (said, said.strip()) if text.startswith(s + after, position)]
            framed = before.endswith(frame.prompt + frame.prefix) and after.startswith(frame.trained_suffix)
            if not as_written or not framed:
                return []
            end = position + len(as_written[0])
            spans.append((position - len(frame.prefix), end, end + len(frame.trained_suffix)))
            position = end + len(after)
        return spans if position == len(text) else []

    def _answer_span(self, text: str, messages: List[Dict[str, Any]], answer: int) -> Tuple[int, int, int]:
        """Return one answer's span, also where a template renders turns differently once there are later
        ones."""
        prompt = self._render(messages[:answer], add_generation_prompt=True)
        # What follows it is the same with a probe in its place.
        probed = self._render([*messages[:answer], self._probe_message(), *messages[answer + 1 :]])
        _, found, rest = probed[len(prompt) :].partition(_PROBE)
        end = len(text) - len(rest)
        if not (
            text.startswith(prompt)
            and probed.startswith(prompt)
            and found
            and rest.startswith(self._frame.trained_suffix)
            and text.endswith(rest)
            and end >= len(prompt)
        ):
            raise SampleError("the chat template rewrites its turns, so that the answer can't be found")
        return len(prompt), end, end + len(self._frame.trained_suffix)

    def _probe_message(self) -> Dict[str, Any]:
        return {"role": "assistant", "content": self._text_content(_PROBE)}

    def _with_system(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        if self._system is None or turns[0].role == "system":
            return turns
        return [Turn("system", self._system), *turns]

    def _messages(self, turns: Sequence[Turn], num_images: int) -> List[Dict[str, Any]]:
        marked = any(IMAGE_MARKER in turn.text for turn in turns if turn.role == "user")
        unplaced = 0 if marked else num_images
        messages: List[Dict[str, Any]] = []
        for turn in turns:
            if turn.role == "user":
                content = self._user_content(turn.text, unplaced)
                unplaced = 0
            else:
                content = self._text_content(turn.text)
            messages.append({"role": turn.role, "content": content})
        return messages

    def _text_content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._content_parts else text

    def _said(self, message: Dict[str, Any]) -> str:
        content = message["content"]
        said: str = content[0]["text"] if self._content_parts else content
        return said

    def _user_content(self, text: str, unplaced: int) -> Any:
        if self.name == "plain":
            return self._image_token * (unplaced + text.count(IMAGE_MARKER))
        if not self._content_parts:
            return (self._image_token + "\n") * unplaced + text.replace(IMAGE_MARKER, self._image_token)
        parts: List[Dict[str, str]] = [{"type": "image"}] * unplaced
        chunks = text.split(IMAGE_MARKER)
        for i, chunk in enumerate(chunks):
            if len(chunks) > 1:
                chunk = chunk.strip("\n")  # LLaVA's data writes "<image>\n"; a template adds its own newline
            if i:
                parts = [*parts, {"type": "image"}]
            if chunk or len(chunks) == 1:
                parts = [*parts, {"type": "text", "text": chunk}]
        return parts

    def _render(self, messages: List[Dict[str, Any]], add_generation_prompt: bool = False) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._jinja,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is code, and raises what it likes on turns that aren't for it
            raise SampleError(f"the chat template refuses it ({error})") from None
        return text

    def _takes_content_parts(self) -> bool:
        """Return whether the template wants content as parts (a processor's) or as a string (a
        tokenizer's)."""
        parts = [{"type": "image"}, {"type": "text", "text": _PROBE}]
        string, said = f"{self._image_token}\n{_PROBE}", [{"type": "text", "text": "."}]
        for content in (parts, string):
            reason = self._refusal({"role": "user", "content": content})
            if not reason:
                return content is parts
        for system, content in ((said, parts), (".", string), (".", parts)):
            turns = ({"role": "system", "content": system}, {"role": "user", "content": content})
            if not self._refusal(*turns):
                reason = f"the chat template wants a system turn in every conversation: {reason}"
                break
        raise ValueError(f"--template chat: {reason}; use --template v1 or plain")

    def _refusal(self, *messages: Dict[str, Any]) -> str:
        """Return why the template can't write a question with an image; empty if it can."""
        try:
            text = self._render(list(messages), add_generation_prompt=True)
        except SampleError as error:
            return str(error)
        if text.count(self._image_token) == 1 and _PROBE in text:
            return ""
        return f"the folder's chat template loses the image token {self._image_token}"

    def _probe_frame(self) -> _Frame:
        """Return the text that the template writes around an answer."""
        messages = self._messages(self._with_system([Turn("user", "?"), Turn("assistant", _PROBE)]), 1)
        try:
            question = self._render(messages[:-1])
            prompted = self._render(messages[:-1], add_generation_prompt=True)
            text = self._render(messages)
        except SampleError as error:
            raise ValueError(f"--template {self.name}: {error}; use --template v1 or plain") from None
        prefix, found, suffix = text[len(prompted) :].partition(_PROBE)
        if not text.startswith(prompted) or not found:
            raise ValueError(
                f"--template {self.name}: the folder's chat template can't be split into turns (what it "
                "writes before an answer changes with the answer); use --template v1 or plain"
            )
        added = {str(token): token.special for token in self._tokenizer.added_tokens_decoder.values()}
        end_token = find_end_token(suffix, added, self._tokenizer.eos_token)
        trained = suffix[: suffix.index(end_token) + len(end_token)] if end_token else suffix
        prompt = prompted[len(question) :] if prompted.startswith(question) else prompted
        return _Frame(prompt, prefix, trained, end_token)


def _tokens_between(offsets: np.ndarray, begin: int, end: int) -> slice:
    """Return the tokens that hold any of the characters from ``begin`` to ``end``, and all between two of
    them.

    Args:
        offsets: ``[tokens, 2]``, where each token's characters begin and end.
    """
    inside = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end))
    return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)
