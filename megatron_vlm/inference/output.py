"""The output of answers: a single one to the terminal as it is made, many to a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from megatron_vlm.config.generation import PromptSection, incomplete
from megatron_vlm.inference.questions import Questions

_UNFINISHED = "\ufffd"  # what decodes from a part of a character


class Answers:
    """The writer of answers, as JSON Lines, or of a single one as plain text.

    A file appears when all answers are in it; until then ``<file>.incomplete`` holds them.
    """

    def __init__(self, prompts: PromptSection, questions: Questions) -> None:
        self.questions = questions
        self.path = prompts.output
        self.streams = prompts.input is None and self.path is None
        self.shown = 0  # characters on the terminal
        self.file = sys.stdout if self.path is None else open(incomplete(self.path), "w", encoding="utf-8")

    def show(self, answers: Sequence[Sequence[int]]) -> None:
        """Print the new part of a single answer."""
        if self.streams:
            text = self.questions.decode(answers[0])
            if not text.endswith(_UNFINISHED):
                self._print(text)

    def write(self, numbers: Sequence[int], answers: Sequence[Sequence[int]]) -> None:
        """Write a batch of answers beside their questions' fields."""
        if self.streams:
            self._print(self.questions.decode(answers[0]) + "\n")
            return
        for number, tokens in zip(numbers, answers, strict=True):
            ended = tokens[-1] in self.questions.end_tokens
            answer = {
                "answer": self.questions.decode(tokens),
                "tokens": len(tokens),
                "finish": "end" if ended else "length",
            }
            fields = self.questions.questions[number].fields
            self.file.write(json.dumps({**fields, **answer}, ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Let the output file appear."""
        if self.path is not None:
            self.file.close()
            os.replace(incomplete(self.path), self.path)

    def _print(self, text: str) -> None:
        print(text[self.shown :], end="", flush=True)
        self.shown = len(text)
